"""Runs the parts of the smoke test, each in a process of its own with a time limit, and writes what they found.

    python -m benchmarks.gpu smoke [--out DIR] [--parts attention ranks …] [--seconds 530]
    python -m benchmarks.gpu smoke --device cpu --shape tiny      what the tests run

It needs torch and transformers, and one GPU. Parts run in order of risk, so that a clock that runs out costs the least; a
part for which too little is left is `not run`. While a part runs, the process of the next one does its imports, and waits
with its hands off the GPU. DIR gets smoke.md (tables for docs/benchmarks.md), smoke.json (all figures) and smoke.log; they are
written again after each part. Exit status: 0 if every verdict is ok, otherwise 1; 2 without a usable GPU.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.smoke import child
from benchmarks.gpu.smoke.report import Found, figure_table, page, verdict_table


class Part(NamedTuple):
    """One part of the test."""

    function: str
    """Import path of a function (report, options)."""
    limit: int
    """Seconds after which it is killed."""
    needs: int
    """Seconds below which it is not begun."""
    shape: str = ""
    """Of benchmarks/gpu/shapes.py, where it takes one."""


HERE = "benchmarks.gpu.smoke"
PARTS = {
    "attention": Part(f"{HERE}.attention:attention", 60, 20),
    "ranks": Part(f"{HERE}.ranks:ranks", 80, 30),
    "loop": Part(f"{HERE}.loop:loop", 80, 30),
    "update-4b": Part(f"{HERE}.updates:update", 120, 60, "4b"),
    "head": Part(f"{HERE}.updates:head", 30, 15, "4b"),
    "adamw": Part(f"{HERE}.optimizers:adamw", 40, 15, "0.6b"),
    "teacher": Part(f"{HERE}.scoring:teacher", 75, 40, "4b"),
    "copies": Part(f"{HERE}.copies:copies", 45, 20, "0.6b"),
    "update-0.6b": Part(f"{HERE}.updates:update", 60, 25, "0.6b"),
    "compiled": Part(f"{HERE}.updates:compiled", 120, 60, "0.6b"),
}
"""In order of risk. Together they take about six minutes where nothing hangs."""
SECONDS = 530


def arguments(words: list[str]) -> argparse.Namespace:
    """The command line, behind `smoke`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu smoke",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, default=Path("smoke"), help="where the results go")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--shape", choices=SHAPES, help="of all parts, instead of their own; `tiny` for a CPU")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for all parts together")
    options = parser.parse_args(words)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"--out {options.out}: {error.strerror}")
    return options


class Started:
    """The process of a part: it imports, then waits for its turn."""

    def __init__(self, name: str, options: argparse.Namespace, folder: Path):
        self.name, self._report, self._log = name, folder / f"{name}.lines", folder / f"{name}.log"
        # A fork has its imports already. But CUDA cannot be used in a fork of a process that has used it.
        context: Any = multiprocessing.get_context("fork" if options.device == "cpu" else "spawn")
        self._turn = context.Event()
        given = SimpleNamespace(
            device=options.device, shape=options.shape or PARTS[name].shape, models=folder / "models"
        )
        arguments = (PARTS[name].function, given, self._report, self._log, self._turn)
        self._process = context.Process(target=child.run, args=arguments, daemon=True)
        self._process.start()

    def run(self, limit: float) -> Found:
        """Lets it begin, and waits for its end; kills it, and what it has started, at the limit."""
        start = time.monotonic()
        self._turn.set()
        self._process.join(limit)
        status = self._process.exitcode
        self.end()
        if status is None:
            otherwise = ("too late", f"it was killed after {limit:.0f} s")
        else:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            otherwise = ("failed", f"{how}: {self.last_words()}")
        return Found.read(self.name, self._report, time.monotonic() - start, otherwise)

    def end(self) -> None:
        """Kills it and what it has started, whatever is left of it."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()  # also before it has a group of its own
        self._process.join()

    def last_words(self) -> str:
        """The end of its output."""
        lines = self.log().split("\n")[1:]
        return " ".join([line.strip() for line in lines if line.strip()][-2:])[-300:]

    def log(self) -> str:
        """Its whole output."""
        text = self._log.read_text("utf-8", errors="replace") if self._log.exists() else ""
        return f"=== {self.name}\n{text}\n"


def run_parts(options: argparse.Namespace, folder: Path) -> list[Found]:
    """The parts, one after the other; DIR is written again after each."""
    names = [name for name in PARTS if name in options.parts]
    if options.shape and "update-4b" in names:
        names = [name for name in names if name != "update-0.6b"]  # the same update again
    if options.device == "cpu":
        for name in names:  # once, for all forks
            child.load(PARTS[name].function)
    deadline, found, logs = time.monotonic() + options.seconds, [], []
    started = Started(names[0], options, folder)
    for name, following in zip(names, [*names[1:], None], strict=True):
        part, here = PARTS[name], started
        left = deadline - time.monotonic()
        started = Started(following, options, folder) if following else here
        if left < part.needs:
            here.end()
            found.append(Found(name, reason=f"{left:.0f} s are left, and it needs {part.needs}"))
        else:
            found.append(here.run(min(part.limit, left)))
        logs.append(here.log())
        write(options.out, found, "".join(logs))
        print(told(found[-1]), flush=True)
    return found


def told(part: Found) -> str:
    """A part on the screen: verdict, figures, and what was wrong."""
    lines = [f"{part.part}: {part.verdict}{' - ' * bool(part.reason)}{part.reason} ({part.seconds:.0f} s)"]
    table = figure_table([part]).splitlines()[2:]
    lines += ["    " + " ".join(row.strip("|").split("|", 1)[1].replace("|", " ").split()) for row in table]
    return "\n".join(lines)


def write(out: Path, found: list[Found], log: str) -> None:
    """The three files."""
    content: dict[str, Any] = {"date": f"{datetime.now():%Y-%m-%d %H:%M}", "parts": [asdict(part) for part in found]}
    (out / "smoke.json").write_text(json.dumps(content, indent=1), "utf-8")
    (out / "smoke.md").write_text(page(found, content["date"]), "utf-8")
    (out / "smoke.log").write_text(log, "utf-8")


def main(words: list[str]) -> int:
    """Runs the parts that the command line names; the exit status."""
    options = arguments(words)
    with tempfile.TemporaryDirectory(prefix="smoke-") as folder:
        found = run_parts(options, Path(folder))
    print("\n" + verdict_table(found), f"\nwritten: {options.out}/smoke.md, smoke.json, smoke.log", sep="\n")
    return 0 if all(part.verdict == "ok" for part in found) else 1
