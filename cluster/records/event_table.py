"""The kinds of events that a campaign records in events.jsonl, one row each. Standard library only.

`RunRecords.event` refuses a kind without a row, so the terminal, `status` and the report can describe every event.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Tone = Literal["", "good", "warn", "bad"]


@dataclass(frozen=True)
class Event:
    """How one kind of event is described and counted."""

    sentence: str
    """One line for a reader; names in braces are fields of the event. Empty: the fields are listed instead."""
    tone: Tone = ""
    """Colour in the terminal and in the report."""
    label: str = ""
    """One or two words, for places without room for the sentence: the campaign's state, the mark of a chart."""
    fault: bool = False
    """An actor was lost. Counted in summary.json."""
    begins: bool = False
    """A process of the campaign started."""
    ends: bool = False
    """A process of the campaign ended, in a way that it could record. A killed process leaves no such event."""
    news: bool = True
    """`understudy status` lists it under "news"."""
    withdraws: tuple[str, ...] = ()
    """Kinds whose news of the same actor are over with this event."""
    marked: bool = False
    """The report's charts have a mark where it happened, if it has a step."""
    guard_action: str = ""
    """The guard action (`guards.<name>.action`) that this event records."""


EVENTS: dict[str, Event] = {
    # The campaign's process.
    "started": Event("the campaign has started", begins=True, news=False),
    "resumed": Event("the campaign continues after update {step}", "warn", begins=True),
    "loop_started": Event("the loop has started after update {step}", news=False),
    "first_update": Event("update {step} ended {seconds:.1f} s after the command", news=False),
    "interrupted": Event("interrupted after update {step}", "warn"),
    "stopped": Event("stopped after update {step}; the same command continues it", "warn", "interrupted", ends=True),
    "failed": Event("failed after update {step}: {cause}", "bad", "failed", ends=True),
    "finished": Event("finished after update {step}", "good", "finished", ends=True, news=False),
    "contents_changed": Event(
        "{key}: {path} has other contents than the campaign began with, as was allowed", "warn", "changed", marked=True
    ),
    "configuration_changed": Event("continued with another configuration: {changed}", "warn"),
    "commit_unknown": Event(
        "{key}: {path} is taken at commit {commit}; an earlier release began the campaign and did not record its commit",
        "warn",
    ),
    "prompts_dropped": Event("{key}: {cause}", "warn"),
    "held_out_overlap": Event("{cause}", "warn"),
    "prompts_cached": Event("{key}: {cause}", news=False),
    "prompts_uncached": Event("{key}: {cause}", "warn"),
    "replays": Event("replays {path}: {updates} updates, {epochs} times{cause}", news=False),
    "pinned": Event("{commits}", news=False),
    "setting_changed": Event("from update {step} on {key} is {after}; it was {before}", "warn", "changed", marked=True),
    "schedule_planned": Event(
        "the learning rate is planned anew after update {step}: from {rate:.3g} to {final_rate:.3g} at update {until}",
        "warn",
        "planned",
        marked=True,
    ),
    "software_changed": Event("continued with other software: {changed}", "warn"),
    "key_carried_over": Event("a key of an earlier release: {cause}", "warn"),
    # What an operator asked for.
    "paused": Event("paused", "warn"),
    "continued": Event("resumed"),
    "scaled": Event("{role}: {before} -> {after} actors", "warn"),
    "scaling_failed": Event("{actor} cannot join: {cause}", "bad"),
    # Actors.
    "actor_starting": Event("{actor} is starting"),
    "actor_started": Event(
        "{actor} has started ({cause})",
        "good",
        news=False,
        withdraws=("waiting_for_resources", "actor_starting", "actor_silent", "left_behind"),
    ),
    "actor_died": Event("{actor} died; its work is done again ({cause})", "bad", "died", fault=True),
    "actor_hung": Event("{actor} hangs and was killed; its work is done again ({cause})", "bad", "hangs", fault=True),
    "actor_failed": Event(
        "{actor} failed and was killed; its work is done again ({cause})", "bad", "failed", fault=True
    ),
    "actor_restarted": Event("{actor} is back (restart {restarts})", "good"),
    "actor_ended": Event("{actor} has ended"),
    "actor_silent": Event("{actor} is silent: {cause}; others, where there are any, get its work", "warn"),
    "actor_heard": Event("{actor} is heard again, after {seconds} s", withdraws=("actor_silent",)),
    "left_behind": Event("{actor} is left behind; it gets no work until it has caught up ({cause})", "warn"),
    "caught_up": Event("{actor} has caught up", withdraws=("left_behind",)),
    "start_failed": Event("{actor} died while it started; it is started again ({cause})", "warn"),
    "learner_restored": Event("the learner is back, as it was after update {step} ({checkpoint})", "good"),
    "lost_objects": Event(
        "{trajectories} trajectories were lost with the node that held them; they are sampled again ({cause})", "warn"
    ),
    "trajectory_refused": Event("trajectory {trajectory} is dropped: {cause}", "warn"),
    "episodes_failed": Event("failed episodes of an evaluation, which count as wrong: {count} ({cause})", "warn"),
    # Rewards.
    "unjudged": Event("{count} responses have no verdict and count as wrong ({cause})", "warn"),
    "version_shared": Event(
        "{role}: workers of tensor_parallel_size {ranks} are processes of their own; all engines of a node map one copy of each "
        "weight version, {gigabytes:.3g} GB",
        news=False,
    ),
    # Resources.
    "preempted": Event(
        "engines took the cache of a running response for another {count} times in update {step}: {cause}", "warn"
    ),
    "short_of_resources": Event("starting with one actor of each role; more join when there is room ({cause})", "warn"),
    "waiting_for_resources": Event("{actor} waits: {cause}", "warn"),
    "object_store_full": Event("{actor} waits: {cause}", "warn"),
    "outside_away": Event("{actor} waits: {cause}", "warn"),
    "outside_back": Event("{actor} goes on, after {seconds} s", "good", withdraws=("outside_away",)),
    "side_task_failed": Event("{task}: {cause}; it is tried again", "warn"),
    "disk_full": Event("the run directory cannot be written to; it is waited for ({cause})", "bad"),
    "disk_back": Event(
        "the run directory can be written to again, after {seconds} s", "good", withdraws=("disk_full",)
    ),
    # Checkpoints.
    "checkpoint": Event("checkpoint of update {step} written: {path}", news=False),
    "slow_checkpoint": Event(
        "the checkpoint of update {step} took {seconds:g} s; an interrupt gives it {grace_seconds:g} (checkpoint.grace_seconds)",
        "warn",
    ),
    "saved_at_the_end": Event("the campaign ends with an error; update {step} is saved first ({cause})", "warn"),
    "not_saved_at_the_end": Event("update {step} could not be saved before the end: {cause}", "bad"),
    "damaged_checkpoint": Event("{path} is damaged, so the campaign continues after update {to_step}: {cause}", "bad"),
    "damaged_summary": Event("{path} is damaged; it is written again at the end of the campaign: {cause}", "warn"),
    "checkpoint_set_aside": Event("{path} is set aside: the campaign continues after update {to_step}", "warn"),
    "unchecked_checkpoint": Event(
        "{path} has no checksums (an earlier release wrote it); it is taken as it is", "warn"
    ),
    "damaged_copy": Event(
        "the copy of update {step} in checkpoint.mirror is damaged; an older one is used: {cause}", "bad"
    ),
    "tried": Event("tried before the first update, in {seconds:.1f} s: {what}", news=False),
    "mirrored": Event("checkpoint of update {step} copied to checkpoint.mirror"),
    "mirror_failed": Event("checkpoint of update {step} could not be copied to checkpoint.mirror: {cause}", "warn"),
    "brought_back": Event("checkpoint of update {step} fetched from checkpoint.mirror", "good"),
    # Guards, from the mildest action to the strongest.
    "guard_warned": Event("guard {guard}, update {step}: {cause}", "warn", "warned", guard_action="warn"),
    "guard_lowered_rate": Event(
        "guard {guard}, update {step}: {cause}; the learning rate is now {rate_scale:.3g} times the schedule's",
        "warn",
        "rate lowered",
        guard_action="lower_rate",
    ),
    "guard_rolled_back": Event(
        "guard {guard}, update {step}: {cause}; rolled back to update {to_step}, {dropped} trajectories dropped",
        "bad",
        "rolled back",
        guard_action="roll_back",
    ),
    "guard_stopped": Event(
        "guard {guard}, update {step}: {cause}; the campaign stops", "bad", "stopped", guard_action="stop"
    ),
    # Trackers.
    "tracker_failed": Event("{tracker} takes no metrics ({cause}); what it misses is sent when it answers", "warn"),
    "tracker_returned": Event(
        "{tracker} takes metrics again: {late} updates were sent late, {dropped} are left out", "good"
    ),
    "alerts_failed": Event("alerts.{tracker} takes no alerts ({cause}); they are tried again", "warn"),
    "alerts_returned": Event("alerts.{tracker} takes alerts again: {late} were late, {dropped} are left out", "good"),
    "alerts_behind": Event("alerts.{tracker} did not take the last {missing} alerts; events.jsonl has them", "warn"),
    "alert_refused": Event("alerts.{channel} refused an alert for good: {cause}", "warn"),
    "tracker_behind": Event("{tracker} did not get the last {missing} updates; metrics.jsonl has them", "warn"),
}

FAULTS = tuple(kind for kind, event in EVENTS.items() if event.fault)
BEGINNINGS = tuple(kind for kind, event in EVENTS.items() if event.begins)
ENDS = tuple(kind for kind, event in EVENTS.items() if event.ends)
GUARD_EVENTS = {event.guard_action: kind for kind, event in EVENTS.items() if event.guard_action}
"""Guard action -> kind, from the mildest action to the strongest."""

HIDDEN_FIELDS = ("time", "wall_seconds", "kind", "cause", "traceback")


def row_of(kind: str) -> Event:
    """The row of a kind; an empty one for a kind that another release recorded."""
    return EVENTS.get(kind, Event(""))


def describe(kind: str, fields: Mapping[str, Any]) -> str:
    """One line for an event. `fields` may be its line of events.jsonl; another release may have recorded other fields."""
    if sentence := row_of(kind).sentence:
        try:
            return sentence.format(**{"cause": "", **fields}).replace(" ()", "")
        except (KeyError, ValueError, TypeError):
            pass  # a field is missing or of another type: list what there is
    listed = [f"{name}={value}" for name, value in fields.items() if name not in HIDDEN_FIELDS]
    return " ".join([kind.replace("_", " "), *listed, str(fields.get("cause", ""))]).strip()
