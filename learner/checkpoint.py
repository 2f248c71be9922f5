"""Checkpoints: a Hugging Face model directory, and beside the model what is needed to go on exactly.

    step_00000100/
        config.json model.safetensors tokenizer.json …   what from_pretrained and vLLM read; float32 master weights
        training/optimizer.safetensors                    AdamW's moments, by parameter name
        training/learner.json                             policy version, schedule position
        training/campaign.json                            data cursor, ledger, written by the campaign

A directory is written under a temporary name, flushed to disk, and renamed: what has a step's name is complete.
Nothing in it is pickled.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
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


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    """Gives a temporary directory beside `target`, which becomes `target`, flushed to disk, when the block ends well.

    When it does not, nothing of it is left, and a `target` that was there before is as it was.
    """
    temporary = target.with_name(f".{target.name}.partial")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _fsync(path)
        _fsync(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    doomed = _set_aside(target) if target.exists() else None
    os.replace(temporary, target)
    _fsync(target.parent)
    if doomed:
        shutil.rmtree(doomed)


def prune(checkpoints: Path, keep_last: int) -> list[int]:
    """Removes all but the newest `keep_last` checkpoints; returns the steps that were removed."""
    removed = checkpoint_steps(checkpoints)[:-keep_last]
    for step in removed:
        shutil.rmtree(_set_aside(step_directory(checkpoints, step)))
    for leftover in checkpoints.glob(".step_*.removed"):
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
