"""From the demo to a cluster, as docs/walk.md tells it: submit, status, scale, a node that dies, report."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.local_cluster import ROOT
from tests.walk import Walk


@pytest.fixture
def walk(tmp_path: Path) -> Iterator[Walk]:
    walk = Walk(tmp_path)
    yield walk
    walk.close()


@pytest.mark.e2e
@pytest.mark.nightly
@pytest.mark.timeout(1800)
def test_from_the_demo_to_a_report_of_a_campaign_that_was_scaled_and_lost_a_node(demo: Path, walk: Walk) -> None:
    done = walk.submit()
    assert done.returncode == 0 and done.stdout.startswith("job: understudy-walk-"), done.stderr
    walk.until("the first update", lambda: walk.update() >= 1)

    status = walk.status()
    assert (status["state"], status["updates"]) == ("running", 200)
    assert {actor["name"]: actor["alive"] for actor in status["actors"]} == dict.fromkeys(
        ("rollout-0", "teacher.default-0", "learner-0"), True
    )

    assert walk.scale().stdout == "rollout: 1 -> 2\n"
    walk.wait_for_actor("rollout-1")
    hosts = walk.cluster.hosts("RolloutActor")
    assert len(hosts) == 2 and walk.cluster.nodes[0] not in hosts, "rollout actors keep to the nodes meant for them"
    walk.wait_for_updates(3)

    walk.kill_a_node()
    walk.wait_for_the_replacement()
    assert len(walk.cluster.hosts("RolloutActor")) == 2, "on the node that was idle"
    [died] = walk.events("actor_died")
    assert "node" in died["cause"]

    drawn = set(re.findall(r"ray_understudy_\w+", (ROOT / "deploy" / "grafana.json").read_text()))
    assert drawn
    walk.until(f"Prometheus: {drawn - walk.scraped()}", lambda: drawn <= walk.scraped())
    walk.wait_for_the_end()
    summary = json.loads((walk.run / "summary.json").read_text())
    assert (summary["updates"], summary["faults"]) == (200, 1)
    assert summary["actors"]["end"] == {"rollout": 2, "teacher": 1, "learner": 1}
    assert 1 < summary["actors"]["mean"]["rollout"] < 2 and summary["actors"]["mean"]["learner"] > 0.95
    assert summary["ledger"]["trained"] == 200 * 16
    assert summary["ledger"]["trained"] + summary["ledger"]["dropped"] == summary["ledger"]["issued"]

    done = walk.cluster.understudy("report", walk.run, demo, "--output", walk.folder / "page.html")
    assert done.returncode == 0, done.stderr
    for page in (walk.folder / "page.html", walk.run / "report.html"):
        text = page.read_text("utf-8")
        marks = re.findall(r'<i class="mark (\w+)[^>]*title="[^:]*: ([^"]*)"', text)
        assert ("warn", "rollout scaled, 1 to 2 actors") in marks, page
        assert [tone for tone, told in marks if told.startswith("actor died")] == ["bad"], page
