"""What waits between the stages of the loop, and what each stage takes next.

    issue --> to sample --> [rollout actors] --> to score --> [teacher actors] --> ready to train --> [learner]

The stages (campaign.py) make the calls. This module decides their order, and what becomes of trajectories that are
lost, arrive too late (staleness.py), or take too long. It reports every transition to the ledger.
"""

import asyncio
import bisect
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from actors.errors import CampaignError
from actors.prompts.order import PromptOrder
from actors.prompts.prompt_set import PromptSet
from actors.trajectory import RolloutCounts, TrajectoryId
from cluster.config import CampaignConfig
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.prompt_choice import REASONS, choice_of
from cluster.loop.staleness import InFlight, ReadyToTrain, Slots, too_stale
from cluster.loop.teachers import TeacherAnswer, Teachers
from cluster.loop.work import Issued, Sampled, Scored, split_evenly
from cluster.state.campaign_state import CampaignState

TEACHER_CALLS = 2
"""Calls that a teacher actor has at a time: one that it works on, and one that waits, so that it is never idle. What
comes in meanwhile goes together into the next call."""


class Queues:
    """All trajectories of a campaign that are issued and not trained yet."""

    def __init__(
        self,
        config: CampaignConfig,
        state: CampaignState,
        prompts: PromptSet,
        rollout: Fleet,
        teachers: Teachers,
    ):
        self._config, self._state, self._prompts = config, state, prompts
        weights = [source.weight for source in config.prompts.sources.values()]
        self._order = PromptOrder(config.seed, prompts.counts, weights, shuffle=config.prompts.shuffle)
        self.choice = choice_of(config.prompts, config.pipeline.updates, state.prompts)
        """Which prompts are passed over; None: none is."""
        self._rollout, self._teachers = rollout, teachers
        self._max_staleness = config.pipeline.max_staleness
        self._synchronous = self._max_staleness == 0
        self.in_parts = self._synchronous or config.text_by != "student"
        """Whether an update is issued at a time, one part for each actor: where it is needed whole, and where nothing that is
        written can become stale."""
        self._update_size = config.trajectories_per_update
        # Open trajectories of an earlier run are part of this number: they take slots when they are issued again.
        remaining = (config.pipeline.updates - state.step) * self._update_size
        self.slots = Slots(self._update_size, self._max_staleness, remaining)
        self.in_flight = InFlight()
        self.seats = 0
        """Responses that a rollout actor has under way, as the last answer of one said: it follows their lengths, and how
        long environments think."""
        self._open_before = state.ledger.open_numbers()
        """Numbers that an earlier run of the campaign issued and did not train; they are issued first."""
        self._to_sample: asyncio.Queue[Issued] = asyncio.Queue()
        self._group: deque[Issued] = deque()
        """The trajectories of the current group that are not with a rollout actor yet."""
        self._to_score: list[tuple[int, int, Sampled]] = []
        """Heap of (version of its oldest token, its number in the ledger, the trajectory)."""
        # No asyncio.PriorityQueue: a batch takes several entries at once, and its size depends on how many there are.
        self._any_sampled = asyncio.Event()
        """Set by each answer of a rollout actor."""
        self._to_score_together = self._update_size
        """Trajectories of a synchronous campaign that are scored in one batch: all that were put to be sampled last."""
        self._least_share = 1
        """Of what waited when all teacher actors were idle last, rounded up: what an idle one takes then."""
        self._refused_in_a_row = 0
        self._scored: asyncio.Queue[list[Scored]] = asyncio.Queue()
        self._ready = ReadyToTrain(self._max_staleness)
        self._awaited: Counter[int] = Counter()
        """Version -> trajectories whose oldest token has it, and that are sampled and not in `_ready` yet."""
        self._turns = itertools.count()
        """Numbers the answers of rollout and teacher actors: of several answers for an id, the last one is valid."""
        self._tokens_at_once = min(
            (teacher.microbatch_tokens for teacher in config.teachers.values()),
            default=config.learner.microbatch_tokens,
        )

    # ------------------------------------------------------------------------------------------------- what comes in

    def issue(self, count: int) -> None:
        """Issues `count` trajectories, unfinished ones of an earlier run first."""
        numbers, self._open_before = self._open_before[:count], self._open_before[count:]
        self._put_to_sample([*numbers, *self._new_numbers(count - len(numbers))])

    def sampled(self, issued: Issued, counts: RolloutCounts, trajectories: Any) -> None:
        """A rollout actor, or a teacher in its place, has answered; what a teacher refuses to write is dropped and replaced.

        trajectories: the reference that holds these ids, and perhaps others. CampaignError: see `scored`.
        """
        turn = next(self._turns)  # answers are numbered in the order of their arrival
        lengths = counts.lengths.tolist()
        kept = [row for row in range(len(issued)) if row not in counts.refused]
        self.in_flight.count([lengths[row] for row in kept])
        self.seats = counts.at_once or counts.seats or self.seats
        self._state.ledger.sampled([issued.numbers[row] for row in kept])
        rows = zip(
            issued.numbers,
            issued.ids.tolist(),
            lengths,
            counts.oldest_versions.tolist(),
            counts.truncated.tolist(),
            counts.parts or [{}] * len(issued),
            counts.context or [0] * len(issued),
            counts.episodes or [None] * len(issued),
            strict=True,
        )
        for row, (number, id_, length, version, *rest) in enumerate(rows):
            if row in counts.refused:
                continue
            one = Sampled(number, TrajectoryId(*id_), trajectories, turn, length, version, *rest)
            self._awaited[version] += 1
            heapq.heappush(self._to_score, (version, number, one))
        self._any_sampled.set()
        if counts.refused:
            names = {row: TrajectoryId(*issued.ids[row].tolist()) for row in counts.refused}
            causes = {(issued.numbers[row], names[row]): cause for row, cause in sorted(counts.refused.items())}
            self._refuse(causes, self._to_score_together - len(causes), played=bool(counts.episodes))

    def scored(self, batch: Sequence[Sampled], answer: TeacherAnswer) -> None:
        """Teachers have scored a batch, in its order; what one of them refuses is dropped and replaced.

        CampaignError: they have refused two updates' worth of trajectories in a row.
        """
        turn = next(self._turns)
        rows = [row for row in range(len(batch)) if row not in answer.refused]
        self._state.ledger.scored([batch[row].number for row in rows])
        # An empty list, too: an update may be waiting for the scores of what is now dropped.
        self._scored.put_nowait([Scored(batch[row], answer.references[row], turn) for row in rows])
        if rows:
            self._refused_in_a_row = 0
        if answer.refused:
            causes = {(batch[row].number, batch[row].id): why for row, why in sorted(answer.refused.items())}
            self._not_awaited([batch[row] for row in answer.refused])
            self._refuse(causes)

    def _refuse(self, causes: Mapping[tuple[int, TrajectoryId], str], beside: int = 0, played: bool = False) -> None:
        """Drops what teachers refuse, (number, id) -> why, and has others issued in its place; so with episodes that fail.
        CampaignError: see `scored`.

        beside: others that a synchronous update scores together with these. played: they are episodes.
        """
        for (number, id_), cause in causes.items():
            self._state.ledger.drop([number], "environment" if played else "refused", cause)
            self._refused_in_a_row += 1
            if self._refused_in_a_row >= 2 * self._update_size:
                found = f"teachers have refused {self._refused_in_a_row} trajectories in a row"
                if played:
                    found = f"environment: {self._refused_in_a_row} episodes in a row have failed"
                raise CampaignError(f"{found}; the last, {id_}: {cause}")
        if self._synchronous:
            self._replace(len(causes), beside)
        else:
            self.slots.release(len(causes), replace=True)

    def _replace(self, count: int, beside: int) -> None:
        """Issues trajectories in place of those that a synchronous update lacks; they keep the slots.

        Whole groups, so that later groups stay whole; what is too much of the last one is dropped.
        """
        samples = self._config.pipeline.samples_per_prompt
        numbers = self._new_numbers(-(-count // samples) * samples)
        if spare := numbers[count:]:
            self._state.ledger.drop(spare, "spare")
        self._put_to_sample(numbers[:count], beside)

    def _new_numbers(self, count: int) -> list[int]:
        """Issues `count` numbers, and drops those of prompts that are passed over on the way.

        It ends: a prompt is passed over in a few epochs in a row at most.
        """
        ledger, samples = self._state.ledger, self._config.pipeline.samples_per_prompt
        if self.choice is None:
            return list(ledger.issue(count))
        numbers: list[int] = []
        passed: dict[str, list[int]] = {reason: [] for reason in REASONS}
        while len(numbers) < count:
            cursor, sample = divmod(ledger.next_number, samples)
            # Where a group has begun, its prompt was chosen then.
            reason = None if sample else self.choice.passes(*self._order.id_at(cursor), self._state.step)
            if reason is not None:
                passed[reason] += ledger.issue(samples)
            else:
                numbers += ledger.issue(min(count - len(numbers), samples - sample))
        for reason, dropped in passed.items():
            if dropped:
                ledger.drop(dropped, reason)
        return numbers

    def lost_before_scored(self, batch: Sequence[Sampled]) -> None:
        """The node that held sampled trajectories is gone: the same numbers are sampled again, with the same seeds."""
        self._not_awaited(batch)
        self._sample_again(batch)

    def lost(self, update: Sequence[Scored]) -> None:
        """The node that held the trajectories of an update, or their scores, is gone: they are sampled again."""
        self._sample_again([one.sampled for one in update])

    def _sample_again(self, batch: Iterable[Sampled]) -> None:
        numbers = sorted(one.number for one in batch)
        self._state.ledger.reopen(numbers)
        self._put_to_sample(numbers)

    def _put_to_sample(self, numbers: Sequence[int], beside: int = 0) -> None:
        """Queues issued numbers (ascending): group by group, or, where that is possible, one part for each actor."""
        samples, self._to_score_together = self._config.pipeline.samples_per_prompt, beside + len(numbers)
        # Numbers of one group are consecutive, so a group that was partly trained keeps its remaining samples together.
        groups = [list(group) for _, group in itertools.groupby(numbers, lambda number: number // samples)]
        for part in split_evenly(len(groups), self._writers() if self.in_parts else len(groups)):
            mine = [number for group in groups[part.start : part.stop] for number in group]
            ids = np.array([self._id(number) for number in mine], np.int64)
            self._to_sample.put_nowait(Issued(mine, ids, update=self._update_of(mine)))

    def _update_of(self, numbers: Sequence[int]) -> int | None:
        """The update that these are for, as their place among the open ones says; None where no limit follows a schedule.

        A function of the ledger: a campaign that is resumed, and one that samples again what it lost, cuts where it did.
        """
        environment = self._config.environment
        if not (self._config.sampling.response_tokens_schedule or (environment and environment.turns_schedule)):
            return None
        before = bisect.bisect_left(self._state.ledger.open_numbers(), numbers[0])
        return self._state.step + 1 + before // self._update_size

    def _writers(self) -> int:
        """Actors that write the responses, among which an update is divided; data needs none."""
        if self._config.text_by == "data":
            return 1
        [fleet, *_] = [self._rollout] if self._config.text_by == "student" else [*self._teachers.fleets.values()]
        return len(fleet.replicas)

    def _id(self, number: int) -> tuple[int, int, int]:
        cursor, sample = divmod(number, self._config.pipeline.samples_per_prompt)
        return *self._order.id_at(cursor), sample

    # ----------------------------------------------------------------------------------------- what each stage takes

    async def next_to_sample(self) -> Issued:
        """One trajectory of the oldest group; all of a group go to one actor. Where `in_parts`, a whole part.

        Waits until a rollout actor has room for it.
        """
        if not self._group:
            issued = await self._to_sample.get()
            if self.in_parts:
                return issued
            await asyncio.sleep(0)  # lets the calls for the last group begin, so that `room` counts them
            few_more = (
                self.seats // 8 + 1
            )  # these wait in the actor, which fills a free seat without asking the campaign
            replica = await self._rollout.room(self.seats + few_more)
            # One call for each trajectory: it goes on to the teachers without waiting for the rest of its group.
            for row, number in enumerate(issued.numbers):
                self._group.append(Issued([number], issued.ids[row : row + 1], replica, issued.update))
        return self._group.popleft()

    async def next_to_score(self) -> list[Sampled]:
        """The batch for the next call to teachers, in the order of the ledger: what teachers compute from a batch then
        does not depend on which rollout actor was faster.

        A synchronous update is one batch, and what replaces some of it is another. Otherwise waits until a teacher actor has room,
        and takes the oldest: at most that actor's share of all that wait, and at most the tokens of one forward pass. Where all
        teacher actors are idle, they wait a moment, and each takes an equal share of what has come meanwhile.
        """
        while len(self._to_score) < (self._to_score_together if self._synchronous else 1):
            self._any_sampled.clear()  # no answer is missed: the event loop runs nothing between the test and the wait
            await self._any_sampled.wait()
        if self._synchronous:
            batch = [heapq.heappop(self._to_score)[-1] for _ in range(self._to_score_together)]
        else:
            await asyncio.sleep(0)  # lets the previous call begin, so that it is counted
            actors, idle = self._teachers.actors()
            if idle == actors:
                await asyncio.sleep(self.in_flight.pause.seconds)
                self._least_share = -(-len(self._to_score) // actors)
            await self._teachers.room(TEACHER_CALLS)
            # Rounded up. An actor that takes all that waits would leave the others idle.
            share = max(-(-len(self._to_score) // actors), self._least_share if idle else 1)
            batch = [heapq.heappop(self._to_score)[-1]]
            tokens = self._tokens_of(batch[0])
            while len(batch) < share and tokens < self._tokens_at_once and self._to_score:
                batch.append(heapq.heappop(self._to_score)[-1])
                tokens += self._tokens_of(batch[-1])
        return sorted(batch, key=lambda one: one.number)

    async def next_update(self) -> list[Scored]:
        """The trajectories of the next update: those with the oldest weights, in the order of the ledger.

        Drops and replaces trajectories that are too stale. Waits for the scores of sampled trajectories that this update
        would make too stale: scores come soon, and sampling is the expensive part.
        """
        self._drop(self._ready.age(self._state.step), "stale")
        while len(self._ready) < self._update_size or self._step_would_lose():
            scored = await self._scored.get()
            self._not_awaited(one.sampled for one in scored)
            self._drop(self._ready.add(scored, self._state.step), "stale")
        return self._ready.take(self._update_size)

    async def cut(self) -> None:
        """Makes rollout actors give up what would be too stale to train on, even if it ended now."""
        # Removed before the calls to `abort`: `InFlight.end` then also rejects an answer that is already on its way.
        late = self.in_flight.cut(self._state.step, self._max_staleness)
        told = [one for one in late if one.replica is not None]  # a teacher that writes is not told
        await asyncio.gather(*(self._rollout.tell(one.replica, "abort", one.ids) for one in told))
        self._drop([number for issued in late for number in issued.numbers], "cut")

    def _not_awaited(self, batch: Iterable[Sampled]) -> None:
        self._awaited.subtract(one.oldest_version for one in batch)
        for version in [version for version, count in self._awaited.items() if not count]:
            del self._awaited[version]  # a long campaign has many versions

    def _step_would_lose(self) -> bool:
        """Whether one more step of the learner makes a trajectory too stale that only lacks its scores."""
        after = self._state.step + 1
        return any(too_stale(version, after, self._max_staleness) for version in self._awaited)

    def _drop(self, numbers: list[int], reason: str) -> None:
        if numbers:
            self._state.ledger.drop(numbers, reason)
            self.slots.release(len(numbers), replace=True)

    # -------------------------------------------------------------------------------------------------------- measures

    def prompt_tokens(self, one: Sampled) -> int:
        """Tokens of its prompt, as it was read."""
        if one.episode is not None:
            return one.episode.prompt_tokens
        start, end = self._prompts.offsets[one.id.prompt : one.id.prompt + 2]
        return int(end - start)

    def _tokens_of(self, one: Sampled) -> int:
        return self.prompt_tokens(one) + one.length

    def depths(self) -> dict[str, int]:
        """Stage -> trajectories that wait for it; `sampling`: those that rollout actors have."""
        return {
            "sample": self._to_sample.qsize() * self._config.pipeline.samples_per_prompt + len(self._group),
            "sampling": len(self.in_flight),
            "score": len(self._to_score),
            "train": len(self._ready),
        }
