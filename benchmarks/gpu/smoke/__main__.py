"""The process of one part: imports, waits for its turn, runs. Started by runner.py."""

import argparse
import importlib
import os
import platform
import sys
import time
from importlib import metadata
from pathlib import Path

from benchmarks.gpu.smoke.report import Report


def main() -> None:
    """Runs the function at this import path."""
    parser = argparse.ArgumentParser()
    parser.add_argument("function")
    parser.add_argument("report", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--shape", default="tiny")
    parser.add_argument("--models", type=Path)
    options = parser.parse_args()
    report = Report(options.report)
    module, _, function = options.function.partition(":")

    def part(report: Report) -> None:
        begun = time.perf_counter()
        from benchmarks.gpu.smoke.standins import fill_in

        missing = fill_in()
        found = getattr(importlib.import_module(module), function)
        imported = time.perf_counter() - begun
        sys.stdin.readline()  # not before this may it touch the GPU: another part is on it
        report.machine(machine(options.device))
        report.figure("imports", round(imported, 1), "s")
        for name in missing:
            report.note(f"without the package {name}: a stand-in for it, so times of checksums are not ours")
        found(report, options)

    report.run(part)
    sys.stdout.flush()
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


if __name__ == "__main__":
    main()
