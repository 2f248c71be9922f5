"""What a running campaign can be told to do: pause, resume, stop, scale. The commands come by cluster/console/control.py."""

import asyncio
import os
import signal
from collections.abc import Callable, Mapping
from typing import Any

from actors.errors import UserError
from cluster.console.control import Handler
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_cluster import check_scaled
from cluster.fleet.ray_fleet import Fleet


def handlers(
    fleets: Mapping[str, Fleet],
    needed: dict[str, tuple[int, Resources]],
    gate: asyncio.Event,
    tell: Callable[..., None],
) -> dict[str, Handler]:
    """By command. fleets: those that can be scaled, by role; needed: what an actor of each role takes, kept up to date;
    gate: open while new prompts are issued; tell: is told what was done, as an event."""

    async def pause(_: Mapping[str, Any]) -> str:
        if not gate.is_set():
            return "it is paused already"
        gate.clear()
        tell("paused")
        return "paused: what is under way is finished and trained; nothing new is begun until it is resumed"

    async def resume(_: Mapping[str, Any]) -> str:
        if gate.is_set():
            return "it was not paused"
        gate.set()
        tell("continued")
        return "resumed"

    async def stop(_: Mapping[str, Any]) -> str:
        gate.set()
        asyncio.get_running_loop().call_later(0.5, os.kill, os.getpid(), signal.SIGINT)  # the answer goes out first
        return "stopping: the update that has begun is finished, and a checkpoint written; the same command goes on from it"

    async def scale(wanted: Mapping[str, Any]) -> str:
        sizes = {role: _size(role, value, fleets) for role, value in wanted.items()}
        for role, replicas in sizes.items():
            if replicas > needed[role][0]:
                check_scaled(needed, role, replicas)
        told = []
        for role, replicas in sizes.items():
            before = len(fleets[role].replicas)
            needed[role] = (replicas, needed[role][1])
            fleets[role].resize(replicas)
            tell("scaled", role=role, before=before, after=replicas)
            told.append(f"{role}: {before} -> {replicas}")
        return "; ".join(told)

    return {"pause": pause, "resume": resume, "stop": stop, "scale": scale}


def _size(role: str, value: Any, fleets: Mapping[str, Fleet]) -> int:
    if role not in fleets:
        raise UserError(role, "no role that can be scaled", f"one of {', '.join(fleets)}", list(fleets))
    if not isinstance(value, int) or value < 1:
        raise UserError(role, value, "a number of actors >= 1")
    return value
