"""What will be done for the first time later is tried before the first update, and each failure is one line."""

import asyncio
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

import cluster.trial
from actors.errors import CampaignError, CheckpointError, UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.fleet.ray_cluster import role_resources
from cluster.records.writer import RunRecords
from cluster.state.campaign_state import CampaignState
from cluster.trial import Measured, demand_time, try_out
from learner.learner import Learner
from tests.light_campaign import configuration, make_folder
from tests.tiny_updates import make_learner


class Local:
    """The learner's fleet, in this process."""

    def __init__(self, learner: Learner):
        self.learner = learner

    async def call(self, method: str, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        return getattr(self.learner, method)(*arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("light"))


@pytest.fixture
def config(folder: Path, tmp_path: Path) -> CampaignConfig:
    found = load_config(configuration(folder, "run", checkpoint={"mirror": f"file://{tmp_path}/mirror"}))
    found.output_dir = str(tmp_path)
    return found


def tried(config: CampaignConfig) -> list[dict[str, Any]]:
    events: list[dict[str, Any]] = []
    learner = Local(make_learner({"student": Path(config.student.model)}))
    records, needed = RunRecords(config.run_dir), role_resources(config, 0.0, private=True)
    told = lambda kind, **fields: events.append({"kind": kind, **fields})  # noqa: E731
    asyncio.run(try_out(config, CampaignState(), learner, records, needed, told))  # type: ignore[arg-type]
    return events


def left(config: CampaignConfig) -> list[str]:
    return sorted(path.name for path in config.run_dir.rglob("*") if path.name != "checkpoints")


def test_a_trial_leaves_nothing_and_says_what_was_tried(config: CampaignConfig, tmp_path: Path) -> None:
    (event,) = tried(config)
    assert event["kind"] == "tried" and event["what"] == "a checkpoint, summary, report, mirror"
    assert left(config) == [] and not list((tmp_path / "mirror").iterdir())


def test_of_a_large_model_a_part_is_tried(config: CampaignConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster.trial, "WHOLE_BYTES", 1000)
    monkeypatch.setattr(cluster.trial, "SAMPLE_BYTES", 1 << 20)
    (event,) = tried(config)
    assert event["what"].startswith("a checkpoint, with 1 MB of its ") and left(config) == []


def test_a_checkpoint_that_takes_longer_than_the_grace_period_is_refused(config: CampaignConfig) -> None:
    measured = Measured(nbytes=64_000_000, seconds=0.5)
    demand_time(config, 98_300_000_000, 768.0, measured)  # nothing is known of the scheduler
    config.checkpoint.grace_seconds = 800
    demand_time(config, 98_300_000_000, 768.0, measured)
    config.checkpoint.grace_seconds = 120
    found = (
        r"checkpoint\.grace_seconds: found 120, and a checkpoint of 98\.3 GB takes 768 s \(.*/run took 0\.128 GB/s\), "
        r"expected at least 1152, here and in the scheduler"
    )
    with pytest.raises(UserError, match=found):
        demand_time(config, 98_300_000_000, 768.0, measured)


@pytest.mark.parametrize("whole", [True, False])
def test_the_time_of_a_checkpoint_is_measured_and_compared(
    config: CampaignConfig, whole: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not whole:  # a part that holds all is as large as the checkpoint, so that the two agree
        monkeypatch.setattr(cluster.trial, "WHOLE_BYTES", 1000)
    (event,) = tried(config)
    assert event["nbytes"] > 30_000 and event["checkpoint_seconds"] >= 0.0
    config.checkpoint.grace_seconds = 1e-6
    with pytest.raises(UserError, match=r"checkpoint\.grace_seconds: found 1e-06"):
        tried(config)
    assert left(config) == []


def fail(*_: Any, **__: Any) -> Any:
    raise ValueError("no\nway")


def flip(path: Path, *arguments: Any, **keywords: Any) -> Any:
    """Writes a file, of which one bit then changes."""
    from learner.student.tensor_files import write_tensors

    written = write_tensors(path, *arguments, **keywords)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    return written


@pytest.mark.parametrize(
    ("place", "broken", "match"),
    [
        (
            "learner.student.state.write_model_files",
            fail,
            r"a checkpoint, tried before the first update, .*: ValueError: no way",
        ),
        ("learner.student.state.write_tensors", flip, r"it was not read back as it was written: .* is damaged"),
        ("learner.student.state.write_part", lambda *_: None, None),
        (
            "cluster.trial.check_fit",
            lambda *_: (_ for _ in ()).throw(UserError("a", "b", "c")),
            "it would not be loaded",
        ),
    ],
)
def test_a_checkpoint_that_could_not_be_written_or_read_is_known_before_the_first_update(
    place: str, broken: Any, match: str | None, config: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(place, broken)
    if match is None:  # files without a rank's checksums are hashed by the campaign
        tried(config)
    else:
        with pytest.raises(CheckpointError, match=match) as caught:
            tried(config)
        assert "\n" not in str(caught.value)
    assert left(config) == []


def test_a_learner_on_another_file_system_is_known_before_the_first_update(
    config: CampaignConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    whole: Any = Learner.save
    monkeypatch.setattr(Learner, "save", lambda self, _, sample=None: whole(self, str(tmp_path / "elsewhere"), sample))
    with pytest.raises(CheckpointError, match="learner and campaign must see the same file system"):
        tried(config)


@pytest.mark.parametrize("place", ["summarise", "write_report", "summary_table"])
def test_a_summary_or_report_that_fails_is_known_before_the_first_update(
    place: str, config: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.run_dir.mkdir()
    (config.run_dir / "metrics.jsonl").touch()
    monkeypatch.setattr(cluster.trial, place, fail)
    with pytest.raises(CampaignError, match=r"summary or report, tried before the first update, .*: ValueError: no"):
        tried(config)
    assert left(config) == ["metrics.jsonl"]


def test_a_disk_without_room_for_what_is_kept_is_known_before_the_first_update(
    config: CampaignConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.checkpoint.keep_last, config.checkpoint.keep_best = 3, 1
    usage = namedtuple("usage", "total used free")
    nbytes = make_learner({"student": Path(config.student.model)}).checkpoint_bytes()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 5 * nbytes))
    tried(config)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 5 * nbytes - 1))
    with pytest.raises(
        UserError, match=r"checkpoint\.keep_last: found 3, with .* GB free .*expected room for 5 checkpoints"
    ):
        tried(config)


def test_a_mirror_that_cannot_be_written_to_is_known_before_the_first_update(
    config: CampaignConfig, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not a directory")
    config.checkpoint.mirror = f"file://{tmp_path}/file"
    with pytest.raises(UserError, match=r"checkpoint\.mirror"):
        tried(config)
