"""A campaign that goes on otherwise than it was planned: what may change, longer, from another one, elsewhere, after an upgrade."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from actors.errors import UserError
from cluster.config_file import load_config
from cluster.preflight import check_models
from cluster.records.software import software
from cluster.records.writer import OF_THIS_RUN, read_jsonl
from cluster.renamed_keys import SCHEMA
from cluster.state.campaign_state import read_state
from cluster.state.resume import config_of
from cluster.state.same_inputs import demand_same_architecture
from learner.student.checkpoint import MOMENTS_FILE
from tests import clean_process
from tests.light_campaign import assert_ledger_adds_up, configuration, make_folder, run_command_here
from tests.light_engine import BACKEND
from tests.unit.cluster.test_config import GOOD, written
from tests.unit.cluster.test_resume import EARLIER_RELEASE

COSINE = {"learning_rate": 1e-3, "warmup_updates": 1, "schedule": "cosine", "final_fraction": 0.1}
RATE = "learner.optimizer.learning_rate"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `runs/begun`, a finished campaign of 4 updates on a cosine."""
    folder = make_folder(tmp_path_factory.mktemp("light"))
    learner = {"compute_dtype": "float32", "optimizer": COSINE}
    run(folder, str(configuration(folder, "begun", pipeline={"updates": 4}, learner=learner)))
    return folder


def copy_of(folder: Path, name: str) -> Path:
    """The finished campaign under another name."""
    shutil.copytree(folder / "runs" / "begun", folder / "runs" / name)
    return folder / "runs" / name


def run(folder: Path, *arguments: str, status: int = 0) -> str:
    """Runs `understudy run …` in the folder; returns what it printed."""
    log = folder / "command.log"
    log.unlink(missing_ok=True)
    process = clean_process.start(run_command_here, folder, "run", *arguments, log=log)
    process.join()
    text = log.read_text()
    assert process.exitcode == status, text[-3000:]
    return text


def rates(run_dir: Path) -> list[float]:
    return [row["learning_rate"] for row in read_jsonl(run_dir / "metrics.jsonl") if row["step"]]


def own(run_dir: Path) -> dict[str, Any]:
    return yaml.safe_load((run_dir / "config.yaml").read_text())[OF_THIS_RUN]


def state(run_dir: Path, step: int) -> Any:
    return read_state(run_dir / "checkpoints" / f"step_{step:08d}")


def test_a_finished_campaign_goes_on_longer_with_its_memory_keys_changed_and_its_rate_without_a_jump(
    folder: Path,
) -> None:
    run_dir = copy_of(folder, "longer")
    before = rates(run_dir)
    free = ["learner.microbatch_tokens=64", "learner.gradient_checkpointing=true", "rollout.replicas=1"]
    text = run(folder, "--resume", "runs/longer", "pipeline.updates=7", *free)
    assert f"planned anew after update 4: from {before[-1]:.3g} to 0.0001 at update 7" in text
    after = rates(run_dir)
    assert after[:4] == before and len(after) == 7
    assert after[3] >= after[4] and after[-1] == pytest.approx(1e-4)
    events = {row["kind"]: row for row in read_jsonl(run_dir / "events.jsonl")}
    assert set(events["configuration_changed"]["changed"]) == {"pipeline.updates", *(key.split("=")[0] for key in free)}
    assert own(run_dir)["history"] == []
    assert own(run_dir)["plans"] == [plan.to_json() for plan in state(run_dir, 7).plans] != []
    assert_ledger_adds_up(run_dir, updates=7, size=8, max_staleness=0)


def test_what_is_on_request_is_recorded_everywhere_and_drawn(folder: Path) -> None:
    run_dir = copy_of(folder, "asked")
    now, file = dict(software()), run_dir / "config.yaml"
    file.write_text(file.read_text().replace(f"ray: {now['ray']}", "ray: 2.0.0"))
    whole = file.read_text()
    changes = ["--resume", "runs/asked", "pipeline.updates=6", f"{RATE}=5e-4", "sampling.max_response_tokens=5",
               "teachers.default.weight=2"]  # fmt: skip
    refused = run(folder, *changes, status=2)
    assert (
        refused.count("understudy: ") == 1
        and f"--allow-change {RATE} --allow-change sampling.max_response_tokens" in refused
    )
    assert file.read_text() == whole, "nothing is written"
    allowed = ["--allow-change", RATE, "--allow-change", "sampling", "--allow-change", "teachers.default"]
    run(folder, *changes, *allowed)
    assert len(rates(run_dir)) == 6 and 5e-4 > rates(run_dir)[4] > rates(run_dir)[5] == pytest.approx(5e-5)
    events = read_jsonl(run_dir / "events.jsonl")
    told = [row for row in events if row["kind"] == "setting_changed"]
    rows = [{key: row[key] for key in ("step", "key", "before", "after")} for row in told]
    assert rows[0] == {"step": 4, "key": RATE, "before": 1e-3, "after": 5e-4} and len(rows) == 3
    summary = json.loads((run_dir / "summary.json").read_text())
    assert rows == own(run_dir)["history"] == state(run_dir, 6).history == summary["history"]
    assert state(run_dir, 4).history == []
    page = (run_dir / "report.html").read_text()
    assert f"from update 4 on {RATE} is 0.0005; it was 0.001" in page and 'class="mark warn"' in page
    # The software: in every record, and another version is told.
    assert own(run_dir)["software"] == summary["software"] == state(run_dir, 6).software == now
    assert f"torch {now['torch']}" in page
    assert [row["changed"] for row in events if row["kind"] == "software_changed"] == [{"ray": ["2.0.0", now["ray"]]}]


def test_a_checkpoint_of_another_campaign_is_where_one_begins_with_its_moments_or_none(folder: Path) -> None:
    config, checkpoint = folder / "begun.yaml", folder / "runs" / "begun" / "checkpoints" / "step_00000004"
    refused = run(folder, str(config), "seed=7", status=2)
    assert f"student.model={checkpoint} student.optimizer=keep (or new)" in refused
    steps = {}
    for kept in ("keep", "new"):
        run(folder, str(config), "seed=7", f"name={kept}", f"student.model={checkpoint}", f"student.optimizer={kept}",
            "pipeline.updates=1", "evaluation.prompts=null", f"{RATE}=1e-12")  # fmt: skip
        first = folder / "runs" / kept / "checkpoints" / "step_00000001"
        moments, weights = load_file(first / MOMENTS_FILE), load_file(first / "model.safetensors")
        steps[kept] = {tensor.item() for name, tensor in moments.items() if name.endswith(".step")}
        for name, tensor in load_file(checkpoint / "model.safetensors").items():
            assert torch.allclose(weights[name], tensor, atol=1e-6)
    assert steps == {"keep": {5}, "new": {1}}
    with pytest.raises(UserError, match=r"student\.optimizer: found keep, and no training/optimizer.safetensors"):
        check_models(load_config(config, ["student.optimizer=keep"]))
    with pytest.raises(UserError, match=r"student\.optimizer: found keep, expected new"):
        load_config(config, ["student.optimizer=keep", "student.lora.rank=4"])


def test_a_run_directory_and_its_models_move_and_relative_paths_are_found_again(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "here")
    config = configuration(folder, "moved", pipeline={"updates": 2}, evaluation={"prompts": None})
    config.write_text(config.read_text().replace(f"{folder}/", ""))
    assert str(tmp_path) not in config.read_text()
    run(folder, "moved.yaml")
    run_dir = (folder / "runs" / "moved").rename(tmp_path / "elsewhere")
    run(tmp_path, "--resume", "elsewhere", "pipeline.updates=3")  # from another directory: where it was begun
    assert own(run_dir)["begun_in"] == str(folder) and len(rates(run_dir)) == 3
    (folder / "teacher").rename(tmp_path / "teacher-2")
    shutil.copytree(folder / "student", tmp_path / "student-2")
    with pytest.raises(UserError, match=r"^teachers\.default\.model: found"):
        check_models(config_of(run_dir, []))
    moved = ["teachers.default.model=teacher-2", "student.model=student-2"]
    run(tmp_path, "--resume", "elsewhere", "pipeline.updates=4", *moved)
    assert len(rates(run_dir)) == 4 and own(run_dir)["history"] == []


def test_a_student_of_another_architecture_is_refused_also_where_other_contents_are_allowed(folder: Path) -> None:
    config, checkpoint = load_config(folder / "begun.yaml"), folder / "runs" / "begun" / "checkpoints" / "step_00000004"
    demand_same_architecture(config, checkpoint)
    shutil.copytree(folder / "student", folder / "another")
    network = json.loads((folder / "another" / "config.json").read_text())
    (folder / "another" / "config.json").write_text(json.dumps({**network, "rms_norm_eps": 0.5}))
    config.student.model = str(folder / "another")
    with pytest.raises(UserError, match=r"rms_norm_eps: 0\.5.*a new campaign that begins from this one"):
        demand_same_architecture(config, checkpoint)


def test_a_run_of_the_release_before_goes_on_after_an_upgrade_longer_and_with_other_memory_keys(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    run_dir = folder / "runs" / "stopped"
    shutil.copytree(EARLIER_RELEASE / "stopped", run_dir)
    shutil.rmtree(folder / "teacher")
    shutil.copytree(EARLIER_RELEASE / "teacher", folder / "teacher")
    text = (run_dir / "config.yaml").read_text().replace("FOLDER", str(folder))
    (run_dir / "config.yaml").write_text(text.replace("\nrollout:\n", f"\nrollout:\n  backend: {BACKEND}\n"))
    run(folder, "--resume", "runs/stopped", "pipeline.updates=10", "learner.microbatch_tokens=64")
    assert [row["step"] for row in read_jsonl(run_dir / "metrics.jsonl")] == list(range(11))
    assert own(run_dir)["schema"] == SCHEMA and own(run_dir)["software"] == dict(software())


def test_a_file_of_a_later_release_is_refused(tmp_path: Path) -> None:
    file = written(tmp_path, f"{GOOD}{OF_THIS_RUN}: {{schema: {SCHEMA + 1}}}\n")
    with pytest.raises(UserError, match=r"a later release wrote this file"):
        load_config(file)
    assert load_config(written(tmp_path, f"{GOOD}{OF_THIS_RUN}: {{schema: {SCHEMA}, history: []}}\n")).name == "here"
