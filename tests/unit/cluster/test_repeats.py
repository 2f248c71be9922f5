"""Nothing that fails in the same way at the same step is tried a third time, whatever the clock says."""

from pathlib import Path
from typing import Any

import pytest

from actors.errors import ActorFaultError, CampaignError, LearnerLostError
from cluster.config_file import load_config
from cluster.fleet.restarts import Repeated, same_cause
from cluster.records.writer import read_jsonl
from learner.learner import Learner
from tests import clean_process
from tests.light_campaign import configuration, make_folder, run_here
from tests.waiting import PATIENCE_SECONDS


def lost(message: str, cause: Exception | None = None) -> LearnerLostError:
    error = LearnerLostError(message)
    error.__cause__ = cause
    return error


def test_the_same_error_after_the_same_checkpoint_is_known_whatever_its_numbers() -> None:
    seen = Repeated().seen
    fault = ActorFaultError("update failed")
    assert not seen(100, 157, lost("CUDA error at 0x7f12, pid 4111", fault))
    assert not seen(200, 257, lost("CUDA error at 0x7f12, pid 4111", fault)), "another checkpoint: there was progress"
    assert not seen(100, 157, lost("no such key", fault))
    assert seen(100, 163, lost("CUDA error at 0x88aa, pid 977", fault))


def test_a_process_that_ended_without_an_error_must_have_ended_at_the_same_step() -> None:
    seen = Repeated().seen
    assert not seen(100, 157, lost("learner-0 died: SIGKILL"))
    assert not seen(100, 133, lost("learner-0 died: SIGKILL")), "machines are taken away at any step"
    assert seen(100, 157, lost("learner-0 died: SIGKILL"))
    assert same_cause("node 10.0.3.7 pid=12") == same_cause("node 10.0.3.9 pid=8")


def fails_at(config_file: Path, step: int, method: str, restarts_take_hours: bool) -> None:
    """Runs the campaign with a learner that cannot get beyond this step, and hours between its failures."""
    import cluster.fleet.restarts as restarts

    if restarts_take_hours:
        restarts.WINDOW_SECONDS = 0.0
    restarts.Restarts.pause = lambda self: 0.0  # type: ignore[method-assign]
    whole: Any = getattr(Learner, method)

    def broken(self: Learner, *arguments: Any, **keywords: Any) -> Any:
        if self.policy_version == step:
            raise ValueError(f"cannot {method} in process {id(self)}")
        return whole(self, *arguments, **keywords)

    setattr(Learner, method, broken)
    try:
        run_here(config_file)
    except CampaignError as error:
        print(f"{type(error).__name__}: {error}")
        raise SystemExit(1) from None


@pytest.mark.parametrize(("step", "origin"), [(1, "the untrained student"), (3, "the checkpoint of step 2")])
def test_a_learner_that_fails_in_the_same_way_ends_the_campaign(tmp_path: Path, step: int, origin: str) -> None:
    config = configuration(make_folder(tmp_path), "run")
    process = clean_process.start(fails_at, config, step, "update", True, log=tmp_path / "log")
    process.join(PATIENCE_SECONDS)
    assert process.exitcode == 1
    told = (tmp_path / "log").read_text()
    assert (
        "cannot update in process" in told and f"after {origin} was taken up, so it is not tried a third time" in told
    )
    events = read_jsonl(load_config(config).run_dir / "events.jsonl")
    restored = [event for event in events if event["kind"] == "learner_restored"]
    assert len(restored) == 1 and (restored[0]["checkpoint"] == "the untrained student") == (step == 1)
    assert events[-1]["kind"] == "failed"
