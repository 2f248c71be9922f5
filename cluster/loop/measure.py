"""What is measured of the loop: its clock, where the actors' seconds go, and the line that each update leaves."""

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from cluster.fleet.ray_fleet import Fleet
from cluster.loop.queues import staleness_histogram
from cluster.loop.weight_sync import Published
from cluster.loop.work import Scored
from cluster.records.utilisation import TRACE_FILE, Utilisation, add_up
from cluster.state.campaign_state import CampaignState


class LoopClock:
    """Counts the loop's wall-clock seconds, and what each actor did in them, into the campaign's state."""

    def __init__(self, state: CampaignState):
        self.utilisation = Utilisation({})
        self._state, self._seconds_before = state, state.actor_seconds
        self._counted: float | None = None

    def start(self, fleets: Iterable[Fleet]) -> None:
        """The first work is about to be issued."""
        self.utilisation = Utilisation({r.name: fleet.role for fleet in fleets for r in fleet.replicas})
        for fleet in fleets:
            fleet.utilisation = self.utilisation
        self._counted = time.perf_counter()

    @property
    def started(self) -> bool:
        """Whether it counts."""
        return self._counted is not None

    def count(self) -> None:
        """Brings the state up to now; nothing before the start."""
        if self._counted is not None:
            now = time.perf_counter()
            self._state.loop_seconds += now - self._counted
            self._counted = now
            self._state.actor_seconds = add_up(self._seconds_before, self.utilisation.seconds())

    def write_trace(self, run_dir: Path) -> None:
        """Of this run of the campaign, from its start."""
        if self.started:
            self.utilisation.write_trace(run_dir / TRACE_FILE)


def record_of_update(
    state: CampaignState,
    update: Sequence[Scored],
    metrics: Mapping[str, float],
    published: Published,
    *,
    wall_seconds: float,
    max_staleness: int,
    queues: Mapping[str, int],
) -> dict[str, Any]:
    """The line of metrics.jsonl for the update that was just taken, on these trajectories.

    queues: trajectories that wait for each stage.
    """
    sampled = [one.sampled for one in update]
    staleness = state.step - 1 - np.array([one.oldest_version for one in sampled])
    busy, ledger = state.busy_since_last_step(), state.ledger
    return {
        "step": state.step,
        "policy_version": published.version,
        "wall_seconds": wall_seconds,
        "trajectories": ledger.trained,
        "tokens_generated": state.tokens_generated,
        **metrics,
        "staleness_mean": float(staleness.mean()),
        "staleness_max": int(staleness.max()),
        "staleness_histogram": staleness_histogram(staleness.tolist(), max_staleness),
        "dropped": ledger.dropped.total(),
        "dropped_share": ledger.dropped.total() / max(ledger.next_number, 1),
        "missing_scores": state.missing_scores,
        "truncated_fraction": float(np.mean([one.truncated for one in sampled])),
        "response_length_mean": float(np.mean([one.length for one in sampled])),
        **{f"queue_{name}": depth for name, depth in queues.items()},
        **{f"busy_{role}": seconds for role, seconds in busy.items()},
        "publish_seconds": published.seconds,
        "publish_bytes": published.nbytes,
    }
