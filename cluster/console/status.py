"""What a campaign is doing now: written beside its records while it runs, read by `understudy status` from anywhere.

The campaign replaces `status.json` every few seconds: what only its process knows (which actors live, what each role
does). Everything else is read from the records. A reader needs the run directory and nothing of the cluster.
"""

import asyncio
import json
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.planning.throughput import Plan, Stage, mean_of
from cluster.records.event_table import BEGINNINGS, ENDS, FAULTS, row_of
from cluster.records.metric_table import METRICS, of_status
from cluster.records.utilisation import role_of
from cluster.records.writer import (
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    read_jsonl,
    read_summary,
    write_atomically,
)

STATUS_FILE = "status.json"
EVERY_SECONDS = 2.0
LOST_AFTER_SECONDS = 30.0
"""A campaign that has not written for so long does not run any more, or its machine is gone."""
RECENT_UPDATES = 20
"""Rates are taken over the last so many updates."""


async def keep_status(run_dir: Path, read: Callable[[], Mapping[str, Any]]) -> None:
    """Replaces status.json with what `read` returns, and the process and time of it, until it is cancelled."""
    while True:
        write_status(run_dir, read())
        await asyncio.sleep(EVERY_SECONDS)


def write_status(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Replaces status.json."""
    known = {"time": round(time.time(), 3), "process": os.getpid(), "host": socket.gethostname()}
    write_atomically(Path(run_dir) / STATUS_FILE, json.dumps({**content, **known}) + "\n")


def find_run(name: str) -> Path:
    """The run directory that `name` means: a path, or a name below ~/understudy-runs or runs/.

    UserError: there is no such run; names that look like it are told.
    """
    homes = (Path("."), Path("runs"), Path.home() / "understudy-runs")
    for candidate in (home / name for home in homes):
        if (candidate / CONFIG_FILE).exists():
            return candidate
    there = [path.parent.name for home in homes if home.is_dir() for path in home.glob(f"*/{CONFIG_FILE}")]
    raise UserError("RUN", name, "a run directory, or the name of one in ~/understudy-runs", there)


def read_status(run_dir: Path, now: float | None = None) -> dict[str, Any]:
    """Everything that `understudy status` shows, as one JSON object; its keys are stable.

    state: `starting`, `running`, `paused`, `finished`, `stopped` (interrupted, with a checkpoint), `failed`, or `lost`:
    it has not written for LOST_AFTER_SECONDS, though nothing says that it ended.
    """
    config = load_config(run_dir / CONFIG_FILE)
    metrics = read_jsonl(run_dir / METRICS_FILE)
    rows = [row for row in metrics if row["step"] > 0]
    evaluated = [row for row in metrics if row.get("eval/accuracy") is not None]
    events, summary, live = read_jsonl(run_dir / EVENTS_FILE), read_summary(run_dir), _live(run_dir)
    now = time.time() if now is None else now
    last, recent = (rows[-1] if rows else {}), rows[-RECENT_UPDATES:]
    state = _state(events, live, now)
    rates = _rates(config, recent, config.replicas | _sizes(live))
    left = config.pipeline.updates - last.get("step", 0)
    seconds = rates.pop("seconds_per_update", None)
    return {
        "name": config.name,
        "run_dir": str(run_dir),
        "state": state,
        "cause": events[-1].get("cause", "") if events and state == "failed" else "",
        "seen_seconds_ago": round(now - live["time"], 1) if live else None,
        "process": live.get("process"),
        "host": live.get("host"),
        "update": last.get("step", 0),
        "updates": config.pipeline.updates,
        "wall_seconds": summary.get("wall_seconds", last.get("wall_seconds")),
        "seconds_left": round(seconds * left, 1) if seconds and left and state in ("running", "paused") else None,
        **rates,
        "roles": live.get("roles", {}),
        "actors": live.get("actors", []),
        "queues": {key.removeprefix("queue_"): depth for key, depth in last.items() if key.startswith("queue_")},
        "policy_version": last.get("policy_version", 0),
        "ledger": live.get("ledger") or summary.get("ledger", {}),
        "metrics": {
            key: last[key]
            for key, metric in METRICS.items()
            if metric.status not in ("", "evaluation") and last.get(key) is not None
        },
        "evaluation": {key: evaluated[-1][key] for key in ("step", *of_status("evaluation")) if key in evaluated[-1]}
        if evaluated
        else {},
        "accuracy_teacher": next(
            (row["eval/accuracy_teacher"] for row in evaluated if "eval/accuracy_teacher" in row), None
        ),
        "checkpoints": _checkpoints(events),
        "faults": sum(event["kind"] in FAULTS for event in events),
        "news": [event for event in events if row_of(event["kind"]).news][-5:],
    }


def _live(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / STATUS_FILE).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return {}


def _state(events: list[dict[str, Any]], live: Mapping[str, Any], now: float) -> str:
    telling = (*BEGINNINGS, "loop_started", *ENDS)
    kind = next((event["kind"] for event in reversed(events) if event["kind"] in telling), "")
    if kind in ENDS:
        return str(kind)
    if not live or now - live["time"] > LOST_AFTER_SECONDS:
        return "lost"
    return str(live.get("state", "running")) if kind == "loop_started" else "starting"


def _sizes(live: Mapping[str, Any]) -> dict[str, int]:
    """Role -> its actors, with those that are away; nothing where no process has told."""
    return dict(Counter(role_of(actor["name"]) for actor in live.get("actors", [])))


def _rates(config: CampaignConfig, recent: list[dict[str, Any]], replicas: dict[str, int]) -> dict[str, Any]:
    """Rates, shares of time and the bottleneck over some updates; {} where there are fewer than two."""
    if len(recent) < 2:
        return {}
    seconds = (recent[-1]["wall_seconds"] - recent[0]["wall_seconds"]) / (len(recent) - 1)
    if seconds <= 0:
        return {}
    tokens = (recent[-1]["tokens_generated"] - recent[0]["tokens_generated"]) / (len(recent) - 1)
    work = {role: mean_of(recent[1:], f"busy_{role}") for role in replicas}
    stages = tuple(Stage(role, work[role], replicas[role]) for role in replicas)
    return {
        "seconds_per_update": seconds,
        "updates_per_hour": round(3600 / seconds, 1),
        "trajectories_per_second": round(config.trajectories_per_update / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "utilisation": {role: round(work[role] / replicas[role] / seconds, 3) for role in replicas},
        "bottleneck": Plan(stages, config.pipeline.max_staleness > 0).sentence() if any(work.values()) else "",
    }


def _checkpoints(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest: its step and path."""
    saved = [event for event in events if event["kind"] == "checkpoint"]
    return {"step": saved[-1].get("step"), "path": saved[-1].get("path")} if saved else {}
