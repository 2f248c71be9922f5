"""Checkpoint directories are complete or absent, also after a crash at any file operation."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from actors.errors import UserError
from learner.student.checkpoint import (
    checkpoint_steps,
    commit,
    discard,
    latest_checkpoint,
    new_directory,
    prune,
    read_json,
    step_directory,
)


@contextmanager
def atomic_directory(target: Path) -> Iterator[Path]:
    partial = new_directory(target)
    try:
        yield partial
        commit(partial, target)
    except BaseException:
        discard(partial)
        raise


def make(checkpoints: Path, *steps: int) -> None:
    for step in steps:
        with atomic_directory(step_directory(checkpoints, step)) as directory:
            (directory / "weights").write_text(str(step))


def test_a_directory_appears_only_when_all_of_it_is_written(tmp_path: Path) -> None:
    target = step_directory(tmp_path, 7)
    with atomic_directory(target) as directory:
        (directory / "training").mkdir()
        (directory / "training" / "state.json").write_text("{}")
        assert not target.exists()
        assert checkpoint_steps(tmp_path) == []
    assert (target / "training" / "state.json").read_text() == "{}"
    assert [path.name for path in tmp_path.iterdir()] == ["step_00000007"]


def test_a_failure_while_writing_leaves_what_was_there(tmp_path: Path) -> None:
    make(tmp_path, 7)
    with pytest.raises(OSError, match="disk full"), atomic_directory(step_directory(tmp_path, 7)) as directory:
        (directory / "weights").write_text("half")
        raise OSError("disk full")
    assert (step_directory(tmp_path, 7) / "weights").read_text() == "7"
    assert len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_process_left_is_not_a_checkpoint(tmp_path: Path) -> None:
    make(tmp_path, 10, 9)
    (tmp_path / ".step_00000011.0a.partial").mkdir()
    (tmp_path / "step_12").mkdir()
    assert checkpoint_steps(tmp_path) == [9, 10]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000010"
    make(tmp_path, 11)
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000011"
    prune(tmp_path, {10, 11})  # removes the leftovers
    assert not (tmp_path / ".step_00000011.0a.partial").exists()


def test_there_may_be_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_only_the_steps_to_keep_are_kept(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    assert prune(tmp_path, {1, 4}) == [2, 3]
    assert checkpoint_steps(tmp_path) == [1, 4]
    assert prune(tmp_path, {1, 2, 4}) == []


def test_a_damaged_state_is_the_users_to_know(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"step": ')
    with pytest.raises(UserError, match="a complete checkpoint"):
        read_json(tmp_path / "state.json")


def killed_before(operation: int, folder: Path) -> bool:
    """Rewrites step 7 and prunes, in a process that dies before this file operation; False: it ended."""
    child = os.fork()
    if child == 0:
        left = operation

        def die(event: str, _arguments: tuple) -> None:
            nonlocal left
            if event in ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir"):
                left -= 1
                if left < 0:
                    os._exit(9)

        sys.addaudithook(die)
        try:
            with atomic_directory(step_directory(folder, 7)) as directory:
                (directory / "training").mkdir()
                for name in ("weights", "training/state"):
                    (directory / name).write_text("new")
            prune(folder, {6, 7})
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9)
    return status == 9


def test_whenever_a_process_is_killed_what_has_a_steps_name_is_whole(tmp_path: Path) -> None:
    operation = 0
    while True:
        folder = tmp_path / str(operation)
        for step in (5, 6, 7):
            (step_directory(folder, step) / "training").mkdir(parents=True)
            for name in ("weights", "training/state"):
                (step_directory(folder, step) / name).write_text("old")
        killed = killed_before(operation, folder)
        for step in checkpoint_steps(folder):
            directory = step_directory(folder, step)
            assert (directory / "weights").read_text() == (directory / "training" / "state").read_text()
        assert checkpoint_steps(folder)
        assert not killed_before(10_000, folder)  # the next process works despite the leftovers
        assert sorted(path.name for path in folder.iterdir()) == ["step_00000006", "step_00000007"]
        if not killed:
            break
        operation += 1
    assert operation > 20
