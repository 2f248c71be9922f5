"""The quickstart, with a real engine, while an actor of each role is killed in turn; the result has the same bits."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.processes import below, command_of
from tests.waiting import PATIENCE_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]


def start(output: Path, name: str) -> subprocess.Popen[bytes]:
    """A campaign. What it says is in a file: nobody reads a pipe meanwhile."""
    settings = [
        *(f"output_dir={output}", f"name={name}", "pipeline.updates=14", "pipeline.prompts_per_update=16"),
        *("checkpoint.every_updates=3", "evaluation.every_updates=7", "evaluation.prompts.limit=16"),
    ]
    command = [sys.executable, "-m", "cluster", "run", "configs/quickstart.yaml", *settings]
    with (output / f"{name}.log").open("w") as log:
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=log)


def kill(role: str, campaign: subprocess.Popen[bytes]) -> None:
    """SIGKILL for the actor of this class, among the processes of this campaign alone."""
    for process in below(campaign.pid):
        if any(part.startswith(f"ray::{role}") for part in command_of(process)):
            process.kill()
            return
    raise AssertionError(f"no {role} to kill")


@pytest.mark.integration
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_a_campaign_whose_actors_are_killed_ends_with_the_same_bits(tmp_path: Path) -> None:
    calm = start(tmp_path, "calm")
    assert calm.wait(PATIENCE_SECONDS) == 0, (tmp_path / "calm.log").read_text()[-2000:]
    stormy = start(tmp_path, "stormy")
    metrics = tmp_path / "stormy" / "metrics.jsonl"
    for lines, role in ((3, "LocalTeacher"), (6, "Learner"), (10, "RolloutActor")):
        until(
            lambda lines=lines: metrics.exists() and metrics.read_bytes().count(b"\n") >= lines,
            f"update {lines - 1}",
            lambda: stormy.poll() is None,
        )
        kill(role, stormy)
    assert stormy.wait(PATIENCE_SECONDS) == 0, (tmp_path / "stormy.log").read_text()[-2000:]

    last = Path("checkpoints", "step_00000014", "model.safetensors")
    assert (tmp_path / "calm" / last).read_bytes() == (tmp_path / "stormy" / last).read_bytes()
    summary = json.loads((tmp_path / "stormy" / "summary.json").read_text())
    assert summary["faults"] == 3
    assert summary["ledger"]["trained"] == summary["ledger"]["issued"] == 14 * 16
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "stormy" / "events.jsonl").read_text().splitlines()]
    assert kinds.count("actor_died") == 3 and kinds.count("actor_restarted") == 2 and "learner_restored" in kinds
    steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
    assert steps == list(range(15))
