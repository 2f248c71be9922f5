"""Predictions against hand-computed pipelines, and recommendations against every allocation there is."""

import itertools
import json
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.errors import UserError
from cluster.cli import main
from cluster.commands.plan import from_data_sheet, from_run, model_size
from cluster.config_file import load_config
from cluster.console.status import RECENT_UPDATES, read_status, write_status
from cluster.planning.datasheet import (
    GPUS,
    Gpu,
    Load,
    ModelSize,
    cached_sequences,
    learner_seconds,
    rollout_seconds,
    teacher_seconds,
)
from cluster.planning.throughput import Plan, Stage, environments, for_gpus, measured, table
from cluster.records.writer import read_jsonl
from tests.fake_run import make_fake_run

ROOT = Path(__file__).resolve().parents[3]
QUICKSTART = ROOT / "configs" / "quickstart.yaml"


def plan(rollout: float, teacher: float, learner: float, *, overlapped: bool, overhead: float = 1.0) -> Plan:
    stages = (Stage("rollout", rollout), Stage("teacher", teacher), Stage("learner", learner))
    return Plan(stages, overlapped, overhead)


def test_an_overlapped_update_takes_the_slowest_stage_and_one_in_sequence_the_sum() -> None:
    assert plan(4, 6, 3, overlapped=True).update_seconds == 6
    assert plan(4, 6, 3, overlapped=False).update_seconds == 13
    assert plan(4, 6, 3, overlapped=True, overhead=1.5).update_seconds == 9
    assert plan(4, 6, 3, overlapped=True).utilisation() == pytest.approx(
        {"rollout": 4 / 6, "teacher": 1, "learner": 0.5}
    )


def test_the_sentence_says_what_the_next_actor_would_give() -> None:
    # A second teacher halves its 6 seconds, and rollout's 4 become the slowest: 6 / 4 = +50%.
    assert plan(4, 6, 3, overlapped=True).sentence() == "teacher-bound: a second teacher actor would give +50%"
    # In sequence: 13 / 10.
    assert plan(4, 6, 3, overlapped=False).sentence() == "teacher-bound: a second teacher actor would give +30%"
    assert plan(4, 6, 9, overlapped=True).sentence().startswith("learner-bound: more actors of one role alone")
    eight = plan(80, 6, 3, overlapped=True).scaled("rollout", 7)
    assert eight.sentence().startswith("rollout-bound: an eighth rollout actor would give +")
    assert (
        plan(200, 6, 3, overlapped=True).scaled("rollout", 10).sentence().split(": ")[1].startswith("an 11th rollout")
    )
    assert ": an 80th rollout actor" in plan(2000, 6, 3, overlapped=True).scaled("rollout", 79).sentence()


def test_environments_answer_all_episodes_that_are_under_way_whatever_their_actors() -> None:
    # Episodes that wait 8 s each, two updates' worth at a time: an update cannot take less than 4 s.
    slow = environments(8.0, 100, max_staleness=1, replicas=3)
    assert slow.seconds == 4 and not slow.scalable and slow.gpus_per_replica == 0
    bound = replace(plan(2, 3, 1, overlapped=True), stages=(*plan(2, 3, 1, overlapped=True).stages, slow))
    assert bound.update_seconds == 4 and bound.gain("environment") == 0 and bound.gpus == 3
    assert bound.sentence().startswith("environment-bound: quicker answers, more episodes under way")
    assert for_gpus(bound, 8).gpus == 3  # none of them would make it faster
    free = replace(bound, stages=(*bound.stages[:-1], environments(2.0, 100, max_staleness=1)))
    assert free.sentence().startswith("teacher-bound") and free.utilisation()["environment"] == pytest.approx(1 / 3)
    assert [row[1] for row in table([("", bound)])] == [
        "role",
        "rollout",
        "teacher",
        "learner",
        "environment",
        "together",
    ]


def test_a_run_with_an_environment_is_measured_with_it(tmp_path: Path) -> None:
    run_dir = make_fake_run(tmp_path / "run")
    rows = read_jsonl(run_dir / "metrics.jsonl")
    told = [json.dumps(row | ({"environment_seconds_mean": 3.0} if row["step"] else {})) for row in rows]
    (run_dir / "metrics.jsonl").write_text("\n".join(told) + "\n")
    config = load_config(run_dir / "config.yaml", ["environment.name=tests.guessing:Guess", "environment.replicas=2"])
    ahead, size = config.pipeline.max_staleness + 1, config.trajectories_per_update
    found = from_run(config, run_dir).stages[-1]
    assert (found.role, found.replicas, found.work_seconds) == ("environment", 2, 3.0 * size)
    assert found.seconds == pytest.approx(3.0 / ahead)
    config.pipeline.prompts_per_update *= 2  # each episode waits as long, and more of them are under way
    assert from_run(config, run_dir).stages[-1].seconds == pytest.approx(3.0 / ahead)


def test_roles_that_share_a_card_or_cores_take_turns_however_they_are_scheduled() -> None:
    def shares(*gpus: float, overlapped: bool = True) -> Plan:
        work = {"rollout": 4.0, "teacher": 6.0, "learner": 3.0}
        stages = tuple(Stage(role, work[role], 1, share) for role, share in zip(work, gpus, strict=True))
        return Plan(stages, overlapped)

    one_card = shares(0.4, 0.3, 0.3)
    assert one_card.update_seconds == 13 == shares(0.4, 0.3, 0.3, overlapped=False).update_seconds
    told = "rollout, teacher and learner share one GPU: pipeline.max_staleness above 0 gains nothing there"
    assert one_card.sharing() == told
    # The learner has a card of its own: 4 + 6 seconds on the other one, where 13 pass in turns.
    assert shares(0.5, 0.5, 1).update_seconds == 10
    assert shares(0.5, 0.5, 1).sharing().startswith("rollout and teacher share one GPU: ")
    assert shares(0.5, 0.5, 1).sharing().endswith(" gains at most 30% there")
    assert shares(0.6, 0.7, 0.7).update_seconds == 6.5, "two cards"
    assert shares(0.2, 0.3, 0.1).scaled("rollout", 3).update_seconds == 13, "one card, though 3 * 0.2 + 0.3 + 0.1 > 1"
    assert not shares(1, 1, 1).sharing() and shares(1, 1, 1).update_seconds == 6
    assert not shares(0.5, 1, 1).sharing()

    on_cores = replace(shares(1, 1, 1), cores=1)
    assert on_cores.update_seconds == 13 and "share one core, besides one for the campaign" in on_cores.sharing()
    assert replace(on_cores, cores=2).update_seconds == 6.5
    assert replace(on_cores, cores=8).update_seconds == 6
    # Three actors on two cores: an update in turns takes no less than their work on all cores.
    many = replace(on_cores, cores=2, overlapped=False).scaled("rollout", 3)
    assert many.update_seconds == 4 / 2 + 6 + 3
    # Environments wait, and take no core meanwhile.
    waiting = replace(on_cores, stages=(*on_cores.stages, environments(8.0, 100, max_staleness=1)))
    assert waiting.update_seconds == 13 and "rollout, teacher and learner share" in waiting.sharing()
    assert replace(waiting, overlapped=False).update_seconds == 13 + 4


def test_a_run_without_a_gpu_on_this_machine_is_planned_on_its_cores(tmp_path: Path) -> None:
    run_dir = make_fake_run(tmp_path / "run")
    config, summary = load_config(run_dir / "config.yaml"), json.loads((run_dir / "summary.json").read_text())
    assert from_run(config, run_dir).cores is None
    (run_dir / "summary.json").write_text(json.dumps(summary | {"cost": {"gpu_hours": {"rollout": 0, "learner": 0}}}))
    assert from_run(config, run_dir).cores is None, "nothing says that it ran here"
    (run_dir / "status.json").write_text(json.dumps({"time": 0, "host": socket.gethostname()}))
    assert from_run(config, run_dir).cores == max(1, (os.cpu_count() or 1) - 1)
    (run_dir / "status.json").write_text(json.dumps({"time": 0, "host": f"not-{socket.gethostname()}"}))
    assert from_run(config, run_dir).cores is None
    (run_dir / "status.json").write_text(json.dumps({"time": 0, "host": socket.gethostname()}))
    (run_dir / "summary.json").write_text(json.dumps(summary | {"cost": {"gpu_hours": {"rollout": 1, "learner": 0}}}))
    assert from_run(config, run_dir).cores is None


@pytest.mark.parametrize("gpus", [0.0, 0.25, 1.0])
def test_status_says_of_more_actors_what_plan_says(tmp_path: Path, gpus: float) -> None:
    """On cores of one machine, on a card that roles share, and on cards of their own."""
    run_dir = make_fake_run(tmp_path / "running", updates=RECENT_UPDATES, of=80, evaluate_every=1000)
    text = (run_dir / "config.yaml").read_text()
    for section in ("rollout", "learner"):
        text = text.replace(f"\n{section}:\n", f"\n{section}:\n  gpus_per_replica: {gpus}\n")
    (run_dir / "config.yaml").write_text(
        text.replace("    replicas: 1\n", f"    replicas: 1\n    gpus_per_replica: {gpus}\n")
    )
    write_status(run_dir, {"gpus": dict.fromkeys(("rollout", "teacher.default", "learner"), gpus), "state": "running"})
    plan = from_run(load_config(run_dir / "config.yaml"), run_dir)
    assert read_status(run_dir)["bottleneck"] == plan.sentence()
    assert bool(plan.sharing()) == (gpus < 1)


@given(
    st.tuples(*[st.floats(0.1, 50)] * 3),
    st.integers(3, 14),
    st.booleans(),
)
def test_a_recommendation_is_as_good_as_the_best_of_all_allocations(
    work: tuple[float, float, float], gpus: int, overlapped: bool
) -> None:
    start = plan(*work, overlapped=overlapped)
    chosen = for_gpus(start, gpus)
    assert chosen.gpus <= gpus
    allocations = [(r, t) for r, t in itertools.product(range(1, gpus), repeat=2) if r + t + 1 <= gpus]
    best = min(start.scaled("rollout", r).scaled("teacher", t).update_seconds for r, t in allocations)
    assert chosen.update_seconds == pytest.approx(best)


def test_gpus_that_would_not_help_are_left() -> None:
    assert for_gpus(plan(1, 1, 10, overlapped=True), 50).gpus == 3


def test_stages_that_are_slowest_together_are_raised_together() -> None:
    assert for_gpus(plan(6, 6, 1, overlapped=True), 5).update_seconds == 3


def test_too_few_gpus_are_refused() -> None:
    with pytest.raises(ValueError, match="takes 3 GPUs"):
        for_gpus(plan(1, 1, 1, overlapped=True), 2)


def test_a_measured_plan_reproduces_the_run_it_was_measured_on() -> None:
    summary = {"updates": 10, "busy": {"rollout": 80.0, "teacher": 30.0, "learner": 20.0}, "loop_seconds": 55.0}
    replicas, gpus = {"rollout": 2, "teacher": 1, "learner": 1}, {"rollout": 1.0, "teacher": 2.0, "learner": 1.0}
    found = measured(summary, replicas, gpus, overlapped=True, publish_seconds=0.5)
    assert found.update_seconds == pytest.approx(5.5)
    assert found.overhead == pytest.approx(5.5 / 4)
    assert {s.role: s.seconds for s in found.stages} == pytest.approx({"rollout": 4, "teacher": 3, "learner": 2.5})
    assert found.gpus == 5
    quick = measured(summary | {"loop_seconds": 35.0}, replicas, gpus, overlapped=True)
    assert quick.overhead == 1.0, "a prediction is not below what the slowest stage takes"
    with pytest.raises(ValueError, match="no update"):
        measured(summary | {"updates": 0}, replicas, gpus, overlapped=True)


def test_the_work_of_another_batch_size_is_in_proportion(tmp_path: Path) -> None:
    run_dir = make_fake_run(tmp_path / "run")
    ran = load_config(run_dir / "config.yaml")
    same = from_run(ran, run_dir)
    ran.pipeline.prompts_per_update *= 3
    larger = from_run(ran, run_dir)
    assert [s.work_seconds for s in larger.stages] == pytest.approx([3 * s.work_seconds for s in same.stages])


def test_times_of_hardware_follow_from_its_data_sheet() -> None:
    gpu = Gpu(flops=1e15, bandwidth=1e12, memory=100e9)
    small = ModelSize(1e9, 1e9, cache_bytes_per_token=1e5, vocabulary=1000, hidden=1000)
    load = Load(trajectories=100, prompt_tokens=100.0, response_tokens=400.0)
    assert teacher_seconds(load, small, gpu, 1) == pytest.approx(2e9 * 50_000 / 0.4e15)
    assert learner_seconds(load, small, gpu, 2, True) == pytest.approx(8e9 * 50_000 / 0.7e15)
    assert cached_sequences(load, small, gpu, 1) == pytest.approx((90e9 - 2e9) / (500 * 1e5))
    # 100 sequences at a time: each step reads 2 GB of weights and 100 x 300 tokens of cache, at 0.6 TB/s.
    step = (2e9 + 100 * 300 * 1e5) / 0.6e12
    assert rollout_seconds(load, small, gpu, 1, 256) == pytest.approx(400 * step + 100 * 2e9 * 100 / 0.4e15)
    assert rollout_seconds(load, small, gpu, 1, 10) > rollout_seconds(load, small, gpu, 1, 100)


def test_the_size_of_a_model_is_read_from_its_configuration(tmp_path: Path) -> None:
    shape = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 100,
        "intermediate_size": 128,
        "moe_intermediate_size": 32,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(shape))
    size = model_size(str(tmp_path), False, "student.model")
    experts = 2 * 8 * 3 * 64 * 32
    assert size.parameters - size.active_parameters == experts * 6 / 8
    assert size.cache_bytes_per_token == 2 * 2 * 2 * 2 * 16
    assert (size.vocabulary, size.hidden) == (100, 64)


def test_data_sheets_give_a_plan_without_running_anything() -> None:
    config = load_config(QUICKSTART)
    found, memory = from_data_sheet(config, "H100", Load(64, 32.0, 8.0))
    assert [stage.role for stage in found.stages] == ["rollout", "teacher", "learner"]
    assert all(stage.seconds > 0 for stage in found.stages)
    assert [row[0] for row in memory[1:]] == ["rollout", "teacher", "learner"]
    with pytest.raises(UserError, match="did you mean 'H100'"):
        from_data_sheet(config, "H1000", Load(64, 32.0, 8.0))
    assert all(gpu.memory > 1e10 for gpu in GPUS.values())


def test_the_table_has_a_row_for_each_role() -> None:
    rows = table([("as configured", plan(4, 6, 3, overlapped=True))])
    assert [row[1] for row in rows] == ["role", "rollout", "teacher", "learner", "together"]
    assert rows[2][4:] == ["6", "100%", "+50%"]
    assert len({len(row) for row in rows}) == 1


def test_the_command_says_what_limits_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = make_fake_run(tmp_path / "run")
    with pytest.raises(SystemExit) as status:
        main(["plan", str(run_dir / "config.yaml"), "--run", str(run_dir), "--gpus", "6"])
    assert status.value.code == 0
    assert "best for 6 GPUs: " in capsys.readouterr().out


def test_a_run_that_has_not_ended_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as status:
        main(["plan", str(QUICKSTART), "--run", str(tmp_path)])
    assert status.value.code == 2
    assert capsys.readouterr().err.startswith(f"understudy: --run: found {tmp_path}")


def test_a_running_campaign_is_measured_by_its_updates_so_far(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    finished, running = make_fake_run(tmp_path / "finished"), make_fake_run(tmp_path / "running", updates=40, of=80)
    config = load_config(finished / "config.yaml")
    whole, so_far = from_run(config, finished), from_run(config, running)
    assert "running is lost: measured over updates 2 to 40" in capsys.readouterr().out.replace(str(tmp_path), "")
    assert [s.role for s in so_far.stages] == [s.role for s in whole.stages]
    rows = [row for row in read_jsonl(running / "metrics.jsonl") if row["step"] > 0]
    for stage in so_far.stages:
        publish = sum(row["publish_seconds"] for row in rows[1:]) / 39 if stage.role == "learner" else 0.0
        mean = sum(row[f"busy_{stage.role}"] for row in rows[1:]) / 39
        assert stage.work_seconds == pytest.approx(mean + publish)

    # After a restart only the newest process counts: the time between two processes is no update's.
    with (running / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0, "wall_seconds": 31, "kind": "loop_started", "step": 37}) + "\n")
    from_run(config, running)
    assert "measured over updates 39 to 40" in capsys.readouterr().out
    with (running / "events.jsonl").open("a") as file:
        file.write(json.dumps({"time": 0, "wall_seconds": 31, "kind": "loop_started", "step": 39}) + "\n")
    with pytest.raises(UserError, match="has taken 1 updates, expected a run that has taken at least two"):
        from_run(config, running)
