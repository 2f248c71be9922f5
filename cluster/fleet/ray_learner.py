"""A learner of several ranks, one actor each, that the campaign calls as if it were one actor.

start    one placement group for all; rank 0 listens on a port, the others connect to it; each builds its shard
call     goes to all ranks at once, since they compute together; the first rank's answer counts
loss     losing one rank loses the learner: the others need its rows, and are ended
"""

import asyncio
import os
import socket
import time
from collections.abc import Callable, Coroutine
from typing import Any

import ray
import torch.distributed as dist
from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

from actors.accelerator import torch_device
from actors.errors import ActorFaultError, CampaignError, LostObjectError, StoreFullError
from cluster.fleet.ray_actor import (
    ActorLostError,
    PerRank,
    Replica,
    create,
    invoke,
    place,
    started,
    streamed,
    wait_until_built,
    whereabouts,
)
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.supervision import Supervisor
from learner.learner import Learner
from learner.student.sharding import Ranks

LOOPBACK = "127.0.0.1"
GRACE_SECONDS = 15.0
"""After the first error of a rank, the time for the others to report theirs: ranks that wait for a dead one fail first,
and their errors do not name the cause."""


class LearnerRank:
    """One rank in a process of its own. It holds a Learner once `build` has returned."""

    def __init__(self, rank: int, size: int):
        self._rank, self._size = rank, size
        self._store: dist.Store | None = None
        self._learner: Any = None

    def node(self) -> str:
        """The IP address of this machine."""
        return ray.util.get_node_ip_address()

    def listen(self, host: str) -> int:
        """Rank 0 only: listens at `host`, on no other interface, for the other ranks; returns the port."""
        # A socket of our own, because TCPStore would listen on all interfaces. `detach` hands it over to the store.
        listening = socket.create_server((host, 0))
        port = listening.getsockname()[1]
        self._store = dist.TCPStore(
            host, port, is_master=True, wait_for_workers=False, master_listen_fd=listening.detach()
        )
        return port

    def build(self, host: str, port: int, nodes: list[str], arguments: tuple, keywords: dict[str, Any]) -> None:
        """Connects to the other ranks and builds this rank's Learner; returns when all have connected.

        host, port: where rank 0 listens. nodes: of each rank. arguments, keywords: of Learner.
        """
        if host == LOOPBACK:  # Gloo would otherwise listen at the machine's address, which other machines can reach
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
        store = self._store or dist.TCPStore(host, port, is_master=False)
        ranks = Ranks.join(store, self._rank, self._size, torch_device(), nodes)
        self._learner = Learner(*arguments, **keywords, ranks=ranks)

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Calls a method of the learner."""
        return getattr(self._learner, method)(*arguments, **keywords)

    def give_up(self) -> None:
        """See Learner; called while another call is under way."""
        self._learner.give_up()

    def stream(self, method: str, *arguments: Any) -> Any:
        """Calls a generator method of the learner."""
        yield from getattr(self._learner, method)(*arguments)


class LearnerGroup(Fleet):
    """All ranks of one learner. A lost rank is not replaced: the campaign starts a new learner from a checkpoint."""

    _placement: PlacementGroup | None = None

    async def start(self, *, patient: bool = False) -> None:
        """Starts all ranks and waits until every one has built its shard. Arguments and errors: see Supervisor.start."""
        waiting: list[str] = []
        try:
            async with asyncio.timeout(None if patient else self._start_timeout):
                await self._find_room(waiting)
            await self._in_time(self.replicas, self._start_all())
        except TimeoutError as error:
            raise CampaignError(
                f"the {len(self.replicas)} ranks of the learner did not start within {self._start_timeout:g} s "
                f"(ray.start_timeout_seconds){await self._who_holds_the_room(waiting)}"
            ) from error
        for replica in self.replicas:
            replica.alive = True
            self._record("ended", replica, "away")
            self._tell_start(replica)
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
        """Calls a method on every rank and waits for all; gives the first rank's answer.

        Where the answers are booleans it gives whether all are true. A PerRank among the arguments is replaced, on
        each rank, by that rank's own arguments: Ray transfers to each node only its ranks' arguments. `returns` and
        `at` are not supported. LearnerLostError: a rank is lost. Other errors are those of Fleet.call.
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
        """Calls a generator method on every rank; one list of references for each. See Fleet.stream."""
        return await self._together(
            method, lambda replica: streamed(replica.handle, "stream", (method, *arguments), on_item)
        )

    def inherit(self, lost: Supervisor) -> None:
        """Takes over the placement group of a lost group; see Supervisor.inherit."""
        assert isinstance(lost, LearnerGroup)
        # Moved before `super().inherit` closes the lost group, which would give up its place.
        self._placement, lost._placement = lost._placement, None
        super().inherit(lost)

    def close(self) -> None:
        """Ends all ranks at once."""
        super().close()
        if self._placement is not None:
            remove_placement_group(self._placement)
            self._placement = None

    async def _find_room(self, waiting: list[str]) -> None:
        nodes = [replica.node for replica in self.replicas]
        bundles = [self._resources.bundle] * len(nodes)
        self._placement = await place(
            self._placement, nodes, bundles, lambda reason: self._waits(self.role, len(nodes), waiting, reason)
        )
        waiting.clear()

    async def _start_all(self) -> None:
        size = len(self.replicas)
        bundles = list(range(size)) if self._placement is None else await asyncio.to_thread(_by_node, self._placement)
        for rank, replica in enumerate(self.replicas):
            at = (self._resources, self._placement, bundles[rank])
            replica.created = replica.doing_since = time.monotonic()
            replica.handle = create(LearnerRank, (rank, size), {}, *at)
            await wait_until_built(replica.handle, replica.name)
            replica.node, replica.process = await whereabouts(replica.handle)
        nodes = await self._together("node", lambda replica: invoke(replica.handle, "node", (), 1))
        host = LOOPBACK if len(set(nodes)) == 1 else nodes[0]
        port = await invoke(self.replicas[0].handle, "listen", (host,), 1)
        arguments = (host, port, nodes, self._arguments, self._keywords)
        await self._together("the start", lambda replica: invoke(replica.handle, "build", arguments, 1))
        for replica in self.replicas:
            replica.phases = await started(replica.handle)

    async def _together(self, what: str, one: Callable[[Replica], Coroutine[Any, Any, Any]]) -> list[Any]:
        """Runs `one` for every rank at once; gives the answers by rank.

        LearnerLostError: a rank is lost. Otherwise, the first error that a rank has raised.
        """
        if self._failure:
            raise self._failure
        handles = [replica.handle for replica in self.replicas]
        for replica in self.replicas:
            self._began(replica, what)
        tasks = [asyncio.create_task(one(replica)) for replica in self.replicas]
        try:
            _, waiting = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            if waiting:  # one has failed: see GRACE_SECONDS
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
        """Ends the group if a rank has died or could not take part: the others would wait for it for ever.

        A dead rank is reported in preference to a failed one, which may have failed because of it.
        """
        for replica, handle, error in zip(self.replicas, handles, errors, strict=False):
            if isinstance(error, ActorLostError):
                self._lost(replica, handle, "actor_died", error)
        for replica, handle, error in zip(self.replicas, handles, errors, strict=False):
            if isinstance(error, (ActorFaultError, LostObjectError, StoreFullError)):
                self._lost(replica, handle, "actor_failed", error)
        if self._failure:
            raise self._failure

    def _lost(self, replica: Replica, handle: Any, kind: str, cause: Exception | str) -> None:
        if replica.handle is handle and not self._failure:
            replica.alive = True  # a rank that dies while the others still start is reported like any other
            super()._lost(replica, handle, kind, cause)
            for other in self.replicas:
                other.kill()


def _by_node(placement: PlacementGroup) -> list[int]:
    """Numbers of the group's bundles, those of one node side by side: ranks that share rows of tokens are consecutive, and
    exchange more than others (`learner.sequence_parallel`)."""
    node_of = placement_group_table(placement)["bundles_to_node_id"]
    return sorted(node_of, key=lambda bundle: (node_of[bundle], bundle))


def _own_arguments(arguments: tuple, rank: int) -> list[Any]:
    return [own for given in arguments for own in (given.arguments[rank] if isinstance(given, PerRank) else [given])]
