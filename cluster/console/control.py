"""Steering a campaign that runs: commands are files in `<run directory>/control/`, which it looks into every second.

A run directory is what the campaign and whoever steers it share already, on one machine and on a cluster; nothing has
to listen anywhere, and who may write into the directory may steer. A command is a JSON file that appears as a whole;
the campaign takes it away and leaves an answer in its place.
"""

import asyncio
import json
import os
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from actors.errors import CampaignError, UserError
from cluster.records.writer import write_atomically

CONTROL_DIRECTORY = "control"
EVERY_SECONDS = 1.0
Handler = Callable[[Mapping[str, Any]], Awaitable[str]]
"""Does what a command asks for, given its arguments, and says what it did; UserError where it will not."""


async def obey(run_dir: Path, handlers: Mapping[str, Handler]) -> None:
    """Obeys commands in the order in which they were sent, until it is cancelled.

    Those that were sent before it began are refused: whoever sent them meant another run of the campaign.
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
        asked = json.loads(path.read_text("utf-8"))
        done, told = True, await handlers[asked["command"]](asked.get("arguments", {}))
    except UserError as error:
        done, told = False, str(error)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        done, told = False, f"{path.name}: found {error!r}, expected one of the commands {', '.join(handlers)}"
    path.unlink(missing_ok=True)
    answer = path.with_name(path.name.replace(".command.", ".answer."))
    write_atomically(answer, json.dumps({"done": done, "told": told}) + "\n")


def send(run_dir: Path, command: str, arguments: Mapping[str, Any] | None = None, *, patience: float = 30.0) -> str:
    """Sends a command and waits for the answer: what the campaign did.

    UserError: it will not. CampaignError: no answer within `patience` seconds; the command is taken back.
    """
    folder = run_dir / CONTROL_DIRECTORY
    folder.mkdir(exist_ok=True)
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
    if not content["done"]:
        where, _, rest = content["told"].partition(": found ")
        found, _, expected = rest.partition(", expected ")
        raise UserError(where, found, expected)
    return str(content["told"])
