"""Every role is killed, stopped and made to fail, idle and at work; the result is that of an undisturbed campaign."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.records.writer import read_jsonl
from tests import light_campaign
from tests.chaos_campaign import Fault, schedule
from tests.light_campaign import assert_ledger_adds_up, configuration, fingerprint, finish, make_folder
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]
SHORT = [
    Fault("rollout", "stop", True, 1),
    Fault("learner", "raise", True, 3),
    Fault("teacher.default", "stop", False, 4),
    Fault("learner", "stop", True, 6),
    Fault("teacher.default", "raise", True, 7),
    Fault("rollout", "kill", False, 8),
    Fault("learner", "kill", False, 10),
]


def test_the_long_schedule_has_every_role_kind_and_state() -> None:
    faults = schedule(0, 5, 10)
    assert len({(fault.role, fault.kind, fault.busy) for fault in faults}) == len(faults) == 15
    assert [fault.after for fault in faults] == list(range(5, 155, 10))
    assert schedule(1, 5, 10) != faults == schedule(0, 5, 10)


@pytest.mark.integration
def test_a_campaign_under_faults_ends_with_the_same_bits(tmp_path: Path, python: str) -> None:
    folder = make_folder(tmp_path)
    changes: dict = {"pipeline": {"updates": 13}, "ray": {"hang_timeout_seconds": 1.5, "object_store_mebibytes": 100}}
    light = {"replicas": 2, "cpus_per_replica": 0.2}
    changes |= {"rollout": light, "learner": {"cpus_per_replica": 0.2}}
    changes["teachers"] = {"default": {"model": str(folder / "teacher"), "dtype": "float32", **light}}
    calm, stormy = configuration(folder, "calm", **changes), configuration(folder, "stormy", **changes)
    finish(light_campaign.start(calm), calm)
    (tmp_path / "schedule.json").write_text(json.dumps([asdict(fault) for fault in SHORT]))
    files = (stormy, tmp_path / "schedule.json", tmp_path / "result.json")
    command = [python, "-m", "tests.chaos_campaign", *files, "--hold"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]

    found = json.loads((tmp_path / "result.json").read_text())
    assert [row["role"] for row in found["faults"]] == [fault.role for fault in SHORT], done.stdout
    assert not [row for row in found["faults"] if row["wedged"]] and not found["orphans"]
    told = {"kill": "actor_died", "stop": "actor_hung", "raise": "actor_failed"}
    assert [row["told_as"] for row in found["faults"]] == [told[fault.kind] for fault in SHORT]
    assert fingerprint(folder / "runs" / "stormy") == fingerprint(folder / "runs" / "calm")
    assert_ledger_adds_up(folder / "runs" / "stormy", 13, 8, 0)
    kinds = [event["kind"] for event in read_jsonl(folder / "runs" / "stormy" / "events.jsonl")]
    assert kinds.count("learner_restored") == 3 and kinds.count("actor_restarted") >= 4
    assert "rollout-0 hangs and was killed" in done.stdout or "rollout-1 hangs and was killed" in done.stdout
    assert "the learner is back, as it was after update" in done.stdout
