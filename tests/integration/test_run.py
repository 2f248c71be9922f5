"""`python -m cluster run` as a user types it, with tiny models, real Ray and real vLLM."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from actors.data.models import load_model
from cluster.config_file import load_config, write_config
from cluster.records.event_table import FAULTS
from cluster.records.metric_table import EVALUATION_KEYS, METRIC_KEYS
from cluster.records.writer import SUMMARY_KEYS, TRAJECTORY_KEYS, read_jsonl
from tests import clean_process, light_campaign
from tests.light_engine import BACKEND
from tests.processes import below, command_of
from tests.tiny_models import make_tiny_model
from tests.tiny_tokenizers import byte_level
from tests.waiting import PATIENCE_SECONDS, until

ROOT = Path(__file__).resolve().parents[2]
UPDATES = 6
OF_TIME = re.compile(
    r"wall_seconds|processor_seconds|busy_.*|publish_seconds|prepare_seconds|standstill_seconds|loop_seconds"
)
LIGHT = f"rollout.backend={BACKEND}"

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models, prompts and a configuration that names them by relative paths."""
    path = tmp_path_factory.mktemp("work")
    make_tiny_model(path / "student", hidden=32, layers=1, context=64)
    make_tiny_model(path / "teacher", hidden=32, layers=1, context=64, seed=1)
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(10)]
    for name, part in (("train", rows[:7]), ("heldout", rows[7:])):
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (path / "campaign.yaml").write_text(
        """
name: calm
student: {model: student}
teachers:
  default:  # the student itself, as a moving average of its weights, that knows the answer
    {model: student, ema_decay: 0.7, prompt_template: "{prompt} is {answer}", dtype: float32, cpus_per_replica: 0.2,
     signal: student_topk, top_k: 30}
prompts: {path: train.jsonl}
sampling: {max_response_tokens: 10}
rollout:
  dtype: float32
  cpus_per_replica: 0.2
  engine: {kv_cache_memory_bytes: 67108864, max_num_seqs: 8}
learner:
  compute_dtype: float32
  cpus_per_replica: 0.2
  objective: {estimator: full}
  optimizer: {learning_rate: 1e-3}
pipeline: {updates: 6, prompts_per_update: 4, samples_per_prompt: 2}
evaluation:
  prompts: {path: heldout.jsonl}
  every_updates: 3
checkpoint: {every_updates: 1, keep_last: 100}
ray: {object_store_mebibytes: 100, start_timeout_seconds: 600}
"""
    )
    return path


def start(folder: Path, *overrides: str, what: tuple[str, ...] = ("campaign.yaml",)) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    long = folder / "a-directory-for-temporary-files-with-a-path-that-is-too-long-for-sockets"
    long.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-m", "cluster", "run", *what, *overrides],
        cwd=folder,
        env={**environment, "PYTHONPATH": str(ROOT), "HOME": str(folder / "home"), "TMPDIR": str(long)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], status: int) -> tuple[str, str]:
    """Waits for the process to end with this status; returns its output and its errors."""
    try:
        out, err = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    assert process.returncode == status, out[-1500:] + err[-3000:]
    return out, err


def wait_for_step(folder: Path, name: str, step: int, process: subprocess.Popen[str]) -> None:
    def done() -> bool:
        return max((row["step"] for row in read_jsonl(folder / "runs" / name / "metrics.jsonl")), default=-1) >= step

    until(done, f"update {step} of {name}", lambda: process.poll() is None)


def processes_of(campaign: subprocess.Popen[str]) -> list[psutil.Process]:
    return [psutil.Process(campaign.pid), *below(campaign.pid)]


def sockets_of(process: psutil.Process) -> list[Any]:
    with suppress(psutil.NoSuchProcess):  # some end soon
        return process.net_connections("inet")
    return []


def refusal(folder: Path, *overrides: str) -> str:
    out, err = finish(start(folder, *overrides), 2)
    assert "Traceback" not in out + err
    [line] = err.splitlines()
    assert re.fullmatch(r"understudy: .+: found .+, expected .+", line)
    return line


def without_times(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if not OF_TIME.fullmatch(key)}


@pytest.fixture(scope="module")
def calm(folder: Path) -> Iterator[Path]:
    """The run directory of a campaign that nothing disturbed."""
    out, _ = finish(start(folder), 0)
    assert str(folder / "runs" / "calm" / "report.html") in out
    yield folder / "runs" / "calm"


def test_a_run_directory_has_every_file_and_key_of_the_contract(calm: Path, folder: Path) -> None:
    assert load_config(calm / "config.yaml") == load_config(folder / "campaign.yaml")
    before, *rows = read_jsonl(calm / "metrics.jsonl")
    assert [before["step"], *(row["step"] for row in rows)] == list(range(UPDATES + 1))
    assert before.keys() >= {"eval/accuracy", "eval/reverse_kl", "eval/accuracy_teacher"}
    for row in rows:
        assert row.keys() >= set(METRIC_KEYS)
        assert row["policy_version"] == row["step"]
        assert row["staleness_max"] == row["dropped"] == 0
        assert row["trajectories"] == 8 * row["step"]
        assert row["prepare_seconds"] > 0 and 0 < row["standstill_seconds"] < row["publish_seconds"]
        assert row["engine_logprob_abs_diff"] < 1e-4
        assert (row.keys() >= set(EVALUATION_KEYS)) == (row["step"] in (3, 6))
    kinds = [row["kind"] for row in read_jsonl(calm / "events.jsonl")]
    assert {"started", "actor_started", "checkpoint", "finished"} <= set(kinds)
    assert kinds.count("checkpoint") == UPDATES
    for step in (0, 3, 6):
        kept = read_jsonl(calm / "trajectories" / f"step_{step:08d}.jsonl")
        assert len(kept) == 3
        for row in kept:
            assert row.keys() >= set(TRAJECTORY_KEYS)
            assert len(row["tokens"]) == len(row["student_logprobs"]) == len(row["teacher_logprobs"])
    summary = json.loads((calm / "summary.json").read_text())
    assert summary.keys() >= set(SUMMARY_KEYS)
    assert summary["updates"] == UPDATES
    assert summary["faults"] == 0
    assert summary["ledger"] == {
        "issued": 48, "waiting": 0, "sampled": 0, "scored": 0, "trained": 48, "dropped": 0,
    }  # fmt: skip
    assert "<html" in (calm / "report.html").read_text()


def test_a_checkpoint_is_a_model_that_loads_and_has_learnt(calm: Path, folder: Path) -> None:
    last = calm / "checkpoints" / f"step_{UPDATES:08d}"
    trained, untrained = (
        dict(load_model(str(path), "float32", "cpu", False, "a").named_parameters())
        for path in (last, folder / "student")
    )
    assert trained.keys() == untrained.keys()
    assert all(not trained[name].equal(untrained[name]) for name in trained)
    assert {p.name for p in (last / "training").iterdir()} == {
        "optimizer.safetensors", "averages.safetensors", "learner.json", "campaign.json", "checksums.json",
    }  # fmt: skip


def test_a_finished_campaign_is_not_run_again(calm: Path, folder: Path) -> None:
    before = {path: path.read_bytes() for path in calm.iterdir() if path.is_file()}
    finish(start(folder), 0)
    assert before == {path: path.read_bytes() for path in calm.iterdir() if path.is_file()}


def test_killed_and_interrupted_equals_undisturbed_bit_for_bit(calm: Path, folder: Path) -> None:
    stormy = folder / "runs" / "stormy"
    process = start(folder, "name=stormy", "pipeline.updates=10000")
    wait_for_step(folder, "stormy", 2, process)
    family = processes_of(process)
    sockets = [socket for one in family for socket in sockets_of(one) if socket.status == "LISTEN"]
    assert len(sockets) > 5 and {socket.laddr.ip for socket in sockets} <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}
    [rollout] = [one for one in family if " ".join(command_of(one)).startswith("ray::Rollout")]
    assert rollout.environ()["RAY_AUTH_MODE"] == "token" and len(rollout.environ()["RAY_AUTH_TOKEN"]) == 64
    assert not (folder / "home" / ".ray").exists()
    process.kill()
    process.communicate()
    until(lambda: not any(one.is_running() for one in family), f"the end of {family}")
    assert not list(Path("/tmp").glob(f"us-*/ray/session_*_{process.pid}"))
    killed_at = read_jsonl(stormy / "metrics.jsonl")[-1]["step"]

    process = start(folder, "pipeline.updates=9000", what=("--resume", "runs/stormy"))
    wait_for_step(folder, "stormy", max(5, killed_at + 2), process)
    family = processes_of(process)
    os.killpg(process.pid, signal.SIGTERM)  # as `timeout`, `scancel` and systemd do: the cluster's daemons live on
    _, err = finish(process, 130)
    until(lambda: not any(one.is_running() for one in family), f"the end of {family}")
    assert "a checkpoint is written" in err and "Traceback" not in err
    events = {row["kind"]: row for row in read_jsonl(stormy / "events.jsonl")}
    assert "interrupted" in events and events["configuration_changed"]["changed"] == {"pipeline.updates": [10000, 9000]}
    summary = json.loads((stormy / "summary.json").read_text())
    newest = max(path.name for path in (stormy / "checkpoints").iterdir())
    assert newest == f"step_{summary['updates']:08d}"
    assert summary["ledger"]["trained"] == 8 * summary["updates"]

    for step in (3, 4, 5):
        for name in ("model.safetensors", "training/optimizer.safetensors", "training/averages.safetensors"):
            path = Path("checkpoints", f"step_{step:08d}", name)
            assert (calm / path).read_bytes() == (stormy / path).read_bytes(), path
    trained = [{"step": step, "trained": [[8 * step - 8, 8 * step]]} for step in range(1, summary["updates"] + 1)]
    assert read_jsonl(stormy / "ledger.jsonl") == trained
    assert read_jsonl(calm / "ledger.jsonl")[:5] == trained[:5]
    ours, theirs = (read_jsonl(run / "metrics.jsonl") for run in (calm, stormy))
    assert [row["step"] for row in theirs] == list(range(len(theirs)))
    for mine, other in zip(ours[:6], theirs[:6], strict=True):
        assert without_times(mine) == without_times(other)


def kill_a_rank(process: subprocess.Popen[str]) -> None:
    """SIGKILL for the second rank of this campaign's learner."""
    commands = {child.pid: command_of(child) for child in below(process.pid)}
    ranks = sorted(pid for pid, command in commands.items() if command[:1] == ["ray::LearnerRank"])
    assert len(ranks) == 2, list(commands.values())
    os.kill(ranks[1], signal.SIGKILL)


def test_a_learner_of_two_ranks_that_loses_one_trains_as_one_of_one(folder: Path) -> None:
    one = folder / "runs" / "one"
    alone = folder / "one.yaml"
    write_config(load_config(folder / "campaign.yaml", ["name=one", LIGHT, "rollout.engine={}"]), alone)
    process = clean_process.start(light_campaign.run_command_here, folder, "run", "one.yaml", log=folder / "one.log")
    process.join()
    assert process.exitcode == 0, (folder / "one.log").read_text()
    ranks = folder / "runs" / "ranks"
    waiting = f"rollout.engine={{wait_at: 2, wait_for: {folder / 'go'}}}"
    overrides = ("learner.replicas=2", "weights.encoding=delta", "weights.anchor_every=3", LIGHT, waiting)
    process = start(folder, "name=ranks", *overrides)
    wait_for_step(folder, "ranks", 2, process)
    kill_a_rank(process)
    (folder / "go").touch()
    finish(process, 0)
    summary = json.loads((ranks / "summary.json").read_text())
    assert summary["faults"] == 1 and summary["ledger"]["trained"] == UPDATES * 8
    rows = read_jsonl(ranks / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(UPDATES + 1))
    for mine, other in zip(rows, read_jsonl(one / "metrics.jsonl"), strict=True):
        expected = without_times(other)
        assert mine.get("publish_bytes", 0) <= expected.pop("publish_bytes", 0)
        for key, value in expected.items():
            assert mine[key] == (value if isinstance(value, list) else pytest.approx(value, rel=1e-3, abs=1e-4)), key
    published = [row["publish_bytes"] for row in rows if "publish_bytes" in row]
    assert min(published) < 0.8 * max(published), "each rank's rows as what has changed in them"
    last = Path("checkpoints", f"step_{UPDATES:08d}", "model.safetensors")
    ours, theirs = load_file(ranks / last), load_file(one / last)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=1e-5)


def test_a_teacher_with_another_tokenizer_teaches_a_student_whose_adapter_alone_is_published(folder: Path) -> None:
    pytest.importorskip("peft")
    make_tiny_model(folder / "foreign", hidden=32, layers=1, context=128, seed=2, tokenizer=byte_level())
    overrides = ["name=foreign", "pipeline.updates=2", "teachers.default.model=foreign",
                 "teachers.default.tokenizer=foreign", "teachers.default.ema_decay=null",
                 "teachers.default.signal=sampled", "learner.objective.estimator=immediate",
                 "student.lora={rank: 4, publish: adapter}"]  # fmt: skip
    finish(start(folder, *overrides), 0)
    before, *rows = read_jsonl(folder / "runs" / "foreign" / "metrics.jsonl")
    assert len(rows) == 2 and all(row["tokens_trained"] > 0 and row["grad_norm"] > 0 for row in rows)
    # What a student of random weights writes is in part special tokens, which this teacher does not have.
    assert rows[-1]["missing_scores"] < rows[-1]["tokens_generated"] / 2
    assert all(row["engine_logprob_abs_diff"] < 1e-4 for row in rows)
    weights = load_model(str(folder / "student"), "float32", "cpu", False, "student.model").num_parameters()
    assert rows[-1]["publish_bytes"] < weights  # which would be four bytes each
    assert before["eval/reverse_kl"] > 0 and "eval/accuracy_teacher" in before


def test_what_the_engine_cannot_compute_ends_before_the_first_update_with_the_engines_own_words(folder: Path) -> None:
    make_tiny_model(folder / "odd", hidden=32, layers=1, context=64, head_dim=40)  # which vLLM builds, and cannot run
    models = [f"{key}.model=odd" for key in ("student", "teachers.default")]
    out, err = finish(start(folder, "name=odd", *models), 1)
    assert "Traceback" not in out + err
    events = read_jsonl(folder / "runs" / "odd" / "events.jsonl")
    failed = [row for row in events if row["kind"] in FAULTS]
    assert len(failed) <= 2, "the second engine's failure may be told, or the campaign has ended before"
    for row in failed:
        assert row["kind"] == "actor_failed" and "the vLLM engine has failed: RuntimeError: " in row["cause"]
        assert "head" in row["cause"]
    assert err.splitlines()[-1].startswith("understudy: rollout-0: the vLLM engine has failed: RuntimeError: ")
    assert failed and "head" in err.splitlines()[-1] and "not tried a third time" in err.splitlines()[-1]
    assert not [row for row in events if row["kind"] == "loop_started"]


def test_more_actors_than_the_cluster_holds_are_refused_before_any_starts(folder: Path) -> None:
    line = refusal(folder, "name=many", "rollout.replicas=500")
    assert line.startswith("understudy: rollout.replicas: found 100.4 CPUs asked (rollout 500 x 0.2")
    assert re.search(r"at most the \d+ CPUs of the cluster", line)
    assert "actor_started" not in {event["kind"] for event in read_jsonl(folder / "runs" / "many" / "events.jsonl")}


def test_a_loss_that_is_no_number_ends_with_the_step_and_the_trajectory_and_a_good_checkpoint(tmp_path: Path) -> None:
    config_file = light_campaign.configuration(
        light_campaign.make_folder(tmp_path),
        "wild",
        learner={"optimizer": {"learning_rate": 1e30}},
        evaluation={"prompts": None},
        checkpoint={"every_updates": 1},
        teachers={"default": {"model": str(tmp_path / "teacher"), "dtype": "float32", "signal": "hidden"}},
    )
    log = tmp_path / "log"
    process = clean_process.start(light_campaign.run_command_here, tmp_path, "run", str(config_file), log=log)
    process.join()
    said = log.read_text()
    assert process.exitcode == 1 and "Traceback" not in said, said
    [line] = [line for line in said.splitlines() if line.startswith("understudy:")]
    assert re.match(r"understudy: update 2: the (loss|gradient's norm) is .* \(trajectories \d+/\d+/\d+", line)
    assert "the last checkpoint is good" in line
    wild = tmp_path / "runs" / "wild"
    assert [path.name for path in (wild / "checkpoints").iterdir()] == ["step_00000001"]
    load_model(str(wild / "checkpoints" / "step_00000001"), "float32", "cpu", False, "a")
    assert [row["step"] for row in read_jsonl(wild / "metrics.jsonl")] == [1]
