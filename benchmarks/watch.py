"""Watches a campaign that runs as a process of its own: its lines of metrics.jsonl, and what its processes use."""

import json
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

LOOK_SECONDS = 0.02


def rows(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a file of JSON lines."""
    if not path.exists():
        return []
    text = path.read_text("utf-8")
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def newest(metrics: Path) -> int:
    """The newest update of metrics.jsonl; 0 before the first."""
    return max((row["step"] for row in rows(metrics)), default=0)


def updates(campaign: subprocess.Popen[Any], metrics: Path, every: float = LOOK_SECONDS) -> Iterator[int]:
    """The newest update, at each look, until the campaign ends. every: seconds from one look to the next."""
    while campaign.poll() is None:
        yield newest(metrics)
        time.sleep(every)


def used(pid: int) -> dict[int, tuple[str, float]]:
    """Process -> (what it is, processor seconds), of the campaign with this id and of all below it. psutil.Error: it has
    ended."""
    found, campaign = {}, psutil.Process(pid)
    for one in [campaign, *campaign.children(recursive=True)]:
        with suppress(psutil.Error):
            title = " ".join(one.cmdline()).strip() or one.name()  # titles are padded
            kind = title.split("::")[-1].split(".")[0] if title.startswith("ray::") else Path(title.split()[0]).name
            found[one.pid] = "campaign" if one.pid == pid else kind, sum(one.cpu_times()[:2])
    return found


class Mark(NamedTuple):
    """What was seen of a campaign at one look."""

    update: int
    """The newest."""
    time: float
    """By the monotonic clock, in seconds."""
    used: dict[int, tuple[str, float]]
    """See `used`."""


def marks(campaign: subprocess.Popen[Any], metrics: Path, at: Sequence[int]) -> list[Mark]:
    """The first looks after these updates, which ascend; fewer, where the campaign ends before them."""
    found: list[Mark] = []
    for update in updates(campaign, metrics):
        if update >= at[0]:
            with suppress(psutil.Error):
                found.append(Mark(update, time.monotonic(), used(campaign.pid)))
                at = [one for one in at if one > update]
        if not at:
            break
    return found
