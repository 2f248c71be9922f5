"""The summary of a campaign: summary.json, from the state at its end."""

from collections.abc import Mapping
from typing import Any

from cluster.config import CampaignConfig
from cluster.fleet.ray_actor import Resources
from cluster.records.metric_table import sets_of
from cluster.records.rewards import is_graded
from cluster.records.utilisation import by_role, cost_of, mean_actors, role_of
from cluster.state.campaign_state import CampaignState


def summarise(
    config: CampaignConfig, state: CampaignState, wall_seconds: float, needed: dict[str, tuple[int, Resources]]
) -> dict[str, Any]:
    """The content of summary.json, at the end of a run.

    needed: role -> (actors at the end, resources of one). wall_over_slowest_stage divides the loop's seconds by the
    working seconds of the slowest stage's mean actor, or by those of environments, if it is they: for so long an episode waits
    for its own, while max_staleness more updates' worth wait for theirs. 1.0 is the bound of the pipeline: that stage never
    waits.
    """
    end = last_of(state, "")
    at_the_end: dict[str, int] = {}
    for role, (count, _) in needed.items():
        if role_of(role) not in state.busy:  # an environment, whose work is not counted: it only answers
            continue
        at_the_end[role_of(role)] = at_the_end.get(role_of(role), 0) + count
    mean = at_the_end | mean_actors(state.actor_seconds, state.loop_seconds)
    stages = [state.busy[role] / mean[role] for role in mean if mean[role]]
    slowest = max([state.environment_seconds / (config.pipeline.max_staleness + 1), *stages])
    return {
        "accuracy_start": state.start.get("eval/accuracy"),
        "accuracy_end": end.get("eval/accuracy"),
        "accuracy_teacher": state.start.get("eval/accuracy_teacher"),
        "accuracy_sampled_start": state.start.get("eval/accuracy_sampled"),
        "accuracy_sampled_end": end.get("eval/accuracy_sampled"),
        **{
            f"right_{when}": metrics.get(f"eval/{key}")
            for when, metrics, key in (
                ("start", state.start, "right"),
                ("end", end, "right"),
                ("teacher", state.start, "right_teacher"),
            )
        },
        "graded": any(map(is_graded, (state.start, *state.evaluations.values()))),
        "reverse_kl_start": state.start.get("eval/reverse_kl"),
        "reverse_kl_end": end.get("eval/reverse_kl"),
        "intervals": _intervals(state.start, end),
        "sets": of_sets(state),
        "updates": state.step,
        "trajectories": state.ledger.trained,
        "tokens_generated": state.tokens_generated,
        "wall_seconds": wall_seconds,
        "busy": state.busy,
        "actors": {"mean": mean, "end": at_the_end},
        "loop_seconds": state.loop_seconds,
        "wall_over_slowest_stage": state.loop_seconds / slowest if slowest else None,
        "utilisation": {"roles": by_role(state.actor_seconds), "actors": state.actor_seconds},
        "cost": cost_of(state.actor_seconds, {role: one for role, (_, one) in needed.items()}, state.tokens_generated),
        "faults": state.faults,
        "ledger": state.ledger.counts(),
        "dropped_because": dict(state.ledger.dropped),
        "software": state.software,
        "history": state.history,
    }


def last_of(state: CampaignState, name: str) -> dict[str, Any]:
    """The metrics of the last evaluation of a set after an update, with their keys; "": of `evaluation.prompts`."""
    for step in sorted(filter(None, state.evaluations), reverse=True):
        if own := _of_set(state.evaluations[step], name):
            return own
    return {}


def of_sets(state: CampaignState) -> dict[str, dict[str, dict[str, Any]]]:
    """Evaluation set -> "start" and "end" -> its metrics, without the prefix `eval/<set>/`."""
    names = {name for metrics in (state.start, *state.evaluations.values()) for name in sets_of(metrics)}
    return {
        name: {
            when: {key.split("/")[2]: value for key, value in metrics.items()}
            for when, metrics in (("start", _of_set(state.start, name)), ("end", last_of(state, name)))
        }
        for name in sorted(names)
    }


def _of_set(metrics: Mapping[str, Any], name: str) -> dict[str, Any]:
    depth, prefix = (2, f"eval/{name}/") if name else (1, "eval/")
    return {key: value for key, value in metrics.items() if key.startswith(prefix) and key.count("/") == depth}


def _intervals(start: Mapping[str, Any], end: Mapping[str, Any]) -> dict[str, list[float | None]]:
    """Key of the summary -> [low, high]; `accuracy_change` and so on hold [difference, low, high] of end and start, paired."""
    found: dict[str, list[float | None]] = {}
    for name in ("accuracy", "accuracy_sampled", "right", "reverse_kl"):
        key = f"eval/{name}"
        for when, metrics in (("start", start), ("end", end)):
            if f"{key}:low" in metrics:
                found[f"{name}_{when}"] = [metrics[f"{key}:low"], metrics[f"{key}:high"]]
        if f"{key}:from_start" in end:
            found[f"{name}_change"] = [end[f"{key}:from_start{bound}"] for bound in ("", ":low", ":high")]
    for key in ("accuracy_teacher", "right_teacher"):
        if f"eval/{key}:low" in start:
            found[key] = [start[f"eval/{key}:low"], start[f"eval/{key}:high"]]
    return found
