"""Checkpoint directories: whole or not there."""

from pathlib import Path

import pytest

from actors.errors import UserError
from learner.checkpoint import atomic_directory, checkpoint_steps, latest_checkpoint, prune, read_json, step_directory


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
    (tmp_path / ".step_00000011.partial").mkdir()
    (tmp_path / "step_12").mkdir()
    assert checkpoint_steps(tmp_path) == [9, 10]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000010"
    make(tmp_path, 11)  # a later attempt takes the leftovers away
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000011"
    assert not (tmp_path / ".step_00000011.partial").exists()


def test_there_may_be_no_checkpoint(tmp_path: Path) -> None:
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    make(tmp_path, 1, 2, 3, 4)
    assert prune(tmp_path, 2) == [1, 2]
    assert checkpoint_steps(tmp_path) == [3, 4]
    assert prune(tmp_path, 5) == []


def test_a_damaged_state_is_the_users_to_know(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text('{"step": ')
    with pytest.raises(UserError, match="a complete checkpoint"):
        read_json(tmp_path / "state.json")
