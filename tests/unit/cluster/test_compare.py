"""Several methods on one task: what each campaign is, what is said of them, and that nothing is run twice."""

import json
from pathlib import Path

import pytest

from actors.errors import UserError
from cluster import cli
from cluster.commands.compare import mean_run, reached, table, trials
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


def test_three_methods_are_run_and_told_apart_and_nothing_is_run_twice(folder: Path) -> None:
    base = str(
        configuration(folder, "three", pipeline={"updates": 3, "prompts_per_update": 8, "samples_per_prompt": 1})
    )
    arguments = [base, "--seeds", "0,1", "--target", "0", "rl:learner.optimizer.learning_rate=1e-2"]
    said = comparison(arguments, folder / "log")
    runs = folder / "runs"
    dirs = {m: [runs / f"three-{m}-{s}" for s in (0, 1)] for m in ("opd", "rl", "sft")}
    metrics = {m: read_jsonl(dirs[m][0] / "metrics.jsonl") for m in dirs}
    assert all(len(read_jsonl(path / "metrics.jsonl")) == 4 for paths in dirs.values() for path in paths)
    assert {m: "reward_mean" in rows[1] for m, rows in metrics.items()} == {"opd": False, "rl": True, "sft": False}
    assert {m: round(rows[-1]["learning_rate"] / metrics["opd"][-1]["learning_rate"]) for m, rows in metrics.items()} == {
        "opd": 1, "rl": 10, "sft": 1,
    }  # fmt: skip
    rows = [line for line in said.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[:2] for row in rows[1:]] == [["| opd", "2"], ["| rl", "2"], ["| sft", "2"]]
    assert all(row.split(" | ")[-3:] == ["0", "0", "0 |"] for row in rows[1:])  # a target of 0 is reached at once
    page = (runs / "three-comparison.html").read_text()
    assert page.count('class="band') >= 3 and "eval" in page
    before = {path: (path / "summary.json").stat().st_mtime_ns for paths in dirs.values() for path in paths}
    assert comparison(arguments, folder / "log").splitlines()[-6:] == said.splitlines()[-6:]
    assert before == {path: (path / "summary.json").stat().st_mtime_ns for path in before}


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
    mean = mean_run("opd", dirs).metrics
    assert [row["wall_seconds"] for row in mean] == [0, 10, 20]
    assert [row["eval/accuracy"] for row in mean] == pytest.approx([0.2, 0.5, 0.75])
    assert [(row["eval/accuracy:low"], row["eval/accuracy:high"]) for row in mean] == [
        (0.1, 0.3),
        (0.5, 0.5),
        (0.6, 0.9),
    ]
    assert reached(dirs[0], 0.9) == (20, 2000, 20.0) and reached(dirs[1], 0.9) is None
    summary = json.loads((dirs[0] / "summary.json").read_text())
    share = 0.9 / summary["accuracy_teacher"]
    assert (
        table({"opd": dirs}, share)
        .splitlines()[2]
        .endswith("| 20 (1 of 2 never) | 2,000 (1 of 2 never) | 20 (1 of 2 never) |")
    )


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"methods": ["opd", "grpo"]}, "--methods: found grpo, expected some of opd, rl, sft"),
        ({"overrides": ["rl:pipeline.prompts_per_update=3"]}, "rl:pipeline.prompts_per_update: found 24 trajectories"),
        ({"methods": ["opd", "opd"]}, "--methods: found opd,opd, expected each of them once"),
        ({"seeds": [0, 1, 0]}, "--seeds: found 0,1,0, expected each of them once"),
        ({"overrides": ["evaluation.teacher=false"]}, "evaluation.teacher: found false, expected true"),
        ({"overrides": ["evaluation.prompts=null"]}, "evaluation.prompts: found null, expected held-out prompts"),
        ({"overrides": ["sft:learner.objective.mismatch.correction=mask"]}, "correction: found mask, expected none"),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_before_anything_runs(folder: Path, arguments: dict, said: str) -> None:
    base = configuration(folder, "refused", pipeline={"prompts_per_update": 16, "samples_per_prompt": 1})
    with pytest.raises(UserError) as refused:
        trials(base, **{"overrides": [], "methods": ["opd", "rl", "sft"], "seeds": [0]} | arguments)
    assert said in str(refused.value)
    assert not list((folder / "runs").glob("refused*"))
