"""Which run a command is about: a directory, a name below an output directory, or the only or newest one.

Every command that takes a run finds it by `find_run`, or by `named_run` where a model may stand in its place.
"""

import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from actors.errors import UserError
from actors.plain_text import printable
from cluster.records.run_lock import is_locked
from cluster.records.writer import CONFIG_FILE, EVENTS_FILE, METRICS_FILE

RUN_HELP = "run directory, or a name in runs/ or ~/understudy-runs (default: the only or newest run there)"
EXPECTED = "a run directory: one with config.yaml, or the name of one in runs/ or ~/understudy-runs"


def homes() -> tuple[Path, ...]:
    """The directories in which runs are looked for by name."""
    return Path("."), Path("runs"), Path.home() / "understudy-runs"


def find_run(name: str | None, key: str = "RUN", *, states: Collection[str] = ()) -> Path:
    """The run directory for a path or a name; for None the only one, or the newest, which a line on standard error names.

    states: where nothing is named, only runs in one of these count, and several are refused. UserError: there is no such
    run (the message names similar ones), or several of this name.
    """
    if name is None:
        return _without_a_name(key, states)
    if (run := named_run(name, key)) is None:
        raise UserError(key, name, EXPECTED, [path.name for path in all_runs()])
    return run


def named_run(name: str, key: str = "RUN") -> Path | None:
    """The run directory for a path or a name; None: there is none. UserError: there are several of this name."""
    if _is_run(Path(name)):
        return Path(name)
    found = {path.resolve(): path for path in (home / name for home in homes()) if _is_run(path)}
    if len(found) > 1:
        raise UserError(key, f"{name}, which is in {' and in '.join(str(p.parent) for p in found.values())}", "a path")
    return next(iter(found.values()), None)


def _is_run(path: Path) -> bool:
    try:
        return (path / CONFIG_FILE).exists()
    except (OSError, ValueError):  # no name that a file can have, or a directory that is not ours
        return False


def all_runs() -> list[Path]:
    """Every run in the places where names are looked for, the one that has changed last first."""
    found = {path.parent.resolve(): path.parent for home in homes() for path in home.glob(f"*/{CONFIG_FILE}")}
    began = (EVENTS_FILE, METRICS_FILE)
    runs = [path for path in found.values() if any((path / name).exists() for name in began) or is_locked(path)]
    return sorted(runs, key=changed, reverse=True)


def changed(run_dir: Path) -> float:
    """When a run has last written, in seconds since 1970."""
    return max(path.stat().st_mtime for path in (run_dir / CONFIG_FILE, *run_dir.glob("*.json*")) if path.exists())


def listing() -> list[dict[str, Any]]:
    """Name, state, update, updates, changed_seconds_ago and run_dir of every run. UserError: there is none."""
    runs, now = all_runs(), time.time()
    if not runs:
        raise UserError("RUN", "none, and no run in ., runs/ or ~/understudy-runs", "a run directory")
    rows = []
    for run in runs:
        state, update, updates = _progress(run)
        row = {"name": run.name, "state": state, "update": update, "updates": updates}
        rows.append({**row, "changed_seconds_ago": round(max(now - changed(run), 0.0), 1), "run_dir": str(run)})
    return rows


def _progress(run_dir: Path) -> tuple[str, int, int]:
    """State, update and updates. A run that cannot be read does not hide the others."""
    from cluster.console.status import read_status  # imports the configuration's parser, which `--help` does not need

    try:
        status = read_status(run_dir)
    except UserError:
        return "cannot be read", 0, 0
    return status["state"], status["update"], status["updates"]


def _without_a_name(key: str, states: Collection[str]) -> Path:
    runs = all_runs()
    if states:
        runs = [run for run in runs if _progress(run)[0] in states]
    if not runs:
        raise UserError(key, f"none, and no {'running campaign' if states else 'run'} in runs/ or elsewhere", EXPECTED)
    if states and len(runs) > 1:
        raise UserError(key, f"none, and {len(runs)} campaigns that run", f"one of {', '.join(map(str, runs))}")
    which = f", the newest of {len(runs)}" if len(runs) > 1 else ""
    print(printable(f"run: {runs[0]}{which}"), file=sys.stderr)
    return runs[0]
