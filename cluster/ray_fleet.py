"""Fleets: the replicas of one role as supervised Ray actors.

Roles are plain classes; `ray.remote` is applied here. A call goes to the replica with the least work under way; when
its actor dies, the call is given to another, and a new actor takes the lost one's place, with the current weights,
before it gets work. What a role *returns* is owned by the campaign process and outlives the actor.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.errors import CampaignError, LearnerLostError, UserError
from cluster.utilisation import Utilisation

OnEvent = Callable[..., None]
"""Called with the kind of event and its fields."""


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for one actor."""

    cpus: float
    gpus: float
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the actor's process."""
    custom: dict[str, float] = field(default_factory=dict)
    """Resources that the cluster's operator has named."""


@dataclass
class Replica:
    """One place in a fleet; the actor in it may change."""

    name: str
    handle: Any = None
    under_way: int = 0
    """Units of work that it has been given and not answered."""
    calls: int = 0
    """Calls, likewise."""
    restarts: int = 0
    alive: bool = False
    node: str = ""
    """Where its actor is: Ray's id of the node."""


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
        on_event: OnEvent,
    ):
        """max_restarts: how often one replica is replaced; None: never, its loss is LearnerLostError for every caller."""
        self.role = role
        self.restarts = 0
        self.replicas = [Replica(f"{role}-{i}") for i in range(replicas)]
        self._ever = replicas
        self._leaving: list[Replica] = []
        self._actor_class, self._arguments, self._keywords = actor_class, arguments, keywords
        self._resources, self._max_restarts = resources, max_restarts
        self._start_timeout = start_timeout_seconds
        self._on_event = on_event
        self._changed = asyncio.Condition()
        self._failure: Exception | None = None
        self._tasks: set[asyncio.Task] = set()
        self.prepare: Callable[[Any], Awaitable[None]] | None = None
        """Run on each new actor's handle before it gets work: gives it the current weights."""
        self.utilisation: Utilisation | None = None
        """Is told when calls begin and end."""

    async def start(self) -> None:
        """Starts every replica and waits until all can work. UserError where the input is why one cannot."""
        await asyncio.gather(*(self._start(replica) for replica in self.replicas))

    def resize(self, replicas: int) -> None:
        """Begins to start more actors, or to end some; those that end finish first what they have been given.

        An actor that cannot start is told as the event `scaling_failed`, and the fleet goes on without it.
        """
        for _ in range(replicas - len(self.replicas)):
            replica = Replica(f"{self.role}-{self._ever}")
            self._ever += 1
            self.replicas.append(replica)
            self._in_background(self._join(replica))
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
        """Calls a method of the least busy replica, or of `at`; again on another one as long as actors die under it.

        With `returns` of 2 or more, the result is the first value and the references of the others, not fetched.
        """
        while True:
            replica = at if at is not None and at.alive else await self._least_busy()
            replica.under_way += units
            replica.calls += 1
            handle = replica.handle
            self._tell("began", replica, method)
            try:
                return await invoke(handle, method, arguments, returns, keywords)
            except RayActorError as error:
                await self._lost(replica, handle, error)
            finally:
                self._tell("ended", replica, method)
                replica.under_way -= units
                replica.calls -= 1
                async with self._changed:
                    self._changed.notify_all()

    async def call_each(self, method: str, *arguments: Any) -> list[Any]:
        """Calls a method of every living replica; one that dies meanwhile is replaced and left out of the answers."""

        async def one(replica: Replica) -> list[Any]:
            handle, answer = replica.handle, None
            self._tell("began", replica, method)
            try:
                answer = await invoke(handle, method, arguments, 1)
                return [answer]
            except RayActorError as error:
                await self._lost(replica, handle, error)
                return []
            finally:
                self._tell("ended", replica, method, answer)

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

    async def stream(self, method: str, *arguments: Any, on_item: Callable[[Any], None] | None = None) -> list[Any]:
        """Calls a generator method of the only replica: the references of all that it yields, in order.

        on_item: is called with each as it comes. An error within the method is raised as of any other call.
        """
        [replica] = self.replicas
        handle = replica.handle
        self._tell("began", replica, method)
        try:
            return await streamed(handle, method, arguments, on_item)
        except RayActorError as error:
            await self._lost(replica, handle, error)
            raise
        finally:
            self._tell("ended", replica, method)

    def close(self) -> None:
        """Ends all actors at once."""
        for task in self._tasks:
            task.cancel()
        for replica in (*self.replicas, *self._leaving):
            if replica.handle is not None:
                ray.kill(replica.handle)
                replica.handle, replica.alive = None, False

    async def _start(self, replica: Replica) -> None:
        actor: Any = ray.remote(self._actor_class).options(
            num_cpus=self._resources.cpus,
            num_gpus=self._resources.gpus,
            resources=self._resources.custom,
            max_restarts=0,
            max_task_retries=0,
            runtime_env={"env_vars": self._resources.environment} if self._resources.environment else None,
        )
        replica.handle = actor.remote(*self._arguments, **self._keywords)
        try:
            async with asyncio.timeout(self._start_timeout):
                await invoke(replica.handle, "status", (), 1)
                replica.node = await replica.handle.__ray_call__.remote(_node)
                if self.prepare is not None:
                    with errors_of("the start"):
                        await self.prepare(replica.handle)
        except TimeoutError as error:
            raise CampaignError(
                f"{replica.name} did not start within {self._start_timeout:g} s (ray.start_timeout_seconds)"
            ) from error
        except RayActorError as error:
            raise _start_failure(replica.name, error) from error
        if replica in self._leaving:  # the fleet has shrunk meanwhile
            return
        replica.alive = True
        self._tell("ended", replica, "away")
        self._on_event("actor_started", actor=replica.name)
        async with self._changed:
            self._changed.notify_all()

    async def _least_busy(self) -> Replica:
        async with self._changed:
            await self._changed.wait_for(lambda: self._failure or any(r.alive for r in self.replicas))
        if self._failure:
            raise self._failure
        return min((r for r in self.replicas if r.alive), key=_load)

    def _tell(self, what: str, replica: Replica, method: str, *answer: Any) -> None:
        if self.utilisation is not None:
            getattr(self.utilisation, what)(replica.name, self.role, method, *answer)

    async def _lost(self, replica: Replica, handle: Any, error: RayActorError) -> None:
        if replica.handle is not handle or not replica.alive:
            return  # another call has noticed before
        replica.alive = False
        self._tell("began", replica, "away")
        self._on_event("actor_died", actor=replica.name, cause=cause_of(error))
        ray.kill(handle)
        if self._max_restarts is None:
            raise LearnerLostError(f"{replica.name} died: {cause_of(error)}") from error
        self._in_background(self._replace(replica))

    def _in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _join(self, replica: Replica) -> None:
        try:
            await self._start(replica)
        except (CampaignError, UserError) as error:
            if replica in self.replicas:
                self.replicas.remove(replica)
            ray.kill(replica.handle)
            self._on_event("scaling_failed", actor=replica.name, cause=str(error))

    async def _leave(self, replica: Replica) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: not replica.calls)
        ray.kill(replica.handle)
        replica.handle = None
        self._leaving.remove(replica)
        self._tell("began", replica, "away")
        self._on_event("actor_ended", actor=replica.name)

    async def _replace(self, replica: Replica) -> None:
        try:
            while not replica.alive:
                if replica.restarts >= (self._max_restarts or 0):
                    raise CampaignError(
                        f"{replica.name} died {replica.restarts + 1} times (ray.max_restarts={self._max_restarts}); "
                        "see events.jsonl for the causes, and run the same command again to go on from the last "
                        "checkpoint"
                    )
                # A machine that kills actors as fast as they start is not helped by starting them faster.
                await asyncio.sleep(min(30.0, 0.5 * 2**replica.restarts) if replica.restarts else 0)
                replica.restarts += 1
                self.restarts += 1
                try:
                    await self._start(replica)
                except _DiedAtStartError as error:
                    self._on_event("actor_died", actor=replica.name, cause=str(error))
            self._on_event("actor_restarted", actor=replica.name, restarts=replica.restarts)
        except Exception as error:  # whatever it is: the callers that wait for an actor are told
            self._failure = error
            async with self._changed:
                self._changed.notify_all()


def _node(_actor: Any) -> str:
    return ray.get_runtime_context().get_node_id()


def _load(replica: Replica) -> int:
    return replica.under_way


class _DiedAtStartError(CampaignError):
    """The process of a new actor ended before it could work."""


async def invoke(
    handle: Any, method: str, arguments: tuple, returns: int, keywords: dict[str, Any] | None = None
) -> Any:
    """Calls a method of one actor: its value, or the first of its values and the references of the others."""
    with errors_of(method):
        if returns == 1:
            return await getattr(handle, method).remote(*arguments, **(keywords or {}))
        first, *others = getattr(handle, method).options(num_returns=returns).remote(*arguments, **(keywords or {}))
        return await first, *others


async def streamed(
    handle: Any, method: str, arguments: tuple, on_item: Callable[[Any], None] | None = None
) -> list[Any]:
    """Calls a generator method of one actor: the references of all that it yields."""
    with errors_of(method):
        yielded = getattr(handle, method).options(num_returns="streaming").remote(*arguments)
        references = []
        async for reference in yielded:
            references.append(reference)
            if on_item is not None:
                on_item(reference)
        await yielded.completed()  # what broke off a stream is not raised before
        return references


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Our own errors say all that is to say; others keep the actor's traceback as their cause."""
    try:
        yield
    except RayTaskError as error:
        if isinstance(error.cause, (UserError, CampaignError)):
            raise error.cause from None
        raise CampaignError(f"{what} failed: {type(error.cause).__name__}: {error.cause}") from error


def _start_failure(name: str, error: RayActorError) -> Exception:
    last_line = cause_of(error)
    if match := re.search(r"actors\.errors\.UserError: (.*)", str(error)):
        where, _, rest = match[1].partition(": found ")
        found, _, expected = rest.partition(", expected ")
        return UserError(where, found, expected)
    kind = _DiedAtStartError if "raised in its creation task" not in str(error) else CampaignError
    return kind(f"{name} could not start: {last_line}")


def cause_of(error: RayActorError) -> str:
    """Why an actor has died, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if line.startswith("The actor is dead because")] or lines
    return telling[-1].partition(" Some common causes")[0]
