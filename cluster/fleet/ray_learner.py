"""A learner of several ranks, which the campaign sees as one actor.

start    one placement group; rank 0 says where it listens, the others come there; each builds its share
call     goes to all ranks at once, since each has a part in it; the first rank's answer is the answer
loss     of one rank is the loss of the learner: the others cannot go on without its rows, and end
"""

import asyncio
import os
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import RayActorError
from ray.util.placement_group import PlacementGroup, remove_placement_group

from actors.errors import ActorFaultError, CampaignError, LostObjectError, StoreFullError
from cluster.fleet.ray_actor import PerRank, Replica, cause_of, create, invoke, place, streamed, whereabouts
from cluster.fleet.ray_fleet import Fleet
from learner.learner import Learner
from learner.student.sharding import Ranks

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 15.0
"""When one rank has failed, so long the others may take to say what they know of it: first come those that it left waiting."""


class LearnerRank:
    """One rank, in a process of its own; a learner once it has been built."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size
        self._store: dist.Store | None = None
        self._learner: Any = None

    def node(self) -> str:
        """The address of the machine that it is on."""
        return ray.util.get_node_ip_address()

    def listen(self, host: str) -> int:
        """Of the first rank: the port at `host`, and nowhere else, where it waits for the others."""
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        self._store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        return port

    def build(self, host: str, port: int, arguments: tuple, keywords: dict[str, Any]) -> None:
        """Meets the others, and makes the learner of which this is a rank."""
        if host == LOOPBACK:
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = self._store or dist.TCPStore(host, port, is_master=False)
        ranks = Ranks.join(store, self._rank, self._size, "cuda" if torch.cuda.is_available() else "cpu")
        self._learner = Learner(*arguments, **keywords, ranks=ranks)

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """A method of the learner."""
        return getattr(self._learner, method)(*arguments, **keywords)

    def stream(self, method: str, *arguments: Any) -> Any:
        """A generator method of the learner."""
        yield from getattr(self._learner, method)(*arguments)


class LearnerGroup(Fleet):
    """All ranks of one learner. Like the fleet of a single learner it is not replaced in place: its state is."""

    _placement: PlacementGroup | None = None

    async def start(self, *, patient: bool = False) -> None:
        """Starts all ranks. UserError where the input is why they cannot work."""
        try:
            async with asyncio.timeout(None if patient else self._start_timeout):
                await self._find_room()
            async with asyncio.timeout(self._start_timeout):
                await self._start_all()
        except TimeoutError as error:
            raise CampaignError(
                f"the {len(self.replicas)} ranks of the learner did not start within {self._start_timeout:g} s "
                "(ray.start_timeout_seconds)"
            ) from error
        for replica in self.replicas:
            replica.alive = True
            self._tell("ended", replica, "away")
            self._on_event("actor_started", actor=replica.name)
            self._in_background(self._watch(replica))

    async def call(
        self,
        method: str,
        *arguments: Any,
        returns: int = 1,
        units: int = 1,
        at: Replica | None = None,
        **keywords: Any,
    ) -> Any:
        """Calls a method on every rank; the first one's answer, but where it is yes or no, whether all say yes.

        For an argument that is PerRank each rank gets its own, as arguments of the call: Ray fetches them to its node,
        and no others.
        """
        assert returns == 1 and at is None

        def one(replica: Replica) -> Coroutine[Any, Any, Any]:
            own = _own_arguments(arguments, self.replicas.index(replica))
            return invoke(replica.handle, "call", (method, *own), 1, keywords)

        answers = await self._together(method, one)
        return all(answers) if isinstance(answers[0], bool) else answers[0]

    async def stream(
        self, method: str, *arguments: Any, on_item: Callable[[Any], None] | None = None
    ) -> list[list[Any]]:
        """As of a single learner, on every rank: what each yields."""
        return await self._together(
            method, lambda replica: streamed(replica.handle, "stream", (method, *arguments), on_item)
        )

    def inherit(self, lost: Fleet) -> None:
        """As Fleet."""
        assert isinstance(lost, LearnerGroup)
        self._placement, lost._placement = lost._placement, None
        super().inherit(lost)

    def close(self) -> None:
        """Ends all ranks at once."""
        super().close()
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    async def _find_room(self) -> None:
        bundle = self._resources.bundle

        def waits() -> None:
            needs = ", ".join(f"{amount:g} {name}" for name, amount in bundle.items())
            cause = f"the cluster has no room for {len(self.replicas)} times {needs}"
            self._on_event("waiting_for_resources", actor=self.role, cause=cause)

        nodes = [replica.node for replica in self.replicas]
        self._placement = await place(self._placement, nodes, [bundle] * len(nodes), waits)

    async def _start_all(self) -> None:
        for rank, replica in enumerate(self.replicas):
            replica.handle = create(LearnerRank, (rank, len(self.replicas)), {}, self._resources, self._placement, rank)
            replica.node, replica.process = await whereabouts(replica.handle)
        nodes = await self._together("node", lambda replica: invoke(replica.handle, "node", (), 1))
        host = LOOPBACK if len(set(nodes)) == 1 else nodes[0]
        port = await invoke(self.replicas[0].handle, "listen", (host,), 1)
        arguments = (host, port, self._arguments, self._keywords)
        await self._together("the start", lambda replica: invoke(replica.handle, "build", arguments, 1))

    async def _together(self, what: str, one: Callable[[Replica], Coroutine[Any, Any, Any]]) -> list[Any]:
        """What each rank answers. LearnerLostError: one of them is lost; else the first error that one has raised."""
        if self._failure:
            raise self._failure
        handles = [replica.handle for replica in self.replicas]
        for replica in self.replicas:
            self._began(replica, what)
        tasks = [asyncio.create_task(one(replica)) for replica in self.replicas]
        try:
            _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:
                await asyncio.wait(waiting, timeout=GRACE_SECONDS)
            errors = [task.exception() for task in tasks if task.done()]
            self._end_if_lost(handles, errors)
            for error in errors:
                if error is not None:
                    raise error
            return [task.result() for task in tasks]
        finally:
            for replica, task in zip(self.replicas, tasks, strict=True):
                task.cancel()
                self._ended(replica, what)

    def _end_if_lost(self, handles: list[Any], errors: list[BaseException | None]) -> None:
        """Where a rank has died, or could not take part, the others wait for it in vain."""
        for replica, handle, error in zip(self.replicas, handles, errors, strict=False):
            if isinstance(error, RayActorError):
                self._lost(replica, handle, "actor_died", cause_of(error), error)
        for replica, handle, error in zip(self.replicas, handles, errors, strict=False):
            if isinstance(error, (ActorFaultError, LostObjectError, StoreFullError)):
                self._lost(replica, handle, "actor_failed", str(error), error)
        if self._failure:
            raise self._failure

    def _lost(self, replica: Replica, handle: Any, kind: str, cause: str, error: BaseException | None = None) -> None:
        if replica.handle is handle and not self._failure:
            replica.alive = True  # one that dies while the others start is told like any other
            super()._lost(replica, handle, kind, cause, error)
            for other in self.replicas:
                other.kill()


def _own_arguments(arguments: tuple, rank: int) -> list[Any]:
    return [own for given in arguments for own in (given.arguments[rank] if isinstance(given, PerRank) else [given])]
