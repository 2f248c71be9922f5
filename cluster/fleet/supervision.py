"""Starts the actors of one role, watches them, and replaces those that are lost.

    start     reserve a place -> create the actor -> wait for its constructor -> `prepare` it -> it gets work
    watch     ask it every few seconds how many steps it has taken; silence, or work without steps, is a hang
    silent    before it counts as a hang: its calls go to other actors, and it gets no new ones until it is heard again
    behind    it was late for what every actor must do (load weights): the others go on, and it catches up
    lost      it died, hangs or failed: end it, report the event, and start another in its place
    resize    more or fewer actors while the others work on

An actor that may not be replaced (the learner, whose state would be lost with it) makes its fleet fail for good: every
waiting and every later call raises LearnerLostError.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import nullcontext, suppress
from typing import Any

from actors.errors import ActorFaultError, CampaignError, LearnerLostError, UnavailableError, UserError
from cluster.fleet.changes import Changes
from cluster.fleet.ray_actor import (
    ActorLostError,
    DiedAtStartError,
    Replica,
    Resources,
    create,
    end_processes,
    errors_of,
    place,
    progress_of,
    started,
    steps_of,
    wait_until_built,
    whereabouts,
    within,
)
from cluster.fleet.ray_room import holders, needs
from cluster.fleet.restarts import Restarts, same_cause
from cluster.records.event_table import EVENTS
from cluster.records.utilisation import Utilisation

MUTE, STUCK = "has not answered", "has made no progress"
"""What a silent actor does not do (Replica.silent)."""
OnEvent = Callable[..., None]
"""Called with the kind of event and its fields."""
STARTS = 3
"""Processes that are tried for an actor at the start of a campaign, and for the first call before any has done work."""

WATCH_SECONDS = 5.0
"""Between two questions of the watch."""
SILENT_SECONDS = 10.0
"""After this long without an answer to the watch, or after a quarter of the hang time-out, an actor is silent."""
CLOSE_SECONDS = 3.0
"""For the end of all actors of a fleet. Without its control store, Ray waits for ever."""
LOOK_SECONDS = 2.0
"""Between two looks at the progress of a start."""
LOOK_PATIENCE_SECONDS = 5.0
"""After this long a look has found nothing."""
LATE_SECONDS = 5.0
"""A call to each actor waits this long for the others after the first answer, or twice as long as that took."""


class Supervisor:
    """The actors of one role and their lives; `Fleet` (ray_fleet.py) adds the calls."""

    def __init__(
        self,
        role: str,
        actor_class: type,
        arguments: tuple,
        keywords: dict[str, Any],
        *,
        replicas: int,
        resources: Resources,
        max_restarts: int | None,
        start_timeout_seconds: float,
        hang_timeout_seconds: float = 300.0,
        on_event: OnEvent,
        turn: asyncio.Lock | None = None,
    ):
        """Describes the actors; `start` creates them.

        max_restarts: restarts of one replica within an hour. None: a lost actor is not replaced, and every call raises
        LearnerLostError. hang_timeout_seconds: the longest silence, or work without progress, before an actor is ended.
        turn: held while an actor is built. Fleets whose actors share GPUs have one in common, so that an engine can measure
        what the others leave.
        """
        self.role = role
        self.restarts = 0
        self.replicas = [Replica(f"{role}-{i}") for i in range(replicas)]
        self._named = replicas
        """Number of names used so far; a name is never used again."""
        self._leaving: list[Replica] = []
        self._actor_class, self._arguments, self._keywords = actor_class, arguments, keywords
        self._resources, self._max_restarts = resources, max_restarts
        self._start_timeout, self._hang_timeout = start_timeout_seconds, hang_timeout_seconds
        self._on_event, self._turn = on_event, turn
        self._changed = Changes()
        """Told when a replica may have become free, alive or lost."""
        self._worked = False
        """Whether an actor has ever done any work."""
        self._failure: Exception | None = None
        """Why the fleet cannot go on; raised for every caller."""
        self._tasks: set[asyncio.Task] = set()
        self._starting: dict[Replica, asyncio.Task] = {}
        """Replica -> the task that starts it; cancelled if the fleet shrinks meanwhile."""
        self._budgets: defaultdict[Replica, Restarts] = defaultdict(lambda: Restarts(max_restarts or 0))
        self.prepare: Callable[[Any], Awaitable[None]] | None = None
        """Called with each new actor's handle before it gets work: gives it the current weights."""
        self.on_end: Callable[[Any], None] | None = None
        """Called with the handle of an actor that has ended while the campaign goes on."""
        self.utilisation: Utilisation | None = None
        """Records when calls begin and end."""

    def build_with(self, **keywords: Any) -> None:
        """Actors that are created from now on get these keyword arguments."""
        self._keywords = {**self._keywords, **keywords}

    async def start(self, *, patient: bool = False) -> None:
        """Starts every replica and waits until all can work.

        patient: wait without limit for free resources in the cluster. UserError: an actor's constructor raised it.
        CampaignError: an actor could not start, or made no progress with it for `start_timeout_seconds`.
        """
        await asyncio.gather(*(self._start_firmly(replica, patient) for replica in self.replicas))

    def resize(self, replicas: int) -> None:
        """Begins to start actors, or to end some, until there are `replicas`. Returns at once.

        An actor that is to end finishes its calls first. One that cannot start is reported as the event
        `scaling_failed`, and the fleet goes on without it.
        """
        for _ in range(replicas - len(self.replicas)):
            replica = Replica(f"{self.role}-{self._named}")
            self._named += 1
            self.replicas.append(replica)
            self._starting[replica] = self._in_background(self._join(replica))
        # Those that are furthest from work go first, then those with the least work.
        by_load = sorted(self.replicas, key=lambda replica: (replica.readiness, replica.under_way))
        for replica in by_load[: len(self.replicas) - replicas]:
            self.replicas.remove(replica)
            self._leaving.append(replica)  # so that `close` ends it even if it still works
            replica.alive = False  # it gets no more work
            self._in_background(self._leave(replica))

    async def watched(self) -> None:
        """Raises the fleet's fatal error as soon as it occurs, also while nobody calls."""
        await self._changed.wait_for(lambda: self._failure)
        if self._failure:
            raise self._failure

    def inherit(self, lost: "Supervisor") -> None:
        """Takes over the reserved places of a fleet that is lost, so that nobody else gets them, and ends its actors."""
        # Moved before `close`, which gives up the places that the lost fleet still holds.
        for replica, before in zip(self.replicas, lost.replicas, strict=True):
            replica.placement, replica.node, before.placement = before.placement, before.node, None
        lost.close()

    def close(self) -> None:
        """Ends all actors at once."""
        for task in self._tasks:  # first: the watch would report the deaths, and start replacements
            task.cancel()
        within(CLOSE_SECONDS, self._end_all)

    def _end_all(self) -> None:
        for replica in (*self.replicas, *self._leaving):
            with suppress(Exception):  # of any kind: without its control store Ray can end none, and they end with it
                replica.kill()
                replica.give_up_place()

    # ------------------------------------------------------------------------------------------------------- starting

    async def _start_firmly(self, replica: Replica, patient: bool) -> None:
        """Starts a replica, again where its process ends without an error: of hundreds of new processes one may."""
        for attempt in range(STARTS):
            try:
                return await self._start(replica, patient=patient)
            except DiedAtStartError as error:
                replica.kill()
                if attempt == STARTS - 1:
                    raise
                self._on_event("start_failed", actor=replica.name, cause=str(error))

    async def _start(self, replica: Replica, *, patient: bool = False) -> None:
        waiting: list[str] = []
        """Why it has no place, the newest reason last."""
        try:
            async with asyncio.timeout(None if patient else self._start_timeout):
                replica.placement = await place(
                    replica.placement,
                    [replica.node],
                    [self._resources.bundle],
                    lambda reason: self._waits(replica.name, 1, waiting, reason),
                )
            waiting = []
            async with self._turn or nullcontext():
                await self._in_time([replica], self._create(replica))
        except TimeoutError as error:
            late = f"{replica.name} did not start within {self._start_timeout:g} s (ray.start_timeout_seconds)"
            raise CampaignError(late + await self._who_holds_the_room(waiting)) from error
        if replica not in self.replicas:  # the fleet has shrunk meanwhile
            return
        replica.alive, replica.behind, replica.tardy, replica.silent = True, False, False, ""
        self._record("ended", replica, "away")
        self._tell_start(replica)
        self._in_background(self._watch(replica))
        await self._available()

    def _tell_start(self, replica: Replica) -> None:
        """Reports that an actor works, with the seconds that its process and each phase have taken."""
        seconds = time.monotonic() - replica.created
        process = max(seconds - sum(taken for _, taken in replica.phases), 0.0)
        phases = {"process": process}
        for what, taken in replica.phases:
            phases[what] = phases.get(what, 0.0) + taken
        cause = f"{seconds:.1f} s: {', '.join(f'{what} {taken:.1f}' for what, taken in phases.items())}"
        rounded = {what: round(taken, 3) for what, taken in phases.items()}
        self._on_event("actor_started", actor=replica.name, cause=cause, seconds=round(seconds, 3), phases=rounded)

    async def _in_time(self, replicas: list[Replica], work: Coroutine[Any, Any, None]) -> None:
        """Waits for the work of a start as long as one of these actors makes progress.

        CampaignError: none has made any for `start_timeout_seconds`.
        """
        working = asyncio.create_task(work)
        progress: Any = None
        since = time.monotonic()
        try:
            while True:
                await asyncio.wait([working], timeout=min(LOOK_SECONDS, self._start_timeout / 4))
                if working.done():
                    return working.result()
                found = await self._look(replicas)
                if found != progress:
                    progress, since = found, time.monotonic()
                elif time.monotonic() - since > self._start_timeout:
                    raise CampaignError(self._stuck(replicas))
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            for replica in replicas:
                replica.doing = ""

    async def _look(self, replicas: list[Replica]) -> list[Any]:
        """What shows the progress of new actors; notes what they do."""
        there = [replica for replica in replicas if replica.handle is not None]
        handles = [replica.handle for replica in there]
        try:
            async with asyncio.timeout(LOOK_PATIENCE_SECONDS):
                found = await progress_of(handles)
        except Exception:  # of any kind: an answer that is missing is no progress
            found = [("", replica.doing) for replica in there]
        for replica, (_, doing) in zip(there, found, strict=True):
            if doing != replica.doing:
                replica.doing, replica.doing_since = doing, time.monotonic()
        return [*handles, *(progress for progress, _ in found)]

    def _stuck(self, replicas: list[Replica]) -> str:
        who = replicas[0].name if len(replicas) == 1 else f"the {len(replicas)} ranks of the learner"
        last = sorted({replica.doing for replica in replicas if replica.doing})
        doing = f"; the last that was heard: {', '.join(last)}" if last else ""
        limit = f"{self._start_timeout:g} s (ray.start_timeout_seconds) of its last progress"
        return f"{who} did not start within {limit}{doing}"

    def _waits(self, name: str, places: int, waiting: list[str], reason: str) -> None:
        """A place is not there yet: for lack of room (`reason`), or because Ray has not assigned it ("")."""
        waiting.append(reason)
        if reason:
            others = any(replica.alive for replica in self.replicas)
            then = "the campaign continues without it" if others else "the campaign waits for it"
            room = f"the cluster has no room for {needs([self._resources.bundle] * places)}"
            self._on_event("waiting_for_resources", actor=name, cause=f"{room}; {then} ({reason})")
        else:
            self._on_event("actor_starting", actor=name)

    async def _who_holds_the_room(self, waiting: list[str]) -> str:
        """For the message of a start that has waited for room: why, and whose actors are there; "" if it has not."""
        if not waiting or not waiting[-1]:
            return ""
        there = await asyncio.to_thread(holders)
        return f": there is no room for it ({waiting[-1]}" + (f"; there are {there})" if there else ")")

    async def _create(self, replica: Replica) -> None:
        """Creates the actor in its place, and waits until it is ready for work."""
        replica.created = replica.doing_since = time.monotonic()
        replica.handle = create(self._actor_class, self._arguments, self._keywords, self._resources, replica.placement)
        await wait_until_built(replica.handle, replica.name)
        try:
            with errors_of("the start"):
                await replica.handle.status.remote()
                replica.node, replica.process = await whereabouts(replica.handle)
                if self.prepare is not None:
                    await self.prepare(replica.handle)
                replica.phases = await started(replica.handle)
        except ActorLostError as error:
            raise DiedAtStartError(f"{replica.name} could not start: {error}") from error

    async def _join(self, replica: Replica) -> None:
        try:
            await self._start_firmly(replica, True)
        except (CampaignError, UserError) as error:
            if replica in self.replicas:
                self.replicas.remove(replica)
            replica.kill()
            replica.give_up_place()
            self._on_event("scaling_failed", actor=replica.name, cause=str(error))

    async def _leave(self, replica: Replica) -> None:
        if starting := self._starting.get(replica):
            starting.cancel()
        await self._changed.wait_for(lambda: not replica.calls)
        self._end(replica)
        replica.give_up_place()
        self._leaving.remove(replica)
        self._record("began", replica, "away")
        self._on_event("actor_ended", actor=replica.name)

    # ------------------------------------------------------------------------------------------- watching, and losing

    async def _watch(self, replica: Replica) -> None:
        """Notices an actor that dies while nobody calls it, does not answer, or makes no progress with its calls."""
        handle, steps, since = replica.handle, -1, time.monotonic()
        while replica.handle is handle:
            await asyncio.sleep(min(self._hang_timeout / 4, WATCH_SECONDS))
            try:
                now = await self._steps_of(replica, handle)
            except TimeoutError:
                self._hangs(replica, handle, f"it has not answered for {self._hang_timeout:g} s")
                continue
            except ActorLostError as error:
                self._lost(replica, handle, "actor_died", error)
                return
            stuck = replica.silent == STUCK
            if now != steps or not replica.busy:
                steps, since = now, time.monotonic()
                await self._heard(replica, handle)
                continue
            # An idle actor takes no steps: time counts from the first call after the idle time, or the last answer.
            last = replica.silent_since if stuck else max(since, replica.busy_since)
            if time.monotonic() - last > self._hang_timeout:
                self._hangs(replica, handle, f"it {STUCK} for {self._hang_timeout:g} s")
            elif time.monotonic() - last > self._hang_timeout / 4:
                self._falls_silent(replica, handle, STUCK, last)
            elif replica.silent:
                await self._heard(replica, handle)

    async def _steps_of(self, replica: Replica, handle: Any) -> int:
        """The actor's steps. An answer that is late makes it silent. TimeoutError: no answer within the hang time-out."""
        asked, question = time.monotonic(), asyncio.create_task(steps_of(handle))
        try:
            async with asyncio.timeout(self._hang_timeout):
                await asyncio.wait([question], timeout=min(self._hang_timeout / 4, SILENT_SECONDS))
                if not question.done():
                    self._falls_silent(replica, handle, MUTE, asked)
                steps, (waits_for, seconds) = await question
        finally:
            question.cancel()
        self._tell_wait(replica, waits_for, seconds)
        return steps

    def _tell_wait(self, replica: Replica, waits_for: str, seconds: float) -> None:
        """Tells that an actor begins or ends to wait for something that is not the campaign's."""
        if waits_for and not replica.waits_for:
            self._on_event("outside_away", actor=replica.name, cause=waits_for)
        elif replica.waits_for and not waits_for:
            self._on_event("outside_back", actor=replica.name, seconds=round(time.monotonic() - replica.waits_since, 1))
        replica.waits_for, replica.waits_since = (
            waits_for,
            time.monotonic() - seconds if waits_for else replica.waits_since,
        )

    def _falls_silent(self, replica: Replica, handle: Any, how: str, since: float) -> None:
        """The actor gets no new work, and its calls go to others. It may be heard again, or is replaced as one that hangs."""
        if replica.handle is handle and replica.alive and not replica.silent:
            replica.silent, replica.silent_since = how, since
            cause = f"it {how} for {time.monotonic() - since:.0f} s"
            self._on_event("actor_silent", actor=replica.name, cause=cause)
            self._move_calls()

    async def _heard(self, replica: Replica, handle: Any) -> None:
        """The actor gives signs of life."""
        if replica.silent and replica.handle is handle:
            seconds, replica.silent = time.monotonic() - replica.silent_since, ""
            self._on_event("actor_heard", actor=replica.name, seconds=round(seconds, 1))
            await self._available()

    def _move_calls(self) -> None:
        """Lets the calls of silent actors go to others, if there are others. A call moves once."""
        if any(replica.takes_work for replica in self.replicas):
            for replica in self.replicas:
                if replica.silent:
                    for patience in replica.patience:
                        patience.reschedule(asyncio.get_running_loop().time())

    def _leave_behind(self, replica: Replica, what: str, call: asyncio.Task) -> None:
        """The fleet goes on without this actor, which gets no work until it has caught up."""
        replica.behind = replica.tardy = True
        self._on_event("left_behind", actor=replica.name, cause=f"{what} takes it longer than the others")
        self._in_background(self._catch_up(replica, replica.handle, call))

    async def _catch_up(self, replica: Replica, handle: Any, call: asyncio.Task) -> None:
        """Waits for the answer that was late, and brings the actor to where the others are."""
        try:
            await call  # a lost actor is no error here: its successor starts where the others are
            while replica.handle is handle and replica.alive and (prepare := self.prepare):
                with errors_of("catching up"):
                    await prepare(handle)
                if prepare == self.prepare:  # a loop that starts after a lost learner has other weights to give
                    break
        except CampaignError as error:
            self._lost(replica, handle, "actor_died" if isinstance(error, ActorLostError) else "actor_failed", error)
        if replica.handle is handle and replica.alive:
            replica.behind = False
            self._on_event("caught_up", actor=replica.name)
            await self._available()

    async def _available(self) -> None:
        """An actor takes work again."""
        self._move_calls()
        self._changed.tell()

    def _hangs(self, replica: Replica, handle: Any, cause: str) -> None:
        if replica.handle is handle:
            end_processes(replica)  # a stopped process does not react to Ray's kill
            self._lost(replica, handle, "actor_hung", f"{cause} (ray.hang_timeout_seconds)")
            replica.kill()  # `_lost` ignores a replica that is leaving

    def _lost(self, replica: Replica, handle: Any, kind: str, cause: Exception | str) -> None:
        """Reports the loss and begins to replace the actor; where it may not be replaced, the fleet fails.

        handle: the actor that was lost. kind: an event of event_table.py that is a fault. cause: the error that showed
        the loss, or a sentence.
        """
        if replica.handle is not handle or not replica.alive:
            return  # several calls notice the same loss: the first has handled it
        self._end(replica)
        self._record("began", replica, "away")
        self._on_event(kind, actor=replica.name, cause=str(cause))
        if self._max_restarts is None:
            failure = LearnerLostError(f"{replica.name} {EVENTS[kind].label}: {cause}")
            # As `raise ... from` would; callers raise it later, from where they wait.
            failure.__cause__ = cause if isinstance(cause, Exception) else None
            self._fail(failure)
        else:
            self._starting[replica] = self._in_background(self._replace(replica, str(cause)))

    async def _replace(self, replica: Replica, cause: str) -> None:
        """Starts an actor in the lost one's place, again within the restart budget; a spent budget fails the fleet."""
        budget, failed_starts = self._budgets[replica], 0
        try:
            while not replica.alive and replica in self.replicas:
                # The starts that fail in a row are counted besides: of a model that loads for minutes few fit into an hour.
                if (spent := budget.spent()) or failed_starts > (self._max_restarts or 0):
                    when = "within an hour" if spent else "in a row"
                    raise CampaignError(
                        f"{replica.name} was lost {self._max_restarts or 0} times {when} and once more (ray.max_restarts), "
                        f"the last time because: {cause}; see events.jsonl for the others, and run the same command again "
                        "to go on from the last checkpoint"
                    )
                await asyncio.sleep(budget.pause())
                budget.count()
                replica.restarts += 1
                self.restarts += 1
                try:
                    await self._start(replica, patient=True)
                except (CampaignError, UnavailableError) as error:
                    replica.kill()
                    if (
                        isinstance(error, ActorFaultError)
                        and same_cause(error) == same_cause(cause)
                        and not self._worked
                    ):
                        raise CampaignError(
                            f"{replica.name} could not start, twice in the same way: {error}"
                        ) from error
                    failed_starts += 1
                    cause = str(error)
                    self._on_event("actor_died", actor=replica.name, cause=cause)
            self._on_event("actor_restarted", actor=replica.name, restarts=replica.restarts)
        except Exception as error:  # of any kind: otherwise the callers would wait for this actor for ever
            self._fail(error)

    def _end(self, replica: Replica) -> None:
        handle = replica.handle
        replica.kill()
        if handle is not None and self.on_end is not None:
            self.on_end(handle)

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._changed.tell()

    # ---------------------------------------------------------------------------------------------------- bookkeeping

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # asyncio itself holds only a weak reference
        task.add_done_callback(self._tasks.discard)
        return task

    def _began(self, replica: Replica, method: str) -> None:
        replica.began()
        self._record("began", replica, method)

    def _ended(self, replica: Replica, method: str, *answer: Any) -> None:
        replica.ended()
        self._record("ended", replica, method, *answer)

    def _record(self, what: str, replica: Replica, method: str, *answer: Any) -> None:
        if self.utilisation is not None:
            getattr(self.utilisation, what)(replica.name, self.role, method, *answer)
