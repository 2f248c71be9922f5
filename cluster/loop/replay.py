"""Recorded updates in the place of prompts, rollout actors and teachers (`replay`).

Each update of the record is trained on as it was: the same trajectories, in the same order. After the last one the next epoch
begins with the first. The campaign process reads counts; the learner reads the arrays.
"""

import asyncio
from typing import Any

import numpy as np

from actors.data.trajectory_shards import counts_of
from actors.trajectory import TrajectoryId
from cluster.config import CampaignConfig
from cluster.loop.staleness import Slots
from cluster.loop.work import Sampled, Scored
from cluster.state.campaign_state import CampaignState
from cluster.state.recorded import Record


class Replay:
    """The next update of a campaign, from a record."""

    def __init__(self, config: CampaignConfig, state: CampaignState, record: Record, slots: Slots):
        self._state, self._record, self._slots = state, record, slots
        self._size, self.updates = config.trajectories_per_update, record.updates
        self._open_before = state.ledger.open_numbers()
        """Of an update that an earlier run has given up."""
        self.domains: list[str | None] | None = None
        """Of the last update's prompts; None: they have none."""
        self.prompt_lengths = np.zeros(0, np.int64)
        """Tokens of its prompts."""

    async def next_update(self) -> list[Scored]:
        """The trajectories that are trained on next, in the order of the record. Waits for free slots, as `issue` does.

        CampaignError: a shard cannot be read.
        """
        await self._slots.acquire(self._size)
        shards = self._record.shards[self._state.step % self.updates + 1]
        counts = await asyncio.to_thread(counts_of, shards)
        self.domains = counts["domain"] if any(counts["domain"]) else None
        self.prompt_lengths = np.array(counts["prompt_length"], np.int64)
        numbers, self._open_before = self._open_before[: self._size], self._open_before[self._size :]
        ledger = self._state.ledger
        numbers = [*numbers, *ledger.issue(self._size - len(numbers))]
        ledger.sampled(numbers)
        ledger.scored(numbers)
        self._state.missing_scores += sum(counts["missing"])
        self._state.tokens_generated += sum(counts["length"]) - sum(counts["context"])
        return [Scored(self._sampled(number, row, counts), (), 0) for row, number in enumerate(numbers)]

    def _sampled(self, number: int, row: int, counts: dict[str, list[Any]]) -> Sampled:
        # What another has written is as old as the day: it has no version of this student.
        version = counts["oldest_version"][row] if self._record.by_student else self._state.step
        return Sampled(
            number,
            TrajectoryId(*(counts[name][row] for name in ("epoch", "prompt", "sample"))),
            counts["shard"][row],
            turn=0,
            length=counts["length"][row],
            oldest_version=min(version, self._state.step),
            truncated=counts["finish_reason"][row] == "length",
            parts=counts["parts"][row],
            context=counts["context"][row],
        )
