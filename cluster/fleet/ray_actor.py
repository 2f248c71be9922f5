"""One Ray actor: its reserved place, its creation, calls to it, the errors that come back, and its end.

Errors cross from the actor's process as exceptions of our own (actors/errors.py); other modules see no error of Ray.
"""

import asyncio
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    OutOfMemoryError,
    RayActorError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.accelerator import keep_to_share, require_gpu
from actors.errors import ActorFaultError, CampaignError, LostObjectError, StoreFullError, UserError
from actors.gpu_share import is_share
from actors.heartbeat import BUILDS, count, phase, phases, waiting
from actors.last_words import last_error
from cluster.fleet.ray_room import shortage_now
from cluster.fleet.ray_start import Teller, forget, told

DEATHS = (RayActorError, OutOfMemoryError, WorkerCrashedError, NodeDiedError)
"""Ray's errors of a process that is gone. OutOfMemoryError: Ray has ended it, because its node had hardly any memory left."""
WAIT_SECONDS = 5.0
"""After this long without a place it is asked why, and again each time it has passed."""
SUPERVISION = "supervision"
"""A concurrency group: one thread in the actor's process that answers the watch while the actor works."""


class ActorLostError(CampaignError):
    """The actor's process has died, or cannot be reached; the message is the cause, in one line."""


class DiedAtStartError(CampaignError):
    """The process of a new actor ended before it could work, without an error that says why."""


class PerRank(NamedTuple):
    """Arguments of a call to a learner of several ranks that differ from rank to rank.

    Example: call("update", ids, PerRank([[a, b], [c]])) runs update(ids, a, b) on rank 0 and update(ids, c) on rank 1.
    """

    arguments: list[list[Any]]
    """[ranks] each rank's arguments."""


@dataclass(frozen=True)
class Resources:
    """The resources that Ray reserves for one actor."""

    cpus: float
    gpus: float
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the actor's process."""
    custom: dict[str, float] = field(default_factory=dict)
    """Custom resources of the cluster, by the operator's names."""

    @property
    def bundle(self) -> dict[str, float]:
        """The resources as a bundle of a placement group; empty where nothing is reserved."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in amounts.items() if amount}


@dataclass(eq=False)
class Replica:
    """One place in a fleet. The actor in it may change; the name and the reserved place stay."""

    name: str
    handle: Any = None
    placement: PlacementGroup | None = None
    """The reservation, which the next actor in this place takes over."""
    under_way: int = 0
    """Units (tokens or trajectories) of the unanswered calls; actors are balanced by it."""
    calls: int = 0
    """Unanswered calls that count in `under_way`."""
    busy: int = 0
    """Unanswered calls of any kind, also those to every actor (`call_each`)."""
    busy_since: float = 0.0
    """When the first of these began, or the last answer came; seconds of time.monotonic()."""
    restarts: int = 0
    alive: bool = False
    """Whether it has started and is neither lost nor leaving."""
    behind: bool = False
    """Whether the fleet went on without its answer to a call to each actor. It gets no work until it has caught up."""
    tardy: bool = False
    """Whether it was late for the last call to each actor: the next one does not wait for it."""
    silent: str = ""
    """What is missing: `has not answered` or `has made no progress`; empty for an actor that does both. A silent one gets
    no work, and what it has goes to another."""
    silent_since: float = 0.0
    """Time of its last sign of life, where it is silent; seconds of time.monotonic()."""
    waits_for: str = ""
    """Something outside the campaign that it waits for (actors/heartbeat.py), such as a teacher's server."""
    waits_since: float = 0.0
    """Since when; seconds of time.monotonic()."""
    patience: set[asyncio.Timeout] = field(default_factory=set)
    """A timeout without a limit for each unanswered call that may move to another actor; it is set when that is due."""
    node: str = ""
    """Ray's id of the actor's node."""
    process: int = 0
    doing: str = ""
    """What it does while it starts, for example which model it downloads."""
    doing_since: float = field(default_factory=time.monotonic)
    """Since when; seconds of time.monotonic()."""
    created: float = 0.0
    """When its process was asked for; seconds of time.monotonic()."""
    phases: list[tuple[str, float]] = field(default_factory=list)
    """(name, seconds) of what it did while it started, after its process was there."""
    batched: Any = None
    """The BatchedCaller of its actor (ray_batched_calls.py), from the first `ask` on."""
    version: int | None = None
    """The weight version that a rollout actor holds."""

    @property
    def takes_work(self) -> bool:
        """Whether it gets new calls."""
        return self.alive and not self.behind and not self.silent

    @property
    def readiness(self) -> int:
        """How near it is to work: 0 waits for room, then has room, a process, a built actor, is alive, 5 takes work."""
        steps = (self.placement is not None, self.handle is not None, self.process, self.alive, self.takes_work)
        return sum(map(bool, steps))

    def began(self) -> None:
        """A call has been sent."""
        if not self.busy:
            self.busy_since = time.monotonic()
        self.busy += 1

    def ended(self) -> None:
        """A call has been answered, or its actor has died."""
        self.busy -= 1
        self.busy_since = time.monotonic()

    def kill(self) -> None:
        """Ends the actor at once, if it has one; its place stays reserved."""
        if self.handle is not None:
            ray.kill(self.handle)
            self.handle, self.process = None, 0
        self.alive = False

    def give_up_place(self) -> None:
        """Gives the reservation back to the cluster."""
        if self.placement is not None:
            remove_placement_group(self.placement)
            self.placement = None


async def place(
    held: PlacementGroup | None,
    nodes: Iterable[str],
    bundles: list[dict[str, float]],
    on_wait: Callable[[str], None],
) -> PlacementGroup | None:
    """A placement group with these bundles; waits without limit until the cluster has room.

    held, nodes: the group that is already reserved, and its nodes; it is kept unless one of its nodes is gone.
    on_wait: called after WAIT_SECONDS, and when the reason changes: with what there is no room for, or "" where there is
    room and the start takes its time. Returns None where no bundle reserves anything.
    """
    if not any(bundles):
        return None
    # In a thread: the question to the cluster blocks, and the campaign's event loop must go on.
    if held is not None and not await asyncio.to_thread(_live, nodes):
        remove_placement_group(held)
        held = None
    if held is None:
        held = placement_group(bundles, strategy="PACK")
    asked, reported = time.monotonic(), None
    start = asked
    try:
        # Polled: `held.ready()` would start a worker process in the group only to report that there is room.
        while not held.wait(0):
            await asyncio.sleep(0.02 if time.monotonic() - start < 1 else 0.5)
            if time.monotonic() - asked > WAIT_SECONDS:
                asked, reason = time.monotonic(), await asyncio.to_thread(shortage_now, bundles)
                # Amounts in the reason change often: what is missing is told once.
                if reported is None or bool(reason) != bool(reported):
                    reported = reason
                    on_wait(reason)
    except BaseException:
        remove_placement_group(held)
        raise
    return held


def within(seconds: float, do: Callable[[], object]) -> None:
    """Does something that may block for ever, and goes on without it after so many seconds."""
    doing = threading.Thread(target=do, daemon=True)
    doing.start()
    doing.join(seconds)


def create(
    actor_class: type,
    arguments: tuple,
    keywords: dict[str, Any],
    resources: Resources,
    placement: PlacementGroup | None,
    bundle: int = 0,
) -> Any:
    """Creates an actor in a process of its own, and returns its handle at once; see `wait_until_built`.

    bundle: the number of the actor's bundle in the placement group.
    """
    keeping = _keeping_its_error(actor_class, resources.gpus)
    actor: Any = ray.remote(concurrency_groups={SUPERVISION: 1})(keeping).options(  # type: ignore[call-overload]
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        resources=resources.custom,
        max_restarts=0,  # the fleet replaces actors: Ray would restart one without its weights
        max_task_retries=0,
        runtime_env={"env_vars": resources.environment} if resources.environment else None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement, bundle) if placement else "DEFAULT",
    )
    return actor.remote(*arguments, **keywords)


async def wait_until_built(handle: Any, name: str) -> None:
    """Waits for the end of a new actor's constructor.

    UserError: the constructor raised it. CampaignError: it raised something else. DiedAtStartError: its process ended.
    """
    try:
        with errors_of("the constructor"):
            await handle.__ray_call__.remote(_raise_kept_error)
    except ActorLostError as error:
        raise DiedAtStartError(f"{name} could not start: {error}") from error
    except CampaignError as error:
        raise CampaignError(f"{name} could not start: {error}") from error


async def whereabouts(handle: Any) -> tuple[str, int]:
    """An actor's node (Ray's id) and process number."""
    # `__ray_call__` runs a function in the actor's process, so the classes of the roles need no method for it.
    return await handle.__ray_call__.remote(_whereabouts)


async def started(handle: Any) -> list[tuple[str, float]]:
    """The start is over: the actor tells no more of it. Returns (name, seconds) of its phases (actors/heartbeat.py)."""
    with errors_of("the start"):
        phases = await handle.__ray_call__.options(concurrency_group=SUPERVISION).remote(_end_start)
        await asyncio.to_thread(forget, handle)
        return phases


async def progress_of(handles: Iterable[Any]) -> list[tuple[str, str]]:
    """What each of these new actors has told of its start (ray_start.py)."""

    def read() -> list[tuple[str, str]]:
        return [told(handle) for handle in handles]

    return await asyncio.to_thread(read)


async def steps_of(handle: Any) -> tuple[int, tuple[str, float]]:
    """The number of small steps that the actor has taken, and what it waits for (actors/heartbeat.py); answers also while
    it works.

    ActorLostError: the actor has died.
    """
    with errors_of("the watch"):
        return await handle.__ray_call__.options(concurrency_group=SUPERVISION).remote(_steps)


async def beside(handle: Any, method: str) -> None:
    """Calls a method in the thread that answers the watch, while the actor works on another call. Errors: see `errors_of`."""
    with errors_of(method):
        await handle.__ray_call__.options(concurrency_group=SUPERVISION).remote(_call, method)


def end_processes(replica: Replica) -> None:
    """Kills the actor's process and its children, on the actor's node. It works on stopped processes too."""
    task: Any = ray.remote(kill_tree).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(replica.node, soft=False)
    )
    task.remote(replica.process)


async def invoke(
    handle: Any, method: str, arguments: tuple, returns: int, keywords: dict[str, Any] | None = None
) -> Any:
    """Calls a method of one actor and waits for it: its value, or its first value and references of the others.

    returns: values that the method returns. Errors: see `errors_of`.
    """
    with errors_of(method):
        if returns == 1:
            return await getattr(handle, method).remote(*arguments, **(keywords or {}))
        first, *others = getattr(handle, method).options(num_returns=returns).remote(*arguments, **(keywords or {}))
        return await first, *others


async def streamed(
    handle: Any, method: str, arguments: tuple, on_item: Callable[[Any], None] | None = None
) -> list[Any]:
    """Calls a generator method of one actor and waits for its end: the references of all that it yields, in order.

    on_item: called with each reference as it comes. Errors: see `errors_of`.
    """
    with errors_of(method):
        yielded = getattr(handle, method).options(num_returns="streaming").remote(*arguments)
        references = []
        async for reference in yielded:
            references.append(reference)
            if on_item is not None:
                on_item(reference)
        await yielded.completed()  # raises the error that broke off the stream; the iteration just ends
        return references


async def fetched(references: Iterable[Any]) -> list[Any]:
    """The values of object references. LostObjectError: one of them is gone."""
    with errors_of("reading"):
        return await asyncio.gather(*references)


def held(value: Any) -> Any:
    """The reference of a value that this process puts into Ray's object store, and owns."""
    return ray.put(value)


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Turns Ray's errors within the block into ours. `what` names the call in messages.

    UserError, CampaignError: raised in the actor, and raised here as they were. ActorLostError: the actor has died.
    LostObjectError, StoreFullError: not the actor's fault. ActorFaultError: the actor raised anything else; Ray's error
    with the actor's traceback is its cause.
    """
    try:
        yield
    except DEATHS as error:
        raise ActorLostError(cause_of(error)) from error
    except (RayTaskError, ObjectLostError, ObjectStoreFullError, OutOfDiskError) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        message = f"{what} failed: {type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}"
        if isinstance(cause, (UserError, CampaignError)):
            raise cause from None
        if isinstance(cause, ObjectLostError):
            raise LostObjectError(message) from error
        if isinstance(cause, (ObjectStoreFullError, OutOfDiskError)):
            raise StoreFullError(message) from error
        raise ActorFaultError(message) from error


def cause_of(error: BaseException) -> str:
    """Why an actor has died, in one line.

    A lost node first shows as connection errors; Ray reports its death up to 15 seconds later.
    """
    if isinstance(error, ActorUnavailableError):
        reason = re.search(r"RPC error: (.*?) rpc_code", str(error))
        return f"it cannot be reached any more, as when its node is gone ({reason[1] if reason else error})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if isinstance(error, OutOfMemoryError):  # the first line says so; the others are advice and a list of processes
        return lines[0]
    telling = [line for line in lines if line.startswith("The actor is dead because")] or lines
    last = last_error(log) if (log := _log_of(lines)) else ""
    return telling[-1].partition(" Some common causes")[0] + f" The last error in its log: {last}" * bool(last)


def _log_of(lines: list[str]) -> Path | None:
    """The log of the dead actor that these lines of Ray's are about, where it ran on this machine; None: elsewhere."""
    place = dict(line.split(": ", 1) for line in lines if line.startswith(("pid: ", "ip: ")))
    node: Any = ray._private.worker._global_node  # which says where logs are; Ray has no public way to ask
    if node is None or place.get("ip") != node.node_ip_address:
        return None
    return next(Path(node.get_logs_dir_path()).glob(f"worker-*-{place.get('pid')}.err"), None)


def _keeping_its_error(actor_class: type, gpus: float = 0.0) -> type:
    """The class with a constructor that keeps an error instead of raising it; `wait_until_built` raises it.

    An error in the constructor of a Ray actor reaches callers only as text, as part of "the actor died". An error in
    a call arrives as the exception that it was. gpus: if any are reserved, torch is asked first whether it can use them,
    and is limited to a share of one.
    """

    def build(self: Any, *arguments: Any, **keywords: Any) -> None:
        self.error_of_constructor, self.start_teller = None, Teller()
        phase(BUILDS)
        try:
            if gpus:
                require_gpu(f"{gpus:g} by Ray")
            if is_share(gpus):
                keep_to_share(gpus)
            actor_class.__init__(self, *arguments, **keywords)  # type: ignore[misc]
        except Exception as error:
            self.error_of_constructor = error
        phase("")

    names = {"__init__": build, "__module__": actor_class.__module__, "__doc__": actor_class.__doc__}
    return type(actor_class.__name__, (actor_class,), names)


def _raise_kept_error(actor: Any) -> None:
    if actor.error_of_constructor is not None:
        raise actor.error_of_constructor


def _live(nodes: Iterable[str]) -> bool:
    return {node for node in nodes if node} <= {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _whereabouts(_actor: Any) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _steps(_actor: Any) -> tuple[int, tuple[str, float]]:
    return count(), waiting()


def _end_start(actor: Any) -> list[tuple[str, float]]:
    actor.start_teller.end()
    return phases()


def _call(actor: Any, method: str) -> None:
    getattr(actor, method)()


def kill_tree(process: int) -> None:
    """Kills a process and all that it has started; one that is gone is no error."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process)
        # The children are listed and killed before their parent: they would no longer be its children after its end.
        for one in [*first.children(recursive=True), first]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
