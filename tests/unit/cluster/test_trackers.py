"""Trackers get what metrics.jsonl gets, and none of them can end a campaign."""

import struct
import threading
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.records.metric_table import METRIC_KEYS
from cluster.records.writer import RunRecords
from cluster.tracking import outbox
from cluster.tracking.outbox import Trackers
from cluster.tracking.trackers import TensorBoard, make_trackers
from tests.waiting import until


def config(tmp_path: Path, *overrides: str) -> CampaignConfig:
    path = tmp_path / "campaign.yaml"
    path.write_text("name: here\nstudent: {model: s}\nteachers: {default: {model: t}}\nprompts: {path: p}\n")
    found = load_config(path, [f"output_dir={tmp_path}", *overrides])
    found.run_dir.mkdir()
    return found


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """(tag, step) -> value of all event files, read record by record as the format says: length, CRC, data, CRC."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(folder.glob("events.out.*")):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            found |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
    return found


class Recording:
    """A tracker that does what the test says: works, fails, or stalls until it is let go."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed, self.built = False, 0
        self.error: Exception | None = None
        self.open = threading.Event()
        self.open.set()

    def make(self, next_step: int) -> "Recording":
        self.built += 1
        if self.error is not None:
            raise self.error
        return self

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.open.wait()
        if self.error is not None:
            raise self.error
        self.seen.append((step, metrics))

    def close(self) -> None:
        self.open.wait()
        self.closed = True

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.seen]


class Told(list):
    """The events that trackers reported."""

    def __call__(self, kind: str, **fields: Any) -> None:
        self.append((kind, fields))

    def kinds(self) -> list[str]:
        return [kind for kind, _ in self]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "PAUSES_SECONDS", (0.01, 0.02))
    monkeypatch.setattr(outbox, "CLOSE_SECONDS", 5.0)


def trackers_of(tmp_path: Path, told: Told, **trackers: Recording) -> Trackers:
    makers = {name: tracker.make for name, tracker in trackers.items()}
    return Trackers(makers, told, next_step=1, metrics_file=tmp_path / "metrics.jsonl")


def reported(trackers: Trackers, told: Told, kind: str) -> None:
    def there() -> bool:
        trackers.report()
        return kind in told.kinds()

    until(there, kind)


def test_event_files_hold_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    makers = {"tensorboard": lambda step: TensorBoard(tmp_path, step)}
    trackers = Trackers(makers, print, next_step=1, metrics_file=tmp_path / "metrics.jsonl")
    trackers.require()  # it imports its library
    records.on_metrics = trackers.log
    for step in (1, 2):
        records.metrics({**dict.fromkeys(METRIC_KEYS, 0.5), "step": step, "loss": step / 4, "eval/accuracy": 0.25})
    trackers.close()
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss", 2] == 0.5 and found["train/loss", 1] == 0.25
    assert found["eval/accuracy", 1] == 0.25
    assert {tag.removeprefix("train/") for tag, _ in found} >= set(METRIC_KEYS) - {"step"}


def test_a_tracker_gets_finite_numbers_alone(tmp_path: Path) -> None:
    tracker = Recording()
    trackers = trackers_of(tmp_path, Told(), one=tracker)
    trackers.log({"step": 3, "loss": float("nan"), "reverse_kl": 0.1, "teacher": "a", "dropped": 2})
    trackers.close()
    assert tracker.seen == [(3, {"reverse_kl": 0.1, "dropped": 2.0})] and tracker.closed


def test_a_tracker_that_stalls_holds_up_nobody_and_gets_everything_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "STALL_SECONDS", 0.05)
    told, working, stalled = Told(), Recording(), Recording()
    trackers = trackers_of(tmp_path, told, working=working, stalled_uri=stalled)
    stalled.open.clear()
    for step in (1, 2, 3):
        trackers.log({"step": step, "loss": 1.0})
    reported(trackers, told, "tracker_failed")
    until(lambda: working.steps == [1, 2, 3], "the other tracker")
    stalled.open.set()
    reported(trackers, told, "tracker_returned")
    assert stalled.steps == [1, 2, 3]
    assert told == [
        ("tracker_failed", {"tracker": "stalled", "cause": "no answer for 0.05 s"}),
        ("tracker_returned", {"tracker": "stalled", "late": 3, "dropped": 0}),
    ]
    trackers.close()


def test_a_tracker_that_fails_is_told_once_and_comes_back(tmp_path: Path) -> None:
    told, broken = Told(), Recording()
    trackers = trackers_of(tmp_path, told, broken=broken)
    broken.error = ConnectionError("the server is away")
    for step in (1, 2):
        trackers.log({"step": step, "loss": 1.0})
    until(lambda: broken.built > 4, "more tries")
    broken.error = None
    reported(trackers, told, "tracker_returned")
    assert broken.steps == [1, 2]
    assert told[0] == ("tracker_failed", {"tracker": "broken", "cause": "ConnectionError: the server is away"})
    assert told.kinds() == ["tracker_failed", "tracker_returned"]
    trackers.close()
    assert broken.closed


@pytest.mark.parametrize(("again", "dropped"), [(100, 0), (3, 5)])
def test_what_does_not_fit_into_memory_is_sent_from_the_file_within_bounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: int, dropped: int
) -> None:
    monkeypatch.setattr(outbox, "KEPT_RECORDS", 2)
    monkeypatch.setattr(outbox, "SENT_AGAIN", again)
    told, tracker = Told(), Recording()
    tracker.error = ConnectionError("away")
    trackers = trackers_of(tmp_path, told, one=tracker)
    for step in range(1, 11):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(f'{{"step": {step}, "loss": {step / 2}}}\n')
        trackers.log({"step": step, "loss": step / 2})
    reported(trackers, told, "tracker_failed")
    tracker.error = None
    reported(trackers, told, "tracker_returned")
    assert tracker.seen == [(step, {"loss": step / 2}) for step in range(1 + dropped, 11)]
    assert told[-1][1] == {"tracker": "one", "late": 10 - dropped, "dropped": dropped}
    trackers.close()


def test_updates_that_are_taken_back_are_not_sent_later(tmp_path: Path) -> None:
    tracker, told = Recording(), Told()
    trackers = trackers_of(tmp_path, told, one=tracker)
    tracker.open.clear()
    for step, loss in ((1, 1.0), (2, 2.0), (3, 3.0), (2, 20.0), (3, 30.0)):
        trackers.log({"step": step, "loss": loss})
    tracker.open.set()
    until(lambda: len(tracker.seen) == 3, "three steps")
    trackers.close()
    assert [(step, numbers["loss"]) for step, numbers in tracker.seen] == [(1, 1.0), (2, 20.0), (3, 30.0)]


def test_the_end_waits_a_moment_for_a_tracker_and_says_what_it_misses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(outbox, "CLOSE_SECONDS", 0.1)
    told, tracker = Told(), Recording()
    trackers = trackers_of(tmp_path, told, one=tracker)
    tracker.open.clear()
    for step in (1, 2):
        trackers.log({"step": step, "loss": 1.0})
    trackers.close()
    assert told == [("tracker_behind", {"tracker": "one", "missing": 2})]
    tracker.open.set()


def test_a_new_campaign_refuses_a_tracker_that_does_not_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "START_SECONDS", 0.05)
    trackers_of(tmp_path, Told(), one=Recording()).require()
    refusing, stalled = Recording(), Recording()
    refusing.error = ConnectionError("no route")
    with pytest.raises(
        UserError, match=r"tracking.mlflow_uri: found ConnectionError: no route, expected a tracker that answers"
    ):
        trackers_of(tmp_path, Told(), mlflow_uri=refusing).require()
    stalled.open.clear()
    stalled.make = lambda step: stalled.open.wait()  # type: ignore
    with pytest.raises(UserError, match=r"tracking.one: found TimeoutError: no answer within 0\.05 s"):
        trackers_of(tmp_path, Told(), one=stalled).require()
    stalled.open.set()


def test_what_the_configuration_asks_for_is_made(tmp_path: Path) -> None:
    made = make_trackers(config(tmp_path))
    assert list(made) == ["tensorboard"] and isinstance(made["tensorboard"](1), TensorBoard)
    assert (tmp_path / "here" / "tensorboard").is_dir()


def test_nothing_is_made_that_is_not_asked_for(tmp_path: Path) -> None:
    assert make_trackers(config(tmp_path, "tracking.tensorboard=false")) == {}


def test_a_tracker_whose_package_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tracking.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking.wandb_project: found p, but no package wandb, expected pip install"):
        make_trackers(config(tmp_path, "tracking.wandb_project=p"))


def test_wandb_gets_the_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    made = make_trackers(config(tmp_path, "tracking.wandb_project=p", "tracking.tensorboard=false"))
    tracker = made["wandb_project"](1)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    assert list((tmp_path / "here" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_mlflow_gets_the_metrics_and_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "ml").as_uri()
    wanted = config(tmp_path, f"tracking.mlflow_uri={uri}", "tracking.tensorboard=false")
    for step in (1, 2):
        tracker = make_trackers(wanted)["mlflow_uri"](step)
        tracker.log(step, {"loss": step / 2})
        tracker.close()
    client = MlflowClient(tracking_uri=uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "understudy"]
    [run] = client.search_runs([experiment.experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 0.5), (2, 1.0)]
