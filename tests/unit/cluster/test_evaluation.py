"""Whole campaigns, without Ray: what is measured on held-out prompts, what is kept for reading, and verifiers that fail."""

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from cluster import cli
from cluster.config import CheckpointConfig
from cluster.console.screen import summary_table
from cluster.console.status import read_status
from cluster.loop.evaluation_statistics import mean_of, tally
from cluster.records.metric_table import listed
from cluster.records.writer import TRAJECTORY_KEYS, read_jsonl, trajectory_files
from cluster.report.page import write_report
from cluster.state.campaign_state import CampaignState
from cluster.state.checkpoints import steps_to_keep
from tests import clean_process, light_campaign
from tests.light_campaign import configuration, fingerprint, finish, make_folder
from tests.processes import ended
from tests.waiting import until

SHORT = {"updates": 2, "prompts_per_update": 2, "samples_per_prompt": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = make_folder(tmp_path_factory.mktemp("light"))
    records = [json.loads(line) for line in (made / "heldout.jsonl").read_text().splitlines()]
    chat = [{"prompt": [{"role": "user", "content": record["prompt"]}]} for record in records]
    (made / "chat.jsonl").write_text("".join(json.dumps(record) + "\n" for record in chat))
    mixed = [record if i % 2 else {**record, "answer": None} for i, record in enumerate(records)]
    (made / "mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mixed))
    return made


def run(folder: Path, name: str, **changes: Any) -> Path:
    """Runs a campaign of two updates; returns its run directory."""
    file = configuration(folder, name, pipeline=SHORT | changes.pop("pipeline", {}), **changes)
    finish(light_campaign.start(file), file)
    return folder / "runs" / name


def held_out(folder: Path, file: str, **more: Any) -> dict[str, Any]:
    return {"prompts": {"path": str(folder / file), "limit": 4, **more}, "every_updates": 1}


def test_held_out_prompts_without_references_give_the_reverse_kl_everywhere_and_no_accuracy(folder: Path) -> None:
    run_dir = run(folder, "chat", evaluation=held_out(folder, "chat.jsonl", reference_field=None))
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert len(rows) == 3
    for row in rows:
        assert row["eval/reverse_kl"] > 0 and not [key for key in row if "accuracy" in key]
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["accuracy_start"] is None and summary["accuracy_end"] is None
    assert summary["reverse_kl_end"] == rows[2]["eval/reverse_kl"]
    assert f"{rows[2]['eval/reverse_kl']:.4f}" in summary_table(summary)
    assert read_status(run_dir)["evaluation"]["eval/reverse_kl"] == rows[2]["eval/reverse_kl"]
    kept = read_jsonl(trajectory_files(run_dir)[2])
    assert len(kept) == 4 and all(row["reward"] is None for row in kept)
    page = write_report([run_dir], run_dir / "again.html").read_text()
    assert "The reverse KL to the teacher is <b>" in page and "unjudged" in page


def test_accuracy_is_over_the_prompts_that_have_a_reference(folder: Path) -> None:
    run_dir = run(folder, "mixed", evaluation=held_out(folder, "mixed.jsonl"))
    kept = read_jsonl(trajectory_files(run_dir)[2])
    assert [row["reward"] is None for row in kept] == [True, False, True, False]
    judged = [row["reward"] for row in kept if row["reward"] is not None]
    assert read_jsonl(run_dir / "metrics.jsonl")[2]["eval/accuracy_sampled"] == sum(judged) / 2


def test_the_best_checkpoints_are_those_with_the_lowest_reverse_kl_where_no_accuracy_is_measured() -> None:
    kls = {1: 0.5, 2: 0.1, 3: 0.3, 4: float("nan"), 5: 0.4}
    state = CampaignState(evaluations={step: {"eval/reverse_kl": kl} for step, kl in kls.items()})
    assert steps_to_keep([1, 2, 3, 4, 5], state, CheckpointConfig(keep_last=1, keep_best=2)) == {2, 3, 5}
    for step, accuracy in {1: 0.9, 2: 0.1, 3: 0.2, 4: 0.3, 5: 0.0}.items():
        state.evaluations[step]["eval/accuracy"] = accuracy
    assert steps_to_keep([1, 2, 3, 4, 5], state, CheckpointConfig(keep_last=1, keep_best=2)) == {1, 4, 5}


def test_without_held_out_prompts_a_few_trajectories_of_training_are_kept_and_killed_equals_uninterrupted(
    folder: Path,
) -> None:
    options = {"evaluation": {"prompts": None, "every_updates": 2, "keep_training_trajectories": 3}}
    pipeline = {"updates": 5}
    calm = run(folder, "calm", pipeline=pipeline, **options)
    assert list(trajectory_files(calm)) == [1, 2, 4, 5]
    for step, path in trajectory_files(calm).items():
        rows = read_jsonl(path)
        assert len(rows) == 3 and set(TRAJECTORY_KEYS) <= rows[0].keys()
        for row in rows:
            assert row["step"] == step and row["prompt"].startswith("<user>") and row["reward"] is None
            assert len(row["tokens"]) == len(row["student_logprobs"]) == len(row["teacher_logprobs"]) <= 6
            assert None not in row["teacher_logprobs"] and set(row["policy_versions"]) == {step - 1}
    file = configuration(folder, "killed", pipeline=SHORT | pipeline, **options)
    process = light_campaign.start(file, dies_at=90)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    finish(light_campaign.start(file), file)
    assert fingerprint(folder / "runs" / "killed") == fingerprint(calm)


@pytest.mark.parametrize("where", ["prompts", "evaluation"])
def test_check_tries_every_reference_answer_of_prompts_that_are_judged(
    folder: Path, where: str, capsys: pytest.CaptureFixture
) -> None:
    records = [{"prompt": "1+1=", "answer": answer} for answer in ("2", "3", "n/a", "4")]
    (folder / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    path, verifier = {"path": str(folder / "bad.jsonl")}, {"name": "numeric"}
    sections: dict[str, Any] = {"evaluation": {"prompts": path, "verifier": verifier}}
    if where == "prompts":
        sections = {"evaluation": {"prompts": None, "verifier": verifier}, "prompts": path, "learner": REWARDS}
    file = configuration(folder, f"bad-{where}", pipeline=SHORT, **sections)
    with pytest.raises(SystemExit) as ended:
        cli.main(["check", "--offline", str(file)])
    told = capsys.readouterr().err
    assert (
        ended.value.code == 2 and f"{folder / 'bad.jsonl'}, line 3: found answer = 'n/a', expected a reference" in told
    )


REWARDS = {"objective": {"estimator": "reward"}, "compute_dtype": "float32"}


@pytest.mark.parametrize("where", ["held out", "rewards"])
def test_a_pattern_that_never_ends_costs_deadlines_and_is_told(folder: Path, where: str) -> None:
    judged = where == "held out"
    # The untrained student writes no 'Z'; the pattern backtracks over every response of six tokens or more.
    verifier = {"name": "regex", "pattern": r"(.+)+(.+)+(.+)+(.+)+(.+)+(.+)+(.+)+\x00", "timeout_seconds": 0.05}
    evaluation = {"prompts": None, **(held_out(folder, "heldout.jsonl") if judged else {}), "verifier": verifier}
    sampling = {"max_response_tokens": 24}
    name = f"slow-{len(where)}"
    file = configuration(
        folder,
        name,
        evaluation=evaluation,
        sampling=sampling,
        pipeline=SHORT,
        **({} if judged else {"learner": REWARDS}),
    )
    process = light_campaign.start(file)
    process.join()
    events = [row for row in read_jsonl(folder / "runs" / name / "events.jsonl") if row["kind"] == "unjudged"]
    assert events and "no verdict within 0.05 s (evaluation.verifier.timeout_seconds)" in events[0]["cause"]


def seconds_of(process: psutil.Process) -> float:
    """Of the processor, so far."""
    try:
        return process.cpu_times().user
    except psutil.NoSuchProcess:
        return 0.0


def test_an_interrupt_is_heard_while_a_verdict_does_not_come(folder: Path) -> None:
    verifier = {"name": "regex", "pattern": r"(.+)+(.+)+(.+)+(.+)+(.+)+(.+)+(.+)+\x00", "timeout_seconds": 3000}
    evaluation = {**held_out(folder, "heldout.jsonl"), "verifier": verifier, "teacher": False}
    file = configuration(folder, "stuck", evaluation=evaluation, sampling={"max_response_tokens": 30}, pipeline=SHORT)
    log = folder / "stuck.log"
    process = clean_process.start(light_campaign.run_command_here, folder, "run", str(file), log=log)
    events = folder / "runs" / "stuck" / "events.jsonl"
    until(lambda: events.exists() and "actor_started" in events.read_text(), "it starts", process.is_alive)
    assert process.pid is not None
    found = psutil.Process(process.pid)
    until(lambda: any(seconds_of(child) > 1 for child in found.children()), "it judges", process.is_alive)
    verifiers = found.children()
    found.terminate()
    process.join()
    assert process.exitcode == 130, log.read_text()[-3000:]
    assert "interrupted" in events.read_text()
    until(lambda: all(map(ended, verifiers)), "the end of the verifiers")


def test_math_gives_rewards_in_training(folder: Path) -> None:
    pytest.importorskip("math_verify")
    run_dir = run(folder, "math", evaluation={"prompts": None, "verifier": {"name": "math"}}, learner=REWARDS)
    rows = read_jsonl(run_dir / "metrics.jsonl")
    assert [row["reward_mean"] for row in rows] == [0.0, 0.0] and len(rows) == 2
    assert {row["reward"] for row in read_jsonl(trajectory_files(run_dir)[1])} <= {0.0, 1.0}


@pytest.mark.filterwarnings("error")
def test_a_mean_of_no_scores_is_one_sign_and_no_warning() -> None:
    kl = mean_of(tally([[np.nan], [np.nan]]))
    assert np.isnan(kl) and "nan" not in summary_table({"reverse_kl_end": kl})
    assert listed("evaluation", {"eval/reverse_kl": kl}) == listed("evaluation", {"eval/reverse_kl": None})
    assert listed("evaluation", {"eval/reverse_kl": kl}) == "reverse KL -"
    assert mean_of(tally([[np.nan, 1.0, 2.0]])) == 1.5
