"""Fleets: the replicas of one role as supervised Ray actors.

Roles are plain classes; `ray.remote` is applied here. A call goes to the replica with the least work under way; when
its actor dies, hangs or fails, the call is given to another, and a new actor takes the lost one's place, with the
current weights, before it gets work. While the cluster has no room for it, the fleet works on with fewer. What a role
*returns* is owned by the campaign process and outlives the actor.
"""

import asyncio
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import Any

from ray.exceptions import RayActorError

from actors.errors import ActorFaultError, CampaignError, LearnerLostError, StoreFullError, UserError
from actors.trajectory import Requests, RolloutCounts
from cluster.fleet.ray_actor import (
    DiedAtStartError,
    Replica,
    Resources,
    cause_of,
    create,
    end_processes,
    errors_of,
    invoke,
    place,
    start_failure,
    steps_of,
    streamed,
    whereabouts,
)
from cluster.fleet.ray_mailbox import Mailbox
from cluster.fleet.restarts import Restarts
from cluster.records.utilisation import Utilisation

OnEvent = Callable[..., None]
"""Called with the kind of event and its fields."""
LOST = {"actor_died": "died", "actor_hung": "hangs", "actor_failed": "failed"}
"""How an actor can be lost, by kind of event: its process ended, it made no progress, it raised what none should."""
STARTS = 3
"""Processes that are tried for an actor at the start of a campaign."""
ATTEMPTS = 2
"""Actors that a call may make fail, before it is the call that is at fault."""


class Fleet:
    """All actors of one role."""

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
    ):
        """max_restarts: how often within an hour one replica is replaced; None: never, its loss is LearnerLostError for
        every caller. hang_timeout_seconds: how long an actor may be silent, or at work without progress."""
        self.role = role
        self.restarts = 0
        self.replicas = [Replica(f"{role}-{i}") for i in range(replicas)]
        self._ever = replicas
        self._leaving: list[Replica] = []
        self._actor_class, self._arguments, self._keywords = actor_class, arguments, keywords
        self._resources, self._max_restarts = resources, max_restarts
        self._start_timeout, self._hang_timeout = start_timeout_seconds, hang_timeout_seconds
        self._on_event = on_event
        self._changed = asyncio.Condition()
        self._failure: Exception | None = None
        self._tasks: set[asyncio.Task] = set()
        self._coming: dict[Replica, asyncio.Task] = {}
        """Those that start, or wait for room."""
        self._budgets: defaultdict[Replica, Restarts] = defaultdict(lambda: Restarts(max_restarts or 0))
        self.prepare: Callable[[Any], Awaitable[None]] | None = None
        """Run on each new actor's handle before it gets work: gives it the current weights."""
        self.utilisation: Utilisation | None = None
        """Is told when calls begin and end."""

    async def start(self, *, patient: bool = False) -> None:
        """Starts every replica and waits until all can work. UserError where the input is why one cannot.

        patient: they may wait for room in the cluster as long as it takes.
        """
        await asyncio.gather(*(self._start_firmly(replica, patient) for replica in self.replicas))

    def resize(self, replicas: int) -> None:
        """Begins to start more actors, or to end some; those that end finish first what they have been given.

        An actor that cannot start is told as the event `scaling_failed`, and the fleet goes on without it.
        """
        for _ in range(replicas - len(self.replicas)):
            replica = Replica(f"{self.role}-{self._ever}")
            self._ever += 1
            self.replicas.append(replica)
            self._coming[replica] = self._in_background(self._join(replica))
        for replica in sorted(self.replicas, key=lambda one: (one.alive, one.under_way))[
            : len(self.replicas) - replicas
        ]:
            self.replicas.remove(replica)
            self._leaving.append(replica)
            replica.alive = False  # it gets no more work
            self._in_background(self._leave(replica))

    async def call(
        self,
        method: str,
        *arguments: Any,
        returns: int = 1,
        units: int = 1,
        at: Replica | None = None,
        **keywords: Any,
    ) -> Any:
        """Calls a method of the least busy replica, or of `at`; again on another one as long as actors are lost under it.

        With `returns` of 2 or more, the result is the first value and the references of the others, not fetched.
        ActorFaultError: it has made several actors fail. LostObjectError: what it was to be given is gone.
        """

        async def do(replica: Replica) -> Any:
            handle = replica.handle
            return await self._patiently(replica, lambda: invoke(handle, method, arguments, returns, keywords))

        return await self._on_one(method, units, at, do)

    async def ask(self, requests: Requests, *, units: int = 1, at: Replica | None = None) -> tuple[RolloutCounts, Any]:
        """As a call of `generate` with two returns, together with others: the reference may hold more than these."""
        return await self._on_one("generate", units, at, lambda replica: self._mailbox(replica).ask(requests))

    async def _on_one(
        self, method: str, units: int, at: Replica | None, do: Callable[[Replica], Awaitable[Any]]
    ) -> Any:
        """What `do` makes of the least busy replica, or of `at`; of another one as often as actors are lost under it."""
        failures = 0
        while True:
            replica = at if at is not None and at.alive else await self._least_busy()
            handle = replica.handle
            replica.under_way += units
            replica.calls += 1
            self._began(replica, method)
            try:
                return await do(replica)
            except RayActorError as error:
                self._lost(replica, handle, "actor_died", cause_of(error), error)
            except ActorFaultError as error:
                failures += 1
                if failures == ATTEMPTS:
                    raise
                self._lost(replica, handle, "actor_failed", str(error), error)
            finally:
                self._ended(replica, method)
                replica.under_way -= units
                replica.calls -= 1
                await self._notify()

    async def call_each(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every living replica; one that is lost meanwhile is replaced and left out of the answers."""

        async def one(replica: Replica) -> list[Any]:
            handle, answer = replica.handle, None
            self._began(replica, method)
            try:
                answer = await invoke(handle, method, arguments, 1)
                return [answer]
            except RayActorError as error:
                self._lost(replica, handle, "actor_died", cause_of(error), error)
            except ActorFaultError as error:
                self._lost(replica, handle, "actor_failed", str(error), error)
            finally:
                self._ended(replica, method, answer)
            return []

        answers = await asyncio.gather(*(one(replica) for replica in self.replicas if replica.alive))
        return [value for answer in answers for value in answer]

    async def tell(self, replica: Replica, method: str, *arguments: Any) -> None:
        """Calls a method of this replica, unless it has died."""
        if replica.alive:
            with suppress(RayActorError):  # whoever waits for its work will notice
                await invoke(replica.handle, method, arguments, 1)

    async def room(self, calls: int) -> Replica:
        """The least busy replica with fewer than `calls` calls under way; waits until there is one."""
        async with self._changed:
            while True:
                if self._failure:
                    raise self._failure
                if free := [replica for replica in self.replicas if replica.alive and replica.calls < calls]:
                    return min(free, key=_load)
                await self._changed.wait()

    def tell_nodes(self, method: str, *arguments: Any) -> None:
        """Calls a method of one living replica on each node and does not wait; nobody hears of what became of it."""
        for replica in {replica.node: replica for replica in self.replicas if replica.alive}.values():
            getattr(replica.handle, method).remote(*arguments)

    async def stream(
        self, method: str, *arguments: Any, on_item: Callable[[Any], None] | None = None
    ) -> list[list[Any]]:
        """Calls a generator method of the only replica: the references of all that it yields, in order; as the only one of
        a list, since a learner of several ranks answers with as many.

        on_item: is called with each as it comes. An error within the method is raised as of any other call.
        """
        replica = await self._least_busy()
        handle = replica.handle
        self._began(replica, method)
        try:
            return [await streamed(handle, method, arguments, on_item)]
        except RayActorError as error:
            self._lost(replica, handle, "actor_died", cause_of(error), error)
            raise
        except ActorFaultError as error:
            self._lost(replica, handle, "actor_failed", str(error), error)
            raise
        finally:
            self._ended(replica, method)
            if self._failure:
                raise self._failure

    async def watched(self) -> None:
        """Raises what every caller would be told, as soon as there is anything, also while nobody calls."""
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure)
        if self._failure:
            raise self._failure

    def inherit(self, lost: "Fleet") -> None:
        """Takes over the places of a fleet that is lost, before others can, and ends what is left of it."""
        for replica, before in zip(self.replicas, lost.replicas, strict=True):
            replica.placement, replica.node, before.placement = before.placement, before.node, None
        lost.close()

    def close(self) -> None:
        """Ends all actors at once."""
        for task in self._tasks:
            task.cancel()
        for replica in (*self.replicas, *self._leaving):
            replica.kill()
            replica.give_up_place()

    async def _start_firmly(self, replica: Replica, patient: bool) -> None:
        """Again where the process of a new actor dies without having raised anything: one of hundreds may."""
        for attempt in range(STARTS):
            try:
                return await self._start(replica, patient=patient)
            except DiedAtStartError as error:
                replica.kill()
                if attempt == STARTS - 1:
                    raise
                self._on_event("start_failed", actor=replica.name, cause=str(error))

    async def _start(self, replica: Replica, *, patient: bool = False) -> None:
        bundle = self._resources.bundle

        def waits() -> None:
            needs = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            self._on_event("waiting_for_resources", actor=replica.name, cause=f"the cluster has no room for {needs}")

        try:
            async with asyncio.timeout(None if patient else self._start_timeout):
                replica.placement = await place(replica.placement, [replica.node], [bundle], waits)
            async with asyncio.timeout(self._start_timeout):
                replica.handle = create(
                    self._actor_class, self._arguments, self._keywords, self._resources, replica.placement
                )
                with errors_of("the start"):
                    await replica.handle.status.remote()
                    replica.node, replica.process = await whereabouts(replica.handle)
                    if self.prepare is not None:
                        await self.prepare(replica.handle)
        except TimeoutError as error:
            raise CampaignError(
                f"{replica.name} did not start within {self._start_timeout:g} s (ray.start_timeout_seconds)"
            ) from error
        except RayActorError as error:
            raise start_failure(replica.name, error) from error
        if replica not in self.replicas:  # the fleet has shrunk meanwhile
            return
        replica.alive = True
        self._tell("ended", replica, "away")
        self._on_event("actor_started", actor=replica.name)
        self._in_background(self._watch(replica))
        await self._notify()

    async def _patiently(self, replica: Replica, do: Callable[[], Awaitable[Any]]) -> Any:
        """Again while the object store is full, which is waited for as long as for an actor that hangs."""
        full_since = 0.0
        while True:
            try:
                return await do()
            except StoreFullError as error:
                full_since = full_since or self._say_full(replica, error)
                if time.monotonic() - full_since > self._hang_timeout:
                    raise
                await asyncio.sleep(1.0)

    def _mailbox(self, replica: Replica) -> Mailbox:
        if replica.mailbox is None or replica.mailbox.handle is not replica.handle:
            replica.mailbox = Mailbox(replica.handle, replica.name, partial(self._patiently, replica))
        return replica.mailbox

    async def _least_busy(self) -> Replica:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or any(r.alive for r in self.replicas))
        if self._failure:
            raise self._failure
        return min((r for r in self.replicas if r.alive), key=_load)

    def _began(self, replica: Replica, method: str) -> None:
        replica.began()
        self._tell("began", replica, method)

    def _ended(self, replica: Replica, method: str, *answer: Any) -> None:
        replica.ended()
        self._tell("ended", replica, method, *answer)

    def _tell(self, what: str, replica: Replica, method: str, *answer: Any) -> None:
        if self.utilisation is not None:
            getattr(self.utilisation, what)(replica.name, self.role, method, *answer)

    def _say_full(self, replica: Replica, error: StoreFullError) -> float:
        self._on_event("object_store_full", actor=replica.name, cause=str(error))
        return time.monotonic()

    async def _watch(self, replica: Replica) -> None:
        """Notices when this actor dies while nobody calls it, does not answer, or makes no progress with its work."""
        handle, done, since = replica.handle, -1, time.monotonic()
        while replica.handle is handle:
            await asyncio.sleep(min(self._hang_timeout / 4, 10.0))
            try:
                async with asyncio.timeout(self._hang_timeout):
                    now = await steps_of(handle)
            except TimeoutError:
                self._hangs(replica, handle, f"it has not answered for {self._hang_timeout:g} s")
            except RayActorError as error:
                self._lost(replica, handle, "actor_died", cause_of(error), error)
                return
            else:
                if now != done or not replica.busy:
                    done, since = now, time.monotonic()
                elif time.monotonic() - max(since, replica.busy_since) > self._hang_timeout:
                    self._hangs(replica, handle, f"it has made no progress for {self._hang_timeout:g} s")

    def _hangs(self, replica: Replica, handle: Any, cause: str) -> None:
        if replica.handle is handle:
            end_processes(replica)
            self._lost(replica, handle, "actor_hung", f"{cause} (ray.hang_timeout_seconds)")
            replica.kill()  # also one that was to leave

    def _lost(self, replica: Replica, handle: Any, kind: str, cause: str, error: BaseException | None = None) -> None:
        """Tells of it, and begins to replace the actor; or, where it is not to be, fails whoever calls."""
        if replica.handle is not handle or not replica.alive:
            return  # another call has noticed before
        replica.kill()
        self._tell("began", replica, "away")
        self._on_event(kind, actor=replica.name, cause=cause)
        if self._max_restarts is None:
            failure = LearnerLostError(f"{replica.name} {LOST[kind]}: {cause}")
            failure.__cause__ = error
            self._fail(failure)
        else:
            self._coming[replica] = self._in_background(self._replace(replica, cause))

    def _fail(self, error: Exception) -> None:
        self._failure = error
        self._in_background(self._notify())

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _in_background(self, work: Coroutine[Any, Any, None]) -> asyncio.Task:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

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
        if coming := self._coming.get(replica):
            coming.cancel()
        async with self._changed:
            await self._changed.wait_for(lambda: not replica.calls)
        replica.kill()
        replica.give_up_place()
        self._leaving.remove(replica)
        self._tell("began", replica, "away")
        self._on_event("actor_ended", actor=replica.name)

    async def _replace(self, replica: Replica, cause: str) -> None:
        budget = self._budgets[replica]
        try:
            while not replica.alive and replica in self.replicas:
                if budget.spent():
                    raise CampaignError(
                        f"{replica.name} was lost {self._max_restarts or 0} times within an hour and once more "
                        f"(ray.max_restarts), the last time because: {cause}; see events.jsonl for the others, and run "
                        "the same command again to go on from the last checkpoint"
                    )
                await asyncio.sleep(budget.pause())
                budget.count()
                replica.restarts += 1
                self.restarts += 1
                try:
                    await self._start(replica, patient=True)
                except CampaignError as error:
                    replica.kill()
                    cause = str(error)
                    self._on_event("actor_died", actor=replica.name, cause=cause)
            self._on_event("actor_restarted", actor=replica.name, restarts=replica.restarts)
        except Exception as error:  # whatever it is: the callers that wait for an actor are told
            self._fail(error)


def _load(replica: Replica) -> int:
    return replica.under_way
