"""Control of a running campaign: pause, resume, stop, scale.

A command is a file in `<run directory>/control/`; the campaign looks there every second, does what it asks and replaces
it with an answer. Campaign and operator share the run directory anyway, on one machine and on a cluster, so nothing has
to listen on a port, and write permission on the directory decides who may control the campaign.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from actors.errors import CampaignError, UserError
from actors.json_files import read_json
from cluster.fleet.ray_actor import Resources
from cluster.fleet.ray_cluster import check_scaled
from cluster.fleet.ray_fleet import Fleet
from cluster.records.writer import write_atomically

CONTROL_DIRECTORY = "control"
EVERY_SECONDS = 1.0
Handler = Callable[[Mapping[str, Any]], Awaitable[str]]
"""Takes a command's arguments, does what it asks and returns what it did. UserError: the campaign refuses."""


async def obey(run_dir: Path, handlers: Mapping[str, Handler]) -> None:
    """Does what commands ask for, in the order in which they were sent, until it is cancelled.

    Commands that are there at the start are deleted: they were sent to an earlier process of the campaign.
    """
    folder = run_dir / CONTROL_DIRECTORY
    folder.mkdir(exist_ok=True)
    for stale in folder.glob("*.json"):
        stale.unlink(missing_ok=True)
    while True:
        for path in sorted(folder.glob("*.command.json")):
            await _obey_one(path, handlers)
        await asyncio.sleep(EVERY_SECONDS)


async def _obey_one(path: Path, handlers: Mapping[str, Handler]) -> None:
    try:
        asked = read_json(path)
        answer = {"done": True, "told": await handlers[asked["command"]](asked.get("arguments", {}))}
    except UserError as error:
        answer = {"done": False, "error": error.to_json()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        unknown = UserError(path.name, repr(error), f"one of the commands {', '.join(handlers)}")
        answer = {"done": False, "error": unknown.to_json()}
    except Exception as error:  # of any kind: one command that fails must not end the others
        answer = {"done": False, "told": f"the campaign could not do this: {type(error).__name__}: {error}"}
    path.unlink(missing_ok=True)  # it is missing if `send` has withdrawn it
    write_atomically(path.with_name(path.name.replace(".command.", ".answer.")), json.dumps(answer) + "\n")


def send(run_dir: Path, command: str, arguments: Mapping[str, Any] | None = None, *, patience: float = 30.0) -> str:
    """Sends a command and returns the answer: what the campaign did.

    UserError: it refuses. CampaignError: no answer within `patience` seconds; the command is withdrawn.
    """
    folder = run_dir / CONTROL_DIRECTORY
    folder.mkdir(exist_ok=True)
    # In the order of names `obey` reads commands in the order in which they were sent; two senders never share a name.
    name = f"{time.time_ns():020d}-{os.getpid()}"
    path, answer = folder / f"{name}.command.json", folder / f"{name}.answer.json"
    write_atomically(path, json.dumps({"command": command, "arguments": dict(arguments or {})}) + "\n")
    deadline = time.monotonic() + patience
    while not answer.exists():
        if time.monotonic() > deadline:
            path.unlink(missing_ok=True)
            raise CampaignError(f"the campaign in {run_dir} has not answered within {patience:g} s")
        time.sleep(0.1)
    content = json.loads(answer.read_text("utf-8"))
    answer.unlink(missing_ok=True)
    if "error" in content:
        raise UserError.from_json(content["error"])
    if not content["done"]:  # the campaign runs an earlier release, which answered with the text alone
        raise CampaignError(content["told"])
    return str(content["told"])


def handlers(
    fleets: Mapping[str, Fleet],
    needed: dict[str, tuple[int, Resources]],
    gate: asyncio.Event,
    on_event: Callable[..., None],
    interrupted: asyncio.Event,
) -> dict[str, Handler]:
    """Command -> its handler.

    fleets: role -> fleet, for the roles that can be scaled. needed: role -> (actors, resources of one); `scale` updates
    it. gate: set while new prompts are issued. on_event: records an event.
    interrupted: ends the campaign with a checkpoint once it is set.
    """

    async def pause(_: Mapping[str, Any]) -> str:
        if not gate.is_set():
            return "it is paused already"
        gate.clear()
        on_event("paused")
        return (
            "paused: trajectories under way are finished and trained on; no new prompts are issued until it is resumed"
        )

    async def resume(_: Mapping[str, Any]) -> str:
        if gate.is_set():
            return "it was not paused"
        gate.set()
        on_event("continued")
        return "resumed"

    async def stop(_: Mapping[str, Any]) -> str:
        gate.set()
        asyncio.get_running_loop().call_later(0.5, interrupted.set)  # later, so that the answer is written
        return "stopping: the update under way is given up, and what was trained is saved; the same command goes on with it"

    async def scale(wanted: Mapping[str, Any]) -> str:
        # All sizes are checked before the first fleet changes: a command is carried out completely or not at all.
        sizes = {role: _size(role, value, fleets) for role, value in wanted.items()}
        for role, replicas in sizes.items():
            if replicas > needed[role][0]:
                check_scaled(needed, role, replicas)
        changes = []
        for role, replicas in sizes.items():
            before = len(fleets[role].replicas)
            needed[role] = (replicas, needed[role][1])
            fleets[role].resize(replicas)
            on_event("scaled", role=role, before=before, after=replicas)
            changes.append(f"{role}: {before} -> {replicas}")
        return "; ".join(changes)

    return {"pause": pause, "resume": resume, "stop": stop, "scale": scale}


def _size(role: str, value: Any, fleets: Mapping[str, Fleet]) -> int:
    if role not in fleets:
        raise UserError(role, "no role that can be scaled", f"one of {', '.join(fleets)}", list(fleets))
    if not isinstance(value, int) or value < 1:
        raise UserError(role, value, "a number of actors >= 1")
    return value
