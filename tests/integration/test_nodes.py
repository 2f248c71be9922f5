"""A node is taken away in the middle of an update, with what its actors had written, and later another one comes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.records import read_jsonl
from tests import light_campaign
from tests.light_campaign import assert_ledger_adds_up, configuration, fingerprint, finish, make_folder, without_times

ROOT = Path(__file__).resolve().parents[2]


def files(run_dir: Path) -> dict[str, str]:
    """Hashes of all but what counts the tokens that were sampled, some of them twice."""
    counting = ("metrics.jsonl", "training/campaign.json")
    return {name: found for name, found in fingerprint(run_dir).items() if not name.endswith(counting)}


def metrics(run_dir: Path) -> list[dict]:
    rows = [without_times(row) for row in read_jsonl(run_dir / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if key != "tokens_generated"} for row in rows]


@pytest.mark.integration
@pytest.mark.timeout(300)
def test_a_campaign_survives_the_loss_of_a_node_and_uses_the_one_that_joins(tmp_path: Path) -> None:
    folder = make_folder(tmp_path)
    home = {"cpus_per_replica": 0.2, "resources": {"home": 1}}
    teacher = {"model": str(folder / "teacher"), "dtype": "float32", **home}
    changes: dict = {"learner": home, "teachers": {"default": teacher}, "pipeline": {"updates": 6}}
    changes |= {
        "rollout": {"replicas": 2, "cpus_per_replica": 0.2, "resources": {"roll": 1}},
        "evaluation": {"every_updates": 100},
    }
    calm, stormy = configuration(folder, "calm", **changes), configuration(folder, "stormy", **changes)
    finish(light_campaign.start(calm), calm)
    command = [sys.executable, "-m", "tests.node_campaign", stormy, tmp_path / "events.json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    events = json.loads((tmp_path / "events.json").read_text())
    told = [(event["kind"], event.get("actor")) for event in events]
    for actor in ("rollout-0", "rollout-1"):
        assert told.index(("actor_died", actor)) < told.index(("waiting_for_resources", actor))
    back = next(index for index, (kind, _) in enumerate(told) if kind == "actor_restarted")
    assert back > told.index(("waiting_for_resources", "rollout-0")), "one may be enough to finish with"
    assert ("lost_objects", None) in told
    assert files(folder / "runs" / "stormy") == files(folder / "runs" / "calm")
    assert metrics(folder / "runs" / "stormy") == metrics(folder / "runs" / "calm")
    assert_ledger_adds_up(folder / "runs" / "stormy", 6, 8, 0)
    assert "the cluster has no room for 0.2 CPU, 1 roll; the campaign goes on without it" in done.stdout
    assert "trajectories were lost with the node that held them" in done.stdout
