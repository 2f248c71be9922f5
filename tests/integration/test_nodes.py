"""A node is lost in the middle of an update, with what its actors have written; later another node comes."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cluster.records.writer import read_jsonl
from tests import light_campaign
from tests.light_campaign import assert_ledger_adds_up, configuration, fingerprint, finish, make_folder, without_times
from tests.waiting import PATIENCE_SECONDS

ROOT = Path(__file__).resolve().parents[2]


def files(run_dir: Path) -> dict[str, str]:
    """Hashes of all files but those that count sampled tokens: some tokens are sampled twice."""
    counting = ("metrics.jsonl", "training/campaign.json")
    return {name: found for name, found in fingerprint(run_dir).items() if not name.endswith(counting)}


def metrics(run_dir: Path) -> list[dict]:
    rows = [without_times(row) for row in read_jsonl(run_dir / "metrics.jsonl")]
    return [{key: value for key, value in row.items() if key != "tokens_generated"} for row in rows]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("nodes"))


def campaign(folder: Path, name: str, **changes: Any) -> Path:
    """Learner and teacher at home, two rollout actors where there is room for them."""
    home = {"cpus_per_replica": 0.2, "resources": {"home": 1}}
    teacher = {"model": str(folder / "teacher"), "dtype": "float32", **home}
    rollout = {"replicas": 2, "cpus_per_replica": 0.2, "resources": {"roll": 1}}
    settings: dict = {"learner": home, "teachers": {"default": teacher}, "rollout": rollout}
    return configuration(folder, name, **settings, evaluation={"every_updates": 100}, **changes)


def on_nodes(python: str, config: Path, *how: str) -> tuple[str, list[dict[str, Any]]]:
    """Runs it on a cluster (tests/node_campaign.py). Returns its output and its events."""
    result = config.with_suffix(".events")
    command = [python, "-m", "tests.node_campaign", config, result, *how]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout, json.loads(result.read_text())


@pytest.mark.integration
def test_a_campaign_survives_the_loss_of_a_node_and_uses_the_one_that_joins(folder: Path, python: str) -> None:
    updates = {"pipeline": {"updates": 6}}
    calm, stormy = campaign(folder, "calm", **updates), campaign(folder, "stormy", **updates)
    finish(light_campaign.start(calm), calm)
    said, events = on_nodes(python, stormy)

    told = [(event["kind"], event.get("actor")) for event in events]
    for actor in ("rollout-0", "rollout-1"):
        assert told.index(("actor_died", actor)) < told.index(("waiting_for_resources", actor))
    back = next(index for index, (kind, _) in enumerate(told) if kind == "actor_restarted")
    assert back > told.index(("waiting_for_resources", "rollout-0")), "one may be enough to finish with"
    assert ("lost_objects", None) in told
    assert files(folder / "runs" / "stormy") == files(folder / "runs" / "calm")
    assert metrics(folder / "runs" / "stormy") == metrics(folder / "runs" / "calm")
    assert_ledger_adds_up(folder / "runs" / "stormy", 6, 8, 0)
    assert "the cluster has no room for 0.2 CPU, 1 roll; the campaign waits for it (no node is large enough" in said
    assert "trajectories were lost with the node that held them" in said


@pytest.mark.integration
@pytest.mark.nightly
def test_a_campaign_begins_with_the_nodes_that_are_there_and_grows_when_others_come(folder: Path, python: str) -> None:
    said, events = on_nodes(
        python, campaign(folder, "short", pipeline={"updates": 100_000, "max_staleness": 1}), "--short"
    )
    told = [(event["kind"], event.get("actor")) for event in events]
    first, second = told.index(("loop_started", None)), told.index(("actor_started", "rollout-1"))
    assert told.index(("short_of_resources", None)) < told.index(("actor_started", "rollout-0")) < first < second
    assert "starting with one actor of each role; more join when there is room (rollout.replicas: found 2" in said
    ledger = json.loads((folder / "runs" / "short" / "summary.json").read_text())["ledger"]
    assert ledger["trained"] > 0 and ledger["issued"] == sum(
        count for state, count in ledger.items() if state != "issued"
    )
    lost = {"actor_died", "actor_hung", "actor_failed", "scaling_failed"}
    assert not lost & {kind for kind, _ in told}
