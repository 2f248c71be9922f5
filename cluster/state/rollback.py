"""Carries out the guards' findings: events, an end with an error, or a rollback to an earlier checkpoint.

After a rollback the campaign continues from the weights of an earlier update, with new prompts and a lower learning
rate. The ledger drops the trajectories that were trained since (reason `rolled_back`): each trajectory is either in the
weights once, or has a reason for its absence. The metrics of the undone updates are moved to undone.jsonl.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.errors import GuardError
from cluster.config import CampaignConfig
from cluster.guards import Finding
from cluster.records.event_table import GUARD_EVENTS
from cluster.records.metric_table import METRICS
from cluster.records.writer import LEDGER_FILE, RunRecords, read_jsonl
from cluster.state.campaign_state import STATE_FILE, CampaignState, read_state, write_state
from cluster.state.resume import fit_records
from cluster.state.soundness import examined
from learner.student.checkpoint import checkpoint_steps, prune, step_directory


class RollBack(Exception):
    """A guard asks for a rollback; `cluster/run.py` catches it and continues from `roll_back`."""

    def __init__(self, finding: Finding):
        super().__init__(finding.reason)
        self.finding = finding


def apply_findings(
    findings: Iterable[Finding], rate_scale: float, config: CampaignConfig, on_event: Callable[..., None]
) -> None:
    """Reports the guards' findings of one update. GuardError: a guard ends the campaign. RollBack: a guard undoes updates.

    on_event: called with the event's kind and fields. rate_scale: the factor on the learning rate after the findings.
    """
    # From the mildest to the strongest: all warnings and lowered rates are reported before a rollback or an end.
    worst = sorted(findings, key=lambda finding: list(GUARD_EVENTS).index(finding.action))
    for finding in worst:
        if finding.action in ("warn", "lower_rate"):
            scaled = {"rate_scale": rate_scale} if finding.action == "lower_rate" else {}
            on_event(GUARD_EVENTS[finding.action], **fields(finding), **scaled)
    if worst and worst[-1].action == "roll_back":
        raise RollBack(worst[-1])
    if worst and worst[-1].action == "stop":
        finding = worst[-1]
        on_event(GUARD_EVENTS["stop"], **fields(finding))
        checkpoint = last_good(config, finding)
        good = f"{checkpoint} is from before that" if checkpoint else "there is no checkpoint from before that"
        sign = METRICS[finding.metric].bad_sign if finding.metric in METRICS else ""
        meaning = f"; what it may mean: {sign}" if sign else ""
        raise GuardError(f"guards.{finding.guard}: update {finding.step}: {finding.reason}; {good}{meaning}")


def fields(finding: Finding) -> dict[str, Any]:
    """The fields of an event that reports a finding."""
    where = {"step": finding.step, "guard": finding.guard, "metric": finding.metric}
    return {**where, "value": finding.value, "bound": finding.bound, "cause": finding.reason}


def last_good(config: CampaignConfig, finding: Finding) -> Path | None:
    """The newest sound checkpoint that is older than the weights that put the metric out of bounds. None: there is none.

    Update s measures responses that were sampled with the weights of updates s-1-K to s-1 (K = max_staleness). Any of
    them may be bad, so the checkpoint must be of an update before s-1-K.
    """
    checkpoints = config.run_dir / "checkpoints"
    suspect = finding.since - 1 - config.pipeline.max_staleness
    rows = read_jsonl(config.run_dir / LEDGER_FILE)
    for step in reversed(checkpoint_steps(checkpoints)):
        checkpoint = step_directory(checkpoints, step)
        if step < suspect and not isinstance(examined(checkpoint, rows), str):
            return checkpoint
    return None


def roll_back(
    config: CampaignConfig, now: CampaignState, finding: Finding, records: RunRecords, on_event: Callable[..., None]
) -> tuple[CampaignState, Path | None]:
    """Undoes updates on disk; returns the state to continue from and its checkpoint (None: the untrained student).

    No checkpoint may be under way. The state in the checkpoint is replaced, and newer checkpoints are removed. A
    campaign that is killed after this resumes from the rolled-back state; killed before, it repeats the updates, and
    the guard acts again.
    """
    checkpoint = last_good(config, finding)
    then = read_state(checkpoint) if checkpoint else CampaignState()
    state = replace(
        now,
        step=then.step,
        ledger=now.ledger.rolled_back(then.ledger),
        guards=now.guards.rolled_back(then.guards),
        pending=[record for record in now.pending if record["step"] <= then.step],
        evaluations={step: found for step, found in now.evaluations.items() if step <= then.step},
    )
    # Metrics first, then the state in the checkpoint: until that is written, a campaign that is killed repeats all this.
    records.set_aside_after(then.step, now.pending)
    if checkpoint:
        write_state(state, checkpoint / STATE_FILE)
    checkpoints = config.run_dir / "checkpoints"
    # Newer checkpoints hold the rejected weights; the next resume would load the newest of them.
    if checkpoints.is_dir():
        prune(checkpoints, [step for step in checkpoint_steps(checkpoints) if step <= then.step])
    fit_records(config, records, state)
    dropped = now.ledger.trained - state.ledger.trained
    on_event(
        GUARD_EVENTS["roll_back"],
        **fields(finding),
        to_step=state.step,
        dropped=dropped,
        rate_scale=state.guards.rate_scale,
    )
    return state, checkpoint
