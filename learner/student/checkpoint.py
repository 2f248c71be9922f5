"""Checkpoints: a Hugging Face model directory, and beside the model what is needed to go on exactly.

    step_00000100/
        config.json model.safetensors tokenizer.json …   what from_pretrained and vLLM read; float32 master weights
        adapter/                                          where adapters are trained: they alone, as peft reads them
        training/optimizer.safetensors                    AdamW's moments, by parameter name
        training/averages.safetensors                     where teachers follow the student: what they are
        training/learner.json                             policy version, schedule position
        training/campaign.json                            data cursor, ledger, written by the campaign

A directory is written under a temporary name, flushed to disk, and renamed: what has a step's name is complete.
Nothing in it is pickled. This module knows directories, standard library only; `saving.py` writes tensors into them.
"""

import json
import os
import re
import secrets
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from actors.errors import UserError

STEP_NAME = re.compile(r"step_(\d{8})")


def step_directory(checkpoints: Path, step: int) -> Path:
    """`checkpoints/step_00000100`."""
    return checkpoints / f"step_{step:08d}"


def checkpoint_steps(checkpoints: Path) -> list[int]:
    """Steps of the complete checkpoints, oldest first."""
    if not checkpoints.is_dir():
        return []
    return sorted(int(match[1]) for path in checkpoints.iterdir() if (match := STEP_NAME.fullmatch(path.name)))


def latest_checkpoint(checkpoints: Path) -> Path | None:
    """The newest complete checkpoint."""
    steps = checkpoint_steps(checkpoints)
    return step_directory(checkpoints, steps[-1]) if steps else None


def new_directory(target: Path) -> Path:
    """An empty directory beside `target`, under a name that no other process uses, to be filled and then committed."""
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    partial.mkdir(parents=True)
    return partial


def commit(partial: Path, target: Path) -> None:
    """Flushes a directory to disk and gives it its name; a `target` that was there before is replaced, or as it was."""
    flush(partial)
    doomed = _set_aside(target) if target.exists() else None
    os.replace(partial, target)
    _fsync(target.parent)
    if doomed:
        shutil.rmtree(doomed)


def discard(partial: Path) -> None:
    """Removes a directory that will not be committed."""
    shutil.rmtree(partial, ignore_errors=True)


def flush(directory: Path) -> None:
    """Has everything in a directory on disk. OSError where that cannot be done."""
    for path in directory.rglob("*"):
        _fsync(path)
    _fsync(directory)


def prune(checkpoints: Path, keep: Collection[int]) -> list[int]:
    """Removes all checkpoints but those of the steps in `keep`, and what interrupted writes left; returns the steps
    that were removed. Not to be called while a checkpoint is being written."""
    removed = [step for step in checkpoint_steps(checkpoints) if step not in keep]
    for step in removed:
        shutil.rmtree(_set_aside(step_directory(checkpoints, step)))
    for leftover in (*checkpoints.glob(".step_*.removed"), *checkpoints.glob(".step_*.partial")):
        shutil.rmtree(leftover, ignore_errors=True)
    return removed


def _set_aside(directory: Path) -> Path:
    """Renames what is to be removed: a removal that is interrupted must not leave half a checkpoint under a step's name."""
    doomed = directory.with_name(f".{directory.name}.removed")
    shutil.rmtree(doomed, ignore_errors=True)
    return directory.rename(doomed)


def write_json(path: Path, content: Any) -> None:
    """JSON on disk, parents made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")


def read_json(path: Path) -> Any:
    """What `write_json` wrote. UserError: missing or damaged."""
    try:
        return json.loads(path.read_text("utf-8"))
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
