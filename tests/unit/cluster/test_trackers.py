"""Trackers get what metrics.jsonl gets, and none of them can end a campaign."""

import struct
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.records.metric_table import METRIC_KEYS
from cluster.records.writer import RunRecords
from cluster.tracking.trackers import TensorBoard, Trackers, make_trackers


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
    def __init__(self) -> None:
        self.seen: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.seen.append((step, metrics))

    def close(self) -> None:
        self.closed = True


class Broken(Recording):
    def log(self, step: int, metrics: dict[str, float]) -> None:
        raise ConnectionError("the server is away")


def test_event_files_hold_the_numbers_of_metrics_jsonl(tmp_path: Path) -> None:
    records = RunRecords(tmp_path)
    records.on_metrics = Trackers([TensorBoard(tmp_path, 0)], print).log
    for step in (1, 2):
        records.metrics({**dict.fromkeys(METRIC_KEYS, 0.5), "step": step, "loss": step / 4, "eval/accuracy": 0.25})
    found = scalars(tmp_path / "tensorboard")
    assert found["train/loss", 2] == 0.5 and found["train/loss", 1] == 0.25
    assert found["eval/accuracy", 1] == 0.25
    assert {tag.removeprefix("train/") for tag, _ in found} >= set(METRIC_KEYS) - {"step"}


def test_a_tracker_gets_finite_numbers_alone(tmp_path: Path) -> None:
    tracker = Recording()
    Trackers([tracker], print).log({"step": 3, "loss": float("nan"), "reverse_kl": 0.1, "teacher": "a", "dropped": 2})
    assert tracker.seen == [(3, {"reverse_kl": 0.1, "dropped": 2.0})]


def test_a_tracker_that_fails_is_told_once_and_left_out() -> None:
    told: list[tuple[str, dict[str, Any]]] = []
    working, broken = Recording(), Broken()
    trackers = Trackers([broken, working], lambda kind, **fields: told.append((kind, fields)))
    for step in (1, 2):
        trackers.log({"step": step, "loss": 1.0})
    trackers.close()
    assert [step for step, _ in working.seen] == [1, 2]
    assert told == [("tracker_failed", {"tracker": "Broken", "cause": "ConnectionError: the server is away"})]
    assert working.closed and not broken.closed


def test_what_the_configuration_asks_for_is_made(tmp_path: Path) -> None:
    assert [type(tracker) for tracker in make_trackers(config(tmp_path), 1)] == [TensorBoard]
    assert (tmp_path / "here" / "tensorboard").is_dir()


def test_nothing_is_made_that_is_not_asked_for(tmp_path: Path) -> None:
    assert make_trackers(config(tmp_path, "tracking.tensorboard=false"), 1) == []


def test_a_tracker_whose_package_is_missing_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.tracking.trackers.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tracking.wandb_project: found p, but no package wandb, expected pip install"):
        make_trackers(config(tmp_path, "tracking.wandb_project=p"), 1)


def test_a_server_that_refuses_us_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(uri: str, config: CampaignConfig) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("cluster.tracking.trackers.find_spec", lambda name: object())
    monkeypatch.setattr("cluster.tracking.trackers.MLflow", refuse)
    with pytest.raises(UserError, match=r"tracking.mlflow_uri: found http://nowhere \(ConnectionError: no route\)"):
        make_trackers(config(tmp_path, "tracking.mlflow_uri=http://nowhere"), 1)


def test_wandb_gets_the_metrics_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    trackers = make_trackers(config(tmp_path, "tracking.wandb_project=p", "tracking.tensorboard=false"), 1)
    trackers[0].log(1, {"loss": 0.5})
    trackers[0].close()
    assert list((tmp_path / "here" / "wandb").glob("offline-run-*/run-*.wandb"))


def test_mlflow_gets_the_metrics_and_goes_on_with_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from mlflow.tracking import MlflowClient

    uri = (tmp_path / "ml").as_uri()
    wanted = config(tmp_path, f"tracking.mlflow_uri={uri}", "tracking.tensorboard=false")
    for step in (1, 2):
        [tracker] = make_trackers(wanted, step)
        tracker.log(step, {"loss": step / 2})
        tracker.close()
    client = MlflowClient(tracking_uri=uri)
    [experiment] = [e for e in client.search_experiments() if e.name == "understudy"]
    [run] = client.search_runs([experiment.experiment_id])
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "loss")] == [(1, 0.5), (2, 1.0)]
