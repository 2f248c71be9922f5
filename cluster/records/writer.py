"""Writes and reads the records of a run: metrics, events, the ledger, sample trajectories, the summary.

One process writes (the campaign); any number may read at any moment. Only the last line of a file can be incomplete, and
other files appear by renaming. JSON has no NaN and no infinity: they are written as null. Standard library only.
"""

import errno
import json
import math
import os
import re
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from actors.errors import UserError, is_full_disk
from actors.json_files import DamagedError, bytes_of, parsed, read_json, replace_content
from actors.plain_text import concealed
from cluster.records.event_table import EVENTS, FAULTS, row_of
from cluster.records.forms import parsed_row, wrong_in
from cluster.records.metric_table import METRIC_KEYS, STEP_ZERO_KEYS

METRICS_FILE, EVENTS_FILE, SUMMARY_FILE = "metrics.jsonl", "events.jsonl", "summary.json"
LEDGER_FILE = "ledger.jsonl"
UNDONE_FILE = "undone.jsonl"
RECORD_DIRECTORY = "record"
"""The trajectories that were trained on, with their scores, where `record` is set (actors/data/trajectory_shards.py)."""
ORIGIN_FILE = "record.json"
"""What such a record is of; in its directory."""
EXPORTS_FILE = "exports.jsonl"
"""A line for each `understudy export` of this run: time, step, out, dtype. The campaign does not touch it."""
CONFIG_FILE, REPORT_FILE, TRAJECTORIES_DIRECTORY = "config.yaml", "report.html", "trajectories"
OF_THIS_RUN = "of_this_run"
"""The key of config.yaml under which a campaign writes about itself (cluster/state/taken_over.py); no setting."""

SUMMARY_KEYS = (
    "accuracy_start",
    "accuracy_end",
    "accuracy_teacher",
    "reverse_kl_start",
    "reverse_kl_end",
    "updates",
    "tokens_generated",
    "wall_seconds",
    "busy",
    "wall_over_slowest_stage",
    "utilisation",
    "faults",
    "ledger",
)
"""Keys of summary.json. `busy`: role -> seconds. `ledger`: state -> number of trajectories."""

TRAJECTORY_KEYS = (
    "id",
    "step",
    "prompt",
    "response",
    "tokens",
    "student_logprobs",
    "teacher_logprobs",
    "policy_versions",
    "finish_reason",
    "reference",
    "reward",
)
"""Keys of each line of trajectories/step_*.jsonl. Lists have one entry for each token of the response. A response that the
student did not write alone also has `trained`: for each token, whether it did; and `turns`: for each part that one wrote, `by` (`turn 1`,
`others`, …: cluster/records/turns.py) and `text`. One of several conversations has `begins`: the numbers of the tokens with which each
but the first begins."""


TRAJECTORY_NAME = re.compile(r"step_([0-9]{1,18})\.jsonl")


class Full(NamedTuple):
    """A disk that takes no writes."""

    cause: str
    since: float
    """Seconds of time.monotonic()."""

    def told(self) -> str:
        """One line for `status`."""
        return f"the disk takes no writes: {self.cause}; waited for since {time.monotonic() - self.since:.0f} s"


class RunRecords:
    """Writes one run directory. After a crash, create a new one and call `truncate_after`."""

    def __init__(self, run_dir: Path, *, max_files: int = 24, max_rows: int = 64, began: float | None = None):
        """max_files: how many files of sample trajectories are kept. max_rows: how many trajectories each of them holds.

        began: when the command began, by time.monotonic(); None: now.
        """
        self.run_dir, self.max_files, self.max_rows = Path(run_dir), max_files, max_rows
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._demand_kinds()
        # First: a crash may have torn the last line of a file that is appended to.
        for name in (METRICS_FILE, EVENTS_FILE, LEDGER_FILE, UNDONE_FILE):
            _cut_torn_line(self.run_dir / name)
        steps, events = (read_jsonl(self.run_dir / name) for name in (METRICS_FILE, EVENTS_FILE))
        if wrong := [row for row in steps if type(row.get("step")) is not int]:
            raise UserError(
                str(self.run_dir / METRICS_FILE), f"a line without a step, {wrong[0]}", "a line for each update"
            )
        seconds = [row.get("wall_seconds") for row in [*steps, *events]]
        self._wall_before = max((float(value) for value in seconds if isinstance(value, int | float)), default=0.0)
        self.last_step = max((row["step"] for row in steps), default=-1)
        """Step of the last line of metrics.jsonl; -1 without lines."""
        self.unwritten: deque[tuple[Path, bytes]] = deque()
        """Lines that wait for room on the disk, by file, in their order."""
        self._writing = threading.Lock()  # `flush` runs in a thread
        self.full: Full | None = None
        """Set while the disk is full."""
        self.faults = sum(str(row.get("kind")) in FAULTS for row in events)
        """Events that are faults, over all runs of the campaign."""
        self.guard_actions = sum(bool(row_of(str(row.get("kind"))).guard_action) for row in events)
        """The same of guards' actions."""
        self.on_metrics: Callable[[Mapping[str, Any]], None] | None = None
        """Called with each line of metrics.jsonl, after it is written."""
        self.on_event: Callable[[Mapping[str, Any]], None] | None = None
        """Called with each line of events.jsonl, likewise."""
        self.last_event_seconds = 0.0
        """`wall_seconds` of the newest line of events.jsonl that this process has written."""
        self._last_update = time.monotonic()
        self._started = self._last_update if began is None else began

    def _demand_kinds(self) -> None:
        """UserError: a file that is written later is another thing, such as a pipe, whose writer would wait for ever."""
        for name in (METRICS_FILE, EVENTS_FILE, LEDGER_FILE, UNDONE_FILE):
            if (path := self.run_dir / name).exists() and not path.is_file():
                raise UserError(str(path), "a directory" if path.is_dir() else "no regular file", "a file to write to")
        folder = self.run_dir / TRAJECTORIES_DIRECTORY
        if (folder.exists() or folder.is_symlink()) and not folder.is_dir():
            raise UserError(str(folder), "no directory", "a directory for sample trajectories; move it away")

    @property
    def wall_seconds(self) -> float:
        """Seconds that the campaign has run since its command, without downtime: a restart continues from the last line. The clock of
        events, of the terminal and of `status`."""
        return round(self._wall_before + time.monotonic() - self._started, 3)

    @property
    def last_update_seconds_ago(self) -> float:
        """Seconds since the last line of metrics.jsonl, or since this process began."""
        return round(time.monotonic() - self._last_update, 1)

    def metrics(self, record: Mapping[str, Any]) -> None:
        """Appends the line of one step; adds `wall_seconds` where it is missing.

        ValueError: a metric that every line has is missing, or the step is not greater than the last one.
        """
        row = {**record, "wall_seconds": record.get("wall_seconds", self.wall_seconds)}
        _demand_keys(METRICS_FILE, row, METRIC_KEYS if row.get("step") else STEP_ZERO_KEYS)
        if row["step"] <= self.last_step:
            raise ValueError(f"{METRICS_FILE}: step {row['step']} after step {self.last_step}; truncate_after first")
        self._append(METRICS_FILE, row)
        self._last_update = time.monotonic()
        self.last_step = row["step"]
        if self.on_metrics is not None:
            self.on_metrics(row)

    def event(self, kind: str, cause: str = "", **fields: Any) -> None:
        """Appends an event: a kind such as `actor_died`, its cause, and fields that say where (role, actor, step).

        ValueError for a kind that has no row in event_table.py: nobody could describe it.
        """
        if kind not in EVENTS:
            raise ValueError(f"{EVENTS_FILE}: the event {kind} has no row in cluster/records/event_table.py")
        self.last_event_seconds = self.wall_seconds
        row = {"time": round(time.time(), 3), "wall_seconds": self.last_event_seconds, "kind": kind, "cause": cause}
        self.faults += kind in FAULTS
        self.guard_actions += bool(EVENTS[kind].guard_action)
        self._append(EVENTS_FILE, {**fields, **row})
        if self.on_event is not None:
            self.on_event({**fields, **row})

    def closed(self, row: Mapping[str, Any]) -> None:
        """Appends a row of the ledger (cluster/state/ledger.py): trajectories that were trained on or dropped."""
        self._append(LEDGER_FILE, row)

    def keep_closed(self, as_known: Callable[[dict[str, Any]], dict[str, Any] | None]) -> list[dict[str, Any]]:
        """Rewrites ledger.jsonl with the rows that a checkpoint knows, and returns them.

        as_known: a row -> the row as the checkpoint has it, or None where it does not know it.
        """
        path = self.run_dir / LEDGER_FILE
        rows = [known for row in read_jsonl(path) if (known := as_known(row)) is not None]
        write_atomically(path, "".join(_to_json(row) + "\n" for row in rows))
        return rows

    def keep_trajectories(self, step: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Writes the first `max_rows` of `rows` (TRAJECTORY_KEYS). Deletes files beyond `max_files`, evenly over the steps."""
        directory = self.run_dir / TRAJECTORIES_DIRECTORY
        directory.mkdir(exist_ok=True)
        lines = []
        for row, _ in zip(rows, range(self.max_rows), strict=False):
            _demand_keys(TRAJECTORIES_DIRECTORY, row, TRAJECTORY_KEYS)
            lines.append(_to_json(row, digits=5) + "\n")
        write_atomically(directory / f"step_{step:08d}.jsonl", "".join(lines))
        files = trajectory_files(self.run_dir)
        while len(files) > max(self.max_files, 1):
            files.pop(_most_crowded(list(files))).unlink()

    def write_summary(self, summary: Mapping[str, Any], path: Path | None = None) -> None:
        """Replaces summary.json atomically. path: another file, for a trial."""
        _demand_keys(SUMMARY_FILE, summary, SUMMARY_KEYS)
        write_atomically(path or self.run_dir / SUMMARY_FILE, _to_json(summary, indent=2) + "\n")

    def flush(self) -> None:
        """Forces all lines to disk, so that they survive a crash of the machine. OSError: the disk is full."""
        self.write_lines()
        for name in (METRICS_FILE, EVENTS_FILE, LEDGER_FILE):
            if (path := self.run_dir / name).exists():
                with path.open("rb") as file:
                    os.fsync(file.fileno())

    def write_lines(self) -> None:
        """Writes the lines that wait for the disk. OSError: it is still full."""
        with self._writing:
            while self.unwritten:
                _append(*self.unwritten[0])
                self.unwritten.popleft()
            self.full = None

    def _append(self, name: str, row: Mapping[str, Any]) -> None:
        line = (
            concealed(_to_json(row)).encode(errors="backslashreplace") + b"\n"
        )  # half a surrogate pair becomes an escape
        self.unwritten.append((self.run_dir / name, line))
        try:
            self.write_lines()
        except OSError as error:
            if not is_full_disk(error):
                raise
            self.full = self.full or Full(told_cause(error), time.monotonic())  # `Disk` waits for it

    def set_aside_after(self, step: int, more: Iterable[Mapping[str, Any]]) -> None:
        """Moves the lines of updates after `step` from metrics.jsonl to undone.jsonl; for a rollback to `step`.

        more: lines of such updates that are not written yet.
        """
        written = [row for row in read_jsonl(self.run_dir / METRICS_FILE) if row["step"] > step]
        for row in (*written, *(row for row in more if row["step"] > max(step, self.last_step))):
            self._append(UNDONE_FILE, row)
        self.truncate_after(step)

    def truncate_after(self, step: int) -> None:
        """Deletes metrics, trajectories and shards of the record after `step`, and the summary: the campaign continues from there.

        Events stay, because they happened. -1 deletes the evaluation of the untrained student too.
        """
        rows = [row for row in read_jsonl(self.run_dir / METRICS_FILE) if row["step"] <= step]
        write_atomically(self.run_dir / METRICS_FILE, "".join(_to_json(row) + "\n" for row in rows))
        for kept, path in trajectory_files(self.run_dir).items():
            if kept > step:
                path.unlink()
        for shard in (self.run_dir / RECORD_DIRECTORY).glob("update_*.parquet"):
            if int(shard.name.removeprefix("update_").partition(".")[0]) > step:
                shard.unlink(missing_ok=True)
        # A summary means that the campaign has ended.
        summary = self.run_dir / SUMMARY_FILE
        if summary.is_dir() and not summary.is_symlink():  # not removed: nobody knows what is in it
            summary.rename(summary.with_name(f"{SUMMARY_FILE}.{time.time_ns()}.damaged"))
        summary.unlink(missing_ok=True)
        self.last_step = max((row["step"] for row in rows), default=-1)


def record_export(run_dir: Path, step: int, out: Path, dtype: str) -> None:
    """Tells the run's report of an export; not where the run directory cannot be written to, as an archive."""
    row = {"time": round(time.time(), 3), "step": step, "out": str(out.resolve()), "dtype": dtype}
    with suppress(OSError), (run_dir / EXPORTS_FILE).open("a") as file:
        file.write(json.dumps(row) + "\n")


def read_jsonl(path: Path, *, checked: bool = False) -> list[dict[str, Any]]:
    """The JSON objects of a file, one from each line; [] without a file. An incomplete last line is ignored.

    checked: the values must have the form that their readers rely on, too (forms.py).
    UserError: the file cannot be read, or another line is damaged.
    """
    try:
        lines = bytes_of(Path(path)).split(b"\n")
    except FileNotFoundError:
        return []
    except DamagedError as error:
        raise UserError(str(path), error, "a file that can be read") from error
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(parsed_row(Path(path).name if checked else "", line))
        except ValueError as error:
            if number == len(lines):  # no newline after it: torn by a crash, or caught while being written
                break
            raise UserError(f"{path}, line {number}", f"a damaged line ({error})", "a JSON object") from error
    return rows


def read_summary(run_dir: Path) -> dict[str, Any]:
    """summary.json; {} for a campaign that has not ended. DamagedError: it cannot be read. It is derived from other files,
    so nothing has to fail for it."""
    try:
        summary = read_json(Path(run_dir) / SUMMARY_FILE)
    except FileNotFoundError:
        return {}
    if wrong := wrong_in(SUMMARY_FILE, summary):
        raise DamagedError(wrong)
    return summary


def summary_if_whole(run_dir: Path) -> dict[str, Any]:
    """For those who show a run: summary.json, or {}; a damaged one is left out, which is said."""
    try:
        return read_summary(run_dir)
    except DamagedError as error:
        print(f"note: {Path(run_dir) / SUMMARY_FILE} is damaged ({error}) and left out", file=sys.stderr)
        return {}


def trajectory_files(run_dir: Path) -> dict[int, Path]:
    """Step -> file of its sample trajectories, in ascending order."""
    files = sorted((Path(run_dir) / TRAJECTORIES_DIRECTORY).glob("step_*.jsonl"))
    return {int(match[1]): path for path in files if (match := TRAJECTORY_NAME.fullmatch(path.name))}


def _demand_keys(where: str, row: Mapping[str, Any], keys: Iterable[str]) -> None:
    if missing := [key for key in keys if key not in row]:
        raise ValueError(f"{where}: a record without {', '.join(missing)}")


def _most_crowded(steps: list[int]) -> int:
    """The step to delete: the one between the two closest neighbours, but never the first or the last."""
    inner = range(1, len(steps) - 1)
    return steps[min(inner, key=lambda i: steps[i + 1] - steps[i - 1], default=0)]


def _finite(value: Any, digits: int | None) -> Any:
    """`value` for JSON: NaN and infinity become None; scalars and arrays of numpy and torch become Python values."""
    if isinstance(value, float):
        return (round(value, digits) if digits else value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item, digits) for item in value]
    return _finite(value.tolist(), digits) if hasattr(value, "tolist") else value


def _to_json(row: Mapping[str, Any], *, digits: int | None = None, indent: int | None = None) -> str:
    """The JSON text. TypeError for a value that JSON cannot represent."""
    return json.dumps(_finite(row, digits), ensure_ascii=False, allow_nan=False, indent=indent)


def _append(path: Path, line: bytes) -> None:
    """Appends a line, or nothing: OSError."""
    # Opened for each line: `write_atomically` may have replaced the file since the last one.
    with path.open("ab", buffering=0) as file:  # one write: a reader sees the complete line, or an incomplete last line
        end = file.tell()
        try:
            if file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                file.truncate(end)  # half a line would spoil the next one
            raise OSError(error.errno, error.strerror, str(path)) from error


def told_cause(error: Exception) -> str:
    """What is wrong with the disk, in one line."""
    if isinstance(error, OSError):
        return f"{error.strerror} ({error.filename or 'a file'})"
    return str(error).partition("; ")[0]  # without the way out, for which it is too early


def write_atomically(path: Path, text: str) -> None:
    """Replaces a file's text, as `replace_content` does."""
    replace_content(path, text.encode(errors="backslashreplace"))


def _cut_torn_line(path: Path) -> None:
    """Removes an incomplete last line that a crash left, so that the next line does not continue it.

    A file system that lost power may have made the file longer than what it wrote: the rest is then zeros.
    """
    if not path.is_file():
        return
    content = path.read_bytes()
    whole = content.rstrip(b"\0")
    if whole.endswith(b"}") and _is_json(whole.rpartition(b"\n")[2]):  # only the newline is missing
        os.truncate(path, len(whole))
        with path.open("ab") as file:
            file.write(b"\n")
    elif not content.endswith(b"\n"):
        os.truncate(path, whole.rfind(b"\n") + 1)


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(parsed(line), dict)
    except ValueError:
        return False
