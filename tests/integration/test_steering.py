"""A campaign with real Ray and vLLM is paused, scaled, resumed and stopped by the commands that a user types."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.records.writer import read_jsonl
from tests.light_campaign import configuration, make_folder

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.integration, pytest.mark.timeout(200)]


def understudy(*arguments: object) -> str:
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def until(run: Path, what: str, process: subprocess.Popen, condition: object) -> None:
    deadline = time.monotonic() + 90
    while not condition():  # type: ignore[operator]
        assert process.poll() is None and time.monotonic() < deadline, what
        time.sleep(0.2)


def test_pause_scale_resume_stop(tmp_path: Path) -> None:
    make_folder(tmp_path)
    config = configuration(
        tmp_path,
        "steered",
        rollout={
            "cpus_per_replica": 0.2,
            "replicas": 1,
            "engine": {"kv_cache_memory_bytes": 64 << 20, "max_num_seqs": 8},
        },
        learner={"cpus_per_replica": 0.2},
        pipeline={"updates": 100_000, "max_staleness": 1},
        evaluation={"every_updates": 100_000},
        checkpoint={"every_updates": 100_000, "keep_last": 1},
        ray={"object_store_mebibytes": 100},
    )
    run = tmp_path / "runs" / "steered"
    command = [sys.executable, "-m", "cluster", "run", str(config), "teachers.default.cpus_per_replica=0.2"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def step() -> int:
        return read_jsonl(run / "metrics.jsonl")[-1]["step"]

    def kinds() -> list[str]:
        return [event["kind"] for event in read_jsonl(run / "events.jsonl")]

    try:
        until(
            run,
            "it did not begin",
            process,
            lambda: (run / "status.json").exists() and "loop_started" in kinds() and step() > 2,
        )
        assert understudy("pause", run).startswith("paused")
        time.sleep(2.5)
        paused_at = step()
        time.sleep(1.5)
        assert step() == paused_at and json.loads(understudy("status", run, "--json"))["state"] == "paused"
        assert (
            understudy("scale", run, "rollout=2", "teacher.default=2") == "rollout: 1 -> 2; teacher.default: 1 -> 2\n"
        )
        assert understudy("resume", run) == "resumed\n"
        started = {"rollout-1", "teacher.default-1"}
        until(run, "the new actors did not start", process, lambda: started <= {
            event["actor"] for event in read_jsonl(run / "events.jsonl") if event["kind"] == "actor_started"
        })  # fmt: skip
        until(run, "it did not go on", process, lambda: step() > paused_at + 3)
        understudy("scale", run, "rollout=1")
        until(run, "no actor has left", process, lambda: "actor_ended" in kinds())
        assert understudy("stop", run).startswith("stopping")
        assert process.wait(timeout=60) == 130
    finally:
        process.kill()
    assert kinds()[-1] == "stopped" and "scaling_failed" not in kinds() and list((run / "checkpoints").iterdir())
    ledger = json.loads((run / "summary.json").read_text())["ledger"]
    assert ledger["issued"] == sum(count for state, count in ledger.items() if state != "issued")
