"""What a campaign is doing now: status.json, which it writes while it runs, and the reader behind `understudy status`.

The campaign replaces `status.json` every few seconds with what only its process knows: which actors live, and what each
role does. Everything else comes from its records. A reader needs the run directory and nothing of the cluster.
"""

import asyncio
import json
import os
import socket
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.errors import is_full_disk
from actors.json_files import read_json
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.planning.measured_run import plan_of_run
from cluster.planning.throughput import mean_of
from cluster.records.event_table import BEGINNINGS, ENDS, row_of
from cluster.records.forms import wrong_in
from cluster.records.metric_table import METRICS, is_evaluation, of_status, sets_of
from cluster.records.reader import BUSY, JsonlTail
from cluster.records.rewards import is_graded
from cluster.records.run_lock import is_locked
from cluster.records.utilisation import role_of
from cluster.records.writer import CONFIG_FILE, EVENTS_FILE, METRICS_FILE, summary_if_whole, write_atomically

STATUS_FILE = "status.json"
EVERY_SECONDS = 2.0
LOST_AFTER_SECONDS = 30.0
"""A campaign that has not written status.json for this long has died, or its machine is gone."""
STANDS_SECONDS = 30.0
"""A campaign stands that has taken no update for this long, or for three times its usual time."""
RECENT_UPDATES = 20
"""Rates are taken over this many of the last updates."""
NEWS = 5
RUNNING_STATES = ("starting", "running", "paused")


async def keep_status(run_dir: Path, read: Callable[[], Mapping[str, Any]]) -> None:
    """Writes what `read` returns to status.json every EVERY_SECONDS, until it is cancelled."""
    while True:
        write_status(run_dir, read())
        await asyncio.sleep(EVERY_SECONDS)


def write_status(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Replaces status.json. Adds the time, and the process and host that wrote it."""
    path, text = Path(run_dir) / STATUS_FILE, json.dumps({**content, **_signature()}) + "\n"
    try:
        write_atomically(path, text)
    except OSError as error:
        if not is_full_disk(error) or not path.exists():
            raise
        # A full disk still takes writes to blocks that a file has. Without them, a campaign that waits would look lost.
        with path.open("r+b") as file:
            file.write(text.encode())
            file.truncate()


def write_beginning(run_dir: Path) -> None:
    """Says that a process has begun to prepare a campaign here, until `keep_status` says more."""
    write_status(run_dir, {"state": "starting", "begins": True})


async def persistently(task: str, work: Callable[[], Awaitable[None]], on_event: Callable[..., None]) -> None:
    """Does `work`, again after an error, which is reported: the campaign goes on without it meanwhile."""
    told = ""
    while True:
        try:
            return await work()
        except Exception as error:  # of any kind: nothing that only shows the campaign may end, or end it
            cause = f"{type(error).__name__}: {error}"
            if cause != told:  # once for each cause, however long it lasts
                told = cause
                on_event("side_task_failed", task=task, cause=cause)
            await asyncio.sleep(EVERY_SECONDS)


def live_actors(replicas: Iterable[Any]) -> list[dict[str, Any]]:
    """What status.json has of each Replica. silent_seconds: since its last sign of life, 0 for one that is well.
    doing: what a starting one does. waits_seconds: for how long it has waited for something outside, such as a teacher's server."""
    now = time.monotonic()
    return [
        {
            "name": replica.name,
            "alive": replica.alive,
            "restarts": replica.restarts,
            "under_way": replica.under_way,
            "version": replica.version,
            "silent_seconds": round(now - replica.silent_since, 1) if replica.alive and replica.silent else 0.0,
            "behind": replica.alive and replica.behind,
            "doing": "" if replica.alive else _doing(replica),
            "doing_seconds": 0.0 if replica.alive else round(now - replica.doing_since, 1),
            "waits_for": replica.waits_for if replica.alive else "",
            "waits_seconds": round(now - replica.waits_since, 1) if replica.alive and replica.waits_for else 0.0,
        }
        for replica in replicas
    ]


def _doing(replica: Any) -> str:
    """What a Replica does that does not work yet, or no more."""
    return replica.doing or ("its process starts" if replica.handle is not None else "it waits for its place")


def _signature() -> dict[str, Any]:
    return {"time": round(time.time(), 3), "process": os.getpid(), "host": socket.gethostname()}


def read_status(run_dir: Path, now: float | None = None) -> dict[str, Any]:
    """What `understudy status` shows; see `StatusReader.read`."""
    return StatusReader(run_dir).read(now=now)


@dataclass
class _Updates:
    """What the status needs of the lines of metrics.jsonl."""

    recent: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=RECENT_UPDATES))
    evaluation: dict[str, Any] = field(default_factory=dict)
    sets: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Evaluation set -> the metrics of its last evaluation, without their prefix, and its step."""
    graded: set[str] = field(default_factory=set)
    """Those of the evaluation sets, and "" for `evaluation.prompts`, whose rewards are no shares of right answers."""
    accuracy_teacher: float | None = None

    def add(self, row: dict[str, Any]) -> None:
        if row["step"] > 0:
            self.recent.append(row)
        if is_evaluation(row):
            own = {key: value for key, value in row.items() if key.startswith("eval/")}
            self.graded |= {name for name in sets_of(row) if is_graded(row, f"eval/{name}/")}
            self.graded |= {""} if is_graded(row) else set()
            for name in sets_of(row):
                self.sets[name] = {key.split("/")[2]: own[key] for key in own if key.startswith(f"eval/{name}/")}
                self.sets[name]["step"] = row["step"]
            if any(key.count("/") == 1 for key in own):
                self.evaluation = row
        if self.accuracy_teacher is None:
            self.accuracy_teacher = row.get("eval/accuracy_teacher")


@dataclass
class _Events:
    """What the status needs of the lines of events.jsonl."""

    kind: str = ""
    """Kind of the last event that shows whether the campaign runs."""
    cause: str = ""
    """Cause of the last event."""
    faults: int = 0
    checkpoint: dict[str, Any] = field(default_factory=dict)
    news: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=NEWS))

    def add(self, row: dict[str, Any]) -> None:
        kind, event = row["kind"], row_of(row["kind"])
        if kind in (*BEGINNINGS, "loop_started", *ENDS):
            self.kind = kind
        if kind == "checkpoint":
            self.checkpoint = {"step": row.get("step"), "path": row.get("path")}
        over = [old for old in self.news if old["kind"] in event.withdraws and old.get("actor") == row.get("actor")]
        for old in over:
            self.news.remove(old)
        if event.news:
            self.news.append(row)
        self.cause = row.get("cause", "")
        self.faults += event.fault


class StatusReader:
    """Reads the status of one run again and again; each time only the lines that were added since."""

    def __init__(self, run_dir: Path):
        self._run_dir, self.config = run_dir, load_config(run_dir / CONFIG_FILE, environment=False)
        self._updates = JsonlTail(run_dir / METRICS_FILE, _Updates)
        self._events = JsonlTail(run_dir / EVENTS_FILE, _Events)

    def read(self, live: Mapping[str, Any] | None = None, now: float | None = None) -> dict[str, Any]:
        """Everything that `understudy status` shows, as one JSON object with stable keys.

        live: the content of status.json, where the campaign is in this process; None: the file is read.
        state: `starting` (from the moment a process holds the run directory), `running`, `paused`, `finished`, `stopped`
        (interrupted, with a checkpoint), `failed`, `not begun` (a configuration alone), or `lost`: it has not written for
        LOST_AFTER_SECONDS, though no event says that it ended.
        """
        config, updates, events = self.config, self._updates.read(), self._events.read()
        summary = summary_if_whole(self._run_dir)
        live = live_status(self._run_dir) if live is None else {**live, **_signature()}
        now = time.time() if now is None else now
        last: dict[str, Any] = updates.recent[-1] if updates.recent else {}
        state = _state(self._run_dir, events.kind, live, now)
        if state == "lost" and not (events.kind or last):
            state = "not begun"
        rates = _rates(config, list(updates.recent), config.replicas | _sizes(live), live)
        left = config.pipeline.updates - last.get("step", 0)
        seconds = rates.pop("seconds_per_update", None)
        since = _since_the_last_update(live, now) if state in ("running", "paused") else None
        stands = state == "running" and since is not None and since > _stands_after(seconds or 0.0)
        if (stands or state == "paused") and "bottleneck" in rates:
            rates["bottleneck"] = ""  # it was right while updates came
        return {
            "name": config.name,
            "run_dir": str(self._run_dir),
            "state": state,
            "cause": events.cause if state == "failed" else "",
            "seen_seconds_ago": round(now - live["time"], 1) if live else None,
            "process": live.get("process"),
            "host": live.get("host"),
            "update": last.get("step", 0),
            "updates": config.pipeline.updates,
            "wall_seconds": summary.get("wall_seconds", last.get("wall_seconds")),
            "seconds_left": round(seconds * left, 1) if seconds and left and state == "running" and not stands else None,
            "last_update_seconds_ago": since,
            "stands": stands,
            "waits_for": live.get("waits_for", "") if state in RUNNING_STATES else "",
            **rates,
            "roles": live.get("roles", {}),
            "actors": live.get("actors", []),
            "start": live.get("start", []) if state in RUNNING_STATES else [],
            "queues": {} if state in ENDS else _queues(last),
            "policy_version": last.get("policy_version", 0),
            "ledger": summary.get("ledger") or live.get("ledger", {}),  # status.json is older than the summary
            "metrics": {
                key: last[key]
                for key, metric in METRICS.items()
                if metric.status not in ("", "evaluation") and last.get(key) is not None
            },
            "evaluation": {
                k: updates.evaluation[k]
                for key in ("step", *of_status("evaluation"))
                for k in (key, f"{key}:low", f"{key}:high")
                if updates.evaluation.get(k) is not None
            },
            "sets": updates.sets,
            "graded": sorted(updates.graded),
            "accuracy_teacher": updates.accuracy_teacher,
            "dropped_because": summary.get("dropped_because") or live.get("dropped_because", {}),
            "checkpoints": events.checkpoint,
            "faults": events.faults,
            "news": list(events.news),
        }  # fmt: skip


def _since_the_last_update(live: Mapping[str, Any], now: float) -> float | None:
    """Seconds; None where the campaign's process does not say it (an earlier release)."""
    since = live.get("last_update_seconds_ago")
    return None if since is None else round(since + max(now - live["time"], 0.0), 1)


def _stands_after(seconds_per_update: float) -> float:
    """Seconds without an update after which nothing is foretold."""
    return max(STANDS_SECONDS, 3 * seconds_per_update)


def live_status(run_dir: Path) -> dict[str, Any]:
    """What status.json says; {} without the file, as in a copy of the directory, or where it is damaged."""
    try:
        content = read_json(run_dir / STATUS_FILE)
    except (OSError, ValueError):  # absent, or damaged: the other files say the most
        return {}
    return {} if wrong_in(STATUS_FILE, content) else content


def _state(run_dir: Path, kind: str, live: Mapping[str, Any], now: float) -> str:
    fresh = bool(live) and now - live["time"] <= LOST_AFTER_SECONDS
    if live.get("begins"):  # the events are of earlier processes
        held = is_locked(run_dir)
        return "starting" if held or (held is None and fresh) else kind if kind in ENDS else "lost"
    if kind in ENDS:
        return kind
    if not fresh:  # nothing writes while prompts are read and Ray starts, which may take minutes
        return "starting" if kind != "loop_started" and is_locked(run_dir) else "lost"
    return str(live.get("state", "running")) if kind == "loop_started" else "starting"


def _sizes(live: Mapping[str, Any]) -> dict[str, int]:
    """Role -> number of its actors, including those that are away; empty where no process has written them."""
    return dict(Counter(role_of(actor["name"]) for actor in live.get("actors", [])))


def _queues(last: Mapping[str, Any]) -> dict[str, int]:
    """Stage -> trajectories that waited for it when the last update was taken."""
    return {key.removeprefix("queue_"): depth for key, depth in last.items() if key.startswith("queue_")}


def _rates(
    config: CampaignConfig, recent: list[dict[str, Any]], replicas: dict[str, int], live: Mapping[str, Any]
) -> dict[str, Any]:
    """Rates, shares of time and the bottleneck over these updates; {} for fewer than two."""
    if len(recent) < 2:
        return {}
    replicas = {role: count for role, count in replicas.items() if count}
    seconds = (recent[-1]["wall_seconds"] - recent[0]["wall_seconds"]) / (len(recent) - 1)
    if seconds <= 0:
        return {}
    tokens = (recent[-1]["tokens_generated"] - recent[0]["tokens_generated"]) / (len(recent) - 1)
    work = {role: mean_of(recent[1:], f"busy_{role}") for role in replicas if role in BUSY}
    played: dict[str, Any] = {}
    if mean_of(recent[1:], "environment_seconds_mean"):
        waited = mean_of(recent[1:], "environment_idle_seconds") / replicas.get("rollout", 1) / seconds
        played["waits_for_environments"] = round(waited, 3)
    count = len(recent) - 1
    busy = {role: work[role] * count for role in work if work[role]}  # of a replay, rollout actors do nothing
    measured = {"updates": count, "busy": busy, "loop_seconds": seconds * count}
    return {
        "seconds_per_update": seconds,
        "updates_per_hour": round(3600 / seconds, 1),
        "trajectories_per_second": round(config.trajectories_per_update / seconds, 2),
        "tokens_per_second": round(tokens / seconds, 1),
        "utilisation": {role: round(work[role] / replicas[role] / seconds, 3) for role in work},
        **played,
        "bottleneck": plan_of_run(config, measured, replicas, recent[1:], live).sentence()
        if any(work.values())
        else "",
    }
