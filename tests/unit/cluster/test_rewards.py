"""Rewards that are neither 0 nor 1 are told as what they are, and never as shares of right answers."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from cluster.commands.evaluate import table
from cluster.console.screen import status_line, summary_table
from cluster.console.status import read_status
from cluster.loop.evaluation_sets import metrics_of
from cluster.loop.evaluation_statistics import tally
from cluster.records.forms import verdict
from cluster.records.metric_table import row_of_key
from cluster.records.outcome import outcome
from cluster.records.rewards import are_graded, is_graded
from cluster.records.writer import read_jsonl
from cluster.report.page import write_report
from tests import light_campaign
from tests.fake_run import make_fake_run
from tests.light_campaign import configuration, finish, make_folder


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A campaign whose verifier gives rewards of 2.5, of -0.5 and, in one set, of 3 for everything."""
    folder = make_folder(tmp_path_factory.mktemp("graded"))
    prompts = {"path": str(folder / "heldout.jsonl"), "limit": 6}
    sets = {"all": {"prompts": prompts, "verifier": {"name": "tests.graders:always"}}}
    evaluation = {"prompts": prompts, "verifier": {"name": "tests.graders:by_reference"}, "sets": sets}
    pipeline = {"updates": 2, "prompts_per_update": 2, "samples_per_prompt": 2}
    file = configuration(folder, "graded", pipeline=pipeline, evaluation={**evaluation, "every_updates": 1})
    finish(light_campaign.start(file), file)
    return folder / "runs" / "graded"


def test_graded_rewards_have_a_share_of_right_answers_beside_them(graded: Path) -> None:
    rows = read_jsonl(graded / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["eval/accuracy"] == pytest.approx(2.5 * row["eval/right"] - 0.5 * (1 - row["eval/right"]))
        assert row["eval/right:low"] <= row["eval/right"] <= row["eval/right:high"]
        assert row["eval/all/accuracy"] == 3 and row["eval/all/right"] == 1
        assert [key for key in row if row_of_key(key) is None] == []
    assert rows[0]["eval/right_teacher"] is not None and rows[0]["eval/all/right_teacher"] == 1
    summary = json.loads((graded / "summary.json").read_text())
    assert summary["graded"] and summary["right_end"] == rows[-1]["eval/right"]
    assert summary["right_teacher"] == rows[0]["eval/right_teacher"]


def test_graded_rewards_are_told_as_rewards_everywhere(graded: Path) -> None:
    summary = json.loads((graded / "summary.json").read_text())
    end = f"{summary['accuracy_end']:.4g} ± "
    told = summary_table(summary)
    assert "mean reward" in told and end in told and "accuracy" not in told
    assert "set all: mean reward 3, right 100.0 ± " in told
    status = read_status(graded)
    assert status["graded"] == ["", "all"]
    line = status_line(status)
    assert f"mean reward {end}" in line and f"(teacher {summary['accuracy_teacher']:.4g})" in line
    page = re.sub(r"\s+", " ", write_report([graded], graded / "again.html").read_text())
    assert f"The student’s mean reward on held-out prompts is <b>{end}" in page
    assert f"{summary['right_end']:.1%} of its answers are right (a reward of at least 1)" in page
    assert 'aria-label="Mean reward on held-out prompts against updates"' in page
    assert "Accuracy on held-out prompts" not in page and "prompts right" not in page
    assert "<th>Mean reward</th><th>Sampled</th><th>Right</th>" in page
    several = write_report([graded, graded], graded / "several.html").read_text()
    assert "Held-out mean reward after training" in several and "<th>mean reward before</th>" in several


def test_a_report_of_a_campaign_under_way_tells_graded_rewards_too(graded: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    for name in ("metrics.jsonl", "config.yaml"):
        (tmp_path / "run" / name).write_text((graded / name).read_text())
    page = write_report([tmp_path / "run"], tmp_path / "page.html").read_text()
    assert "The student’s mean reward on held-out prompts is <b>" in page and "are right (a reward" in page


def test_rewards_that_do_not_vary_and_may_have_any_value_have_no_interval() -> None:
    same, before = tally([[2.0], [2.0], [2.0]]), tally([[1.0], [1.0], [1.0]])
    found = metrics_of("", {"accuracy": same}, {"accuracy": before})
    assert found["accuracy"] == 2 and found["accuracy:from_start"] == 1
    assert all(math.isnan(found[f"accuracy{end}"]) for end in (":low", ":high", ":from_start:low", ":from_start:high"))
    right = metrics_of("", {"accuracy": before})
    assert right["accuracy:low"] < 1 == right["accuracy:high"], "shares keep theirs"
    rows = table({"near": {"a": {"accuracy": before}, "b": {"accuracy": same}}})
    assert rows[1] == ["near", "mean reward", "1 ± 0.8605", "2", "+1"]


@pytest.mark.parametrize(
    ("rewards", "graded"), [([0, 1, 1.0], False), ([], False), ([0.5], True), ([2, 2], True), ([-1, 0], True)]
)
def test_rewards_are_graded_where_one_is_neither_0_nor_1(rewards: list[float], graded: bool) -> None:
    assert are_graded(rewards) == graded


def test_of_an_earlier_release_a_mean_that_is_no_share_tells_it() -> None:
    assert is_graded({"eval/accuracy": 1.37}) and is_graded({"accuracy": -0.2}, of="")
    assert not is_graded({"eval/accuracy": 0.37, "eval/near/accuracy": 3.0})
    assert not is_graded({"eval/accuracy": math.nan}) and not is_graded({"eval/accuracy": None})


def test_what_is_right_is_the_same_for_samples_and_for_the_metric() -> None:
    for reward in (-1.0, 0.0, 0.999, 1.0, 2.5):
        right = metrics_of("", {"right": tally([[float(verdict({"reward": reward}) == "right")]])})["right"]
        assert right == (reward >= 1)


def test_terminal_and_report_show_the_same_table(tmp_path: Path) -> None:
    run = make_fake_run(tmp_path / "run")
    summary: dict[str, Any] = json.loads((run / "summary.json").read_text())
    summary["intervals"] = {"accuracy_end": [0.9, 0.99]}
    (run / "summary.json").write_text(json.dumps(summary))
    columns, rows = outcome(summary)
    assert columns == ["accuracy", "sampled", "reverse KL"] and [row.name for row in rows][-1] == "teacher"
    terminal = [re.split(r"  +", line) for line in summary_table(summary).splitlines()[1:4]]
    assert terminal == [[row.name, *row.cells] for row in rows]
    page = write_report([run], tmp_path / "page.html").read_text()
    found = re.findall(r'<tr class="(?:before|after|teacher)"><th>(.*?)</th>.*?</td>(.*?)</tr>', page)
    cells = [[name.lower(), *re.findall(r"<td>(.*?)</td>", rest)] for name, rest in found]
    value, half = rows[1].cells[0].split(" ± ")
    rows[1].cells[0] = f"{value}%<small>± {half}</small>"  # the only interval, in a line of its own
    assert half.endswith("%")
    assert cells == [[row.name, *("–" if cell == "-" else cell for cell in row.cells)] for row in rows]
