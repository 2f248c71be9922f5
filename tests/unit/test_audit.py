"""The audited table: its rows load, a light campaign goes through all of it, and what is committed agrees with itself."""

import html
import json
import os
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from actors.config import TrainingPromptsConfig
from actors.errors import UserError
from actors.prompts.order import PromptOrder
from benchmarks.audit import (
    JSON,
    PAGE,
    ROOT,
    audit,
    read_results,
    run_interrupted,
    trial_of,
    weights_hash,
    write_results,
)
from benchmarks.audit_page import at_equal, markdown, resumed
from benchmarks.audit_rows import ROWS, Row, held_out
from cluster.config_file import load_config
from cluster.loop.evaluation_statistics import quantile
from cluster.loop.prompt_choice import PromptChoice
from cluster.records.metric_table import with_interval
from cluster.records.writer import read_jsonl
from cluster.report.evaluations import SHOWN, changes
from cluster.report.page import write_report
from cluster.state import recorded
from cluster.state.campaign_state import read_state
from tests import clean_process
from tests.light_campaign import assert_ledger_adds_up, configuration, make_folder, run_command_here

COMMITTED = read_results(ROOT / "docs")
UPDATES = 4
MARGIN = 0.4


class Light:
    """Starts light campaigns. The one that is interrupted stands still after half of its updates until it is killed."""

    def __init__(self, folder: Path):
        self.folder, self.gate, self.started = folder, folder / "gate", 0
        self.gate.touch()
        self._process: BaseProcess | None = None

    def __call__(self, arguments: list[str], log: Path) -> Any:
        self.started += 1
        if any("-interrupted" in word for word in arguments) and not log.exists():
            self.gate.unlink()
        self._process = clean_process.start(run_command_here, self.folder, *arguments, log=log)
        return self

    def wait(self) -> int:
        assert self._process is not None
        self._process.join()
        return self._process.exitcode or 0

    def poll(self) -> int | None:
        assert self._process is not None
        return self._process.exitcode

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self.gate.touch()


@pytest.fixture(scope="module")
def row(tmp_path_factory: pytest.TempPathFactory) -> Row:
    folder = make_folder(tmp_path_factory.mktemp("audit"))
    engine = {"wait_at": UPDATES // 2, "wait_for": str(folder / "gate")}
    set_of = {"prompts": {"path": str(folder / "heldout.jsonl")}, "verifier": {"name": "regex", "pattern": "([0-9])"}}
    file = configuration(
        folder,
        "light",
        rollout={"engine": engine},
        # So few that there are several epochs, in which the choice of prompts depends on what the state knows of them.
        prompts={"limit": 3, "keep": "margin", "margin": MARGIN, "curriculum": "easy_first"},
        pipeline={"updates": UPDATES, "prompts_per_update": 2},
        evaluation={
            "sets": {"far": {**set_of, "samples": 2}},
            "every_updates": 3,
        },  # none where the engine stands still
    )
    file.write_text(file.read_text() + "record: true\n")
    return Row(title="Light", config=str(file), measured="far")


@pytest.fixture(scope="module")
def entry(row: Row) -> dict[str, Any]:
    folder = Path(row.config).parent
    return audit("light", row, [3, 4], folder / "audited", start=Light(folder), say=lambda _: None)


def test_a_campaign_that_is_killed_and_resumed_has_the_weights_of_one_that_is_not(
    row: Row, entry: dict[str, Any]
) -> None:
    found = entry["resumed"]
    assert found["interrupted"] == found["uninterrupted"] and len(found["interrupted"]) == 64
    assert (found["method"], found["seed"], found["killed_after"]) == ("opd", 3, 2)
    audited = Path(row.config).parent / "audited"
    assert weights_hash(audited / "light-opd-4") != weights_hash(audited / "light-opd-3") == found["interrupted"]
    assert "**the same**" in resumed(found) and "**differ**" in resumed({**found, "interrupted": "0" * 64})
    assert "asynchronous" in resumed({**found, "interrupted": "0" * 64, "synchronous": False})


def chosen_again(run_dir: Path, seed: int) -> tuple[dict[int, tuple[float, int]], dict[str, set[int]]]:
    """(what is known of each prompt, the numbers that were passed over for each reason), worked out from the record alone.

    It fails where an update has trained on other prompts than those that are next in order and not passed over.
    """
    files = recorded.opened(str(run_dir)).shards
    settings = TrainingPromptsConfig(path="p", keep="margin", margin=MARGIN, curriculum="easy_first")
    known: dict[int, tuple[float, int]] = {}
    choice, order, cursor = PromptChoice(settings, UPDATES, known), PromptOrder(seed, {"": 3}), 0
    passed: dict[str, set[int]] = {"agreed": set(), "later": set()}
    for step in range(UPDATES):
        frame = pd.concat([pd.read_parquet(shard.path) for shard in files[step + 1]]).sort_values("row")
        asked: list[tuple[int, int]] = []
        while len(asked) < 2:
            if (reason := choice.passes(*order.id_at(cursor), step)) is None:
                asked.append(order.id_at(cursor))
            else:
                passed[reason] |= {2 * cursor, 2 * cursor + 1}
            cursor += 1
        assert frame[["epoch", "prompt", "sample"]].to_numpy().tolist() == [[*a, i] for a in asked for i in (0, 1)]
        apart = (frame["behaviour_logprobs"] - frame["teacher.default.logprobs"]).map(np.mean)
        choice.learn(frame[["epoch", "prompt", "sample"]].to_numpy(), apart.tolist())
    return known, passed


def test_prompts_are_passed_over_and_counted_in_the_ledger_and_in_the_metrics(row: Row, entry: dict[str, Any]) -> None:
    runs = Path(row.config).parent / "audited"
    for name in ("light-opd-3", "light-opd-3-interrupted", "light-opd-4"):
        assert_ledger_adds_up(runs / name, UPDATES, 4, 0)
        dropped = json.loads((runs / name / "summary.json").read_text())["dropped_because"]
        last = read_jsonl(runs / name / "metrics.jsonl")[-1]
        assert dropped and all(last[f"passed_over_{reason}"] == count for reason, count in dropped.items())
        assert last["dropped"] == sum(dropped.values())
        known = read_state(runs / name / "checkpoints" / f"step_{UPDATES:08}").prompts
        asked, passed = chosen_again(runs / name, int(name.split("-")[2]))
        assert known == {prompt: (pytest.approx(value, abs=1e-4), epoch) for prompt, (value, epoch) in asked.items()}
        assert {reason: len(numbers) for reason, numbers in passed.items() if numbers} == dropped
        ledger = [span for line in read_jsonl(runs / name / "ledger.jsonl") for span in line.get("dropped", [])]
        assert {number for a, b in ledger for number in range(a, b)} == set().union(*passed.values())
    assert (runs / "light-opd-3" / "ledger.jsonl").read_text() == (
        runs / "light-opd-3-interrupted" / "ledger.jsonl"
    ).read_text()


def test_the_page_the_report_and_the_summary_agree_to_the_digit(row: Row, entry: dict[str, Any]) -> None:
    page = markdown({"light": entry}, {})
    runs = Path(row.config).parent / "audited"
    assert [(one["method"], one["seed"]) for one in entry["campaigns"]] == [("opd", 3), ("opd", 4)]
    for one in entry["campaigns"]:
        run_dir = runs / f"light-{one['method']}-{one['seed']}"
        summary = json.loads((run_dir / "summary.json").read_text())
        report = html.unescape(write_report([run_dir], run_dir / "report.html").read_text())
        line = next(line for line in page.splitlines() if line.startswith(f"| {one['method']} | {one['seed']} |"))
        for key, form in (pair for pair in SHOWN if pair[0] in ("accuracy", "reverse_kl")):
            for when in ("start", "end"):
                told = with_interval(summary["sets"]["far"][when], key, form)
                assert f"| {told} |" in line and f"<td>{told}</td>" in report
        assert f"{summary['tokens_generated']:,}" in line and f"{summary['tokens_generated']:,}" in report
        assert summary["updates"] == UPDATES and one["tokens_trained"] > 0 and one["processor_seconds"] > 0
        assert one["course"][-1]["step"] == UPDATES and len(one["course"]) == 3
        rows = read_jsonl(run_dir / "metrics.jsonl")
        for at in one["course"]:
            assert at["tokens_trained"] == sum(row.get("tokens_trained", 0) for row in rows[: at["step"] + 1])
            for key in ("accuracy", "reverse_kl"):
                assert at[key] == rows[at["step"]][f"eval/far/{key}"]
        speed = summary["tokens_generated"] / summary["loop_seconds"]
        assert f"| {UPDATES} | {summary['tokens_generated']:,} | {speed:,.0f} |" in line
    assert "**opd** | 2 seeds" in page
    assert "--seeds 3,4" in page


def test_other_prompts_than_those_that_are_pinned_are_refused_before_anything_runs(
    row: Row, entry: dict[str, Any], tmp_path: Path
) -> None:
    keys = {"student.model", "teachers.default.model", "prompts", "evaluation.sets.far.prompts"}
    assert keys <= entry["pins"].keys()
    folder = Path(row.config).parent
    other = tmp_path / "train.jsonl"
    other.write_text((folder / "train.jsonl").read_text().replace("0+0=", "0+1="))
    start = Light(folder)
    with pytest.raises(UserError, match=r"light: prompts.*--new-pins"):
        audit("light", row, [3], tmp_path, pinned=entry["pins"], overrides=[f"prompts.path={other}"], start=start)
    assert start.started == 0


def test_a_campaign_that_fails_or_ends_too_early_is_told_with_what_it_printed(row: Row, tmp_path: Path) -> None:
    class Ended:
        def wait(self) -> int:
            return 2

        poll = wait

        def kill(self) -> None:
            raise AssertionError

    def start(arguments: list[str], log: Path) -> Ended:
        log.write_text("learner.replicas: 0 found")
        return Ended()

    with pytest.raises(RuntimeError, match=r"(?s)light-opd-3 ended with the status 2.*learner.replicas: 0"):
        audit("light", row, [3], tmp_path, start=start, say=lambda _: None)
    with pytest.raises(RuntimeError, match="ended before it could be interrupted"):
        run_interrupted(trial_of("light", row, "opd", 3, tmp_path), start, tmp_path / "log", 1)


def test_methods_are_compared_where_each_has_spent_what_the_most_frugal_has() -> None:
    def campaign(method: str, seed: int, course: list[tuple[float, float, float]]) -> dict[str, Any]:
        rows = [
            {
                "tokens_trained": tokens,
                "processor_seconds": seconds,
                "reverse_kl": kl,
                "reverse_kl:low": kl,
                "reverse_kl:high": kl,
            }
            for tokens, seconds, kl in course
        ]
        return {"method": method, "seed": seed, "course": rows, "end": {}}

    slow = [(0, 0, 1.0), (10, 20, 0.5), (20, 40, 0.25)]
    longer = [*slow[:2], (20, 40, 0.35), (40, 80, 0.0)]
    fast = [(0, 0, 1.0), (15, 5, 0.7), (30, 10, 0.6)]
    found = at_equal({"campaigns": [campaign("a", 0, slow), campaign("b", 0, fast)]}, ["a", "b"])
    assert "0.2500 (0.2500 to 0.2500), after 20 | 0.7000 (0.7000 to 0.7000), after 15 | +0.4500 |" in found[2]
    assert "1.0000 (1.0000 to 1.0000), after 0 | 0.6000 (0.6000 to 0.6000), after 10 | -0.4000 |" in found[3]
    # The other seed has spent more, and its difference is 0.7 + 0.2 - 0.35: each is compared within its own seed.
    again = [campaign("a", 1, longer), campaign("b", 1, [(2 * t, 2 * s, kl + 0.2) for t, s, kl in fast[:2]])]
    found = at_equal({"campaigns": [campaign("a", 0, slow), campaign("b", 0, fast), *again]}, ["a", "b"])
    # Trained tokens: 0.7 - 0.25 and 0.9 - 0.35.
    reach = quantile(1) * 0.05
    assert f"+0.5000 ({0.5 - reach:+.4f} to {0.5 + reach:+.4f})" in found[2]
    # An accuracy has bounds within 0 and 1.
    judged = [campaign(method, seed, [(10, 10, 0.0)]) for method in "ab" for seed in (0, 1)]
    for one, accuracy in zip(judged, (0.9, 1.0, 0.0, 0.1), strict=True):
        one["end"]["accuracy"] = accuracy
        one["course"][0] |= {"accuracy": accuracy, "accuracy:low": accuracy, "accuracy:high": accuracy}
    assert "to 100.0%), after 10 | 5.0% (0.0% to " in at_equal({"campaigns": judged}, ["a", "b"])[2]


@pytest.mark.parametrize("name", ROWS)
def test_a_row_loads_and_has_the_set_that_it_is_measured_on(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    row = ROWS[name]
    for method in row.methods:
        trial = trial_of(name, row, method, 0, Path("/tmp/runs"))
        config = load_config(ROOT / trial.arguments[0], trial.arguments[1:])
        assert row.measured in config.evaluation.sets and config.run_dir == Path(f"/tmp/runs/{name}-{method}-0")
        assert os.sep + "tmp" not in trial.command


@pytest.mark.parametrize("name", COMMITTED)
def test_what_is_committed_of_a_row_is_what_a_report_of_it_says(name: str) -> None:
    entry, [_, page] = COMMITTED[name], (ROOT / "docs" / PAGE).read_text().split(f"## {name}\n")
    assert name in ROWS and entry["config"] == ROWS[name].config
    found = entry["resumed"]
    assert not found["synchronous"] or found["interrupted"] == found["uninterrupted"]
    for one in entry["campaigns"]:
        rows = [
            {"step": step, **{f"eval/{entry['set']}/{key}": value for key, value in one[when].items()}}
            for step, when in enumerate(("start", "end"))
        ]
        report = html.unescape(changes([entry["set"]], rows))
        line = next(line for line in page.splitlines() if line.startswith(f"| {one['method']} | {one['seed']} |"))
        cells = [cell.strip() for cell in line.split("|")]
        shown = [cell for cell in cells if "±" in cell or " to " in cell]
        assert shown and all(f"<td>{cell}</td>" in report or "accuracy_teacher" in one["start"] for cell in shown)


def test_the_committed_page_is_made_of_the_committed_figures(tmp_path: Path) -> None:
    write_results(COMMITTED, tmp_path)
    for file in (JSON, PAGE):
        assert (tmp_path / file).read_text() == (ROOT / "docs" / file).read_text(), "python -m benchmarks.audit --page"
    assert not (COMMITTED.keys() - ROWS.keys())
    assert held_out("a", 2)["evaluation.sets.audit"]["samples"] == 2
