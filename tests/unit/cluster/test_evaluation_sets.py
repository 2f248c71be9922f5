"""Evaluation sets: whole campaigns without Ray, their metrics, baselines and best checkpoint; what is refused; exposure."""

import asyncio
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from actors.config import VerifierConfig
from actors.data.verifiers import answer_of
from actors.errors import UserError
from cluster.config_file import load_config
from cluster.console.screen import status_line, summary_table
from cluster.console.status import read_status
from cluster.loop.evaluation_sets import Evaluations, Measured, metrics_of, passes
from cluster.loop.evaluation_statistics import tally
from cluster.loop.exposure import parts_of
from cluster.records.metric_table import row_of_key, with_interval
from cluster.records.writer import read_jsonl, trajectory_files
from cluster.report.page import write_report
from cluster.state.campaign_state import read_state
from cluster.state.checkpoints import best_first
from cluster.state.resume import config_of
from tests import light_campaign
from tests.light_campaign import configuration, finish, make_folder

SHORT = {"updates": 2, "prompts_per_update": 2, "samples_per_prompt": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("sets"))


def sets_in(folder: Path) -> dict[str, Any]:
    prompts = {"path": str(folder / "heldout.jsonl"), "limit": 5}
    return {
        "near": {"prompts": prompts, "samples": 3, "every_updates": 1, "exposure": True},
        "far": {
            "prompts": prompts,
            "verifier": {"name": "regex", "pattern": "(.)"},
            "samples": 4,
            "temperature": 0.7,
            "top_p": 0.9,
            "max_response_tokens": 9,
        },
        "firm": {"prompts": prompts, "temperature": 0, "verifier": {"name": "exact"}},
    }


@pytest.fixture(scope="module")
def run_dir(folder: Path) -> Path:
    """A campaign with `evaluation.prompts` and three sets."""
    held_out = {"prompts": {"path": str(folder / "heldout.jsonl"), "limit": 5}, "every_updates": 2}
    file = configuration(
        folder, "sets", pipeline=SHORT, evaluation={**held_out, "sets": sets_in(folder)}, checkpoint={"best_by": "near"}
    )
    finish(light_campaign.start(file), file)
    return folder / "runs" / "sets"


def test_each_set_is_measured_when_it_is_due_as_it_samples(run_dir: Path) -> None:
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert all("eval/near/reverse_kl" in row for row in rows) and "eval/far/accuracy" not in rows[1]
    assert "eval/accuracy" not in rows[1]
    for row in (rows[0], rows[2]):
        assert row["eval/far/response_length_mean"] > 6  # its limit is 9, and that of training 6
        assert row["eval/near/response_length_mean"] <= 6
        assert (
            "eval/far/reverse_kl" not in row and "eval/firm/entropy" not in row
        )  # other distributions than training's
        assert {"eval/far/pass@2", "eval/far/pass@4", "eval/far/majority"} <= row.keys()
        assert "eval/firm/pass@2" not in row
        # Greedy as `evaluation.prompts` is: the same answers, and the same number.
        assert row["eval/firm/accuracy"] == row["eval/accuracy"]
    for row in rows:
        for key in row:
            assert row_of_key(key) is not None, key
    kept = read_jsonl(trajectory_files(run_dir)[2])
    assert {row.get("set") for row in kept} == {None, "near", "far", "firm"}


def test_every_value_has_an_interval_and_differences_to_start_and_teacher(run_dir: Path) -> None:
    first, _, last = read_jsonl(run_dir / "metrics.jsonl")
    for key in ("eval/accuracy", "eval/reverse_kl", "eval/near/reverse_kl", "eval/near/entropy", "eval/far/pass@4"):
        assert last[f"{key}:low"] <= last[key] <= last[f"{key}:high"]
        assert last[f"{key}:low"] < last[f"{key}:high"]
    for key in ("eval/accuracy", "eval/reverse_kl", "eval/near/reverse_kl", "eval/far/majority"):
        assert f"{key}:from_start" not in first
        assert last[f"{key}:from_start"] == pytest.approx(last[key] - first[key], abs=1e-6)
        assert last[f"{key}:from_start:low"] <= last[f"{key}:from_start"] <= last[f"{key}:from_start:high"]
    assert first["eval/far/accuracy:from_teacher"] == first["eval/far/accuracy"] - first["eval/far/accuracy_teacher"]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["sets"]["far"]["end"]["accuracy"] == last["eval/far/accuracy"]
    assert summary["intervals"]["reverse_kl_change"][0] == last["eval/reverse_kl:from_start"]
    status = read_status(run_dir)
    assert f"far {with_interval(last, 'eval/far/accuracy', '.1%')}" in status_line(status)
    assert "±" in status_line(status) and "set near: reverse KL" in summary_table(summary)


def test_the_baselines_are_in_the_checkpoint_and_other_prompts_are_not_compared(folder: Path, run_dir: Path) -> None:
    state = read_state(run_dir / "checkpoints" / "step_00000002")
    assert (
        state.baselines["start"].keys() == {"", "near", "far", "firm"} == state.baselines["teacher"].keys() | {"near"}
    )
    more = ["pipeline.updates=3", f"evaluation.sets.near.prompts.path={folder / 'train.jsonl'}"]
    file = folder / "longer.yaml"
    file.write_text(yaml.safe_dump({"name": "sets"}))
    process = light_campaign.clean_process.start(
        light_campaign.run_command_here, folder, "run", "--resume", str(run_dir), *more, log=folder / "longer.log"
    )
    process.join()
    assert process.exitcode == 0, (folder / "longer.log").read_text()[-3000:]
    last = read_jsonl(run_dir / "metrics.jsonl")[3]
    assert "eval/near/reverse_kl:from_start" not in last and "eval/reverse_kl:from_start" in last
    assert config_of(run_dir, []).best_by == "near"


def test_the_report_draws_bands_changes_and_exposure(run_dir: Path) -> None:
    page = write_report([run_dir], run_dir / "again.html").read_text()
    assert "<h2>Evaluation sets</h2>" in page and "near: exposure bias" in page and "far: accuracy" in page
    last = read_jsonl(run_dir / "metrics.jsonl")[2]
    assert with_interval(last, "eval/far/accuracy", ".1%") in page and "teacher's prefixes" in page.replace(
        "&#x27;", "'"
    )
    assert page.count('class="band') >= 3


def test_exposure_compares_prefixes_of_the_student_and_of_the_teacher(run_dir: Path) -> None:
    for row in read_jsonl(run_dir / "metrics.jsonl")[:3]:
        places = row["eval/near/exposure_position"]
        assert places == [0, 1, 2, 3, 4, 5]
        for name in ("exposure_own", "exposure_teacher"):
            curve, low, high = (row[f"eval/near/{name}{end}"] for end in ("", ":low", ":high"))
            assert len(curve) == len(places) == len(low) == len(high)
            assert all(a is None or a <= b <= c for a, b, c in zip(low, curve, high, strict=True))
        # At the first position there is no prefix: both are the same contexts, with other draws.
        apart = abs(row["eval/near/exposure_own"][0] - row["eval/near/exposure_teacher"][0])
        widths = [
            row[f"eval/near/{n}:high"][0] - row[f"eval/near/{n}:low"][0] for n in ("exposure_own", "exposure_teacher")
        ]
        assert apart < sum(widths)


def test_positions_cover_a_response_in_at_most_eight_parts() -> None:
    for longest in (1, 2, 7, 8, 9, 100, 4096):
        edges, positions = parts_of(longest)
        assert edges[0] == 0 and edges[-1] == longest and len(edges) <= 9 and len(positions) <= 16
        assert min(positions) >= 0 and max(positions) < longest
        assert all(np.any((positions >= a) & (positions < b)) for a, b in itertools.pairwise(edges))


def test_the_best_checkpoint_is_that_of_the_named_set_and_ties_go_to_the_lower_reverse_kl() -> None:
    found: dict[int, dict[str, Any]] = {
        1: {"eval/accuracy": 0.9, "eval/a/accuracy": 0.5, "eval/a/reverse_kl": 0.3},
        2: {"eval/accuracy": 0.1, "eval/a/accuracy": 0.5, "eval/a/reverse_kl": 0.2},
        3: {"eval/accuracy": 0.2, "eval/a/accuracy": math.nan, "eval/b/reverse_kl": 0.5},
        4: {"eval/b/reverse_kl": 0.4},
    }
    assert best_first([1, 2, 3, 4], found, "a") == [2, 1, 3]
    assert best_first([1, 2, 3, 4], found, "b") == [4, 3]
    assert best_first([1, 2, 3, 4], found) == [1, 3, 2]


def test_a_difference_is_left_out_where_nothing_is_known_of_the_other() -> None:
    own = {"accuracy": tally([[1.0], [0.0], [1.0]]), "truncated_fraction": tally([[0.0]] * 3)}
    found = metrics_of("eval/x/", own, None, {})
    assert found.keys() == {
        "eval/x/accuracy",
        "eval/x/accuracy:low",
        "eval/x/accuracy:high",
        "eval/x/truncated_fraction",
    }
    rewards = {"accuracy": tally([[5.0], [-1.0], [3.0]])}  # no shares: an interval of Student's t
    assert metrics_of("", rewards)["accuracy:high"] > 5
    assert passes(1) == [] and passes(4) == [2, 4] and passes(6) == [2, 4, 6]


def test_answers_are_what_samples_vote_with() -> None:
    def answer(name: str, text: str, pattern: str | None = None) -> str | None:
        return answer_of(VerifierConfig(name, pattern))(text)

    assert answer("numeric", "about 1,250.50 or 3/4") == "3/4" and answer("numeric", "none") is None
    assert answer("exact", " yes \n") == "yes" and answer("exact", " ") is None
    assert answer("regex", "a: 1, b: 2", r": (\d)") == "2" and answer("regex", "-", r": (\d)") is None
    assert answer("os.path:join", "x") is None and answer("os.path:join", "x1", r"\d") == "1"
    pytest.importorskip("math_verify")
    assert answer("math", r"so \boxed{\frac{1}{2}}") == answer("math", "it is $1/2$") == "1/2"


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"checkpoint": {"best_by": "x"}}, "checkpoint.best_by: found x, expected null, or one of evaluation.sets (a)"),
        ({"a": {"temperature": 0}}, "evaluation.sets.a.verifier: found null"),
        ({"a": {"temperature": 0, "samples": 2, "verifier": {"name": "exact"}}}, "evaluation.sets.a.samples: found 2"),
        ({"a": {"verifier": {"name": "exact"}, "prompts": {"reference_field": None}}}, "a.prompts.reference_field"),
        ({"a": {"top_p": 0.5, "exposure": True, "verifier": {"name": "exact"}}}, "evaluation.sets.a.exposure"),
        ({"a": {"max_response_tokens": 64}}, "evaluation.sets.a.max_response_tokens: found 64, expected less than"),
        ({"a": {"samples": 10**9, "verifier": {"name": "exact"}}}, "a.samples: found 1,000,000,000, expected at most"),
        ({"a": {"samples": 9 * 10**6, "verifier": {"name": "exact"}}}, "a.samples: found 9,000,000 with"),
        ({"a": {"sampels": 2}}, "'samples' perhaps"),
    ],
)
def test_what_a_set_cannot_measure_is_refused_by_check(
    folder: Path, settings: dict[str, Any], told: str, capsys: pytest.CaptureFixture
) -> None:
    own = {"prompts": {"path": str(folder / "heldout.jsonl"), **settings.get("a", {}).pop("prompts", {})}}
    sets = {"a": {**own, **settings.get("a", {})}}
    file = configuration(
        folder, "refused", evaluation={"prompts": None, "sets": sets}, checkpoint=settings.get("checkpoint", {})
    )
    with pytest.raises((SystemExit, UserError)):
        light_campaign.cluster.cli.main(["check", "--offline", str(file)])
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("name", ["greedy", "sampled"])
def test_a_set_is_not_called_as_those_of_the_prompts_are(folder: Path, name: str) -> None:
    prompts = {"path": str(folder / "heldout.jsonl")}
    sets = {name: {"prompts": prompts, "verifier": {"name": "exact"}}}
    file = configuration(folder, "named", evaluation={"sets": sets, "prompts": prompts})
    with pytest.raises(UserError, match=rf"evaluation\.sets: found {name}, expected another name"):
        load_config(file)
    load_config(configuration(folder, "named", evaluation={"sets": sets, "prompts": None}))


def test_a_set_name_is_part_of_metric_names(folder: Path) -> None:
    file = configuration(folder, "named", evaluation={"sets": {"a/b": {"prompts": {"path": "x"}}}})
    with pytest.raises(UserError, match=r"evaluation\.sets: found 'a/b'"):
        load_config(file)


@pytest.mark.parametrize(("temperature", "fits"), [(1.5, True), (1.7, False)])
def test_a_set_is_no_hotter_than_vllm_can(folder: Path, temperature: float, fits: bool) -> None:
    one = {"prompts": {"path": "x"}, "verifier": {"name": "exact"}, "temperature": temperature}
    file = configuration(folder, "hot", evaluation={"sets": {"a": one}}, rollout={"backend": "vllm"})
    if fits:
        load_config(file, ["sampling.temperature=0.8"])
        return
    with pytest.raises(UserError, match=r"sets\.a\.temperature: found 1\.7, expected at most 1\.6"):
        load_config(file, ["sampling.temperature=0.8"])


def test_before_the_first_update_teachers_answer_while_the_student_is_measured(folder: Path) -> None:
    began = {"student": asyncio.Event(), "teacher": asyncio.Event()}

    class Waits:
        """Each side goes on once the other has begun."""

        every = 1

        async def student(self, rollout: Any) -> Measured:
            began["student"].set()
            await asyncio.wait_for(began["teacher"].wait(), 60)
            return Measured({"accuracy": tally([[0.0], [1.0]])}, [], {})

        async def teacher(self) -> dict[str, Any]:
            began["teacher"].set()
            await asyncio.wait_for(began["student"].wait(), 60)
            return {"accuracy": tally([[1.0], [1.0]])}

        def identity(self) -> str:
            return "the same"

    config = load_config(configuration(folder, "waits", pipeline=SHORT), [])
    evaluations = Evaluations(config, None, {"near": Waits()})  # type: ignore[dict-item]
    baselines: dict[str, Any] = {}
    first, _, _ = asyncio.run(evaluations.student(None, 0, baselines))  # type: ignore[arg-type]
    assert baselines.keys() == {"start", "teacher"} and first["eval/near/accuracy_teacher"] == 1
    assert first["eval/near/accuracy:from_teacher"] == -0.5
    later, _, _ = asyncio.run(evaluations.student(None, 1, baselines))  # type: ignore[arg-type]
    assert later["eval/near/accuracy:from_start"] == 0 and "eval/near/accuracy_teacher" not in later
