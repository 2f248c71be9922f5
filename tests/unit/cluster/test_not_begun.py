"""A run that was refused has not begun, and pins nothing: the mended command needs no --allow-change."""

import os
from pathlib import Path

import pytest

import cluster.cli
from actors.errors import UserError
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.pins import hold
from cluster.records.reader import has_begun
from cluster.records.writer import RunRecords, read_jsonl
from cluster.state.resume import claimed
from tests import clean_process
from tests.light_campaign import configuration, make_folder, without_ray
from tests.small_config import config as small

LATE = "checkpoint.grace_seconds=1e-9"
"""Refused last of all, when the actors are there and a checkpoint was tried."""
REFUSED = (
    ["student.model=nowhere"],
    ["prompts.prompt_field=text"],
    ["prompts.path=missing.jsonl"],
    ["sampling.max_response_tokens=64"],
    ["evaluation.verifier.name=own.py:missing"],
    [LATE],
    ["learner.objective.estimator=to_go", "sampling.temperature=0.5", LATE],
)
MENDED = ["sampling.max_response_tokens=5", "learner.optimizer.learning_rate=0.002", "pipeline.samples_per_prompt=1"]


def refuse_and_mend(folder: Path, file: Path) -> None:
    """Gives wrong commands, one after the other, in one run directory, and then a right one."""
    os.chdir(folder)
    without_ray()
    for overrides in (*REFUSED, MENDED):
        try:
            cluster.cli.main(["run", str(file), *overrides])
        except SystemExit as ended:
            expected = 0 if overrides is MENDED else 2
            if ended.code != expected:
                raise RuntimeError(f"{overrides}: {ended.code}, expected {expected}") from ended


def test_whatever_a_start_was_refused_for_the_mended_command_begins(tmp_path: Path) -> None:
    file = configuration(make_folder(tmp_path), "mended", pipeline={"updates": 1}, evaluation={"every_updates": 1})
    process = clean_process.start(refuse_and_mend, tmp_path, file, log=tmp_path / "log")
    process.join()
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 0, said[-3000:]
    refusals = [line for line in said.splitlines() if line.startswith("understudy: ") and ": found " in line]
    assert len(refusals) == len(REFUSED) and "--allow-change" not in said, said[-3000:]
    run = tmp_path / "runs" / "mended"
    config = load_config(run / "config.yaml")
    assert (config.sampling.max_response_tokens, config.sampling.temperature) == (5, 1.0)
    kinds = [row["kind"] for row in read_jsonl(run / "events.jsonl")]
    assert kinds.count("loop_started") == 1 and not {"setting_changed", "configuration_changed"} & set(kinds)


def take(config: CampaignConfig) -> None:
    with claimed(config):
        pass


@pytest.mark.parametrize(
    "trace", ["", "started", "loop_started", "evaluated", "metrics.jsonl", "checkpoints/step_00000002"]
)
def test_a_configuration_binds_from_the_first_update_on(tmp_path: Path, trace: str) -> None:
    where = f"output_dir={tmp_path}"
    first = small(tmp_path, where)
    take(first)
    if trace.endswith("started"):
        RunRecords(first.run_dir).event(trace, step=0)
    elif trace == "evaluated":  # the untrained student
        (first.run_dir / "metrics.jsonl").write_text('{"step": 0, "wall_seconds": 1.0}\n')
    elif trace == "metrics.jsonl":
        (first.run_dir / trace).write_text('{"step": 1, "wall_seconds": 1.0}\n')
    elif trace:
        (first.run_dir / trace).mkdir(parents=True)
    other = small(tmp_path, where, "sampling.temperature=0.5")
    if has_begun(first.run_dir):
        with pytest.raises(UserError, match=r"a campaign with sampling\.temperature=1\.0 where this one has 0\.5"):
            take(other)
    else:
        take(other)
    assert has_begun(first.run_dir) == (trace not in ("", "started", "loop_started", "evaluated"))
    now = load_config(first.run_dir / "config.yaml").sampling.temperature
    assert now == (1.0 if has_begun(first.run_dir) else 0.5)


def test_a_commit_of_a_hub_is_held_from_the_first_update_on(tmp_path: Path) -> None:
    commit, where = "a" * 40, f"output_dir={tmp_path}"
    take(small(tmp_path, where, "student.model=owner/name", f"student.revision={commit}"))
    later = small(tmp_path, where, "student.model=owner/name")
    hold(later)
    assert later.student.revision is None
    (later.run_dir / "metrics.jsonl").write_text('{"step": 1, "wall_seconds": 1.0}\n')
    hold(later)
    assert later.student.revision == commit
