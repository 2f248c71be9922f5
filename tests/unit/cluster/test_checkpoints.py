"""Checkpoints of a campaign: which are kept, what waits for them, and what a failure leaves."""

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from actors.errors import CheckpointError, LearnerLostError
from cluster.config import CampaignConfig, CheckpointConfig
from cluster.records.writer import RunRecords, read_jsonl
from cluster.state.campaign_state import CampaignState
from cluster.state.checkpoints import Checkpoints, steps_to_keep
from learner.student.checkpoint import checkpoint_steps
from tests.states import load_state, write_learners_files


class SlowLearner:
    """Copies its tensors at once; its files are written when the test says so."""

    def __init__(self) -> None:
        self.version, self.error = 0, None
        self.may_write = asyncio.Event()
        self.writing = self.most_writing = 0

    async def call(self, method: str, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        if method == "save":
            self.writing += 1
            self.most_writing = max(self.most_writing, self.writing)
            write_learners_files(arguments[0], self.version)
            Path(arguments[0], "weights").write_text(str(self.version))
            return None
        assert method == "saved"
        if self.error is not None:
            raise self.error
        if self.may_write.is_set() and self.writing:
            self.writing -= 1
            return True
        return not self.writing


def with_checkpoints(
    tmp_path: Path,
    body: Callable[[Checkpoints, CampaignState, Any], Awaitable[None]],
    **settings: Any,
) -> CampaignConfig:
    config = CampaignConfig(name="run", output_dir=str(tmp_path), checkpoint=CheckpointConfig(**settings))

    async def run() -> None:
        checkpoints = Checkpoints(config, RunRecords(config.run_dir))
        try:
            async with asyncio.timeout(600):
                await body(checkpoints, CampaignState(), SlowLearner())
        finally:
            await checkpoints.close()
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())
    return config


def advance(state: CampaignState, learner: SlowLearner, steps: int = 1) -> None:
    state.step += steps
    learner.version = state.step


def test_a_checkpoint_says_how_long_it_took_and_warns_where_that_is_longer_than_the_grace_period(
    tmp_path: Path,
) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        learner.may_write.set()
        advance(state, learner)
        await checkpoints.save(state, learner)  # type: ignore[arg-type]
        await checkpoints.settle()

    for number, (grace, kinds) in enumerate(((1e-9, ["checkpoint", "slow_checkpoint"]), (600.0, ["checkpoint"]))):
        config = with_checkpoints(tmp_path / str(number), body, grace_seconds=grace)
        rows = read_jsonl(config.run_dir / "events.jsonl")
        assert [row["kind"] for row in rows] == kinds and all(row["seconds"] >= 0 for row in rows)


def test_training_goes_on_while_a_checkpoint_is_written_and_at_most_one_is_under_way(tmp_path: Path) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        directory = tmp_path / "run" / "checkpoints"
        advance(state, learner)
        await checkpoints.save(state, learner)  # type: ignore[arg-type]
        assert checkpoint_steps(directory) == []
        state.ledger.issue(5)
        advance(state, learner)
        second = asyncio.create_task(checkpoints.save(state, learner))  # type: ignore[arg-type]
        await asyncio.sleep(0.2)
        assert not second.done() and learner.writing == 1
        learner.may_write.set()
        await second
        await checkpoints.finish()
        assert checkpoint_steps(directory) == [1, 2] and learner.most_writing == 1
        assert [(path / "weights").read_text() for path in sorted(directory.iterdir())] == ["1", "2"]

    config = with_checkpoints(tmp_path, body)
    state, newest = load_state(config)
    assert (state.step, state.ledger.next_number, newest.name) == (2, 5, "step_00000002")  # type: ignore[union-attr]
    (config.run_dir / "checkpoints" / "step_00000002").rename(tmp_path / "aside")
    state, _ = load_state(config)
    assert (state.step, state.ledger.next_number) == (1, 0), "the campaign's state is that of the learner's step"
    rows = read_jsonl(config.run_dir / "events.jsonl")
    assert [(row["kind"], row["step"]) for row in rows] == [("checkpoint", 1), ("checkpoint", 2)]


def test_a_step_is_saved_once_and_not_before_the_first_update(tmp_path: Path) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        learner.may_write.set()
        await checkpoints.save(state, learner)  # type: ignore[arg-type]
        for _ in range(2):
            advance(state, learner, 1 - state.step)
            await checkpoints.save(state, learner)  # type: ignore[arg-type]
        await checkpoints.finish()

    config = with_checkpoints(tmp_path, body)
    assert [row["step"] for row in read_jsonl(config.run_dir / "events.jsonl")] == [1]


@pytest.mark.parametrize("waiting", ["finish", "save", "save_if_due"])
def test_what_cannot_be_written_is_one_error_that_names_what_is_good(tmp_path: Path, waiting: str) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        learner.may_write.set()
        advance(state, learner)
        await checkpoints.save(state, learner)  # type: ignore[arg-type]
        await checkpoints.finish()
        advance(state, learner)
        learner.error = CheckpointError("No space left on device (model.safetensors)")
        await checkpoints.save(state, learner)  # type: ignore[arg-type]
        while checkpoints._task is not None and not checkpoints._task.done():  # `save_if_due` does not wait for it
            await asyncio.sleep(0)
        told = (
            r"the checkpoint of step 2 could not be written: No space left on device \(model.safetensors\); "
            r".*step_00000001 is good: make room, and run the same command again"
        )
        with pytest.raises(CheckpointError, match=told):
            await getattr(checkpoints, waiting)(*([] if waiting == "finish" else [state, learner]))
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]

    with_checkpoints(tmp_path, body)


def test_a_directory_that_cannot_be_made_is_said_at_once(tmp_path: Path) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        (tmp_path / "run" / "checkpoints").write_text("a file in its place")
        advance(state, learner)
        with pytest.raises(
            CheckpointError, match=f"{os.strerror(errno.EEXIST)}|Not a directory.*there is no checkpoint"
        ):
            await checkpoints.save(state, learner)  # type: ignore[arg-type]

    with_checkpoints(tmp_path, body)


def test_a_learner_that_is_lost_takes_only_the_unfinished_checkpoint_along(tmp_path: Path) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        learner.may_write.set()
        for _ in range(2):
            advance(state, learner)
            await checkpoints.save(state, learner)  # type: ignore[arg-type]
            learner.error = LearnerLostError("it died") if state.step == 2 else None
            if state.step == 1:
                await checkpoints.finish()
        with pytest.raises(LearnerLostError):
            await checkpoints.finish()
        assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_00000001"]

    with_checkpoints(tmp_path, body)


def test_one_that_waits_and_gives_up_does_not_take_the_checkpoint_along(tmp_path: Path) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        advance(state, learner)
        await checkpoints.save(state, learner)  # type: ignore[arg-type]
        impatient = asyncio.create_task(checkpoints.finish())
        await asyncio.sleep(0.01)
        impatient.cancel()
        await asyncio.gather(impatient, return_exceptions=True)
        learner.may_write.set()
        await checkpoints.close()  # as at the end of a campaign that failed elsewhere
        assert checkpoint_steps(tmp_path / "run" / "checkpoints") == [1]

    with_checkpoints(tmp_path, body)


def test_the_last_and_the_best_are_kept_and_what_is_still_to_be_evaluated() -> None:
    config = CheckpointConfig(keep_last=2, keep_best=1)
    state = CampaignState(evaluations={2: {"eval/accuracy": 0.7}, 4: {"eval/accuracy": 0.9}, 6: {"eval/accuracy": 0.9}})
    assert steps_to_keep([2, 3, 4, 5, 6, 7, 8], state, config) == {4, 7, 8}
    state.pending = [{"step": 5}]
    assert steps_to_keep([2, 3, 4, 5, 6, 7, 8], state, config) == {4, 5, 7, 8}
    assert steps_to_keep([2, 4, 6, 8], state, CheckpointConfig(keep_last=1, keep_best=3)) == {2, 4, 5, 6, 8}
    assert steps_to_keep([1], CampaignState(), config) == {1}
    assert steps_to_keep([1, 2, 3], state, CheckpointConfig(keep_last=1, keep_best=0)) == {3, 5}


def test_older_checkpoints_are_removed_as_the_campaign_goes_on(tmp_path: Path) -> None:
    async def body(checkpoints: Checkpoints, state: CampaignState, learner: SlowLearner) -> None:
        learner.may_write.set()
        for step in range(1, 8):
            advance(state, learner)
            await checkpoints.save_if_due(state, learner)  # type: ignore[arg-type]
            state.evaluations[step] = {"eval/accuracy": 1 - abs(step - 3) / 10}
        await checkpoints.finish()

    config = with_checkpoints(tmp_path, body, every_updates=1, keep_last=2, keep_best=1)
    assert checkpoint_steps(config.run_dir / "checkpoints") == [3, 6, 7]
