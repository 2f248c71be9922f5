"""The campaign's loop: five coroutines that pass object references and counts to each other, and never a tensor.

      prompts                                                            weights (version n)
         |                                                  +--------------------------------------------+
         v                                                  v                                            |
      [issue] --Issued--> [sample: rollout actors] --Sampled--> [score: teacher actors] --Scored--> [train] --> [publish]
         ^                                                                                                         |
         +------------------------------- slots, released when the new weights are loaded -------------------------+

    issue    prompts -> Issued, by group or by update   waits for free slots         unblocked by publish
    sample   Issued -> Sampled                          waits for a rollout actor    unblocked by the actors' answers
    score    Sampled -> Scored                          waits for a teacher actor    unblocked by the actors' answers
    train    Scored -> weight versions                  waits for a whole update     unblocked by score
    publish  weight versions -> free slots              waits for all rollout actors unblocked by train

It cannot deadlock: only `issue` adds work, and it takes slots before it does; every other stage takes what is there.
`train` ends after the last update, and the campaign with it; any other coroutine that ends is an error.

From the rollout actor on, each trajectory travels alone and never waits for a slower one of its group. All of a group
go to one rollout actor, which has their prompt in its prefix cache. While a teacher actor works, trajectories collect
for its next call. With `pipeline.max_staleness: 0` there are slots for one update only, and each rollout actor gets its
part of the update in one call. The types are in work.py, the queues in queues.py.
"""

import asyncio
import gc
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import numpy as np

from actors.data.trajectory_shards import Row
from actors.errors import AbortedError, GivenUpError, LostObjectError
from actors.prompts.prompt_set import PromptSet, copied, requests
from actors.trajectory import TrajectoryId
from cluster.config import CampaignConfig
from cluster.console.screen import Progress
from cluster.fleet.ray_fleet import Fleet
from cluster.guards import judge
from cluster.loop.ending import Ending, error_of
from cluster.loop.evaluation_sets import Evaluations
from cluster.loop.queues import Queues
from cluster.loop.replay import Replay
from cluster.loop.reporting import Reporter, record_of_update
from cluster.loop.samples import TrainingSamples
from cluster.loop.teachers import TeacherAnswer, Teachers
from cluster.loop.weight_sync import TRANSPORTS, EmaTeachers, NoEngines, Published, WeightTransport
from cluster.loop.work import Issued, Sampled, Scored, ids_of, scores_by_rank, trajectories_of
from cluster.phases import START
from cluster.records.writer import RECORD_DIRECTORY, RunRecords
from cluster.state.campaign_state import CampaignState
from cluster.state.checkpoints import Checkpoints
from cluster.state.recorded import Record
from cluster.state.rollback import apply_findings

Batch = TypeVar("Batch", Issued, list[Sampled])


class Campaign:
    """The loop of one campaign in this process, from a checkpoint's state to its end."""

    def __init__(
        self,
        config: CampaignConfig,
        state: CampaignState,
        *,
        prompts: PromptSet,
        evaluator: Evaluations | None,
        rollout: Fleet,
        teachers: Teachers,
        learner: Fleet,
        records: RunRecords,
        progress: Progress,
        record: Record | None = None,
        samples: TrainingSamples | None = None,
        gate: asyncio.Event | None = None,
        interrupted: asyncio.Event | None = None,
        neighbours: Mapping[str, Callable[[], Coroutine[Any, Any, Any]]] | None = None,
    ):
        """state: where the campaign stands; the loop updates it. Fleets are started. record: is trained on again, in the place of
        prompts. gate: while it is not set, nothing is
        issued, and what is under way is finished and trained. interrupted: once it is set, the loop ends with a checkpoint.
        neighbours: name -> coroutine function that raises when something that the loop cannot do without is lost."""
        self.config, self.state = config, state
        self.rollout, self.teachers, self.learner = rollout, teachers, learner
        self._prompts, self._records, self._samples, self._gate = prompts, records, samples, gate
        self._interrupted, self._neighbours = interrupted or asyncio.Event(), neighbours or {}
        self._synchronous = config.pipeline.max_staleness == 0
        self._update_size = config.trajectories_per_update
        self._queues = Queues(config, state, prompts, rollout, teachers)
        self._replay = None if record is None else Replay(config, state, record, self._queues.slots)
        self._to_publish: asyncio.Queue[Published] = asyncio.Queue(maxsize=1)
        self._learner_turn = asyncio.Lock()
        self._started = asyncio.Event()
        self._spare_slots = int(config.pipeline.oversample * self._update_size)
        self._all_published = asyncio.Event()
        self._versions: WeightTransport = (
            TRANSPORTS[config.weights.transport](learner, rollout, config.weights)
            if rollout.replicas
            else NoEngines(learner)
        )
        self._ema_teachers = EmaTeachers(config, teachers.fleets, learner)
        self._reporter = Reporter(
            config,
            state,
            evaluator=evaluator,
            rollout=rollout,
            versions=self._versions,
            records=records,
            progress=progress,
        )
        self._clock = self._reporter.clock
        self._checkpoints = Checkpoints(config, records, self._reporter.disk)

    async def run(self) -> bool:
        """Runs until the last update is published. False: it was interrupted, and a checkpoint was written.

        Raises the first error of any stage. LearnerLostError, RollBack: the caller may start a new loop from a checkpoint.
        """
        work: dict[str, Callable[[], Coroutine[Any, Any, Any]]] = {
            "interrupt": self._interrupted.wait,
            **({} if self._replay else {"issue": self._issue, "sample": self._sample, "score": self._score}),
            "train": self._train,
            "publish": self._publish,
            # A fleet that fails for good ends the loop, even while no stage calls it.
            **self._neighbours,
            **{fleet.role: fleet.watched for fleet in (self.rollout, self.learner, *self.teachers.fleets.values())},
        }
        stages = {asyncio.create_task(stage(), name=name) for name, stage in work.items()}
        gc.freeze()  # modules and prompts live to the end; scanning them for garbage costs 10% of the loop's time
        try:
            done, _ = await asyncio.wait(stages, return_when=asyncio.FIRST_COMPLETED)
            await self._settle(done, stages)
            return self.state.step == self.config.pipeline.updates and self._all_published.is_set()
        finally:
            gc.unfreeze()
            for task in stages:
                task.cancel()
            # The first error is already on its way to the caller; those of the other stages follow from it.
            await asyncio.gather(*stages, return_exceptions=True)
            await self._checkpoints.close()
            with suppress(OSError):  # on a full disk; the trace is for reading only
                self._clock.write_trace(self.config.run_dir)

    async def _settle(self, done: set[asyncio.Task], stages: set[asyncio.Task]) -> None:
        """The first of the stages has ended. After an interrupt or an error, writes a checkpoint; raises the error."""
        ending = Ending(self._checkpoints, self.state, self.learner, self._learner_turn, self._reporter.event)
        [train] = [task for task in stages if task.get_name() == "train"]
        names = {task.get_name() for task in done}
        # Several may end in one turn of the event loop: an error goes before an interrupt.
        error = next((found for task in done if (found := error_of(task))), None)
        if error is None and not names & {"interrupt", "train"}:
            error = RuntimeError(f"the stage {', '.join(sorted(names))} ended before the last update")
        if error is not None:
            await ending.failed(error, train, self.config.ray.hang_timeout_seconds)
        if "train" not in names:
            await ending.interrupted(train)

    # ------------------------------------------------------------------------------------------------ the five stages

    async def _issue(self) -> None:
        """Issues trajectories in the seeded order, unfinished ones of an earlier run first.

        Waits for free slots; unblocked by publish. A synchronous campaign issues an update at a time, others a group.
        """
        samples = self.config.pipeline.samples_per_prompt
        wanted = self._update_size if self._queues.in_parts else samples
        slots = self._queues.slots
        await self._started.wait()
        while True:
            if self._gate is not None:
                await self._gate.wait()  # `understudy pause`
            # Asked before, since `acquire` does not say whether it had to wait.
            self._clock.utilisation.blocked("rollout", not slots.has_room(wanted))
            count = await slots.acquire(wanted)
            self._clock.utilisation.blocked("rollout", False)
            self._queues.issue(count)

    async def _sample(self) -> None:
        """Issued -> Sampled. Waits for a rollout actor, or a teacher that writes in its place; unblocked by their answers.

        Responses of a data set are here already, and wait for nobody.
        """
        in_flight, text_by = self._queues.in_flight, self.config.text_by
        writer = "rollout" if text_by == "student" else "teacher"

        async def sample(issued: Issued) -> None:
            judged = self.config.judges_training
            most, turns = self.config.limits_at(issued.update)
            asked = requests(self._prompts, issued.ids, self.config.seed, judged=judged, most=most, max_turns=turns)
            # Before the call: the actor may load newer weights during it, and the oldest token decides the staleness.
            in_flight.begin(issued, self._versions.version)
            units = in_flight.expected_tokens(len(asked.prompt_tokens), len(issued))
            try:
                if text_by == "teacher":
                    sampling = replace(self.config.sampling, max_response_tokens=most)
                    counts, reference = await self.teachers.sample(asked, self._versions.version, sampling)
                elif text_by == "data":
                    counts, written = copied(self._prompts, issued.ids, self._versions.version, most)
                    reference = self.learner.put(written)
                else:
                    counts, reference = await self.rollout.ask(asked, units=units, at=issued.replica)
            except AbortedError:
                return  # `Queues.cut` aborted them, and has dropped them in the ledger
            if not in_flight.end(issued):
                return  # `Queues.cut` dropped them while the answer was on its way
            self.state.tokens_generated += int(counts.lengths.sum()) - sum(counts.context)
            self.state.busy[writer] += counts.busy_seconds
            self.state.processor_seconds += counts.processor_seconds
            self._reporter.unjudged(counts.unjudged)
            self._reporter.preempted(counts.preempted, counts.seats)
            self._reporter.waited(counts.waited_seconds)
            for row, cause in counts.refused.items():
                name = TrajectoryId(*issued.ids[row].tolist())
                self._reporter.event("trajectory_refused", trajectory=str(name), cause=cause)
            self._queues.sampled(issued, counts, reference)

        await self._for_each(self._queues.next_to_sample, sample, writer)

    async def _score(self) -> None:
        """Sampled -> Scored. Waits for a teacher actor; unblocked by the actors' answers.

        A synchronous update is divided among all teacher actors in the order of the ledger, so the arithmetic does not
        depend on which actor was faster. Otherwise trajectories are scored as they come, the oldest weights first.
        """

        async def score(batch: list[Sampled]) -> None:
            parts = None if self._synchronous else 1
            if self.config.text_by == "data":  # which needs no scores
                return self._queues.scored(batch, TeacherAnswer([()] * len(batch), 0, 0.0, {}))
            try:
                answer = await self.teachers.score(ids_of(batch), trajectories_of(batch), parts=parts)
            except LostObjectError as error:
                self._reporter.lost(len(batch), error)
                return self._queues.lost_before_scored(batch)
            self.state.missing_scores += answer.missing
            self.state.busy["teacher"] += answer.busy_seconds
            self.state.processor_seconds += answer.processor_seconds
            for row, cause in answer.refused.items():
                self._reporter.event("trajectory_refused", trajectory=str(batch[row].id), cause=cause)
            self._queues.scored(batch, answer)

        await self._for_each(self._queues.next_to_score, score, "teacher")

    async def _train(self) -> None:
        """Scored -> weight versions. Waits for the trajectories of a whole update; unblocked by score."""
        while self.state.step < self.config.pipeline.updates:
            update = await (self._recorded_update() if self._replay else self._queues.next_update())
            await self._reporter.disk.lines_written()  # nothing is trained that could not be recorded
            async with self._learner_turn:  # the checkpoint of an interrupt must not see half a step
                self._reporter.doing("learner", f"update {self.state.step + 1}")
                try:
                    metrics = await self._take_update(update)
                except GivenUpError:  # the campaign is interrupted; `Ending` has asked for it, and saves the state
                    self.state.ledger.reopen([one.sampled.number for one in update])
                    return
                except LostObjectError as error:
                    self._reporter.lost(len(update), error)
                    self._queues.lost(update)
                    continue
                if self.config.record:  # before it counts: a checkpoint of this update must find it recorded
                    await self._reporter.disk.patiently(partial(self._write_record, update))
                self.state.ledger.train([one.sampled.number for one in update], self.state.step + 1)
                self.state.step += 1
                self.state.busy["learner"] += metrics.pop("busy_seconds")
                self.state.processor_seconds += metrics.pop("processor_seconds", 0.0)
                if self._queues.choice is not None:
                    of_each: Any = metrics.pop("reverse_kl_of_each")
                    self._queues.choice.learn(ids_of(one.sampled for one in update), of_each)
                published = await self._published(update, metrics)
                if self._samples is not None:
                    await self._reporter.disk.patiently(partial(self._samples.keep, self.state.step, update))
                self.state.guards, findings = judge(self.config.guards, self.state.guards, published.record)
                # Before the checkpoint: an update that a guard rejects gets none.
                apply_findings(findings, self.state.guards.rate_scale, self.config, self._reporter.event)
                await self._queues.cut()
                await self._checkpoints.save_if_due(self.state, self.learner)
                self._reporter.doing("learner", "idle")
            self._clock.utilisation.blocked("learner", True)
            # The queue holds one version: the learner takes the next update while this one loads, and waits after it.
            await self._to_publish.put(published)
            self._clock.utilisation.blocked("learner", False)
        await self._checkpoints.settle()
        await self._all_published.wait()

    async def _publish(self) -> None:
        """Weight versions -> free slots. Waits until every rollout actor has loaded a version; unblocked by train.

        The first version is the learner's initial weights, which `issue` waits for.
        """
        await self._start()
        self._started.set()
        self._clock.start([self.rollout, self.learner, *self.teachers.fleets.values()])
        self._records.event("loop_started", step=self.state.step)
        self._reporter.loop_started()
        if self.state.step >= self.config.pipeline.updates:  # resumed after the last update: no version will come
            self._all_published.set()
        while True:
            published = await self._to_publish.get()
            await self._versions.load(published)
            await self._ema_teachers.load(published.averages)
            # Slots that stragglers hold are lent out, so that slow responses do not leave rollout actors idle.
            stragglers = self._queues.in_flight.stragglers(published.version)
            self._queues.slots.lend(min(self._spare_slots, stragglers))
            await self._reporter.finish_update(published.record)
            # Only now: what is issued from here on is sampled with the new weights, which max_staleness 0 relies on.
            self._queues.slots.release(published.trained)
            if published.version == self.config.pipeline.updates:
                self._all_published.set()

    # ---------------------------------------------------------------------------------------------------- their parts

    async def _start(self) -> None:
        """Loads the learner's weights into every rollout actor; in a new campaign, evaluates student and teacher."""
        self.rollout.prepare = self._versions.give  # first: an actor may be replaced while the weights load
        await self.rollout.call_each("abort")  # what a loop before this one left under way (lost learner, rollback)
        if self.rollout.replicas:
            self._queues.seats = (await self.rollout.call("status"))["seats"]
        with START.phase("the engines get the first weights"):
            await self._versions.load(await self._versions.publish())
            await self._ema_teachers.load(await self._ema_teachers.publish())
        await self._reporter.begin()

    async def _for_each(
        self, get: Callable[[], Awaitable[Batch]], handle: Callable[[Batch], Awaitable[None]], role: str
    ) -> None:
        """Calls `handle` with each batch that `get` gives, many at a time; the first error ends all.

        `get` waits for room, which bounds how many there are.
        """
        under_way = 0

        async def one(batch: Batch) -> None:
            nonlocal under_way
            under_way += len(batch)
            self._reporter.doing(role, f"{under_way} trajectories")
            await handle(batch)
            under_way -= len(batch)
            self._reporter.doing(role, f"{under_way} trajectories" if under_way else "idle")

        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(one(await get()))
        except ExceptionGroup as errors:  # unpacked, because callers catch errors by their types
            raise errors.exceptions[0] from None

    async def _recorded_update(self) -> list[Scored]:
        """The next update of a record, once the loop has started and while it is not paused."""
        assert self._replay is not None
        await self._started.wait()
        if self._gate is not None:
            await self._gate.wait()
        return await self._replay.next_update()

    async def _write_record(self, update: list[Scored]) -> None:
        """Lets the learner record the update that it has just taken. DiskFullError: it is to be called again."""
        domains = self._prompts.domains_of(ids_of(one.sampled for one in update)) or [None] * len(update)
        rows = [
            Row(one.sampled.number, place, domain, one.sampled.parts)
            for place, (one, domain) in enumerate(zip(update, domains, strict=True))
        ]
        await self.learner.call("record", str((self.config.run_dir / RECORD_DIRECTORY).resolve()), rows)

    async def _take_update(self, update: list[Scored]) -> dict[str, float]:
        """Calls the learner's `update` with all trajectories, and gives each rank the scores of its own; the metrics."""
        config, sampled = self.config.learner, [one.sampled for one in update]
        ids = ids_of(sampled)
        domains, lengths = (
            (self._replay.domains, self._replay.prompt_lengths)
            if self._replay
            else (self._prompts.domains_of(ids), np.array([self._queues.prompt_tokens(one) for one in sampled]))
        )
        costs = lengths + np.array([one.length for one in sampled])
        parallel = (config.replicas, config.sequence_parallel)
        scores = scores_by_rank(update, costs, config.minibatches_per_update, *parallel)
        more: dict[str, Any] = {} if self._queues.choice is None else {"of_each": True}
        return await self.learner.call(
            "update",
            ids,
            *trajectories_of(sampled),
            *(scores.arguments[0] if config.replicas == 1 else [scores]),
            rate_scale=self.state.guards.rate_scale,
            domains=domains,
            **more,
        )

    async def _published(self, update: list[Scored], metrics: dict[str, float]) -> Published:
        """The weights after this update, and its line of metrics.jsonl, which is pending from now on."""
        published = Published(self.state.step, [], 0, 0.0)
        try:
            published = await self._versions.publish()
            published.averages = await self._ema_teachers.publish()
        finally:  # after an error too: a campaign that resumes from its last checkpoint must still write this line
            published.trained = len(update)
            published.record = self._record(update, metrics, published)
            self.state.pending.append(published.record)
        return published

    def _record(self, update: list[Scored], metrics: dict[str, float], published: Published) -> dict[str, Any]:
        if self._replay:
            metrics["replay_epoch"] = (self.state.step - 1) // self._replay.updates + 1
        queues = self._queues.depths()
        self._clock.utilisation.queues(queues)
        record = record_of_update(
            self.state,
            update,
            metrics,
            published,
            wall_seconds=self._records.wall_seconds,
            max_staleness=self.config.pipeline.max_staleness,
            queues=queues,
        )
        self.state.environment_seconds += record.get("environment_seconds_mean", 0.0)
        return record
