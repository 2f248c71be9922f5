"""Reads a run directory, of a campaign that has ended, is running, or has crashed: metrics, events, settings, pace."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import yaml

from actors.errors import UserError
from cluster.records.event_table import FAULTS
from cluster.records.forms import parsed_row
from cluster.records.rewards import is_graded
from cluster.records.writer import (
    CONFIG_FILE,
    EVENTS_FILE,
    EXPORTS_FILE,
    METRICS_FILE,
    UNDONE_FILE,
    read_jsonl,
    summary_if_whole,
    trajectory_files,
)
from learner.student.checkpoint import checkpoint_steps

BUSY = {"rollout": "busy_rollout", "teacher": "busy_teacher", "learner": "busy_learner"}
"""Role -> the metric with the seconds that its actors worked."""


def has_begun(run_dir: Path) -> bool:
    """Whether the campaign of a run directory has taken an update. Until then its config.yaml binds nobody."""
    if checkpoint_steps(run_dir / "checkpoints"):
        return True
    # Whatever is in the file: RunRecords says what is wrong with a line.
    return any(row.get("step") != 0 for row in read_jsonl(run_dir / METRICS_FILE))


@dataclass(frozen=True)
class Run:
    """The content of one run directory."""

    path: Path
    name: str
    metrics: list[dict[str, Any]]
    undone: list[dict[str, Any]]
    events: list[dict[str, Any]]
    summary: dict[str, Any]
    config_text: str
    config: dict[str, Any]
    trajectories: dict[int, Path]
    exports: Sequence[dict[str, Any]] = ()
    """What `understudy export` has written of this run: time, step, out, dtype."""

    def first(self, key: str) -> Any:
        """The earliest value of a metric; None without one."""
        return next((row[key] for row in self.metrics if row.get(key) is not None), None)

    def last(self, key: str, after: int = -1) -> Any:
        """The newest value of a metric; None without one. after: of later steps than this."""
        rows = (row for row in reversed(self.metrics) if row["step"] > after)
        return next((row[key] for row in rows if row.get(key) is not None), None)

    @property
    def result(self) -> dict[str, Any]:
        """summary.json; without one, the same values as far as the metrics give them."""
        judged = [row for row in self.metrics if row.get("eval/accuracy") is not None] or [{}]
        from_metrics = {
            "accuracy_start": self.first("eval/accuracy"),
            "accuracy_end": self.last("eval/accuracy", after=0),
            "accuracy_sampled_start": self.first("eval/accuracy_sampled"),
            "accuracy_sampled_end": self.last("eval/accuracy_sampled", after=0),
            "accuracy_teacher": self.first("eval/accuracy_teacher"),
            "right_start": judged[0].get("eval/right"),
            "right_end": judged[-1].get("eval/right") if judged[-1].get("step") else None,
            "right_teacher": self.first("eval/right_teacher"),
            "graded": any(map(is_graded, self.metrics)),
            "reverse_kl_start": self.first("eval/reverse_kl"),
            "reverse_kl_end": self.last("eval/reverse_kl", after=0),
            "updates": self.last("step"),
            "tokens_generated": self.last("tokens_generated"),
            "wall_seconds": self.last("wall_seconds"),
            "dropped": self.last("dropped"),
            "faults": sum(event["kind"] in FAULTS for event in self.events),
            "busy": {role: sum(row.get(key) or 0 for row in self.metrics) for role, key in BUSY.items()},
        }
        graded = bool(from_metrics["graded"] or self.summary.get("graded"))
        from_summary = {key: value for key, value in self.summary.items() if value is not None}
        return {**from_metrics, **from_summary, "graded": graded}

    def setting(self, key: str, default: Any = None) -> Any:
        """A value of the configuration. Example: `run.setting("rollout.replicas", 1)`."""
        node: Any = self.config
        for part in key.split("."):
            node = node.get(part) if isinstance(node, dict) else None
        return default if node is None else node


def load_run(path: Path) -> Run:
    """Reads a run directory. Only metrics.jsonl has to exist. UserError: it is no run directory, or a file is broken."""
    if not (path / METRICS_FILE).is_file():
        found = f"no {METRICS_FILE} in it" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise UserError(str(path), found, "the run directory of a campaign that has begun, <output_dir>/<name>")
    try:
        config_file = path / CONFIG_FILE
        config_text = config_file.read_text("utf-8") if config_file.exists() else ""
        metrics, events = (
            with_throughput(read_jsonl(path / METRICS_FILE, checked=True)),
            read_jsonl(path / EVENTS_FILE, checked=True),
        )
        undone = read_jsonl(path / UNDONE_FILE, checked=True)
        exports = read_jsonl(path / EXPORTS_FILE, checked=True)
        summary = summary_if_whole(path)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(str(path), str(error), "the files that a campaign wrote") from error
    config = _parsed(config_text)
    name = str(config.get("name") or path.resolve().name)
    return Run(path, name, metrics, undone, events, summary, config_text, config, trajectory_files(path), exports)


def _parsed(text: str) -> dict[str, Any]:
    """The configuration as a dictionary; {} for invalid YAML, whose text the report shows anyway."""
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:
        return {}
    return content if isinstance(content, dict) else {}


def with_throughput(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with `tokens_per_second` added: tokens over seconds since the line before."""
    result: list[dict[str, Any]] = []
    before: tuple[float, float] | None = None
    for row in rows:
        wall, tokens = row.get("wall_seconds"), tokens_so_far(row)
        now = None if wall is None or tokens is None else (wall, tokens)
        rate = None
        if now and before and now[0] > before[0] and now[1] >= before[1]:
            rate = (now[1] - before[1]) / (now[0] - before[0])
        result.append({**row, "tokens_per_second": rate} if row["step"] else row)
        before = now
    return result


def tokens_so_far(row: dict[str, Any]) -> float | None:
    """`tokens_generated` of a line; 0 for the untrained student's."""
    return row.get("tokens_generated", 0 if row["step"] == 0 else None)


class Pace(NamedTuple):
    """How the loop's time was spent."""

    shares: dict[str, float]
    """Role -> share of the loop's time that one of its actors works; empty without measurements."""
    replicas: dict[str, int]
    """Role -> actors at the end."""
    loop_seconds: float
    over_slowest: float
    """The loop's time divided by the time of its slowest stage, which environments may be."""


def pace(run: Run) -> Pace:
    """The pace from the summary; without one, from the metrics, with the time between the first and the last line."""
    result = run.result
    teachers = [t for t in run.setting("teachers", {}).values() if isinstance(t, dict)]
    replicas = {
        "rollout": run.setting("rollout.replicas", 1),
        "teacher": sum(teacher.get("replicas", 1) for teacher in teachers) or 1,
        "learner": run.setting("learner.replicas", 1),
    }
    counted = result.get("actors") or {"mean": replicas, "end": replicas}
    replicas = counted["end"]
    each = {
        role: (result["busy"].get(role) or 0.0) / (counted["mean"][role] or 1)
        for role in BUSY
        if role in counted["mean"]
    }
    waited = sum(row.get("environment_seconds_mean") or 0.0 for row in run.metrics)
    slowest = max([waited / (run.setting("pipeline.max_staleness", 0) + 1), *each.values()])
    walls = [row["wall_seconds"] for row in run.metrics if row.get("wall_seconds") is not None]
    loop = result.get("loop_seconds") or (result.get("wall_over_slowest_stage") or 0) * slowest
    loop = loop or (walls[-1] - walls[0] if walls else 0.0)
    if not slowest or not loop:
        return Pace({}, replicas, loop, 0.0)
    return Pace({role: value / loop for role, value in each.items()}, replicas, loop, loop / slowest)


class Fold(Protocol):
    """A summary of the lines of a file, which grows line by line."""

    def add(self, row: dict[str, Any]) -> None:
        """Takes in one line."""


Kept = TypeVar("Kept", bound=Fold)
ENOUGH_BYTES = 512
"""So many bytes of the end of a file tell it from another; its lines hold times."""


class JsonlTail(Generic[Kept]):
    """Summarises a growing file of JSON lines. Each read parses only the complete lines that were added since the last.

    A file that was replaced, for example after a rollback, is read from its start. Its inode does not tell: the second file
    that replaces one may get the number of the first. So the end of what was read must still be there.
    """

    def __init__(self, path: Path, make: Callable[[], Kept]):
        """make: returns the summary of an empty file."""
        self._path, self._make, self._kept = path, make, make()
        self._inode, self._offset, self._end = -1, 0, b""

    def read(self) -> Kept:
        """Reads the new lines and returns the summary of the whole file. ValueError: a line is not JSON."""
        if self._path.exists() and not self._path.is_file():  # opening a pipe would wait for its writer
            raise UserError(str(self._path), "a directory" if self._path.is_dir() else "no regular file", "a file")
        try:
            with self._path.open("rb") as file:
                there = os.fstat(file.fileno())
                file.seek(self._offset - len(self._end))
                if there.st_ino != self._inode or file.read(len(self._end)) != self._end:
                    self._kept, self._inode, self._offset, self._end = self._make(), there.st_ino, 0, b""
                    file.seek(0)
                added = file.read()
        except FileNotFoundError:
            return self._make()
        except OSError as error:
            raise UserError(str(self._path), error.strerror or error, "a file that can be read") from error
        complete = added[: added.rfind(b"\n") + 1]  # the campaign is still writing the rest
        for line in complete.splitlines():
            try:
                self._kept.add(parsed_row(self._path.name, line))
            except ValueError as error:
                raise UserError(str(self._path), f"a damaged line ({error})", "a JSON object in each line") from error
        self._offset += len(complete)
        self._end = (self._end + complete)[-ENOUGH_BYTES:]
        return self._kept
