"""Ray's control store (GCS) is killed under a campaign with real Ray."""

from pathlib import Path

import psutil
import pytest

from cluster.records.writer import read_jsonl
from learner.student.checkpoint import checkpoint_steps
from tests import clean_process, light_campaign
from tests.waiting import until

pytestmark = pytest.mark.integration
PATIENCE_SECONDS = 3.0
ROOT = str(Path(__file__).parents[2])


def run(folder: str, config_file: str, python: str) -> None:
    """Does what `understudy run` does, with less patience."""
    import os
    import sys

    import cluster.cli
    from cluster.fleet import ray_control_store

    os.environ["PYTHONPATH"] = ROOT  # the actors import the engine from the tests
    sys.executable = python  # which starts the actors
    os.chdir(folder)
    ray_control_store.PATIENCE_SECONDS = PATIENCE_SECONDS
    cluster.cli.main(["run", config_file])


def test_a_campaign_that_loses_rays_control_store_ends_with_a_checkpoint_and_one_line(
    tmp_path: Path, python: str
) -> None:
    light = {"cpus_per_replica": 0.2, "replicas": 1}
    config_file = light_campaign.configuration(
        light_campaign.make_folder(tmp_path),
        "lost",
        rollout=light,
        learner={"cpus_per_replica": 0.2},
        teachers={"default": {"model": str(tmp_path / "teacher"), "dtype": "float32", **light}},
        pipeline={"updates": 100_000, "max_staleness": 1},
        evaluation={"prompts": None},
        checkpoint={"every_updates": 100_000},
        ray={"object_store_mebibytes": 100},
    )
    run_dir, log = tmp_path / "runs" / "lost", tmp_path / "log"
    process = clean_process.start(run, str(tmp_path), str(config_file), python, log=log)
    until(lambda: len(read_jsonl(run_dir / "metrics.jsonl")) > 5, "six updates", process.is_alive)
    [store] = [one for one in psutil.Process(process.pid).children(recursive=True) if one.name() == "gcs_server"]
    store.kill()
    process.join()
    said = log.read_text()
    [line] = [line for line in said.splitlines() if line.startswith("understudy:")]
    assert process.exitcode == 1 and "Traceback" not in said, said
    assert "Ray's control store at " in line and "goes on from the last checkpoint" in line
    last = read_jsonl(run_dir / "metrics.jsonl")[-1]["step"]
    assert checkpoint_steps(run_dir / "checkpoints")[-1] in (last, last + 1)
