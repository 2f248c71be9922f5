"""A campaign keeps the commits that its hub names stood for when it began, whatever the branches are by then."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from actors.config import TeacherConfig
from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.inputs import read_inputs
from cluster.pins import pin, places
from cluster.preflight import check_models
from cluster.records.writer import read_jsonl
from cluster.roles import _as_actors_need, _local_student
from cluster.state.same_inputs import demand_same, fingerprints
from tests import clean_process, fake_hub, hub_campaign, light_campaign
from tests.fake_hub import FakeHub
from tests.tiny_models import make_tiny_model

ON_HUB: dict[str, Any] = {
    "student": {"model": "owner/student"},
    "teachers": {"default": {"model": "owner/teacher", "revision": "best", "dtype": "float32"}},
    "pipeline": {"updates": 3, "prompts_per_update": 2, "samples_per_prompt": 2},
    "checkpoint": {"every_updates": 1},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return light_campaign.make_folder(tmp_path)


@pytest.fixture
def hub(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub with a student and a teacher, as branches `main` and `best`."""
    with fake_hub.hub_of({"owner/student": folder / "student"}) as hub:
        hub.add("owner/teacher", folder / "teacher", branch="best")
        fake_hub.use(monkeypatch, hub.url, tmp_path / "cache")
        yield hub


def campaign(folder: Path, hub: FakeHub, config: Path, expected: int = 0, **how: Any) -> str:
    """Runs it; returns what it printed."""
    log = config.with_suffix(".log")
    log.unlink(missing_ok=True)
    process = clean_process.start(
        hub_campaign.run_on_hub, config, hub.url, folder / "cache", how.get("offline", False), log=log
    )
    process.join()
    assert process.exitcode == expected, log.read_text()[-3000:]
    return log.read_text()


def resolved(folder: Path, name: str) -> tuple[str, str]:
    content = yaml.safe_load((folder / "runs" / name / "config.yaml").read_text())
    return content["student"]["revision"], content["teachers"]["default"]["revision"]


def test_a_resume_keeps_the_commits_though_the_branches_have_moved(folder: Path, hub: FakeHub) -> None:
    calm = light_campaign.configuration(folder, "calm", **ON_HUB)
    campaign(folder, hub, calm)
    begun = hub.refs["model", "owner/student"]["main"], hub.refs["model", "owner/teacher"]["best"]
    assert resolved(folder, "calm") == begun

    moved = {**ON_HUB, "pipeline": {**ON_HUB["pipeline"], "updates": 1}}
    config = light_campaign.configuration(folder, "moved", **moved)
    campaign(folder, hub, config)
    other = make_tiny_model(folder / "other", hidden=32, layers=1, context=64, seed=9)
    for name, branch in (("owner/student", "main"), ("owner/teacher", "best")):
        hub.add(name, other, branch=branch)
    light_campaign.configuration(folder, "moved", **ON_HUB)
    said = campaign(folder, hub, config)
    assert f"student.model owner/student is {begun[0][:12]} (main, as when the campaign began)" in said
    assert resolved(folder, "moved") == begun
    bits = [light_campaign.fingerprint(folder / "runs" / name) for name in ("calm", "moved")]
    assert {k: v for k, v in bits[0].items() if k.endswith("safetensors") and "00000003" in k}.items() <= bits[
        1
    ].items()

    light_campaign.configuration(
        folder,
        "moved",
        **{**ON_HUB, "student": {"model": "owner/student", "revision": hub.refs["model", "owner/student"]["main"]}},
    )
    refused = campaign(folder, hub, config, expected=2)
    assert "student.model: found owner/student with other contents than the campaign began with" in refused
    shutil.rmtree(folder / "runs" / "moved" / "checkpoints" / "step_00000003")
    light_campaign.configuration(folder, "moved", **ON_HUB)
    hub.down = True
    campaign(folder, hub, config)  # commits that are known and cached need no hub
    campaign(folder, hub, light_campaign.configuration(folder, "offline", **ON_HUB), offline=True)
    kinds = {row["kind"] for row in read_jsonl(folder / "runs" / "offline" / "events.jsonl")}
    assert "pinned" in kinds


def configured(folder: Path, **changes: Any) -> CampaignConfig:
    return load_config(light_campaign.configuration(folder, "here", **{**ON_HUB, **changes}))


def test_before_the_start_no_tensor_is_downloaded(folder: Path, hub: FakeHub) -> None:
    large = make_tiny_model(folder / "large", hidden=320, layers=1, context=64)
    hub.add("owner/student", large)
    hub.add("owner/teacher", large, branch="best")
    config = configured(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("actors.data.hub.HEADER_GUESS", 2048)
        pin(config)
        check_models(config)
        inputs = read_inputs(config)
        found = fingerprints(config, inputs.prompts, inputs.held_out)
    size = (large / "model.safetensors").stat().st_size
    assert 0 < hub.sent["model.safetensors"] < 0.02 * size
    commits = [hub.refs["model", "owner/student"]["main"], hub.refs["model", "owner/teacher"]["best"]]
    assert [found[key]["fingerprint"] for key in ("student.model", "teachers.default.model")] == commits
    # What the actors get names the commit.
    assert _local_student(config).source == f"owner/student@{commits[0]}"
    assert _as_actors_need(config)["default"].source == f"owner/teacher@{commits[1]}"


def test_every_model_and_data_set_has_a_revision_and_only_hub_names_do(folder: Path, hub: FakeHub) -> None:
    config = configured(
        folder,
        prompts={"path": "owner/questions:main", "revision": "v1"},
        evaluation={"prompts": {"path": str(folder / "heldout.jsonl")}},
    )
    config.teachers = {
        "a": TeacherConfig("owner/teacher", tokenizer="owner/student"),
        "b": TeacherConfig(str(folder / "teacher")),
    }
    found = {place.revision_key: (place.name, place.kind, place.on_hub) for place in places(config)}
    assert found == {
        "student.revision": ("owner/student", "model", True),
        "teachers.a.revision": ("owner/teacher", "model", True),
        "teachers.a.tokenizer_revision": ("owner/student", "model", True),
        "teachers.b.revision": (str(folder / "teacher"), "model", False),
        "prompts.revision": ("owner/questions", "dataset", True),
        "evaluation.prompts.revision": (str(folder / "heldout.jsonl"), "dataset", False),
    }
    hub.add("owner/teacher", folder / "teacher")
    commit = hub.add("owner/questions", folder / "runs", "dataset", "v1")
    (folder / "runs").mkdir()
    pin(config)
    assert config.prompts.revision == commit
    assert config.teachers["a"].tokenizer_source == f"owner/student@{hub.refs['model', 'owner/student']['main']}"
    config.teachers["b"].revision = "main"
    with pytest.raises(UserError, match=r"teachers\.b\.revision: found main, of .*teacher, expected null"):
        pin(config)
    with pytest.raises(
        UserError, match=r"prompts\.revision: found v9, expected a branch, tag or commit of owner/questions"
    ):
        pin(configured(folder, prompts={"path": "owner/questions", "revision": "v9"}))


def test_a_campaign_that_an_earlier_release_began_gets_commits_and_says_so() -> None:
    then = {"student.model": {"path": "owner/student", "fingerprint": "0" * 32}}
    now = {"student.model": {"path": "owner/student", "fingerprint": "a" * 40}}
    told: list[str] = []
    demand_same(then, now, [], lambda kind, **_: told.append(kind))
    assert told == ["commit_unknown"]
    with pytest.raises(UserError, match="with other contents"):
        demand_same({"student.model": {"path": "owner/student", "fingerprint": "b" * 40}}, now, [], print)
