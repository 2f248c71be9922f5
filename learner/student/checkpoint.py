"""Directories of checkpoints: each is a Hugging Face model directory plus the state for an exact resume.

    step_00000100/
        config.json model.safetensors tokenizer.json …   for from_pretrained and vLLM; float32 master weights
        adapter/                                          LoRA only: the adapter in peft's format
        training/optimizer.safetensors                    AdamW's moments, by parameter name
        training/averages.safetensors                     only with `ema_decay`: the averages that are teachers
        training/learner.json                             policy version, beta of the trust region
        training/campaign.json                            data cursor and ledger, written by the campaign
        training/checksums.json                           of every file but campaign.json, which has its own

A directory is written under a temporary name, flushed to disk, and renamed, so a directory with a step's name is
complete. Nothing in it is pickled. Standard library only; tensor_files.py writes the tensors.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from actors import json_files
from actors.errors import UserError

MOMENTS_FILE = "training/optimizer.safetensors"
STEP_NAME = re.compile(r"step_([0-9]{8})")


def step_directory(checkpoints: Path, step: int) -> Path:
    """The path of a step's checkpoint, for example `checkpoints/step_00000100`."""
    return checkpoints / f"step_{step:08d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """The steps that have a complete checkpoint, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(match[1]) for path in checkpoints.iterdir() if (match := STEP_NAME.fullmatch(path.name)))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint, or None."""
    steps = checkpoint_steps(checkpoints)
    return step_directory(checkpoints, steps[-1]) if steps else None


def new_directory(target: Path) -> Path:
    """Makes an empty directory with a unique name beside `target`. Fill it, then `commit` or `discard` it."""
    # A leading dot and a suffix: no name of a step, so a reader never takes it for a checkpoint, and `prune` finds it.
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, target: Path) -> None:
    """Flushes a directory to disk and renames it to `target`, replacing an existing one."""
    # All data is on disk before the rename: after a crash no incomplete directory has a step's name.
    flush(partial)
    before = target.with_name(f".{target.name}.replaced")
    if target.exists():
        shutil.rmtree(before, ignore_errors=True)
        target.rename(before)  # a process that dies here leaves it to `restore_replaced`
    os.replace(partial, target)
    _fsync(target.parent)  # a rename is on disk only once its directory is
    shutil.rmtree(before, ignore_errors=True)


def restore_replaced(checkpoints: Path) -> None:
    """Gives a checkpoint its name back if a process died while it was being replaced (`commit`)."""
    for before in checkpoints.glob(".step_*.replaced"):
        target = before.with_name(before.name.removeprefix(".").removesuffix(".replaced"))
        if target.exists():
            shutil.rmtree(before, ignore_errors=True)
        else:
            before.rename(target)


def set_aside(directory: Path, why: str) -> Path:
    """Renames a checkpoint to `<name>.<why>`, which no reader takes for one; returns that path. OSError: it cannot be."""
    aside = directory.with_name(f"{directory.name}.{why}")
    if aside.is_symlink() or aside.is_file():
        aside.unlink()
    shutil.rmtree(aside, ignore_errors=True)
    return directory.rename(aside)


def discard(partial: Path) -> None:
    """Removes a directory of `new_directory` without committing it."""
    shutil.rmtree(partial, ignore_errors=True)


def flush(directory: Path) -> None:
    """Waits until a directory and all files in it are on disk (fsync). OSError: they cannot be written."""
    for path in directory.rglob("*"):
        _fsync(path)
    _fsync(directory)


def prune(checkpoints: Path, keep: Collection[int]) -> list[int]:
    """Removes all checkpoints except those in `keep`, and the remains of interrupted writes. Returns the removed steps.

    Do not call it while a checkpoint is being written: it would remove that too.
    """
    restore_replaced(checkpoints)
    removed = [step for step in checkpoint_steps(checkpoints) if step not in keep]
    for step in removed:
        shutil.rmtree(_set_aside(step_directory(checkpoints, step)))
    # Of a process that was killed while it wrote or removed.
    for leftover in (*checkpoints.glob(".step_*.removed"), *checkpoints.glob(".step_*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    return removed


def _set_aside(directory: Path) -> Path:
    """Renames a directory before its removal: an interrupted removal must not leave half a checkpoint under its name."""
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    return directory.rename(doomed)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON; makes the parent directories."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def read_json(path: Path) -> Any:
    """Reads a file of `write_json`. UserError: it is missing or damaged."""
    try:
        return json_files.read_json(path)
    except (OSError, ValueError) as error:
        raise UserError(
            str(path), error, "a complete checkpoint; remove this one to go on from the one before"
        ) from error


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
