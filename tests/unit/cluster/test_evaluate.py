"""`understudy evaluate` without Ray: models and runs side by side, the same numbers as in training, and what it refuses."""

import json
from pathlib import Path
from typing import Any

import pytest

from actors.errors import UserError
from cluster import cli
from cluster.commands.evaluate import Model, models_of, table, to_evaluate, write_results
from cluster.config_file import load_config
from cluster.loop.evaluation_statistics import tally
from cluster.records.writer import read_jsonl
from tests import clean_process, light_campaign
from tests.light_campaign import configuration, finish, make_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates, whose sets the command evaluates again."""
    made = make_folder(tmp_path_factory.mktemp("evaluate"))
    prompts = {"path": str(made / "heldout.jsonl"), "limit": 5}
    sets = {
        "near": {"prompts": prompts, "samples": 2},
        "far": {"prompts": prompts, "samples": 3, "temperature": 0.5, "verifier": {"name": "regex", "pattern": "(.)"}},
    }
    pipeline = {"updates": 2, "prompts_per_update": 2, "samples_per_prompt": 2}
    file = configuration(
        made, "run", pipeline=pipeline, evaluation={"prompts": prompts, "sets": sets, "every_updates": 1}
    )
    finish(light_campaign.start(file), file)
    return made


def evaluated(folder: Path, *arguments: str) -> tuple[int | None, str]:
    """The exit status and the output of the command, in a process of its own."""
    number = len(list(folder.glob("command-*")))
    log = folder / f"command-{number}.log"
    process = clean_process.start(light_campaign.run_command_here, folder, "evaluate", *arguments, log=log)
    process.join()
    return process.exitcode, log.read_text()


def test_a_run_and_its_start_side_by_side_have_the_numbers_that_training_had(folder: Path) -> None:
    words = [str(folder / "student"), str(folder / "runs" / "run"), str(folder / "run.yaml")]
    status, told = evaluated(folder, *words, "--reverse-kl", "--output", "found.json")
    assert status == 0, told[-3000:]
    found = json.loads((folder / "found.json").read_text())
    start, end = found["models"]
    assert end.endswith("run@2") and found["models"][end].endswith("step_00000002")
    rows = read_jsonl(folder / "runs" / "run" / "metrics.jsonl")
    for name, row in ((start, rows[0]), (end, rows[2])):
        for of_set, key in (("near", "reverse_kl"), ("near", "entropy"), ("far", "pass@3"), ("far", "majority")):
            for bound in ("", ":low", ":high"):
                value = found["sets"][of_set]["values"][name][f"{key}{bound}"]
                assert value == pytest.approx(row[f"eval/{of_set}/{key}{bound}"], abs=1e-4)
        assert found["sets"]["greedy"]["values"][name]["accuracy"] == row["eval/accuracy"]
        sampled = found["sets"]["sampled"]["values"][name]
        assert sampled["accuracy"] == row["eval/accuracy_sampled"]
        assert sampled["response_length_mean"] == row["eval/response_length_mean"]
        assert sampled["reverse_kl"] == row["eval/reverse_kl"], "of the same draws"
    [apart] = [one for one in found["sets"]["near"]["differences"] if one["quantity"] == "reverse_kl"]
    assert (apart["model"], apart["against"]) == (end, start)
    for bound, key in (("difference", ""), ("low", ":low"), ("high", ":high")):
        assert apart[bound] == pytest.approx(rows[2][f"eval/near/reverse_kl:from_start{key}"], abs=1e-4)
    assert found["sets"]["far"]["samples"] == 3 and found["sets"]["far"]["prompts"] == 5
    assert "teacher.default-0" in told and "learner" not in told and "±" in told


def test_without_the_reverse_kl_no_teacher_is_needed(folder: Path) -> None:
    words = [str(folder / "teacher"), str(folder / "run.yaml"), "teachers.default.model=nowhere"]
    status, told = evaluated(folder, *words, "--set", "far", "prompts.path=nowhere.jsonl")
    assert status == 0, told[-3000:]
    assert "teacher.default-0" not in told and "reverse_kl" not in told
    found = json.loads((folder / "runs" / "run-evaluation.json").read_text())
    assert found["sets"].keys() == {"far"} and list(found["models"]) == [str(folder / "teacher")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["run.yaml"], "MODEL_OR_RUN, one or several, then CONFIG"),
        (["student", "nothing.yaml"], "CONFIG, a YAML file"),
        (["student", "run.yaml", "--set", "fra"], "--set: found fra, expected one of greedy, sampled, far, near"),
        (["student", "run.yaml", "--best"], "of which none is a run"),
        (["runs/run", "run.yaml", "--step", "7"], "--step"),
        (["student", "student", "run.yaml"], "found student twice"),
        (["student", "run.yaml", "--reverse-kl", "--set", "far"], "--reverse-kl"),
        (["nowhere", "run.yaml"], "nowhere"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(
    folder: Path, words: list[str], told: str, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", *words])
    error = capsys.readouterr().err
    assert ended.value.code == 2 and told in error and len(error.splitlines()) == 1


def test_an_environment_plays_the_held_out_prompts_as_in_training(folder: Path) -> None:
    own = {"name": "tests.guessing:Guess", "arguments": {"turns": 2}, "step_timeout_seconds": 100}
    evaluation = {
        "every_updates": 1,
        "sets": {"twice": {"prompts": {"path": str(folder / "heldout.jsonl"), "limit": 5}, "samples": 4}},
    }
    sampling = {"max_response_tokens": 44, "stop_token_ids": list(range(7, 60))}
    pipeline = {"updates": 1, "prompts_per_update": 2}
    file = configuration(folder, "played", environment=own, evaluation=evaluation, sampling=sampling, pipeline=pipeline)
    finish(light_campaign.start(file), file)
    words = [str(folder / "student"), str(folder / "runs" / "played"), str(file), "--output", "played.json"]
    status, told = evaluated(folder, *words)
    assert status == 0, told[-3000:]
    found = json.loads((folder / "played.json").read_text())["sets"]
    assert found.keys() == {"greedy", "sampled", "twice"}
    rows = read_jsonl(folder / "runs" / "played" / "metrics.jsonl")
    by_model = [[found[name]["values"][model] for name in found] for model in found["greedy"]["values"]]
    for row, (greedy, sampled, twice) in zip(rows, by_model, strict=True):
        assert greedy["accuracy"] == row["eval/accuracy"] and 0 <= sampled["accuracy"] <= 1
        assert twice["accuracy"] == row["eval/twice/accuracy"] and 0 < twice["accuracy"] < 1


def test_a_quantity_that_one_model_lacks_is_left_empty(tmp_path: Path) -> None:
    lengths, right = tally([[3.0], [4.0]]), tally([[1.0], [0.0]])
    results = {
        "near": {"a": {"response_length_mean": lengths}, "b": {"response_length_mean": lengths, "accuracy": right}}
    }
    by_quantity = {row[1]: row for row in table(results)}
    assert by_quantity["accuracy"][2] == by_quantity["accuracy"][4] == "" and "50.0 ±" in by_quantity["accuracy"][3]
    config = load_config(
        configuration(make_folder(tmp_path), "any", evaluation={"sets": {"near": {"prompts": {"path": "a"}}}})
    )
    write_results(config, [Model(name, name) for name in "ab"], results, tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())["sets"]["near"]
    assert [one["quantity"] for one in found["differences"]] == ["response_length_mean"]


def test_the_old_keys_are_two_sets(folder: Path) -> None:
    config = load_config(folder / "run.yaml")
    found = to_evaluate(config, ["greedy", "sampled"], False)
    assert not found.teachers and found.evaluation.sets["greedy"].temperature == 0
    with pytest.raises(UserError, match="no prompts and no sets"):
        config.evaluation.prompts, config.evaluation.sets = None, {}
        to_evaluate(config, [], False)
    best: Any = models_of([str(folder / "runs" / "run")], None, True)
    assert isinstance(best[0], Model) and "step_0000000" in best[0].path


def test_rewards_that_are_no_shares_have_the_same_interval_in_the_file_as_in_the_table(tmp_path: Path) -> None:
    scores = {"a": tally([[1.5], [2.0], [0.0]]), "b": tally([[1.5], [2.5], [0.5]])}
    results = {"near": {name: {"accuracy": one} for name, one in scores.items()}}
    config = load_config(
        configuration(make_folder(tmp_path), "any", evaluation={"sets": {"near": {"prompts": {"path": "a"}}}})
    )
    write_results(config, [Model(name, name) for name in "ab"], results, tmp_path / "found.json")
    [apart] = json.loads((tmp_path / "found.json").read_text())["sets"]["near"]["differences"]
    assert f"{apart['low']:+.4g} to {apart['high']:+.4g}" in table(results)[1][-1]
