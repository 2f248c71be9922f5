"""One actor in a process of its own: what it reserves, how it is called, which of its errors are whose, and its end."""

import asyncio
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import psutil
import ray
from ray.exceptions import (
    ActorUnavailableError,
    ObjectLostError,
    ObjectStoreFullError,
    OutOfDiskError,
    RayActorError,
    RayTaskError,
)
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from actors.errors import ActorFaultError, CampaignError, LostObjectError, StoreFullError, UserError
from actors.heartbeat import count

SUPERVISION = "supervision"
"""The concurrency group, a thread of its own in the actor's process, that answers beside the work."""


class DiedAtStartError(CampaignError):
    """The process of a new actor ended before it could work, and did not say why."""


class PerRank(NamedTuple):
    """In a call to a learner of several ranks, arguments that each rank has of its own."""

    arguments: list[list[Any]]
    """By rank."""


@dataclass(frozen=True)
class Resources:
    """What Ray reserves for one actor."""

    cpus: float
    gpus: float
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the actor's process."""
    custom: dict[str, float] = field(default_factory=dict)
    """Resources that the cluster's operator has named."""

    @property
    def bundle(self) -> dict[str, float]:
        """As a bundle of a placement group; empty where nothing is reserved."""
        amounts = {"CPU": self.cpus, "GPU": self.gpus, **self.custom}
        return {name: amount for name, amount in amounts.items() if amount}


@dataclass(eq=False)
class Replica:
    """One place in a fleet; the actor in it may change."""

    name: str
    handle: Any = None
    placement: PlacementGroup | None = None
    """What is reserved for it: its successors inherit the place."""
    under_way: int = 0
    """Units of work that it has been given and not answered."""
    calls: int = 0
    """Calls, likewise."""
    busy: int = 0
    """Calls of any kind that have not been answered, whatever they count for."""
    busy_since: float = 0.0
    """When the first of these began, or the last one was answered."""
    restarts: int = 0
    alive: bool = False
    node: str = ""
    """Where its actor is: Ray's id of the node."""
    process: int = 0
    mailbox: Any = None
    """Of its actor, once it has been asked for anything (ray_mailbox.py)."""
    version: int | None = None
    """Of the weights that a rollout actor holds."""

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
            self.handle = None
        self.alive = False

    def give_up_place(self) -> None:
        """What was reserved is others' to use."""
        if self.placement is not None:
            remove_placement_group(self.placement)
            self.placement = None


async def place(
    held: PlacementGroup | None,
    nodes: Iterable[str],
    bundles: list[dict[str, float]],
    on_wait: Callable[[], None],
) -> PlacementGroup | None:
    """A placement group with what is needed, waiting for it as long as it takes: the one that is held, unless a node
    that it was on has gone. None: nothing is to be reserved. on_wait: is called once, where the cluster has not enough."""
    if not any(bundles):
        return None
    if held is not None and not await asyncio.to_thread(_live, nodes):
        remove_placement_group(held)
        held = None
    if held is None:
        held = placement_group(bundles, strategy="PACK")
    start, told = time.monotonic(), False
    try:
        while not held.wait(0):
            await asyncio.sleep(0.02 if time.monotonic() - start < 1 else 0.5)
            if not told and time.monotonic() - start > 5:
                on_wait()
                told = True
    except BaseException:
        remove_placement_group(held)
        raise
    return held


def create(
    actor_class: type,
    arguments: tuple,
    keywords: dict[str, Any],
    resources: Resources,
    placement: PlacementGroup | None,
    bundle: int = 0,
) -> Any:
    """The handle of a new actor of this class, in its own process and in its place."""
    actor: Any = ray.remote(concurrency_groups={SUPERVISION: 1})(actor_class).options(  # type: ignore[call-overload]
        num_cpus=resources.cpus,
        num_gpus=resources.gpus,
        resources=resources.custom,
        max_restarts=0,
        max_task_retries=0,
        runtime_env={"env_vars": resources.environment} if resources.environment else None,
        scheduling_strategy=PlacementGroupSchedulingStrategy(placement, bundle) if placement else "DEFAULT",
    )
    return actor.remote(*arguments, **keywords)


async def whereabouts(handle: Any) -> tuple[str, int]:
    """Node and process of an actor."""
    return await handle.__ray_call__.remote(_whereabouts)


async def steps_of(handle: Any) -> int:
    """How many small steps the actor has taken, whatever it is doing (actors/heartbeat.py)."""
    return await handle.__ray_call__.options(concurrency_group=SUPERVISION).remote(_steps)


def end_processes(replica: Replica) -> None:
    """Ends the actor's process and all below it on its node, also those that are stopped and would not hear of it."""
    task: Any = ray.remote(_kill_tree).options(
        num_cpus=0, max_retries=0, scheduling_strategy=NodeAffinitySchedulingStrategy(replica.node, soft=False)
    )
    task.remote(replica.process)


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


async def fetched(references: Iterable[Any]) -> list[Any]:
    """The values of references. LostObjectError: one of them is gone."""
    with errors_of("reading"):
        return await asyncio.gather(*references)


@contextmanager
def errors_of(what: str) -> Iterator[None]:
    """Our own errors say all that is to say; others keep the actor's traceback as their cause.

    LostObjectError, StoreFullError: no fault of the actor. ActorFaultError: what no actor should raise.
    """
    try:
        yield
    except (RayTaskError, ObjectLostError, ObjectStoreFullError, OutOfDiskError) as error:
        cause = error.cause if isinstance(error, RayTaskError) else error
        told = f"{what} failed: {type(cause).__name__}: {str(cause).strip().splitlines()[0] if str(cause) else ''}"
        if isinstance(cause, (UserError, CampaignError)):
            raise cause from None
        if isinstance(cause, ObjectLostError):
            raise LostObjectError(told) from error
        if isinstance(cause, (ObjectStoreFullError, OutOfDiskError)):
            raise StoreFullError(told) from error
        raise ActorFaultError(told) from error


def start_failure(name: str, error: RayActorError) -> Exception:
    """Why an actor could not start: UserError where the input is at fault."""
    last_line = cause_of(error)
    if match := re.search(r"actors\.errors\.UserError: (.*)", str(error)):
        where, _, rest = match[1].partition(": found ")
        found, _, expected = rest.partition(", expected ")
        return UserError(where, found, expected)
    kind = CampaignError if "raised in its creation task" in str(error) else DiedAtStartError
    return kind(f"{name} could not start: {last_line}")


def cause_of(error: RayActorError) -> str:
    """Why an actor has died, in one line.

    Of a node that is gone callers hear first that connections broke; that it has died Ray says up to 15 seconds later.
    """
    if isinstance(error, ActorUnavailableError):
        reason = re.search(r"RPC error: (.*?) rpc_code", str(error))
        return f"it cannot be reached any more, as when its node is gone ({reason[1] if reason else error})"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    telling = [line for line in lines if line.startswith("The actor is dead because")] or lines
    return telling[-1].partition(" Some common causes")[0]


def _live(nodes: Iterable[str]) -> bool:
    return {node for node in nodes if node} <= {node["NodeID"] for node in ray.nodes() if node["Alive"]}


def _whereabouts(_actor: Any) -> tuple[str, int]:
    return ray.get_runtime_context().get_node_id(), os.getpid()


def _steps(_actor: Any) -> int:
    return count()


def _kill_tree(process: int) -> None:
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process)
        for one in [*first.children(recursive=True), first]:
            with suppress(psutil.NoSuchProcess):
                one.kill()
