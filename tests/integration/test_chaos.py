"""Every role is killed, stopped and made to fail, idle and at work; the result is that of an undisturbed campaign."""

import json
import shutil
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

MIDDLE = [
    Fault("environment", "kill", True, 1, in_episode=True),
    Fault("rollout", "kill", True, 2, in_episode=True),
    Fault("campaign", "kill", True, 3, in_episode=True),
    Fault("teacher.default", "kill", False, 4, in_episode=True),
    Fault("environment", "stop", True, 5, in_episode=True),
    Fault("learner", "kill", False, 6, in_episode=True),
]
"""While an environment thinks: the campaign is killed, and begun again, after the third."""
LIGHT = {"replicas": 2, "cpus_per_replica": 0.2}
CHANGES: dict = {
    "ray": {"hang_timeout_seconds": 1.5, "object_store_mebibytes": 100},
    "rollout": LIGHT,
    "learner": {"cpus_per_replica": 0.2},
}


def stormy_campaign(folder: Path, python: str, config: Path, faults: list[Fault]) -> subprocess.CompletedProcess[str]:
    """Runs the campaign under these faults; they are found in result.json."""
    (folder / "schedule.json").write_text(json.dumps([asdict(fault) for fault in faults]))
    shutil.rmtree(folder / "result.flags", ignore_errors=True)
    files = (config, folder / "schedule.json", folder / "result.json")
    command = [python, "-m", "tests.chaos_campaign", *files, "--hold"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)


def test_the_long_schedule_has_every_role_kind_and_state() -> None:
    faults = schedule(0, 5, 10)
    assert len({(fault.role, fault.kind, fault.busy) for fault in faults}) == len(faults) == 15
    assert [fault.after for fault in faults] == list(range(5, 155, 10))
    assert schedule(1, 5, 10) != faults == schedule(0, 5, 10)


@pytest.mark.integration
def test_a_campaign_under_faults_ends_with_the_same_bits(tmp_path: Path, python: str) -> None:
    folder = make_folder(tmp_path)
    changes = CHANGES | {"pipeline": {"updates": 13}}
    changes["teachers"] = {"default": {"model": str(folder / "teacher"), "dtype": "float32", **LIGHT}}
    calm, stormy = configuration(folder, "calm", **changes), configuration(folder, "stormy", **changes)
    finish(light_campaign.start(calm), calm)
    done = stormy_campaign(tmp_path, python, stormy, SHORT)
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


@pytest.mark.integration
def test_faults_in_the_middle_of_an_episode_end_with_the_same_bits(tmp_path: Path, python: str) -> None:
    folder = make_folder(tmp_path)
    own = {"name": "tests.chaos_campaign:ChaosGuess", "step_timeout_seconds": 100, "cpus_per_replica": 0.2}
    changes = CHANGES | {
        "environment": own,
        "sampling": {"max_response_tokens": 44, "stop_token_ids": list(range(7, 60))},
        "pipeline": {"updates": 8},
    }
    # One teacher and one environment actor: all that they do is begun again by those in their places.
    changes["teachers"] = {"default": {"model": str(folder / "teacher"), "dtype": "float32", "cpus_per_replica": 0.2}}
    calm = configuration(folder, "calm", **changes | {"environment": own | {"name": "tests.guessing:Guess"}})
    stormy = configuration(folder, "stormy", **changes)
    beside = light_campaign.start(calm)
    cut = MIDDLE.index(next(fault for fault in MIDDLE if fault.role == "campaign")) + 1
    first = stormy_campaign(tmp_path, python, stormy, MIDDLE[:cut])
    assert first.returncode in (-9, 128 + 9), first.stdout[-2000:] + first.stderr[-3000:]
    rest = stormy_campaign(tmp_path, python, stormy, MIDDLE[cut:])
    assert rest.returncode == 0, rest.stdout[-2000:] + rest.stderr[-3000:]
    finish(beside, calm)

    run = folder / "runs" / "stormy"
    assert fingerprint(run) == fingerprint(folder / "runs" / "calm")
    assert_ledger_adds_up(run, 8, 8, 0)
    found = json.loads((tmp_path / "result.json").read_text())
    assert not [row for row in found["faults"] if row["wedged"]] and not found["orphans"]
    events = read_jsonl(run / "events.jsonl")
    lost = [
        (row["kind"], row["actor"].partition("-")[0]) for row in events if row["kind"] in ("actor_died", "actor_hung")
    ]
    told = {"kill": "actor_died", "stop": "actor_hung"}
    assert lost == [(told[fault.kind], fault.role) for fault in MIDDLE if fault.role != "campaign"]
    kinds = [row["kind"] for row in events]
    assert kinds.count("resumed") == 1 and kinds.count("learner_restored") == 1
