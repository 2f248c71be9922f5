"""The summary of a campaign: summary.json, from the state at its end."""

from typing import Any

from cluster.config import CampaignConfig
from cluster.fleet.ray_actor import Resources
from cluster.records.utilisation import by_role, cost_of, mean_actors, role_of
from cluster.state.campaign_state import CampaignState


def summarise(
    config: CampaignConfig, state: CampaignState, wall_seconds: float, needed: dict[str, tuple[int, Resources]]
) -> dict[str, Any]:
    """The content of summary.json, at the end of a run.

    needed: role -> (actors at the end, resources of one). wall_over_slowest_stage divides the loop's seconds by the
    working seconds of the slowest stage's mean actor. 1.0 is the bound of the pipeline: that stage never waits.
    """
    end = state.evaluations[max(state.evaluations)] if state.evaluations else {}
    at_the_end: dict[str, int] = {}
    for role, (count, _) in needed.items():
        at_the_end[role_of(role)] = at_the_end.get(role_of(role), 0) + count
    mean = at_the_end | mean_actors(state.actor_seconds, state.loop_seconds)
    slowest = max((state.busy[role] / mean[role] for role in mean if mean[role]), default=0.0)
    return {
        "accuracy_start": state.start.get("eval/accuracy"),
        "accuracy_end": end.get("eval/accuracy"),
        "accuracy_teacher": state.start.get("eval/accuracy_teacher"),
        "accuracy_sampled_start": state.start.get("eval/accuracy_sampled"),
        "accuracy_sampled_end": end.get("eval/accuracy_sampled"),
        "reverse_kl_start": state.start.get("eval/reverse_kl"),
        "reverse_kl_end": end.get("eval/reverse_kl"),
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
