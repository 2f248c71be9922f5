"""What waits between the stages of the loop, and which of it each stage takes next.

    issue --> to sample --> [rollout actors] --> to score --> [teacher actors] --> scored --> [learner]

The stages (campaign.py) act; here is the order in which they do it, and what becomes of work that is lost, comes too
late, or takes too long. Of each work the ledger is told when it gets from one state to the next.
"""

import asyncio
import itertools
from collections import Counter, deque
from collections.abc import Sequence

import numpy as np

from actors.data.prompts import PromptSet, position_to_id
from actors.trajectory import RolloutCounts, TrajectoryId
from cluster.config import CampaignConfig
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.slots import Sampling, Scored, Slots, split_evenly, too_stale
from cluster.loop.teachers import Scored as Scores
from cluster.loop.teachers import Teachers
from cluster.loop.work import Work, merge, singles
from cluster.state.campaign_state import CampaignState

TEACHER_CALLS = 2
"""One that a teacher actor works on and one that it finds when it is done: what comes in meanwhile goes together."""


class Backlog:
    """All works of a campaign that are not trained yet."""

    def __init__(
        self, config: CampaignConfig, state: CampaignState, prompts: PromptSet, rollout: Fleet, teachers: Teachers
    ):
        self._config, self._state, self._prompts = config, state, prompts
        self._rollout, self._teachers = rollout, teachers
        self._synchronous = config.pipeline.max_staleness == 0
        self._update_size = config.trajectories_per_update
        remaining = (config.pipeline.updates - state.step) * self._update_size
        self.slots = Slots(self._update_size, config.pipeline.max_staleness, remaining)
        self.sampling = Sampling()
        self.seats = 0
        """How many responses a rollout actor writes at a time."""
        self._open_before = state.ledger.open_numbers()
        """What an earlier run of the campaign had issued and not trained."""
        self._to_sample: asyncio.Queue[Work] = asyncio.Queue()
        self._group: deque[Work] = deque()
        self._to_score: asyncio.PriorityQueue[tuple[int, int, Work]] = asyncio.PriorityQueue()
        self._to_train: asyncio.Queue[Work] = asyncio.Queue()
        self._scored = Scored(config.pipeline.max_staleness)
        self._awaited: Counter[int] = Counter()
        """Trajectories that were sampled and are not with the learner yet, by the version of their oldest token."""
        self._turns = itertools.count()
        """Of sampling and scoring: which of an id's trajectories and scores are the last."""
        self._tokens_at_once = min(teacher.microbatch_tokens for teacher in config.teachers.values())

    # ------------------------------------------------------------------------------------------------- what comes in

    def issue(self, count: int) -> None:
        """So many more trajectories are to be sampled, those first that an earlier run left open."""
        numbers, self._open_before = self._open_before[:count], self._open_before[count:]
        self._to_be_sampled([*numbers, *self._state.ledger.issue(count - len(numbers))])

    def sampled(self, work: Work, counts: RolloutCounts) -> None:
        """A rollout actor has answered."""
        work.sampled_in = next(self._turns)
        work.lengths, work.oldest_versions, work.truncated = counts.lengths, counts.oldest_versions, counts.truncated
        self.sampling.count(work)
        self._state.ledger.sampled(work.numbers)
        self._awaited.update(work.oldest_versions.tolist())
        self._to_score.put_nowait((int(work.oldest_versions.min()), work.numbers[0], work))

    def scored(self, work: Work, scores: Scores) -> None:
        """Teachers have answered."""
        self._state.ledger.scored(work.numbers)
        turn = next(self._turns)
        references = dict(zip((TrajectoryId(*row) for row in work.ids.tolist()), scores.references, strict=True))
        for part in work.parts:
            part.receive(references, turn)
            self._to_train.put_nowait(part)

    def lost_before_scored(self, work: Work) -> None:
        """What was written went with the node that held it."""
        self._awaited.subtract(version for part in work.parts for version in part.oldest_versions.tolist())
        self.lost(work)

    def lost(self, work: Work) -> None:
        """What was written or scored is gone: the same numbers and seeds are sampled again."""
        self._state.ledger.reopen(work.numbers)
        self._to_be_sampled(sorted(work.numbers))

    def _to_be_sampled(self, numbers: Sequence[int]) -> None:
        """Makes works of issued trajectories, given in the order of the ledger: groups, or each rollout actor's part."""
        samples = self._config.pipeline.samples_per_prompt
        groups = [list(group) for _, group in itertools.groupby(numbers, lambda number: number // samples)]
        for part in split_evenly(len(groups), len(self._rollout.replicas) if self._synchronous else len(groups)):
            mine = [number for group in groups[part.start : part.stop] for number in group]
            self._to_sample.put_nowait(Work(mine, np.array([self._id(number) for number in mine], np.int64)))

    def _id(self, number: int) -> tuple[int, int, int]:
        cursor, sample = divmod(number, self._config.pipeline.samples_per_prompt)
        epoch, prompt = position_to_id(cursor, self._config.seed, len(self._prompts), self._config.prompts.shuffle)
        return epoch, prompt, sample

    # ---------------------------------------------------------------------------------------- what each stage is given

    async def next_to_sample(self) -> Work:
        """A trajectory of the oldest group, all of which go to one actor; of a synchronous update, a part."""
        if not self._group:
            work = await self._to_sample.get()
            if self._synchronous:
                return work
            await asyncio.sleep(0)  # the calls for the last group begin, and are counted
            few_more = self.seats // 8 + 1  # so that a seat that falls free is taken at once
            self._group.extend(singles(work, await self._rollout.room(self.seats + few_more)))
        return self._group.popleft()

    async def next_to_score(self) -> Work:
        """What a teacher actor is given next: the oldest, up to its share and the tokens of one forward pass."""
        works = [(await self._to_score.get())[-1]]
        if self._synchronous:
            while sum(map(len, works)) < self._update_size:
                works.append((await self._to_score.get())[-1])
            return merge(works)
        await asyncio.sleep(0)  # the call before begins, and is counted
        await self._teachers.room(TEACHER_CALLS)
        share = -(-self._to_score.qsize() // min(len(fleet.replicas) for fleet in self._teachers.fleets.values()))
        tokens = self.tokens_of(works[0]).sum()
        while len(works) < share and tokens < self._tokens_at_once:
            works.append((await self._to_score.get())[-1])
            tokens += self.tokens_of(works[-1]).sum()
        return merge(works)

    async def next_update(self) -> Work:
        """Scored trajectories for one update, oldest first; those that are too stale are dropped and replaced.

        Waits for scores of those that this update would make too stale: they are written, and come soon.
        """
        await self._drop(self._scored.age(self._state.step), "stale")
        while len(self._scored) < self._update_size or self._lost_by_a_step():
            work = await self._to_train.get()
            self._awaited.subtract(work.oldest_versions.tolist())
            await self._drop(self._scored.add(work, self._state.step), "stale")
        return self._scored.take(self._update_size)

    async def cut(self) -> None:
        """Has rollout actors give up what is so slow that it could not be trained any more."""
        late = self.sampling.cut(self._state.step, self._config.pipeline.max_staleness)
        for work in late:
            await self._rollout.tell(work.replica, "abort", work.ids)
        await self._drop([number for work in late for number in work.numbers], "cut")

    def _lost_by_a_step(self) -> bool:
        bound = self._config.pipeline.max_staleness
        return any(
            count and too_stale(version, self._state.step + 1, bound) for version, count in self._awaited.items()
        )

    async def _drop(self, numbers: list[int], reason: str) -> None:
        if numbers:
            self._state.ledger.drop(numbers, reason)
            await self.slots.release(len(numbers), replace=True)

    # ------------------------------------------------------------------------------------------------ what is told of it

    def tokens_of(self, work: Work) -> np.ndarray:
        """[B] prompt and response."""
        return self._prompts.lengths_of(work.ids[:, 1]) + work.lengths

    def depths(self) -> dict[str, int]:
        """Trajectories that wait for each stage, and those that rollout actors have."""
        return {
            "sample": self._to_sample.qsize() * self._config.pipeline.samples_per_prompt + len(self._group),
            "sampling": len(self.sampling),
            "score": self._to_score.qsize(),
            "train": len(self._scored),
        }
