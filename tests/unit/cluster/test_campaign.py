"""The real loop with fake fleets: one process, no Ray, random delays."""

import asyncio
import errno
import os
import random
import re
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.config import StudentConfig, TeacherConfig, TrainingPromptsConfig
from actors.errors import (
    AbortedError,
    CampaignError,
    CheckpointError,
    GuardError,
    LearnerLostError,
    LostObjectError,
    UserError,
)
from actors.prompts.columns import Coded, Texts
from actors.prompts.prompt_set import PromptSet
from actors.teacher.base import TeacherCounts
from actors.trajectory import EpisodeCounts, LoadSeconds, RolloutCounts, TrajectoryId, offsets_of
from cluster.config import CampaignConfig, PipelineConfig
from cluster.loop import campaign as loop_module
from cluster.loop.campaign import Campaign
from cluster.loop.teachers import PromptRoutes, Teachers
from cluster.loop.work import Issued
from cluster.records import disk
from cluster.records.writer import RunRecords, read_jsonl
from cluster.state.campaign_state import CampaignState
from tests.light_campaign import Reference
from tests.states import load_state, write_learners_files

SIZE, DEADLINE = 6, 600.0
OF_THE_LEARNER = (
    *("tokens_trained", "loss", "reverse_kl", "forward_kl_old", "entropy", "clip_fraction", "ratio_mean", "ratio_max"),
    *("importance_ess", "grad_norm", "learning_rate", "engine_logprob_abs_diff"),
)


class World:
    """State that the fake fleets share, and a record of what they did."""

    def __init__(self, *, bound: int, delay: float = 0.0, seed: int = 0, fail_at: str = "", error: Any = None):
        self.bound, self.delay, self.draw = bound, delay, random.Random(seed)
        self.fail_at, self.error = fail_at, error
        self.version = 0
        self.trained: list[list[tuple[int, int, int]]] = []
        self.written: dict[tuple, int] = {}
        """Id -> the version that last sampled it."""
        self.staleness: list[int] = []
        self.under_way = self.most_under_way = 0
        self.interrupt_at: int | None = None
        self.interrupted: Any = None
        self.gives_up = False
        self.losing: dict[str, float] = {}
        """Method -> probability that an object among its arguments is lost."""
        self.stuck_at = ""

    async def work(self, what: str) -> None:
        if what == self.fail_at:
            raise self.error
        if what == self.stuck_at:
            await asyncio.sleep(1000)
        await asyncio.sleep(self.draw.random() * self.delay)
        if self.draw.random() < self.losing.get(what, 0.0):
            raise LostObjectError(f"{what}: gone with its node")


class FakeFleet:
    def __init__(self, world: World, replicas: int):
        self.world, self.replicas = (
            world,
            [
                SimpleNamespace(
                    name=f"{type(self).__name__}-{i}", version=0, alive=True, handle=i, behind=False, calls=0
                )
                for i in range(replicas)
            ],
        )
        self.role = type(self).__name__
        self.restarts = 0
        self.prepare: Any = None

    async def watched(self) -> None:
        await asyncio.Event().wait()

    async def room(self, calls: int) -> Any:
        return self.world.draw.choice(self.replicas)


class FakeRollout(FakeFleet):
    """Answers that are ready at about the same time come in one object, as from a real rollout actor."""

    seats = 100

    def __init__(self, world: World, replicas: int):
        super().__init__(world, replicas)
        self._ready: list[tuple[dict[tuple, int], Any]] = []

    async def call(self, method: str) -> Any:
        assert method == "status"
        return {"seats": self.seats}

    async def ask(self, requests: Any, *, units: int, at: Any = None) -> Any:
        assert units >= len(requests.ids)
        replica = at or self.world.draw.choice(self.replicas)
        units = len(requests.ids)
        self.world.under_way += units
        self.world.most_under_way = max(self.world.under_way, self.world.most_under_way)
        version = replica.version
        await self.world.work("generate")
        self.world.under_way -= units
        written = {tuple(row): version for row in requests.ids.tolist()}
        self.world.written |= written
        versions = np.full(units, version, np.int32)
        return RolloutCounts(np.full(units, 3), versions, np.zeros(units, bool), 0.1), await self._sent(written)

    async def _sent(self, written: dict[tuple, int]) -> Reference:
        loop = asyncio.get_running_loop()
        if not self._ready:
            loop.call_later(self.world.draw.random() * self.world.delay, self._send)
        self._ready.append((written, loop.create_future()))
        return await self._ready[-1][1]

    def _send(self) -> None:
        ready, self._ready = self._ready, []
        reference = Reference(("trajectories", {row: v for written, _ in ready for row, v in written.items()}))
        for _, future in ready:
            if not future.done():
                future.set_result(reference)

    async def call_each(self, method: str, *arguments: Reference) -> list[Any]:
        if method == "abort":
            return []
        assert method == "load_weights"
        *buckets, manifest = arguments
        assert [bucket.value for bucket in buckets] == ["bucket 0", "bucket 1"]
        await self.world.work("load_weights")
        for replica in self.replicas:
            await asyncio.sleep(self.world.draw.random() * self.world.delay)
            replica.version = manifest.value.version
        return [LoadSeconds(0.2, 0.1)] * len(self.replicas)


class FakeTeacher(FakeFleet):
    async def call(
        self, method: str, ids: np.ndarray, *trajectories: Reference, returns: int, units: int, **_: Any
    ) -> tuple[TeacherCounts, Reference]:
        assert (method, returns, units) == ("score", 2, len(ids))
        written = {row for kind, rows in (t.value for t in trajectories) if kind == "trajectories" for row in rows}
        asked = [tuple(row) for row in ids.tolist()]
        assert written >= set(asked)
        await self.world.work("score")
        return TeacherCounts(0, 0.1), Reference(("scores", dict.fromkeys(asked)))


class FakeLearner(FakeFleet):
    async def call_beside(self, method: str) -> None:
        assert method == "give_up"
        self.world.gives_up = True

    async def call(self, method: str, *arguments: Any, rate_scale: float = 1.0, domains: Any = None) -> Any:
        if method == "save":
            await self.world.work("save")
            Path(arguments[0], "weights").write_text(str(self.world.version))
            write_learners_files(arguments[0], self.world.version)
            return None
        if method == "status":
            return {"policy_version": self.world.version}
        if method == "saved":
            await self.world.work("saved")
            return self.world.draw.random() < 0.5
        assert method == "update"
        ids, *batches = arguments
        await self.world.work("update")
        trained = [tuple(row) for row in ids.tolist()]
        versions = {
            k: v for kind, rows in (b.value for b in batches) if kind == "trajectories" for k, v in rows.items()
        }
        scored = {k for kind, rows in (b.value for b in batches) if kind == "scores" for k in rows}
        assert scored >= set(trained), "trained on what has no score"
        assert {row: versions[row] for row in trained} == {row: self.world.written[row] for row in trained}
        self.world.staleness += [self.world.version - versions[row] for row in trained]
        self.world.trained.append(trained)
        self.world.version += 1
        if self.world.version == self.world.interrupt_at:
            self.world.interrupted.set()
        return dict.fromkeys(OF_THE_LEARNER, 0.0) | {"busy_seconds": 0.1, "tokens_trained": SIZE}

    async def stream(self, method: str, on_item: Any) -> list[list[Reference]]:
        assert method == "publish"
        await self.world.work("publish")
        manifest = SimpleNamespace(version=self.world.version, nbytes=10)
        return [[Reference("bucket 0"), Reference("bucket 1"), Reference(manifest)]]


class FakeEvaluator:
    def __init__(self, world: World, config: CampaignConfig):
        self.world, self.seen, self.config = world, [], config

    def due(self, step: int) -> bool:
        return step % self.config.evaluation.every_updates == 0 or step == self.config.pipeline.updates

    def trajectories(self, step: int) -> int:
        return 8

    async def student(
        self, rollout: FakeRollout, step: int, baselines: dict[str, Any]
    ) -> tuple[dict[str, float], list[Any], dict[str, float]]:
        await self.world.work("evaluate")
        assert len({replica.version for replica in rollout.replicas}) == 1
        self.seen.append(rollout.replicas[0].version)
        of_teacher = {"eval/accuracy_teacher": 1.0} if step == 0 else {}
        return {"eval/accuracy": 0.5, "eval/reverse_kl": 1.0, **of_teacher}, [], {"rollout": 0.1, "teacher": 0.1}


class Silent:
    def update(self, *_: Any) -> None: ...
    def doing(self, *_: Any) -> None: ...
    def note(self, *_: Any) -> None: ...


def configuration(
    output_dir: Path, *, updates: int = 5, bound: int = 0, samples: int = 1, **more: Any
) -> CampaignConfig:
    config = CampaignConfig(
        name="run",
        output_dir=str(output_dir),
        seed=3,
        student=StudentConfig(model="s"),
        prompts=TrainingPromptsConfig(path="p"),
        teachers={"default": TeacherConfig(model="t")},
        pipeline=PipelineConfig(
            updates=updates, prompts_per_update=SIZE // samples, samples_per_prompt=samples, max_staleness=bound
        ),
    )
    config.checkpoint.every_updates = more.pop("save_every", 100)
    assert not more
    return config


def campaign(
    config: CampaignConfig,
    world: World,
    *,
    rollouts: int = 2,
    teachers: int = 1,
    evaluator: Any = None,
    rollout: Any = None,
    prompt_lengths: Any = (1,) * 11,
) -> Campaign:
    state, _ = load_state(config)
    world.version, world.interrupted = state.step, asyncio.Event()  # of the event loop that runs this campaign
    prompts = PromptSet(
        tokens=np.zeros(sum(prompt_lengths), np.int32),
        offsets=offsets_of(prompt_lengths),
        references=Texts.of([None] * 11),
        domains=Coded.of([None] * 11),
        texts=Texts.of([""] * 11),
    )
    fleets: Any = {"default": FakeTeacher(world, teachers)}
    return Campaign(
        config,
        state,
        prompts=prompts,
        evaluator=evaluator,
        rollout=rollout or FakeRollout(world, rollouts),
        teachers=Teachers(fleets, PromptRoutes([{"default": 0.0}] * 11, {})),
        learner=FakeLearner(world, 1),  # type: ignore[arg-type]
        records=RunRecords(config.run_dir),
        progress=Silent(),  # type: ignore[arg-type]
        interrupted=world.interrupted,
    )


def run(made: Campaign) -> bool:
    return asyncio.run(asyncio.wait_for(made.run(), DEADLINE))


def all_ids(made: Campaign, numbers: Any) -> list[tuple[int, int, int]]:
    return [made._queues._id(number) for number in numbers]


@pytest.mark.parametrize("bound", [0, 1])
@pytest.mark.parametrize("played", [True, False])
def test_what_is_refused_is_dropped_with_its_cause_and_another_is_issued_in_its_place(
    tmp_path: Path, bound: int, played: bool
) -> None:
    """Without one, the update would never be whole, and the campaign would wait for ever."""
    made = campaign(configuration(tmp_path, samples=2, bound=bound), World(bound=bound))
    queues, closed = made._queues, []
    made.state.ledger.on_close = closed.append

    async def answered() -> list[int]:
        slots = queues.slots
        queues.issue(await slots.acquire(SIZE))
        before = slots.charged, slots.to_issue
        issued = await queues._to_sample.get()
        counts = RolloutCounts(
            np.full(len(issued), 3), np.zeros(len(issued), np.int32), np.zeros(len(issued), bool), 0.1,
            refused={0: "broken"}, episodes=(EpisodeCounts(1, 4, 0.0, 0.0),) * len(issued) if played else (),
        )  # fmt: skip
        queues.sampled(issued, counts, Reference(None))
        row, *spare = closed
        assert all(one["reason"] == "spare" for one in spare)
        assert row["dropped"] == [[issued.numbers[0], issued.numbers[0] + 1]] and row["cause"] == "broken"
        assert row["reason"] == ("environment" if played else "refused")
        if bound:  # its slot is free, and one more trajectory is wanted
            assert (slots.charged, slots.to_issue) == (before[0] - 1, before[1] + 1) and slots.has_room(1)
            queues.issue(await slots.acquire(1))
        assert (slots.charged, slots.to_issue) == before
        waiting = [number for one in list(queues._to_sample._queue) for number in one.numbers]  # type: ignore[attr-defined]
        return [*issued.numbers[1:], *waiting]

    there = asyncio.run(answered())
    assert len(set(there)) == SIZE and max(there) >= SIZE


def test_an_actor_whose_episodes_wait_for_environments_gets_more_of_them(tmp_path: Path) -> None:
    """As many as it says, and an eighth more, which wait in it."""
    asked: list[int] = []

    class Waiting(FakeRollout):
        seats = 8

        async def room(self, calls: int) -> Any:
            asked.append(calls)
            return await super().room(calls)

        async def ask(self, requests: Any, **keywords: Any) -> Any:
            counts, reference = await super().ask(requests, **keywords)
            return counts._replace(seats=8, at_once=24), reference

    config, world = configuration(tmp_path, bound=1, updates=3), World(bound=1)
    run(campaign(config, world, rollout=Waiting(world, 1)))
    assert asked[0] == 8 + 2 and set(asked) == {8 + 2, 24 + 4}


def test_idle_teachers_share_equally_what_has_come_while_they_waited(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a busy one's part stays for it, as long as no more has come than that."""
    made = campaign(configuration(tmp_path, bound=1), World(bound=1), teachers=4)
    queues, turn, pauses = made._queues, asyncio.sleep, []
    [teacher] = made.teachers.fleets.values()
    queues.in_flight.pause.answered(1.6)

    def answer(count: int) -> None:
        numbers = made.state.ledger.issue(count)
        ids = np.array([(0, number % 11, 0) for number in numbers])
        zeros = np.zeros(count, np.int32)
        queues.sampled(Issued(list(numbers), ids), RolloutCounts(zeros + 3, zeros, zeros > 0, 0.1), Reference(None))

    async def sleep(seconds: float) -> None:
        if seconds:
            pauses.append(seconds)
            answer(10)
        await turn(0)

    async def scenario() -> None:
        answer(1)
        sizes = []
        for replica in teacher.replicas:
            sizes.append(len(await queues.next_to_score()))
            replica.calls = 1
        assert sizes == [3, 3, 3, 2] and pauses == [0.1]
        answer(10)
        assert len(await queues.next_to_score()) == 3, "all are busy: a quarter of ten, rounded up"
        teacher.replicas[0].calls = 0
        assert len(await queues.next_to_score()) == 3, "as much as each took when all were idle"
        assert pauses == [0.1], "one that is idle beside others does not wait"

    monkeypatch.setattr(asyncio, "sleep", sleep)
    asyncio.run(asyncio.wait_for(scenario(), DEADLINE))


@pytest.mark.parametrize(("rollouts", "teachers", "seed"), [(1, 1, 0), (2, 1, 1), (3, 2, 2), (9, 4, 3)])
def test_synchronous_updates_train_the_issued_numbers_in_order(
    tmp_path: Path, rollouts: int, teachers: int, seed: int
) -> None:
    config, world = configuration(tmp_path, samples=2), World(bound=0, delay=0.01, seed=seed)
    made = campaign(config, world, rollouts=rollouts, teachers=teachers)
    assert run(made) is True
    assert world.trained == [all_ids(made, range(step * SIZE, step * SIZE + SIZE)) for step in range(5)]
    assert set(world.staleness) == {0}
    assert made.state.ledger.counts() == {
        "issued": 5 * SIZE, "waiting": 0, "sampled": 0, "scored": 0, "trained": 5 * SIZE, "dropped": 0,
    }  # fmt: skip


def test_ids_go_through_every_prompt_of_an_epoch_before_the_next(tmp_path: Path) -> None:
    config, world = configuration(tmp_path, updates=11), World(bound=0)
    assert run(campaign(config, world))
    trained = [TrajectoryId(*row) for update in world.trained for row in update]
    assert len(set(trained)) == 66
    for epoch in range(6):
        assert sorted(row.prompt for row in trained if row.epoch == epoch) == list(range(11))


@pytest.mark.parametrize("bound", [1, 2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_nothing_is_trained_beyond_the_bound_and_the_ledger_accounts_for_every_number(
    tmp_path: Path, bound: int, seed: int
) -> None:
    updates = 12
    config = configuration(tmp_path, updates=updates, bound=bound, samples=1 + seed % 3)
    world = World(bound=bound, delay=0.01, seed=seed)
    made = campaign(config, world, rollouts=1 + seed, teachers=1 + seed % 2)
    assert run(made) is True
    assert max(world.staleness) <= bound
    assert world.most_under_way <= (bound + 1) * SIZE
    trained = [row for update in world.trained for row in update]
    counts, dropped = made.state.ledger.counts(), made.state.ledger.dropped
    assert all(len(update) == SIZE for update in world.trained)
    assert len(trained) == len(set(trained)) == updates * SIZE == counts["trained"]
    assert counts["issued"] == counts["trained"] + counts["dropped"]
    assert set(trained) <= set(all_ids(made, range(counts["issued"])))
    assert set(dropped) <= {"stale"}
    rows = read_jsonl(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, updates + 1))
    assert max(row["staleness_max"] for row in rows) == max(world.staleness)


class CrowdedRollout(FakeRollout):
    """Its engines say how many responses their cache holds, and that they have taken some of it away."""

    def __init__(self, world: World, replicas: int):
        super().__init__(world, replicas)
        self.rooms: list[int] = []

    async def room(self, calls: int) -> Any:
        self.rooms.append(calls)
        return await super().room(calls)

    async def ask(self, requests: Any, *, units: int, at: Any = None) -> Any:
        counts, reference = await super().ask(requests, units=units, at=at)
        return counts._replace(seats=16, preempted=2), reference


def test_seats_follow_what_engines_say_and_preemptions_are_recorded_and_told_once(tmp_path: Path) -> None:
    config, world = configuration(tmp_path, updates=6, bound=1), World(bound=1, delay=0.01)
    made = campaign(config, world, rollout=(rollout := CrowdedRollout(world, 2)))
    assert run(made) is True
    assert rollout.rooms[0] == 100 + 13 and rollout.rooms[-1] == 16 + 3
    rows = read_jsonl(config.run_dir / "metrics.jsonl")
    assert sum(row["preempted"] for row in rows) <= 2 * made.state.ledger.counts()["issued"]
    assert rows[0]["preempted"] >= 2
    told = [row for row in read_jsonl(config.run_dir / "events.jsonl") if row["kind"] == "preempted"]
    assert len(told) == 1 and told[0]["step"] == 1 and told[0]["count"] == rows[0]["preempted"]
    assert told[0]["cause"].startswith("lower rollout.engine.max_num_seqs towards 16,")


@pytest.mark.parametrize("bound", [0, 2])
def test_what_is_lost_is_sampled_again_and_each_number_is_trained_once(tmp_path: Path, bound: int) -> None:
    config, world = configuration(tmp_path, updates=12, bound=bound, samples=2), World(bound=bound, delay=0.01)
    world.losing = {"score": 0.2, "update": 0.4}
    made = campaign(config, world, rollouts=3, teachers=2)
    assert run(made) is True
    told = [row for row in read_jsonl(config.run_dir / "events.jsonl") if row["kind"] == "lost_objects"]
    assert {row["cause"] for row in told} == {"score: gone with its node", "update: gone with its node"}
    trained = [row for update in world.trained for row in update]
    counts = made.state.ledger.counts()
    assert len(trained) == len(set(trained)) == 12 * SIZE == counts["trained"]
    assert counts["issued"] == counts["trained"] + counts["dropped"] and max(world.staleness) <= bound
    if bound == 0:
        assert world.trained == [all_ids(made, range(step * SIZE, step * SIZE + SIZE)) for step in range(12)]


def test_an_evaluation_that_was_lost_is_repeated_and_says_how_much_was_lost(tmp_path: Path) -> None:
    config, world = configuration(tmp_path, updates=4), World(bound=0)
    config.evaluation.every_updates = 1
    world.losing = {"evaluate": 0.5}
    assert run(campaign(config, world, evaluator=FakeEvaluator(world, config))) is True
    lost = [row for row in read_jsonl(config.run_dir / "events.jsonl") if row["kind"] == "lost_objects"]
    assert (
        lost and {row["trajectories"] for row in lost} == {8} and {row["evaluation"] for row in lost} <= set(range(5))
    )
    rows = read_jsonl(config.run_dir / "metrics.jsonl")
    assert all("eval/accuracy" in row for row in rows) and len(rows) == 5


def test_works_overlap_when_staleness_is_allowed(tmp_path: Path) -> None:
    config, world = configuration(tmp_path, updates=12, bound=2), World(bound=2, delay=0.01)
    assert run(campaign(config, world, rollouts=3))
    assert max(world.staleness) > 0
    assert world.most_under_way > SIZE


def test_what_has_become_too_stale_is_dropped_with_the_reason_and_replaced(tmp_path: Path) -> None:
    class Straggler(FakeRollout):
        """The first call takes until two more updates have been taken without it."""

        async def ask(self, requests: Any, **keywords: Any) -> Any:
            straggles = not hasattr(self, "first")
            if straggles:
                self.first = True
            answer = await super().ask(requests, **keywords)
            while straggles and self.world.version < 2:
                await asyncio.sleep(0.001)
            return answer

    config, world = configuration(tmp_path, updates=6, bound=1), World(bound=1, delay=0.001)
    made = campaign(config, world, rollout=Straggler(world, 2))
    assert run(made) is True
    assert max(world.staleness) <= 1
    counts = made.state.ledger.counts()
    assert dict(made.state.ledger.dropped) == {"stale": counts["dropped"]}
    assert counts["dropped"] >= 1
    assert counts["issued"] == counts["trained"] + counts["dropped"]
    trained = {row for update in world.trained for row in update}
    assert all_ids(made, [0])[0] not in trained


def test_what_is_written_and_only_lacks_its_score_is_waited_for(tmp_path: Path) -> None:
    class Busy(FakeTeacher):
        """The first call takes until an update has been taken without it."""

        async def call(self, *arguments: Any, **keywords: Any) -> Any:
            first, self.called = not hasattr(self, "called"), True
            while first and not self.world.version:
                await asyncio.sleep(0.001)
            return await super().call(*arguments, **keywords)

    config, world = configuration(tmp_path, updates=8, bound=1), World(bound=1, delay=0.001)
    made = campaign(config, world)
    made.teachers.fleets["default"] = Busy(world, 2)  # type: ignore[assignment]
    assert run(made) is True
    assert max(world.staleness) <= 1 and made.state.ledger.dropped.total() == 0


class Slow(FakeRollout):
    """Every ninth trajectory takes as long as many updates, unless it is aborted."""

    def __init__(self, world: World, replicas: int):
        super().__init__(world, replicas)
        self.calls, self.given_up, self.under_way = 0, 0, {}

    async def ask(self, requests: Any, **keywords: Any) -> Any:
        self.calls += 1
        if self.calls % 9 == 0:
            gone = asyncio.Event()
            self.under_way[requests.ids.tobytes()] = keywords["at"], gone
            with suppress(TimeoutError):  # the last ones of a campaign may be waited for
                await asyncio.wait_for(gone.wait(), 0.5)
                self.given_up += 1
                raise AbortedError("aborted")
        return await super().ask(requests, **keywords)

    async def tell(self, replica: Any, method: str, ids: np.ndarray) -> None:
        given_to, gone = self.under_way[ids.tobytes()]
        assert method == "abort" and replica is given_to
        gone.set()


@pytest.mark.parametrize("oversample", [0.0, 0.5])
def test_what_is_so_slow_that_it_could_not_be_trained_is_cut_and_replaced(tmp_path: Path, oversample: float) -> None:
    config, world = configuration(tmp_path, updates=20, bound=1, samples=2), World(bound=1, delay=0.001)
    config.pipeline.oversample = oversample
    rollout = Slow(world, 2)
    made = campaign(config, world, rollout=rollout)
    assert run(made) is True
    counts = made.state.ledger.counts()
    assert made.state.ledger.dropped["cut"] == rollout.given_up > 5
    assert counts["trained"] == 20 * SIZE and max(world.staleness) <= 1
    under_way = counts["waiting"] + counts["sampled"] + counts["scored"]
    assert counts["issued"] == counts["trained"] + counts["dropped"] + under_way
    assert (world.most_under_way > SIZE) and (under_way == 0 or oversample > 0)


@pytest.mark.parametrize("bound", [0, 2])
def test_evaluations_see_one_version_each_and_the_untrained_student_first(tmp_path: Path, bound: int) -> None:
    config, world = configuration(tmp_path, updates=5, bound=bound), World(bound=bound, delay=0.005)
    config.evaluation.every_updates = 2
    evaluator = FakeEvaluator(world, config)
    made = campaign(config, world, evaluator=evaluator)
    assert run(made)
    assert evaluator.seen == [0, 2, 4, 5]
    assert made.state.start["eval/accuracy_teacher"] == 1.0
    rows = {row["step"]: row for row in read_jsonl(config.run_dir / "metrics.jsonl")}
    assert [step for step, row in rows.items() if "eval/accuracy" in row] == [0, 2, 4, 5]


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize(
    "error", [CampaignError("it broke"), UserError("here", "this", "that"), ValueError("a defect")]
)
@pytest.mark.parametrize(
    "stage", ["generate", "load_weights", "score", "update", "publish", "save", "saved", "evaluate"]
)
def test_an_error_in_any_call_ends_the_run_with_it(tmp_path: Path, stage: str, error: Exception, bound: int) -> None:
    config = configuration(tmp_path, updates=100, bound=bound, save_every=2)
    world = World(bound=bound, delay=0.005)
    made = campaign(config, world, evaluator=FakeEvaluator(world, config))

    async def break_it() -> None:
        task = asyncio.create_task(made.run())
        while world.version < 3 and not task.done():
            await asyncio.sleep(0.001)
        world.fail_at, world.error = stage, error
        if stage == "evaluate":
            config.evaluation.every_updates = 1
        await asyncio.wait_for(asyncio.shield(task), DEADLINE)

    with pytest.raises(type(error), match=re.escape(str(error))):
        asyncio.run(break_it())
    assert len(asyncio.all_tasks(asyncio.new_event_loop())) == 0


@pytest.mark.parametrize("bound", [0, 2])
def test_an_interrupt_leaves_a_checkpoint_and_says_so(tmp_path: Path, bound: int) -> None:
    config, world = configuration(tmp_path, updates=50, bound=bound), World(bound=bound, delay=0.002)
    world.interrupt_at = 3
    made = campaign(config, world)
    assert run(made) is False
    state, checkpoint = load_state(config)
    assert checkpoint is not None
    assert state.step == made.state.step == len(world.trained)
    assert 3 <= state.step <= 4
    assert (checkpoint / "weights").read_text() == str(state.step)
    assert "interrupted" in {row["kind"] for row in read_jsonl(config.run_dir / "events.jsonl")}


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("stage", ["generate", "score", "load_weights", "publish", "evaluate"])
def test_an_error_leaves_a_checkpoint_of_the_last_update_and_the_campaign_goes_on_from_it(
    tmp_path: Path, stage: str, bound: int
) -> None:
    config = configuration(tmp_path, updates=8, bound=bound, samples=2)
    config.evaluation.every_updates = 4
    world = World(bound=bound, delay=0.002)
    made = campaign(config, world, evaluator=FakeEvaluator(world, config))

    async def break_it() -> None:
        task = asyncio.create_task(made.run())
        while world.version < 3 and not task.done():
            await asyncio.sleep(0)
        world.fail_at, world.error = stage, CampaignError("it broke")
        await task

    with pytest.raises(CampaignError, match="it broke"):
        asyncio.run(break_it())
    state, _ = load_state(config)
    assert state.step == made.state.step == world.version >= 3
    assert "saved_at_the_end" in {row["kind"] for row in read_jsonl(config.run_dir / "events.jsonl")}
    again = World(bound=bound)
    assert run(campaign(config, again, evaluator=FakeEvaluator(again, config))) is True
    trained = [row for update in world.trained + again.trained for row in update]
    assert len(trained) == len(set(trained)) == 8 * SIZE
    rows = [row for row in read_jsonl(config.run_dir / "metrics.jsonl") if row["step"]]
    assert [row["step"] for row in rows] == list(range(1, 9))


@pytest.mark.parametrize("error", [LearnerLostError("it died"), GuardError("it rises")])
def test_what_an_interrupted_campaign_rejects_is_not_saved_and_the_error_is_told(
    tmp_path: Path, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, world = configuration(tmp_path, updates=50), World(bound=0)
    made = campaign(config, world)

    def findings(*_: Any) -> None:
        if world.version == 3:
            made._interrupted.set()
            raise error

    monkeypatch.setattr(loop_module, "apply_findings", findings)
    with pytest.raises(type(error), match=str(error)):
        run(made)
    assert load_state(config)[0].step == 0, "of a rejected update there is no checkpoint"


class FullDisk:
    """A disk below a folder that takes no more writes while it is full."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch):
        self.full, self.refused = False, 0
        open_file, make = Path.open, Path.mkdir

        def refuse(path: Path, writes: bool) -> None:
            if self.full and writes and folder in path.parents:
                self.refused += 1
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

        def opened(path: Path, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
            refuse(path, mode[0] in "wa")
            return open_file(path, mode, *arguments, **keywords)

        def made(path: Path, *arguments: Any, **keywords: Any) -> None:
            refuse(path, not path.exists())
            make(path, *arguments, **keywords)

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(Path, "mkdir", made)


@pytest.mark.parametrize("bound", [0, 2])
@pytest.mark.parametrize("save_every", [1, 100])
def test_a_full_disk_is_waited_for_and_nothing_is_lost(
    tmp_path: Path, bound: int, save_every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configuration(tmp_path, updates=8, bound=bound, save_every=save_every)
    config.evaluation.every_updates = 2
    world = World(bound=bound, delay=0.002)
    made = campaign(config, world, evaluator=FakeEvaluator(world, config))
    made.state.ledger.on_close = made._records.closed
    drive = FullDisk(config.run_dir, monkeypatch)
    monkeypatch.setattr(disk, "FIRST_PAUSE_SECONDS", 0.01)

    async def fill() -> bool:
        task = asyncio.create_task(made.run())
        for version in (2, 6, 8):
            while world.version < version and not task.done():
                await asyncio.sleep(0)
            drive.full = True
            refused = drive.refused
            while drive.refused < refused + 5 and not task.done():
                await asyncio.sleep(0.01)
            trained = world.version
            await asyncio.sleep(0.05)
            assert world.version <= trained + 1, "nothing is trained that cannot be recorded"
            drive.full = False
        return await task

    assert asyncio.run(fill()) is True
    events = [row["kind"] for row in read_jsonl(config.run_dir / "events.jsonl")]
    assert events.count("disk_full") == events.count("disk_back") >= 1
    rows = read_jsonl(config.run_dir / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(9))
    ledger = read_jsonl(config.run_dir / "ledger.jsonl")
    assert [row["step"] for row in ledger if "trained" in row] == list(range(1, 9))
    assert load_state(config)[0].step == 8
    assert not list(config.run_dir.rglob("*.tmp")) and not list(config.run_dir.rglob("*.partial"))


def test_a_disk_that_stays_full_ends_the_campaign_with_what_is_good(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, world = configuration(tmp_path, updates=8, save_every=2), World(bound=0)
    made, drive = campaign(config, world), FullDisk(config.run_dir, monkeypatch)
    monkeypatch.setattr(disk, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(disk, "PATIENCE_SECONDS", 0.1)

    async def fill() -> None:
        task = asyncio.create_task(made.run())
        while load_state(config)[0].step < 2 and not task.done():
            await asyncio.sleep(0)
        drive.full = True
        await task

    with pytest.raises((CheckpointError, OSError), match="No space left on device"):
        asyncio.run(fill())
    assert load_state(config)[0].step >= 2


def test_an_interrupt_while_rollouts_are_busy_does_not_wait_for_them(tmp_path: Path) -> None:
    config, world = configuration(tmp_path, updates=50), World(bound=0)
    made = campaign(config, world)

    async def interrupted() -> bool:
        task = asyncio.create_task(made.run())
        while world.version < 2 and not task.done():
            await asyncio.sleep(0)
        world.stuck_at = "generate"
        while not world.under_way and not task.done():
            await asyncio.sleep(0)
        world.interrupted.set()
        return await asyncio.wait_for(task, DEADLINE)

    assert asyncio.run(interrupted()) is False
    assert load_state(config)[0].step == made.state.step


@pytest.mark.parametrize("bound", [0, 1, 3])
def test_a_campaign_that_goes_on_trains_exactly_what_was_left(tmp_path: Path, bound: int) -> None:
    updates = 9
    config = configuration(tmp_path, updates=updates, bound=bound, samples=2)
    trained: list[tuple[int, int, int]] = []
    first = World(bound=bound, delay=0.004, seed=1)
    first.interrupt_at = 3
    assert run(campaign(config, first)) is False
    trained += [row for update in first.trained for row in update]
    second = World(bound=bound, delay=0.004, seed=2)
    second.interrupt_at = 6
    assert run(campaign(config, second, rollouts=4)) is False
    trained += [row for update in second.trained for row in update]
    last = World(bound=bound, delay=0.004, seed=3)
    made = campaign(config, last, rollouts=1, teachers=3)
    assert run(made) is True
    trained += [row for update in last.trained for row in update]
    counts = made.state.ledger.counts()
    assert len(trained) == len(set(trained)) == counts["trained"] == updates * SIZE
    assert counts["issued"] == counts["trained"] + counts["dropped"]
    assert max(first.staleness + second.staleness + last.staleness) <= bound
    if bound == 0:
        assert trained == all_ids(made, range(updates * SIZE))
    steps = [row["step"] for row in read_jsonl(config.run_dir / "metrics.jsonl")]
    assert steps == list(range(1, updates + 1))


def test_a_finished_campaign_that_is_given_more_updates_goes_on(tmp_path: Path) -> None:
    config, world = configuration(tmp_path, updates=2), World(bound=0)
    assert run(campaign(config, world))
    again = World(bound=0)
    made = campaign(configuration(tmp_path, updates=5), again)
    assert run(made)
    assert world.trained + again.trained == [all_ids(made, range(n * SIZE, n * SIZE + SIZE)) for n in range(5)]


def test_a_campaign_that_had_taken_its_last_update_has_nothing_more_to_train(tmp_path: Path) -> None:
    config = configuration(tmp_path, updates=2)
    assert run(campaign(config, World(bound=0)))
    again = World(bound=0)
    assert run(campaign(config, again)) is True
    assert again.trained == []


def test_the_state_of_a_campaign_is_read_back_as_it_was() -> None:
    state = CampaignState(step=3, tokens_generated=7, evaluations={2: {"eval/accuracy": 0.5}}, faults=1)
    state.ledger.train([], 1)
    state.ledger.issue(2)
    state.busy["teacher"], state.environment_seconds = 1.5, 2.5
    again = CampaignState.from_json(state.to_json())
    assert again.to_json() == state.to_json()
    assert again.busy_since_last_step() == {"rollout": 0.0, "teacher": 0.0, "learner": 0.0}
