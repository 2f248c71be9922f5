"""The environment actors of a campaign, and how rollout actors reach them.

Calls go from a rollout actor to an environment actor directly. So rollout actors are told which there are: when they are created,
and whenever an environment actor starts, or is to end. One that dies is replaced as those of other roles are; until then the
episodes that it hosted begin again on another, or wait.
"""

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import ray

from actors.config import EnvironmentConfig, SamplingConfig
from actors.environment.actor import EnvironmentActor
from actors.environment.base import EnvironmentLostError
from actors.environment.endpoint import LOOPBACK
from actors.errors import CampaignError
from cluster.fleet.ray_actor import ActorLostError, Replica, invoke
from cluster.fleet.ray_fleet import Fleet
from cluster.fleet.ray_shared_calls import SharedCaller

RESTARTS = 20
"""Environments run code of the user's: their actors may be replaced so many times as often as others."""
LOOK_SECONDS = 0.5
"""Between two looks at the episodes of an actor that is to end."""


class RayEnvironmentActor(EnvironmentActor):
    """EnvironmentActor in an actor of Ray's, which knows the address of its machine."""

    def __init__(self, config: EnvironmentConfig, sampling: SamplingConfig, folder: str):
        """See EnvironmentActor."""
        host = ray.util.get_node_ip_address() if config.listen == "network" else LOOPBACK
        super().__init__(config, sampling, folder, host)


class RayEnvironments:
    """`Environments` (actors/environment/base.py) as Ray actors. It is sent to rollout actors."""

    def __init__(self, places: Sequence[Any]):
        """places: actor handles."""
        self.places = list(places)
        self._callers: dict[Any, SharedCaller] = {}
        self._client = client_of(None)

    def __reduce__(self) -> tuple[Callable[..., "RayEnvironments"], tuple[Any, ...]]:
        return RayEnvironments, (self.places,)  # each process has callers of its own

    async def call(self, place: Any, method: str, *arguments: Any) -> Any:
        """Calls a method of one of them. EnvironmentLostError: it has died."""
        if place not in self._callers:
            self._callers[place] = SharedCaller(place, uuid.uuid4().hex)
        key, *others = arguments
        try:
            # The actor that replaces this one counts its episodes from 0 again.
            return await self._callers[place].call(method, (f"{self._client}/{key}", *others))
        except ActorLostError as error:
            raise EnvironmentLostError(
                f"{method}: its process was lost, as it is where an environment ends or blocks it ({error})"
            ) from error


class EnvironmentFleet(Fleet):
    """Fleet whose actors are called by those of another fleet."""

    clients: Sequence[Fleet] = ()
    """Those that call them."""

    def serve(self, clients: Fleet) -> None:
        """The actors of this fleet call them."""
        self.clients, clients.on_end = [clients], self._forget

    def _forget(self, handle: Any) -> None:
        """Ends the episodes of a client that has ended: they would keep their places until they are late."""
        for replica in self.replicas:
            if replica.handle is not None:
                self._in_background(_told(replica.handle, "forget", client_of(handle)))

    def tell_clients(self) -> None:
        """Tells all actors of the clients, also those to come, which environment actors there are."""
        there = RayEnvironments([replica.handle for replica in self.replicas if replica.alive])
        for fleet in self.clients:
            fleet.build_with(environments=there)
            for replica in fleet.replicas:
                if replica.handle is not None:
                    self._in_background(_told(replica.handle, "use_environments", there))

    def resize(self, replicas: int) -> None:
        """See Supervisor.resize. Actors that are to end get no new episodes."""
        super().resize(replicas)
        self.tell_clients()

    async def _available(self) -> None:
        await super()._available()
        self.tell_clients()

    async def _leave(self, replica: Replica) -> None:
        """The actor ends when its episodes have ended."""
        with suppress(CampaignError):  # it has died
            until = time.monotonic() + self._hang_timeout
            while replica.handle is not None and time.monotonic() < until:
                if not (await invoke(replica.handle, "status", (), 1))["episodes"]:
                    break
                await asyncio.sleep(LOOK_SECONDS)
        await super()._leave(replica)


def client_of(handle: Any) -> str:
    """The name of an actor as a client of environments; None: of this process."""
    if handle is not None:
        return handle._actor_id.hex()
    return (ray.get_runtime_context().get_actor_id() or "") if ray.is_initialized() else ""


async def _told(handle: Any, method: str, argument: Any) -> None:
    with suppress(CampaignError):  # it has died; the one in its place knows it
        await invoke(handle, method, (argument,), 1)
