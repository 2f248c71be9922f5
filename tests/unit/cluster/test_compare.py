"""Several methods on one task: what each campaign is, what is said of them, and that nothing is run twice."""

import itertools
import json
from pathlib import Path
from unittest.mock import ANY

import pytest

from actors.errors import UserError
from cluster import cli
from cluster.commands.compare import trials
from cluster.commands.courses import at_cost, common_budget, course, equal_cost_table, mean_run, reached, table
from cluster.records.reader import Run, load_run
from cluster.records.writer import read_jsonl
from tests import clean_process, light_campaign
from tests.fake_run import make_fake_run
from tests.light_campaign import configuration, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("compare"))


def compared(arguments: list[str]) -> None:
    light_campaign.without_ray()
    try:
        cli.main(["compare", *arguments])
    except SystemExit as ended:
        assert not ended.code, ended.code


def comparison(arguments: list[str], log: Path) -> str:
    log.unlink(missing_ok=True)
    process = clean_process.start(compared, arguments, log=log)
    process.join()
    assert process.exitcode == 0, log.read_text()[-3000:]
    return log.read_text()


METHODS = ("opd", "sft", "sft_then_opd", "opd_reward", "rl")


def test_all_methods_are_run_and_told_apart_and_nothing_is_run_twice(folder: Path) -> None:
    sizes = {"updates": 3, "prompts_per_update": 8, "samples_per_prompt": 1}
    base = str(configuration(folder, "all", pipeline=sizes, checkpoint={"every_updates": 100}))
    arguments = [base, "--methods", ",".join(METHODS), "--seeds", "0,1", "--target", "0",
                 "rl:learner.optimizer.learning_rate=1e-2"]  # fmt: skip
    said = comparison(arguments, folder / "log")
    runs = folder / "runs"
    dirs = {m: [runs / f"all-{m}-{s}" for s in (0, 1)] for m in METHODS if m != "sft_then_opd"}
    metrics = {m: read_jsonl(dirs[m][0] / "metrics.jsonl") for m in dirs}
    assert all(len(read_jsonl(path / "metrics.jsonl")) == 4 for paths in dirs.values() for path in paths)
    assert {m for m, rows in metrics.items() if "reward_mean" in rows[1]} == {"opd_reward", "rl"}
    assert {m: round(rows[-1]["learning_rate"] / metrics["opd"][-1]["learning_rate"]) for m, rows in metrics.items()} == {
        "opd": 1, "sft": 1, "opd_reward": 1, "rl": 10,
    }  # fmt: skip
    weights = {m: load_run(d[0]).setting("learner.objective.reward_weight") for m, d in dirs.items()}
    assert weights == {"opd": 0, "sft": 0, "opd_reward": 1, "rl": 0}
    # The second campaign of sft_then_opd begins with the student that the first has made, and the course is one run.
    parts = [runs / f"all-sft_then_opd-{part}-0" for part in (1, 2)]
    one, two = (read_jsonl(part / "metrics.jsonl") for part in parts)
    assert [len(one), len(two)] == [2, 3] and one[-1]["eval/accuracy"] == two[0]["eval/accuracy"]
    apart = [row["eval/reverse_kl"] for row in (one[0], one[-1], two[0])]
    assert apart[2] == pytest.approx(apart[1], rel=1e-4) != apart[0]
    assert [load_run(part).setting("learner.objective.estimator") for part in parts] == ["sft", "immediate"]
    both = course(parts)
    assert [row["step"] for row in both.metrics] == [0, 1, 2, 3]
    for key in ("tokens_generated", "processor_seconds"):
        assert both.metrics[-1][key] == pytest.approx(one[-1][key] + two[-1][key]) and one[-1][key] > 0
    trained = [row["tokens_trained"] for row in (*one[1:], *two[1:])]
    assert [row["tokens_trained_before"] for row in both.metrics] == [0, *itertools.accumulate(trained)]
    assert [row["wall_seconds"] for row in both.metrics] == sorted(row["wall_seconds"] for row in both.metrics)
    assert both.result["updates"] == 3 and both.result["reverse_kl_start"] == one[0]["eval/reverse_kl"]
    lines = said.splitlines()
    starts = [number for number, line in enumerate(lines) if line.startswith(("| method", "| at "))]
    assert [lines[at].split(" | ")[0] for at in starts] == ["| method", ANY, ANY] and len(starts) == 3
    assert all([row.split(" | ")[0] for row in lines[at + 2 : at + 7]] == [f"| {m}" for m in METHODS] for at in starts)
    assert "trained tokens" in lines[starts[1]] and "processor seconds" in lines[starts[2]]
    rows = lines[starts[0] + 2 : starts[0] + 7]
    assert [row.split(" | ")[1] for row in rows] == ["2"] * 5
    assert all(row.split(" | ")[-3:] == ["0", "0", "0 |"] for row in rows)  # a target of 0 is reached at once
    page = (runs / "all-comparison.html").read_text()
    assert page.count('class="band') >= 3 and "eval" in page
    assert page.count("update 3 of 3") == len(METHODS), "also where the updates are of two campaigns"
    evaluations = json.loads((runs / "all-comparison.json").read_text())
    assert {m: [len(rows) for rows in seeds] for m, seeds in evaluations.items()} == {
        m: [3, 3] if m == "sft_then_opd" else [2, 2] for m in METHODS
    }  # fmt: skip
    # The JSON has each seed's own figures, and the table and the page the means of the same.
    ends = {m: [rows[-1]["eval/reverse_kl"] for rows in seeds] for m, seeds in evaluations.items()}
    for m, row in zip(METHODS, rows, strict=True):
        last = [runs / f"all-{m}{'-2' * (m == 'sft_then_opd')}-{seed}" / "metrics.jsonl" for seed in (0, 1)]
        assert ends[m] == [read_jsonl(file)[-1]["eval/reverse_kl"] for file in last] and ends[m][0] != ends[m][1]
        assert row.split(" | ")[5].startswith(f"{sum(ends[m]) / 2:.3f} ({min(ends[m]):.3f} to {max(ends[m]):.3f})")
        assert f"<td>{sum(ends[m]) / 2:.3g}</td>" in page
    before = {path: path.stat().st_mtime_ns for path in runs.glob("all-*/summary.json")}
    assert comparison(arguments, folder / "log").splitlines()[-12:] == lines[-12:] and len(before) == 12
    assert before == {path: path.stat().st_mtime_ns for path in before}


def with_rows(path: Path, rows: list[tuple[int, int, float, float]]) -> Run:
    """A run with these evaluations: (step, tokens trained since the one before, processor seconds, accuracy)."""
    run_dir = make_fake_run(path)
    lines = [
        {"step": step, "wall_seconds": 1.0 * step, "tokens_trained": tokens, "processor_seconds": spent,
         "eval/accuracy": accuracy, "eval/accuracy_sampled": accuracy}
        for step, tokens, spent, accuracy in rows
    ]  # fmt: skip
    (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return course([run_dir])


def test_methods_are_compared_at_what_all_have_spent_seed_by_seed(tmp_path: Path) -> None:
    slow = [with_rows(tmp_path / f"s{i}", [(0, 0, 0, 0.1), (10, 100, 40, 0.3 + i / 10)]) for i in range(3)]
    fast = [with_rows(tmp_path / f"f{i}", [(0, 0, 0, 0.1), (10, 100, 5, 0.5), (20, 100, 10, 0.7 + i / 10)])
            for i in range(3)]  # fmt: skip
    results = {"fast": fast, "slow": slow}
    assert common_budget(results, "tokens_trained_before") == 100
    assert common_budget(results, "processor_seconds") == 10
    assert at_cost(fast[0], "tokens_trained_before", "eval/accuracy", 150) == pytest.approx(0.6)
    assert at_cost(slow[2], "processor_seconds", "eval/accuracy", 10) == pytest.approx(0.1 + 0.4 / 4)
    with pytest.raises(ValueError, match="has spent 200, not 201"):
        at_cost(fast[0], "tokens_trained_before", "eval/accuracy", 201)
    # At 10 processor seconds: 70, 80, 90% against 15, 17.5, 20%. Differences of -55, -62.5, -70, whose standard error is
    # 7.5 / sqrt(3) = 4.330, times 4.303, Student's t of two degrees of freedom.
    head, _, first, second = (equal_cost_table(results, "processor_seconds") or "").splitlines()
    assert head.startswith("| at 10 processor seconds | accuracy | against fast | sampled | against fast |")
    assert first.startswith("| fast | 80.0% ± 24.8% |  | 80.0%")
    assert second.startswith("| slow | 17.5% ± 6.2% | -62.5% ± 18.6% | 17.5%") and second.endswith("|  |  |")
    alone = equal_cost_table({"fast": fast[:1], "slow": slow[:1]}, "tokens_trained_before") or ""
    assert alone.splitlines()[-1].startswith("| slow | 30.0% | -20.0% |")
    (tmp_path / "f0" / "metrics.jsonl").write_text('{"step": 0, "wall_seconds": 1, "eval/accuracy": 0.5}\n')
    assert equal_cost_table({"fast": [course([tmp_path / "f0"])], "slow": slow}, "processor_seconds") is None


def test_the_mean_over_seeds_has_the_range_and_leaves_starting_up_out(tmp_path: Path) -> None:
    dirs = []
    for number, (accuracies, start) in enumerate([((0.1, 0.5, 0.9), 10.0), ((0.3, 0.5, 0.6), 30.0)]):
        run_dir = make_fake_run(tmp_path / str(number))
        rows = [
            {"step": step, "wall_seconds": start + step, "tokens_generated": 100 * step, "eval/accuracy": accuracy}
            for step, accuracy in zip((0, 10, 20), accuracies, strict=True)
        ]
        (run_dir / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        dirs.append(run_dir)
    runs = [course([path]) for path in dirs]
    mean = mean_run("opd", runs).metrics
    assert [row["wall_seconds"] for row in mean] == [0, 10, 20]
    assert [row["eval/accuracy"] for row in mean] == pytest.approx([0.2, 0.5, 0.75])
    assert [(row["eval/accuracy:low"], row["eval/accuracy:high"]) for row in mean] == [
        (0.1, 0.3),
        (0.5, 0.5),
        (0.6, 0.9),
    ]
    assert reached(runs[0], 0.9) == (20, 2000, 20.0) and reached(runs[1], 0.9) is None
    summary = json.loads((dirs[0] / "summary.json").read_text())
    share = 0.9 / summary["accuracy_teacher"]
    assert (
        table({"opd": runs}, share)
        .splitlines()[2]
        .endswith("| 20 (1 of 2 never) | 2,000 (1 of 2 never) | 20 (1 of 2 never) |")
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"methods": ["sft_then_opd"], "overrides": ["pipeline.updates=1"]}, "pipeline.updates: found 1, expected 2 or"),
        ({"methods": ["opd", "grpo"]}, "--methods: found grpo, expected some of opd, sft, sft_then_opd, opd_reward, rl"),
        ({"overrides": ["rl:pipeline.prompts_per_update=3"]}, "rl:pipeline.prompts_per_update: found 24 trajectories"),
        ({"methods": ["opd", "opd"]}, "--methods: found opd,opd, expected each of them once"),
        ({"seeds": [0, 1, 0]}, "--seeds: found 0,1,0, expected each of them once"),
        ({"overrides": ["evaluation.teacher=false"]}, "evaluation.teacher: found false, expected true"),
        ({"overrides": ["evaluation.prompts=null"]}, "evaluation.prompts: found null, expected held-out prompts"),
        ({"overrides": ["sft:learner.objective.mismatch.correction=mask"]}, "correction: found mask, expected none"),
        ({"overrides": ["environment.name=tests.guessing:Guess"]}, "--methods: found sft, expected methods that this campaign"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_runs(folder: Path, arguments: dict, said: str) -> None:
    base = configuration(folder, "refused", pipeline={"prompts_per_update": 16, "samples_per_prompt": 1})
    with pytest.raises(UserError) as refused:
        trials(base, **{"overrides": [], "methods": ["opd", "rl", "sft"], "seeds": [0]} | arguments)
    assert said in str(refused.value)
    assert not list((folder / "runs").glob("refused*"))
