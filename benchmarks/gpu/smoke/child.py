"""The process of one part: imports, waits for its turn, runs, reports."""

import importlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks.gpu.smoke.report import Report
from benchmarks.gpu.smoke.standins import fill_in


def load(function: str) -> Any:
    """The function of a part, by its import path."""
    fill_in()
    module, _, name = function.partition(":")
    return getattr(importlib.import_module(module), name)


def run(function: str, options: Any, report: Path, log: Path, turn: Any) -> None:
    """Runs a part and ends the process. turn: an Event; before it is set the GPU belongs to another part.

    options: `device`, `shape` and `models`, the folder of models that parts share.
    """
    os.setsid()  # what it starts is killed with it
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def part(report: Report) -> None:
        begun = time.perf_counter()
        body = load(function)
        imported = time.perf_counter() - begun
        turn.wait()
        report.machine(machine(options.device))
        report.figure("imports", round(imported, 1), "s")
        for name in fill_in():
            report.note(f"without the package {name}: another hash in its place, so times with checksums are not ours")
        body(report, options)

    Report(report).run(part)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # no thread of a library may hold the card after the verdict


def machine(device: str) -> dict[str, object]:
    """The card and the versions. RuntimeError: there is no card."""
    names = ("torch", "transformers")
    versions = {**{name: metadata.version(name) for name in names}, "Python": platform.python_version()}
    if device == "cpu":
        return {"card": f"none ({platform.machine()}, {os.cpu_count()} cores)", **versions}
    import torch

    if not torch.cuda.is_available():
        raise RuntimeError("torch finds no GPU here: --device cpu --shape tiny, or a machine with one")
    memory = torch.cuda.get_device_properties(0).total_memory
    return {"card": torch.cuda.get_device_name(), "GB": round(memory / 1e9, 1), "CUDA": torch.version.cuda, **versions}
