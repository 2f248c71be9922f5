"""Calls to the actors of one role: which actor gets a call, and what happens when it is lost under it.

Roles are plain classes; `ray.remote` is applied in ray_actor.py. A call goes to the actor with the least work. When
the actor dies, hangs or fails, the call goes to another one, and supervision.py starts a new actor in the lost one's
place. While the cluster has no room for it, the fleet works on with fewer. Objects that a method returns are owned by
the campaign process and outlive the actor.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from typing import Any

from actors.errors import ActorFaultError, CampaignError, EngineError, StoreFullError
from actors.trajectory import Requests, RolloutCounts
from cluster.fleet.ray_actor import ActorLostError, Replica, beside, held, invoke, streamed
from cluster.fleet.ray_batched_calls import BatchedCaller
from cluster.fleet.restarts import same_cause
from cluster.fleet.supervision import LATE_SECONDS, STARTS, Supervisor
from cluster.records.utilisation import IGNORED

ATTEMPTS = 2
"""Number of actors on which a call may fail; after that the call itself is considered the cause."""


class Fleet(Supervisor):
    """All actors of one role, and the calls to them.

    Errors of every call: a UserError or CampaignError that the method raised arrives as it is. ActorFaultError: the
    method raised anything else, on `ATTEMPTS` actors. EngineError: two engines failed at the call for the same cause.
    LostObjectError: an object among the arguments is gone. StoreFullError: the object store stayed full for
    `hang_timeout_seconds`. The fleet's fatal error, once it has one.
    """

    async def call(
        self,
        method: str,
        *arguments: Any,
        returns: int = 1,
        units: int = 1,
        at: Replica | None = None,
        **keywords: Any,
    ) -> Any:
        """Calls a method of the least busy actor, and waits for its answer; again on another actor if that one is lost.

        returns: values that the method returns. With 1, the call gives the value. With 2 or more it gives the first
        value and the object references of the others, which stay where they are.
        units: the size of the call, by which `least busy` is measured (tokens or trajectories).
        at: the replica to call while it lives, in place of the least busy one.
        Example: counts, reference = await fleet.call("generate", requests, returns=2, units=len(requests.ids))
        """

        async def do(replica: Replica) -> Any:
            handle = replica.handle  # retries stay with this actor; after its death the replica may hold another one
            return await self._patiently(replica, lambda: invoke(handle, method, arguments, returns, keywords))

        return await self._on_a_replica(method, units, at, do)

    async def ask(self, requests: Requests, *, units: int = 1, at: Replica | None = None) -> tuple[RolloutCounts, Any]:
        """Calls `generate` as `call(..., returns=2)` would, but many requests share few calls (ray_batched_calls.py).

        Waits for these requests only. The reference may hold other trajectories too. units, at: see `call`.
        """
        return await self._on_a_replica(
            "generate",
            units,
            at,
            lambda replica: self._batched(replica).generate(requests),
            leave=("abort", requests.ids),
        )

    def put(self, value: Any) -> Any:
        """The reference of a value of this process, for later calls to this fleet."""
        return held(value)

    async def call_each(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every living actor at once; the answers, in the order of the replicas.

        An actor that is lost meanwhile is replaced, and left out of the answers. So is one that is late: it is left
        behind, and gets no work until it has answered and `prepare` has brought it to where the others are. The call
        waits for at least one answer. Actors that are behind already are not called.
        """
        calls = {
            replica: asyncio.create_task(self._one_of_each(replica, method, arguments))
            for replica in self.replicas
            if replica.alive and not replica.behind
        }
        try:
            await _most(calls)
        except BaseException:
            for call in calls.values():
                call.cancel()
            raise
        for replica, call in calls.items():
            replica.tardy = replica.tardy and not call.done()
            if not call.done():
                self._leave_behind(replica, method, call)
        return [value for call in calls.values() if call.done() for value in call.result()]

    async def _one_of_each(self, replica: Replica, method: str, arguments: tuple) -> list[Any]:
        """[its answer], or [] if the actor is lost."""
        handle, answer = replica.handle, None  # the handle of now: the replica may get another actor meanwhile
        self._began(replica, method)
        try:
            answer = await invoke(handle, method, arguments, 1)
            return [answer]
        except (ActorLostError, ActorFaultError) as error:
            self._lost(replica, handle, _kind(error), error)
        finally:
            self._ended(replica, method, answer)
        return []

    async def tell(self, replica: Replica, method: str, *arguments: Any) -> None:
        """Calls a method of this actor and waits until it has ended; not for one that is dead, dies, or is late."""
        if replica.alive:
            told = self._in_background(self._told(replica, replica.handle, method, arguments))
            await asyncio.wait([told], timeout=LATE_SECONDS if replica.takes_work else 0)

    async def _told(self, replica: Replica, handle: Any, method: str, arguments: tuple) -> None:
        try:
            await invoke(handle, method, arguments, 1)
        except (ActorLostError, ActorFaultError) as error:
            self._lost(replica, handle, _kind(error), error)

    async def call_beside(self, method: str) -> None:
        """Calls a method of every living actor at once, beside the calls that they work on. Losses are not told here."""
        living = [replica.handle for replica in self.replicas if replica.alive]
        await asyncio.gather(*(beside(handle, method) for handle in living), return_exceptions=True)

    def tell_nodes(self, method: str, *arguments: Any) -> None:
        """Calls a method of one living actor on each node. Returns at once; answers and errors are ignored."""
        for replica in {replica.node: replica for replica in self.replicas if replica.alive}.values():
            getattr(replica.handle, method).remote(*arguments)

    async def stream(
        self, method: str, *arguments: Any, on_item: Callable[[Any], None] | None = None
    ) -> list[list[Any]]:
        """Calls a generator method of the only actor, and waits for its end.

        Returns one list for each rank (a Fleet has one, LearnerGroup several): object references of all that the
        method yielded, in order. on_item: called with each reference as it comes. The call is not repeated: a lost
        actor is an error here.
        """
        replica = await self._least_busy()
        handle = replica.handle
        self._began(replica, method)
        try:
            return [await streamed(handle, method, arguments, on_item)]
        except (ActorLostError, ActorFaultError) as error:
            self._lost(replica, handle, _kind(error), error)
            raise
        finally:
            self._ended(replica, method)
            if self._failure:  # replaces the actor's error: callers handle LearnerLostError, not the errors of an actor
                raise self._failure

    async def room(self, calls: int) -> Replica:
        """The least busy actor with fewer than `calls` calls under way; waits until there is one."""
        while True:
            if self._failure:
                raise self._failure
            if free := [replica for replica in self.replicas if replica.takes_work and replica.calls < calls]:
                return min(free, key=_load)
            await self._changed.wait()

    async def _on_a_replica(
        self,
        method: str,
        units: int,
        at: Replica | None,
        do: Callable[[Replica], Awaitable[Any]],
        leave: tuple[Any, ...] = ("status",),
    ) -> Any:
        """Runs `do` on the least busy replica, or on `at`; on another one as often as actors are lost under it.

        Once it also moves away from a silent actor, whose answer then counts no more. Once only: work that makes every
        actor silent ends on the second one, or with it. leave: the method, and its arguments, that the silent actor is
        then called with; it answers when it is done with the work, or has given it up.
        """
        tries, moved = _Tries(method, self.role, self._max_restarts), False
        while True:
            replica = at if at is not None and at.takes_work else await self._least_busy()
            handle, answer = replica.handle, None  # `_lost` compares it: a late error must not end the next actor here
            replica.under_way += units
            replica.calls += 1
            self._began(replica, method)
            patience = asyncio.timeout(None)
            if not moved:
                replica.patience.add(patience)
            try:
                async with patience:
                    answer = await do(replica)
                    self._worked |= method not in IGNORED
                    return answer
            except TimeoutError:
                if not patience.expired():
                    raise
                moved = True
                self._in_background(self._left(replica, handle, *leave))
            except ActorLostError as error:
                self._lost(replica, handle, _kind(error), error)
                tries.failed(replica.name, error, self._worked)
            except ActorFaultError as error:
                tries.failed(replica.name, error, self._worked)
                self._lost(replica, handle, _kind(error), error)
            finally:
                replica.patience.discard(patience)
                self._ended(replica, method, answer)
                replica.under_way -= units
                replica.calls -= 1
                self._changed.tell()

    async def _left(self, replica: Replica, handle: Any, method: str, *arguments: Any) -> None:
        """Counts a silent actor as busy until it is done with the work that has moved to another."""
        self._began(replica, method)
        try:
            with suppress(ActorLostError, ActorFaultError):  # the watch notices it too
                await invoke(handle, method, arguments, 1)
        finally:
            self._ended(replica, method)

    async def _patiently(self, replica: Replica, do: Callable[[], Awaitable[Any]]) -> Any:
        """Runs `do`, again each second while the object store is full, for as long as an actor may hang."""
        full_since: float | None = None
        while True:
            try:
                return await do()
            except StoreFullError as error:
                if full_since is None:
                    full_since = time.monotonic()
                    self._on_event("object_store_full", actor=replica.name, cause=str(error))
                if time.monotonic() - full_since > self._hang_timeout:
                    raise
                await asyncio.sleep(1.0)

    def _batched(self, replica: Replica) -> BatchedCaller:
        if replica.batched is None or replica.batched.handle is not replica.handle:
            replica.batched = BatchedCaller(replica.handle, replica.name, partial(self._patiently, replica))
        return replica.batched

    async def _least_busy(self) -> Replica:
        await self._changed.wait_for(lambda: self._failure or any(r.takes_work for r in self.replicas))
        if self._failure:
            raise self._failure
        return min((r for r in self.replicas if r.takes_work), key=_load)


class _Tries:
    """What one call has met, and whether it may go to another actor."""

    def __init__(self, method: str, role: str, max_restarts: int | None):
        self._method, self._role, self._max_restarts = method, role, max_restarts
        self._failures, self._losses, self._causes = 0, 0, set[str]()

    def failed(self, actor: str, error: ActorLostError | ActorFaultError, worked: bool) -> None:
        """The call has ended with this error. Raises what the caller is told, if it may not be tried again.

        worked: whether an actor of the fleet has ever done any work. What fails before that is most likely the
        configuration, so fewer processes are tried.
        """
        if isinstance(error, EngineError):
            # Engines fail for reasons of their machines, too: only the same cause again is one of the call.
            before, cause = len(self._causes), same_cause(error)
            self._causes.add(cause)
            if len(self._causes) == before:
                again = "another engine has failed so at the same call, so it is not tried a third time"
                raise EngineError(f"{actor}: {error}; {again}") from error
        elif isinstance(error, ActorFaultError):
            self._failures += 1
            if self._failures == ATTEMPTS:  # this call would make one actor after the other fail
                raise error
            return
        self._losses += 1
        most = STARTS - 1 if not worked else (self._max_restarts or 0) + ATTEMPTS
        if self._max_restarts is not None and self._losses > most:
            first = "" if worked else "first "
            raise CampaignError(
                f"{self._method}: {self._losses} actors of {self._role} died of the same {first}call: {error}"
            ) from error


def _kind(error: ActorLostError | ActorFaultError) -> str:
    """The event that reports this error."""
    return "actor_died" if isinstance(error, ActorLostError) else "actor_failed"


async def _most(calls: dict[Replica, asyncio.Task]) -> None:
    """Waits for all of these calls but the late ones, and for at least one answer."""
    prompt = [call for replica, call in calls.items() if not (replica.tardy or replica.silent)]
    start, waiting = time.monotonic(), set(prompt or calls.values())
    while waiting:
        done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        if any(call.result() for call in done):
            break
    else:  # all of these were lost
        waiting = {call for call in calls.values() if not call.done()}
        if waiting:
            await asyncio.wait(waiting)
    if waiting:
        await asyncio.wait(waiting, timeout=max(LATE_SECONDS, 2 * (time.monotonic() - start)))


def _load(replica: Replica) -> int:
    return replica.under_way
