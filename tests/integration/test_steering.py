"""A campaign on a real Ray cluster is paused, scaled, resumed and stopped by the commands that a user types."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.records.writer import read_jsonl
from tests.light_campaign import configuration, make_folder
from tests.waiting import PATIENCE_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]
GROUP = 2
pytestmark = pytest.mark.integration


def understudy(*arguments: object) -> str:
    """Runs a command; again where a busy machine has not let the campaign answer in time."""
    command = [sys.executable, "-m", "cluster", *map(str, arguments)]
    while True:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
        if "has not answered within" not in done.stderr:
            assert done.returncode == 0, done.stderr
            return done.stdout


class Campaign:
    """One that runs in a process of its own until it is stopped."""

    def __init__(self, folder: Path, python: str):
        light = {"cpus_per_replica": 0.2, "replicas": 1}
        config = configuration(
            make_folder(folder),
            "steered",
            rollout=light,
            learner={"cpus_per_replica": 0.2},
            teachers={"default": {"model": str(folder / "teacher"), "dtype": "float32", **light}},
            pipeline={"updates": 100_000, "max_staleness": 1, "samples_per_prompt": GROUP},
            evaluation={"every_updates": 100_000},
            checkpoint={"every_updates": 100_000, "keep_last": 1},
            ray={"object_store_mebibytes": 100},
        )
        self.run = folder / "runs" / "steered"
        command = [python, "-m", "cluster", "run", str(config)]
        self.process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def until(self, what: str, condition: Callable[[], object]) -> None:
        until(condition, what, lambda: self.process.poll() is None)

    def step(self) -> int:
        return max((row["step"] for row in read_jsonl(self.run / "metrics.jsonl")), default=-1)

    def events(self) -> list[dict[str, Any]]:
        return read_jsonl(self.run / "events.jsonl")

    def kinds(self) -> list[str]:
        return [event["kind"] for event in self.events()]

    def started(self) -> set[str]:
        return {event["actor"] for event in self.events() if event["kind"] == "actor_started"}

    def next_status(self) -> dict[str, Any]:
        """What the campaign writes about itself the next time."""
        file = self.run / "status.json"
        before = file.read_text()
        self.until("another status", lambda: file.read_text() != before)
        return json.loads(file.read_text())


@pytest.fixture
def campaign(tmp_path: Path, python: str) -> Iterator[Campaign]:
    campaign = Campaign(tmp_path, python)
    yield campaign
    campaign.process.kill()


def test_pause_scale_resume_stop(campaign: Campaign) -> None:
    run = campaign.run
    campaign.until("the third update", lambda: (run / "status.json").exists() and campaign.step() > 2)

    assert understudy("pause", run).startswith("paused")
    campaign.next_status()  # which may have begun before the command
    first, *later = [campaign.next_status() for _ in range(3)]
    assert {status["state"] for status in (first, *later)} == {"paused"}
    assert json.loads(understudy("status", run, "--json"))["state"] == "paused"
    # One group may have waited for a free place when the campaign was paused.
    assert max(status["ledger"]["issued"] for status in later) <= first["ledger"]["issued"] + GROUP

    assert understudy("scale", run, "rollout=2", "teacher.default=2") == "rollout: 1 -> 2; teacher.default: 1 -> 2\n"
    assert understudy("resume", run) == "resumed\n"
    campaign.until("new actors", lambda: {"rollout-1", "teacher.default-1"} <= campaign.started())
    wanted = campaign.step() + 3
    campaign.until("three more updates", lambda: campaign.step() >= wanted)
    understudy("scale", run, "rollout=1")
    campaign.until("an actor that leaves", lambda: "actor_ended" in campaign.kinds())
    assert understudy("stop", run).startswith("stopping")
    assert campaign.process.wait(PATIENCE_SECONDS) == 130

    assert campaign.kinds()[-1] == "stopped" and "scaling_failed" not in campaign.kinds()
    assert list((run / "checkpoints").iterdir())
    ledger = json.loads((run / "summary.json").read_text())["ledger"]
    assert ledger["issued"] == sum(count for state, count in ledger.items() if state != "issued")
