"""Simulates campaigns: the real loop and fleets and real Ray actors, which sleep instead of running a model.

A rollout actor has `seats`; each response occupies one for a time that depends on its id alone. A teacher sleeps for
each trajectory, one call after the other. The learner sleeps for each update, and rollout actors for each load of
weights. Actors are coroutines, so several can share a process (`processes`): 256 of them fit on a small machine.
"""

import asyncio
import heapq
import itertools
import json
import os
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from actors.config import StudentConfig, TeacherConfig, TrainingPromptsConfig
from actors.prompts.columns import Coded, Texts
from actors.prompts.prompt_set import PromptSet
from actors.rollout.batched_calls import BatchedCalls
from actors.teacher.base import TeacherCounts
from actors.teacher_scores import TeacherScores
from actors.trajectory import LoadSeconds, Requests, RolloutCounts, Trajectories, offsets_of
from actors.weights.buckets import WeightVersion
from cluster.config import CampaignConfig, CheckpointConfig, EvaluationConfig, PipelineConfig
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.campaign import Campaign
from cluster.loop.teachers import PromptRoutes, Teachers
from cluster.records.event_table import FAULTS
from cluster.records.metric_table import METRIC_KEYS
from cluster.records.writer import RunRecords
from cluster.state.campaign_state import CampaignState
from cluster.state.resume import claimed, take_up

PROMPTS, TOKENS = 1000, 8
"""Prompts, and tokens of each prompt and response."""


@dataclass(frozen=True)
class Times:
    """Seconds."""

    response: float = 0.6
    """The median response, in its seat."""
    spread: float = 0.0
    """Standard deviation of the logarithm of a response's time."""
    score: float = 0.075
    """One trajectory, by a teacher."""
    update: float = 1.2
    load: float = 0.002

    def of_response(self, row: np.ndarray) -> float:
        """The seconds of one id [3]: the same in every schedule."""
        draw = np.random.default_rng(np.abs(row).astype(np.uint64))
        return self.response * float(np.exp(self.spread * draw.standard_normal()))


class SleepingRollout(BatchedCalls):
    """Stands in for actors.rollout.actor.RolloutActor."""

    def __init__(self, times: Times, seats: int, sharing: int):
        """sharing: the number of actors that share this process, each with its own seats."""
        super().__init__()
        self._times, self._seats, self._free, self._version = times, seats, asyncio.Semaphore(seats * sharing), -1

    async def status(self) -> dict[str, int]:
        """What the fleet asks a new actor."""
        return {"seats": self._seats, "process": os.getpid()}

    async def abort(self, ids: np.ndarray | None = None) -> None:
        """Does nothing: a trajectory that is cut goes on, and its answer is ignored."""

    async def prefetch(self, bucket: np.ndarray) -> None:
        """Brings the bucket to this node, since it is an argument."""

    async def load_weights(self, *published: np.ndarray | WeightVersion) -> LoadSeconds:
        """Sleeps."""
        await asyncio.sleep(self._times.load)
        self._version = published[-1].version  # type: ignore[union-attr]
        return LoadSeconds(0.0, self._times.load)

    async def generate(self, requests: Requests) -> tuple[RolloutCounts, Trajectories]:
        """Sleeps for each response, in a seat; records the weight version of each half of its tokens."""
        versions = np.zeros((len(requests.ids), TOKENS), np.int32)
        seconds = 0.0

        async def one(row: int) -> None:
            nonlocal seconds
            async with self._free:
                duration = self._times.of_response(requests.ids[row])
                versions[row, : TOKENS // 2] = self._version
                await asyncio.sleep(duration)
                versions[row, TOKENS // 2 :] = self._version
                seconds += duration

        await asyncio.gather(*(one(row) for row in range(len(requests.ids))))
        count = len(requests.ids)
        lengths = np.full(count, TOKENS)
        written = Trajectories(
            ids=requests.ids,
            prompt_tokens=requests.prompt_tokens,
            prompt_offsets=requests.prompt_offsets,
            response_tokens=np.zeros(count * TOKENS, np.int32),
            response_offsets=offsets_of(lengths),
            behaviour_logprobs=np.zeros(count * TOKENS, np.float32),
            policy_versions=versions.reshape(-1),
            finish_reasons=np.zeros(count, np.uint8),
        )
        return RolloutCounts(lengths, versions.min(1), np.zeros(count, bool), seconds / self._seats), written


class SleepingTeacher:
    """Stands in for actors.teacher.local.LocalTeacher."""

    def __init__(self, times: Times):
        self._times, self._turn = times, asyncio.Lock()

    async def status(self) -> dict[str, int]:
        """What the fleet asks a new actor."""
        return {"process": os.getpid()}

    async def score(self, ids: np.ndarray, *written: Trajectories, **_: Any) -> tuple[TeacherCounts, TeacherScores]:
        """Sleeps for each trajectory; one call at a time."""
        seconds, tokens = self._times.score * len(ids), len(ids) * TOKENS
        async with self._turn:
            await asyncio.sleep(seconds)
        scores = TeacherScores(
            ids=ids,
            response_offsets=offsets_of([TOKENS] * len(ids)),
            logprobs=np.zeros(tokens, np.float32),
            teacher="default",
            log_weights=np.zeros(len(ids), np.float32),
            support_ids=np.zeros((tokens, 0), np.int32),
            support_logprobs=np.zeros((tokens, 0), np.float32),
        )
        return TeacherCounts(0, seconds), scores


class SleepingLearner:
    """Stands in for learner.learner.Learner, and checks what it gets: each token's staleness, each id only once."""

    def __init__(self, times: Times, max_staleness: int, version: int = 0):
        """version: the updates that were taken before."""
        self._times, self._bound, self._version = times, max_staleness, version
        self._seen: set[tuple[int, ...]] = set()
        self.violations = self.repeated = self.unscored = 0

    async def status(self) -> dict[str, int]:
        """The counts of what it found wrong."""
        return {"violations": self.violations, "repeated": self.repeated, "unscored": self.unscored}

    async def update(self, ids: np.ndarray, *batches: Any, **_: Any) -> dict[str, float]:
        """Sleeps."""
        versions: dict[tuple[int, ...], int] = {}
        scored: set[tuple[int, ...]] = set()
        for batch in batches:
            rows = list(map(tuple, batch.ids.tolist()))
            if isinstance(batch, Trajectories):
                oldest = np.minimum.reduceat(batch.policy_versions, batch.response_offsets[:-1])
                versions |= dict(zip(rows, oldest.tolist(), strict=True))
            else:
                scored |= set(rows)
        asked = list(map(tuple, ids.tolist()))
        self.violations += sum(self._version - versions[row] > self._bound for row in asked)
        self.repeated += sum(row in self._seen for row in asked) + len(asked) - len(set(asked))
        self.unscored += len(set(asked) - scored)
        self._seen |= set(asked)
        await asyncio.sleep(self._times.update)
        self._version += 1
        added_by_the_loop = {"step", "policy_version", "wall_seconds", "trajectories", "tokens_generated"}
        nothing = dict.fromkeys(set(METRIC_KEYS) - added_by_the_loop, 0.0)
        # A guard notices updates without tokens.
        return nothing | {"tokens_trained": len(ids) * TOKENS, "busy_seconds": self._times.update}

    async def publish(self, delta: bool = False) -> AsyncIterator[Any]:
        """Yields a weight version without tensors."""
        yield np.zeros(1, np.uint8)
        yield WeightVersion(self._version, (), (1,))

    async def save(self, directory: str) -> None:
        """Writes a checkpoint without tensors."""
        Path(directory, "training").mkdir()
        Path(directory, "training", "learner.json").write_text(json.dumps({"policy_version": self._version}), "utf-8")

    async def saved(self) -> bool:
        """The checkpoint is complete at once."""
        return True


class SharedFleet(Fleet):
    """A fleet whose replicas share fewer processes."""

    processes: int | None = None

    async def start(self) -> None:
        """Starts the first `processes` replicas; the others share their handles."""
        count = self.processes or len(self.replicas)
        await asyncio.gather(*(self._start(replica) for replica in self.replicas[:count]))
        for place, replica in enumerate(self.replicas[count:]):
            first = self.replicas[place % count]
            replica.handle, replica.alive, replica.node = first.handle, True, first.node


class Silent:
    """Shows no progress."""

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


@dataclass
class Simulation:
    """One simulated campaign, and its measurements after `run`."""

    times: Times = field(default_factory=Times)
    updates: int = 20
    size: int = 64
    samples_per_prompt: int = 4
    max_staleness: int = 2
    oversample: float = 0.0
    rollouts: int = 4
    teachers: int = 4
    seats: int = 8
    processes: int | None = None
    max_restarts: int = 1000
    folder: Path | None = None
    """Where the run directory stays, from whose newest checkpoint the campaign goes on; None: a temporary one."""
    checkpoint_every: int = 10**9
    """Updates."""
    on_metrics: Callable[[Mapping[str, Any]], None] | None = None
    """Called with each line of metrics.jsonl."""
    state: CampaignState = field(default_factory=CampaignState)
    wall: float = 0.0
    cpu: float = 0.0
    """Processor seconds of this process: user and system, all threads."""
    taken_up: float = 0.0
    """Seconds that reading the run directory has taken."""
    faults: int = 0
    found: dict[str, int] = field(default_factory=dict)

    async def run(self, meanwhile: Any = None) -> "Simulation":
        """Runs the campaign. meanwhile: a coroutine function that gets the fleets and runs beside it."""

        def on_event(kind: str, **_: Any) -> None:
            self.faults += kind in FAULTS

        def fleet(role: str, actor: type, *arguments: Any, replicas: int) -> SharedFleet:
            made = SharedFleet(
                role, actor, arguments, {}, replicas=replicas, resources=Resources(0.01, 0),
                max_restarts=self.max_restarts, start_timeout_seconds=120.0, on_event=on_event,
            )  # fmt: skip
            made.processes = min(self.processes or replicas, replicas)
            return made

        sharing = self.rollouts // min(self.processes or self.rollouts, self.rollouts)
        rollout = fleet("rollout", SleepingRollout, self.times, self.seats, sharing, replicas=self.rollouts)
        teacher = fleet("teacher.default", SleepingTeacher, self.times, replicas=self.teachers)
        with ExitStack() as stack:
            config = self.config(self.folder or Path(stack.enter_context(tempfile.TemporaryDirectory())))
            start = time.perf_counter()
            stack.enter_context(claimed(config))
            records = RunRecords(config.run_dir)
            self.state, _ = take_up(config, records)
            self.taken_up = time.perf_counter() - start
            records.on_metrics = self.on_metrics
            learner = fleet("learner", SleepingLearner, self.times, self.max_staleness, self.state.step, replicas=1)
            try:
                await asyncio.gather(rollout.start(), teacher.start(), learner.start())
                campaign = self._campaign(config, records, rollout, teacher, learner)
                beside = asyncio.create_task(meanwhile(rollout, teacher)) if meanwhile else None
                start, cpu = time.perf_counter(), time.process_time()
                await campaign.run()
                self.wall, self.cpu = time.perf_counter() - start, time.process_time() - cpu
                if beside:
                    beside.cancel()
                self.found = await learner.call("status")
            finally:
                for one in (rollout, teacher, learner):
                    one.close()
        return self

    @property
    def trained(self) -> int:
        """Trajectories that were trained on."""
        return self.state.ledger.trained

    @property
    def stages(self) -> dict[str, float]:
        """Stage -> seconds that it needs for the trained trajectories if none of its actors and seats ever waits."""
        return {
            "rollout": sum(self._responses()) / (self.rollouts * self.seats),
            "teacher": self.trained * self.times.score / self.teachers,
            "learner": self.updates * self.times.update,
        }

    @property
    def ideal(self) -> float:
        """Seconds of the campaign if nobody ever waits for anything but work: the stages, with filling and emptying them."""

        def ends(durations: Iterable[float], begins: Iterable[float], places: int) -> list[float]:
            free, found = [0.0] * places, []
            for begin, duration in zip(begins, durations, strict=False):
                found.append(max(free[0], begin) + duration)
                heapq.heapreplace(free, found[-1])
            return sorted(found)

        responses = self._responses()
        written = ends(responses, itertools.repeat(0.0), self.rollouts * self.seats)
        scored = ends(itertools.repeat(self.times.score), written, self.teachers)
        whole = scored[self.size - 1 :: self.size]  # each update takes the next ones that are ready
        return ends(itertools.repeat(self.times.update), whole, 1)[-1]

    def _responses(self) -> list[float]:
        """Seconds of the responses that were trained on, in the order of their prompts."""
        return [self.times.of_response(np.array(row)) for row in self._ids()]

    def _ids(self) -> list[tuple[int, int, int]]:
        """The ids of the first trajectories, as many as were trained on; prompts are taken in order."""
        prompts, found = self.trained // self.samples_per_prompt, []
        for place in range(prompts):
            epoch, prompt = divmod(place, PROMPTS)
            found += [(epoch, prompt, sample) for sample in range(self.samples_per_prompt)]
        return found

    def config(self, folder: Path) -> CampaignConfig:
        """The configuration of the campaign whose run directory is in this folder."""
        return CampaignConfig(
            name="simulated",
            output_dir=str(folder),
            student=StudentConfig(model="none"),
            prompts=TrainingPromptsConfig(path="none", shuffle=False),
            teachers={"default": TeacherConfig(model="none", replicas=self.teachers, microbatch_tokens=1 << 20)},
            pipeline=PipelineConfig(
                updates=self.updates,
                prompts_per_update=self.size // self.samples_per_prompt,
                samples_per_prompt=self.samples_per_prompt,
                max_staleness=self.max_staleness,
                oversample=self.oversample,
            ),
            evaluation=EvaluationConfig(every_updates=10**9),
            checkpoint=CheckpointConfig(every_updates=self.checkpoint_every),
        )

    def _campaign(
        self, config: CampaignConfig, records: RunRecords, rollout: Fleet, teacher: Fleet, learner: Fleet
    ) -> Campaign:
        prompts = PromptSet(
            tokens=np.zeros(PROMPTS * TOKENS, np.int32),
            offsets=np.arange(PROMPTS + 1) * TOKENS,
            references=Texts.of([None] * PROMPTS),
            domains=Coded.of([None] * PROMPTS),
            texts=Texts.of([""] * PROMPTS),
        )
        quiet: Any = Silent()
        return Campaign(
            config,
            self.state,
            prompts=prompts,
            evaluator=None,
            rollout=rollout,
            teachers=Teachers({"default": teacher}, PromptRoutes([{"default": 0.0}] * PROMPTS, {})),
            learner=learner,
            records=records,
            progress=quiet,
        )
