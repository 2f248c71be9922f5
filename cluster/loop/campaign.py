"""The driver loop of a campaign: five coroutines that pass references and counts, and never a tensor.

      prompts                                                            weights (version n)
         |                                                  +--------------------------------------------+
         v                                                  v                                            |
      [issue] --works--> [sample: rollout actors] --works--> [score: teacher actors] --> [train: learner] --> [publish]
         ^                                                                                               |
         +------------------------------- slots, released when the new weights are loaded ---------------+

    issue    produces works: groups, or a whole update     waits for free slots        unblocked by publish
    sample   consumes works, produces sampled ones         waits for a rollout actor   unblocked by sample's answers
    score    consumes sampled works, produces scored ones  waits for a teacher actor   unblocked by score's answers
    train    consumes scored works, produces versions      waits for a whole update    unblocked by score
    publish  consumes versions, releases slots             waits for all rollouts      unblocked by train

What stops it from deadlocking: only `issue` adds work, and it is charged before it does; every other stage takes what
is there. `train` is the finite clock: it ends after the last update; any other coroutine that ends is an error.

From the rollout actor on every trajectory travels by itself: none waits for a slower one of its group. A group goes to
one rollout actor, which has its prompt in the prefix cache; teachers take what has come in until they are free. With
`pipeline.max_staleness: 0` the same loop has slots for one update, and a work is one actor's part of it.
"""

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable
from typing import Any

from actors.data.prompts import PromptSet, requests
from actors.errors import AbortedError, LostObjectError
from cluster.config import CampaignConfig
from cluster.console.progress import Progress
from cluster.fleet.ray_fleet import Fleet
from cluster.guards import judge
from cluster.loop.evaluation import Evaluator
from cluster.loop.followers import Followers
from cluster.loop.measure import record_of_update
from cluster.loop.queues import Backlog
from cluster.loop.reporting import Account
from cluster.loop.teachers import Teachers
from cluster.loop.weight_sync import TRANSPORTS, Published, WeightTransport
from cluster.loop.work import Work, scores_by_rank
from cluster.records.writer import RunRecords
from cluster.state.campaign_state import CampaignState
from cluster.state.checkpoints import Checkpoints
from cluster.state.rollback import act


class Campaign:
    """The loop and its state. `run` returns when the last update has been published, or the campaign was interrupted."""

    def __init__(
        self,
        config: CampaignConfig,
        state: CampaignState,
        *,
        prompts: PromptSet,
        evaluator: Evaluator | None,
        rollout: Fleet,
        teachers: Teachers,
        learner: Fleet,
        records: RunRecords,
        progress: Progress,
        gate: asyncio.Event | None = None,
    ):
        """gate: while it is not set, nothing new is issued; what is under way is finished and trained."""
        self.config, self.state = config, state
        self.rollout, self.teachers, self.learner = rollout, teachers, learner
        self._prompts, self._records, self._gate = prompts, records, gate
        self._checkpoints = Checkpoints(config, records)
        self._synchronous = config.pipeline.max_staleness == 0
        self._update_size = config.trajectories_per_update
        self._backlog = Backlog(config, state, prompts, rollout, teachers)
        self._to_publish: asyncio.Queue[Published] = asyncio.Queue(maxsize=1)
        self._learner_turn = asyncio.Lock()
        self._started = asyncio.Event()
        self._spare_slots = int(config.pipeline.oversample * self._update_size)
        self._all_published = asyncio.Event()
        self._versions: WeightTransport = TRANSPORTS[config.weights.transport](learner, rollout, config.weights)
        self._followers = Followers(config, teachers.fleets, learner)
        self._account = Account(
            config,
            state,
            evaluator=evaluator,
            rollout=rollout,
            versions=self._versions,
            records=records,
            progress=progress,
        )
        self._clock = self._account.clock

    async def run(self) -> bool:
        """True when the campaign is complete, False when SIGINT or SIGTERM ended it, with a checkpoint written."""
        interrupted = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, interrupted.set)
        stages = {
            asyncio.create_task(stage(), name=name)
            for name, stage in {
                "interrupt": interrupted.wait,
                "issue": self._issue,
                "sample": self._sample,
                "score": self._score,
                "train": self._train,
                "publish": self._publish,
                **{fleet.role: fleet.watched for fleet in (self.rollout, self.learner, *self.teachers.fleets.values())},
            }.items()
        }
        gc.freeze()  # modules, prompts: nothing of it is let go of before the end, and looking at it costs a tenth of the loop
        try:
            done, _ = await asyncio.wait(stages, return_when=asyncio.FIRST_COMPLETED)
            await self._settle(done)
            return not interrupted.is_set()
        finally:
            gc.unfreeze()
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            for task in stages:
                task.cancel()
            await asyncio.gather(*stages, return_exceptions=True)
            await self._checkpoints.close()
            self._clock.write_trace(self.config.run_dir)

    async def _settle(self, done: set[asyncio.Task]) -> None:
        """The first stage has ended: raises its error, or leaves a checkpoint if the campaign was interrupted."""
        for task in done:
            task.result()
        names = {task.get_name() for task in done}
        if "interrupt" in names:
            async with self._learner_turn:  # an update that has begun is finished first
                self._records.event("interrupted", step=self.state.step)
                await self._checkpoints.save(self.state, self.learner)
                await self._checkpoints.settle()
        elif "train" not in names:
            raise RuntimeError(f"the stage {', '.join(sorted(names))} ended before the last update")

    # ------------------------------------------------------------------------------------------------ the five stages

    async def _issue(self) -> None:
        """Produces works in the seeded order; first those that an earlier run of the campaign left open.

        Consumes prompts. Waits for free slots; unblocked by publish. A synchronous update is cut into one work for
        each rollout actor; an asynchronous work is the group of one prompt.
        """
        samples = self.config.pipeline.samples_per_prompt
        wanted = self._update_size if self._synchronous else samples
        slots = self._backlog.slots
        await self._started.wait()
        while True:
            if self._gate is not None:
                await self._gate.wait()
            self._clock.utilisation.blocked("rollout", not slots.has_room(wanted))
            count = await slots.acquire(wanted)
            self._clock.utilisation.blocked("rollout", False)
            self._backlog.issue(count)

    async def _sample(self) -> None:
        """Consumes works, produces sampled ones. Waits for a rollout actor; unblocked by the actors' answers."""
        sampling = self._backlog.sampling

        async def sample(work: Work) -> None:
            asked = requests(self._prompts, work.ids, self.config.seed, judged=self.config.gives_rewards)
            sampling.begin(work, self._versions.version)
            units = sampling.expected_tokens(len(asked.prompt_tokens), len(work))
            try:
                if self.config.learner.objective.estimator == "sft":
                    counts, reference = await self.teachers.sample(asked, self._versions.version, self.config.sampling)
                else:
                    counts, reference = await self.rollout.ask(asked, units=units, at=work.replica)
            except AbortedError:
                return  # it was cut, as the ledger knows
            if not sampling.end(work):
                return
            self.state.tokens_generated += int(counts.lengths.sum())
            self.state.busy["rollout"] += counts.busy_seconds
            work.trajectories = [reference]
            self._backlog.sampled(work, counts)

        await self._for_each(self._backlog.next_to_sample, sample, "rollout")

    async def _score(self) -> None:
        """Consumes sampled works, produces scored ones. Waits for a teacher actor; unblocked by the actors' answers.

        A synchronous update is scored in the order of the ledger, in one part for each teacher actor: the same
        arithmetic whoever was faster. An asynchronous one is scored as it comes, the oldest first.
        """

        async def score(work: Work) -> None:
            try:
                scored = await self.teachers.score(work.ids, work.trajectories, parts=None if self._synchronous else 1)
            except LostObjectError as error:
                self._account.lost(len(work), error)
                return self._backlog.lost_before_scored(work)
            self.state.missing_scores += scored.missing
            self.state.busy["teacher"] += scored.busy_seconds
            self._backlog.scored(work, scored)

        await self._for_each(self._backlog.next_to_score, score, "teacher")

    async def _train(self) -> None:
        """Consumes scored works, produces weight versions. Waits for a whole update; unblocked by score."""
        while self.state.step < self.config.pipeline.updates:
            work = await self._backlog.next_update()
            async with self._learner_turn:
                self._account.doing("learner", f"update {self.state.step + 1}")
                try:
                    metrics = await self.learner.call(
                        "update",
                        work.ids,
                        *work.trajectories,
                        *self._scores_of(work),
                        rate_scale=self.state.guards.rate_scale,
                        domains=self._prompts.domains_of(work.ids),
                    )
                except LostObjectError as error:
                    self._account.lost(len(work), error)
                    self._backlog.lost(work)
                    continue
                self.state.ledger.train(work.numbers, self.state.step + 1)
                self.state.step += 1
                self.state.busy["learner"] += metrics.pop("busy_seconds")
                published = await self._versions.publish()
                published.averages = await self._followers.publish()
                published.trained = len(work)
                published.record = self._record(work, metrics, published)
                self.state.pending.append(published.record)
                self.state.guards, findings = judge(self.config.guards, self.state.guards, published.record)
                act(findings, self.state.guards.rate_scale, self.config, self._account.event)
                await self._backlog.cut()
                await self._checkpoints.save_if_due(self.state, self.learner)
                self._account.doing("learner", "idle")
            self._clock.utilisation.blocked("learner", True)
            await self._to_publish.put(published)
            self._clock.utilisation.blocked("learner", False)
        await self._checkpoints.settle()
        await self._all_published.wait()

    async def _publish(self) -> None:
        """Consumes weight versions, releases slots. Waits until every rollout actor has loaded; unblocked by train.

        The first version is the learner's initial weights: `issue` waits for it.
        """
        await self._start()
        self._started.set()
        self._clock.start([self.rollout, self.learner, *self.teachers.fleets.values()])
        self._records.event("loop_started", step=self.state.step)
        if self.state.step >= self.config.pipeline.updates:
            self._all_published.set()
        while True:
            published = await self._to_publish.get()
            await self._versions.load(published)
            await self._followers.load(published.averages)
            await self._backlog.slots.lend(min(self._spare_slots, self._backlog.sampling.stragglers(published.version)))
            await self._account.conclude(published.record)
            await self._backlog.slots.release(published.trained)
            if published.version == self.config.pipeline.updates:
                self._all_published.set()

    # ---------------------------------------------------------------------------------------------------- their parts

    async def _start(self) -> None:
        """Gives every rollout actor the learner's weights, and measures the untrained student and the teacher."""
        self.rollout.prepare = self._versions.give
        await self.rollout.call_each("abort")  # what an earlier loop of this process left under way
        self._backlog.seats = (await self.rollout.call("status"))["seats"]
        await self._versions.load(await self._versions.publish())
        await self._followers.load(await self._followers.publish())
        await self._account.begin()

    async def _for_each(
        self, get: Callable[[], Awaitable[Work]], act: Callable[[Work], Awaitable[None]], role: str
    ) -> None:
        """Runs `act` on works as they come, many at a time; the first error ends all."""
        under_way = 0

        async def one(work: Work) -> None:
            nonlocal under_way
            under_way += len(work)
            self._account.doing(role, f"{under_way} trajectories")
            await act(work)
            under_way -= len(work)
            self._account.doing(role, f"{under_way} trajectories" if under_way else "idle")

        try:
            async with asyncio.TaskGroup() as group:
                while True:
                    group.create_task(one(await get()))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    def _scores_of(self, work: Work) -> list[Any]:
        """The references of an update's scores, as arguments: with several ranks, each gets those of its own trajectories."""
        learner = self.config.learner
        own = scores_by_rank(work, self._backlog.tokens_of(work), learner.minibatches_per_update, learner.replicas)
        return [own] if learner.replicas > 1 else own.arguments[0]

    def _record(self, work: Work, metrics: dict[str, float], published: Published) -> dict[str, Any]:
        queues = self._backlog.depths()
        self._clock.utilisation.queues(queues)
        return record_of_update(
            self.state,
            work,
            metrics,
            published,
            wall_seconds=self._records.wall_seconds,
            max_staleness=self.config.pipeline.max_staleness,
            queues=queues,
        )
