"""A plausible run directory without a campaign: the files of the design's contract, written with json alone."""

import json
import math
import random
from pathlib import Path

from cluster.records.event_table import EVENTS
from cluster.records.metric_table import METRICS

START = 1_800_000_000.0
CONFIG = """name: {name}
output_dir: /runs
seed: {seed}
student:
  model: examples/addition/student
prompts:
  path: examples/addition/train.jsonl
rollout:
  replicas: 2
teachers:
  default:
    model: examples/addition/teacher
    replicas: 1
learner:
  replicas: 1
  optimizer:
    learning_rate: {learning_rate}
pipeline:
  updates: {updates}
  max_staleness: {max_staleness}
"""


def make_fake_run(
    path: Path,
    *,
    updates: int = 40,
    of: int | None = None,
    evaluate_every: int = 10,
    seed: int = 0,
    rows: int = 6,
    tokens_per_response: int = 30,
    max_staleness: int = 1,
    faults: bool = True,
) -> Path:
    """Writes `path` with all files of a finished campaign; `of` updates where it is still under way (no summary)."""
    path.mkdir(parents=True)
    draw = random.Random(seed)
    metrics = [_evaluated({"step": 0, "policy_version": 0, "wall_seconds": 20.0}, 0, updates, draw)]
    metrics[0]["eval/accuracy_teacher"] = 0.99
    for step in range(1, updates + 1):
        row = _update(step, updates, max_staleness, draw)
        metrics.append(_evaluated(row, step, updates, draw) if step % evaluate_every == 0 else row)
    _write_lines(path / "metrics.jsonl", metrics)
    _write_lines(path / "events.jsonl", _events(updates, faults, finished=of is None))
    (path / "config.yaml").write_text(
        CONFIG.format(
            name=path.name,
            seed=seed,
            updates=of or updates,
            max_staleness=max_staleness,
            learning_rate=2e-4 * (1 + seed),
        )
    )
    (path / "trajectories").mkdir()
    for step in range(0, updates + 1, evaluate_every):
        lines = [_trajectory(step, i, step / updates, tokens_per_response, draw) for i in range(rows)]
        _write_lines(path / "trajectories" / f"step_{step:08d}.jsonl", lines)
    if of is None:
        (path / "summary.json").write_text(json.dumps(_summary(metrics, updates)))
    return path


def make_full_run(path: Path, *, updates: int = 1000, teachers: int = 8, seed: int = 0) -> Path:
    """A fake run with all that a report can show: every metric, long names, many teachers, changes, guards, alerts, exports."""
    make_fake_run(path, updates=updates, evaluate_every=max(updates // 20, 1), seed=seed, rows=2)
    draw = random.Random(seed)
    names = [f"a-teacher-with-a-long-name-for-domain-{number}" for number in range(teachers)]
    rows = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        kind = "eval/accuracy" in row, row["step"] > 0
        for key, metric in METRICS.items():
            if key not in row and metric.chart and kind[not key.startswith("eval/")]:
                row |= {key.replace("<name>", name): _drawn(metric.form, draw) for name in names}
    _write_lines(path / "metrics.jsonl", rows)
    events = [json.loads(line) for line in (path / "events.jsonl").read_text().splitlines()]
    marked = [kind for kind, event in EVENTS.items() if event.marked or event.guard_action]
    for number, step in enumerate(range(updates // 20, updates, updates // 20)):
        about = {"cause": "response_length_mean is 80.2, above 60 for 3 updates", "metric": "response_length_mean"}
        about |= {"guard": "length", "key": "learner.optimizer.learning_rate", "before": 1e-4, "after": 5e-5}
        place = {"step": step, "wall_seconds": 20 + step / 2, "tokens_generated": 2900 * step, "time": START + step / 2}
        events.insert(-1, {**about, **place, "kind": marked[number % len(marked)]})
    _write_lines(path / "events.jsonl", events)
    _write_lines(
        path / "exports.jsonl", [{"time": START, "step": updates, "out": "/models/student", "dtype": "bfloat16"}]
    )
    lines = "".join(f"  {name}:\n    model: organisation/a-model-with-a-long-name-32B\n" for name in names)
    config = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(
        config.replace("teachers:\n", f"teachers:\n{lines}") + "alerts: {command: page}\n"
    )
    return path


def _drawn(form: str, draw: random.Random) -> float | list[int]:
    if form == "histogram":
        return [draw.randrange(50) for _ in range(17)]
    return draw.random() * {"percent": 1, "seconds": 5000, "bytes": 2e9}.get(form, 1.2345)


def _progress(step: int, updates: int) -> float:
    return 1 - math.exp(-4 * step / updates)


def _evaluated(row: dict, step: int, updates: int, draw: random.Random) -> dict:
    done = _progress(step, updates)
    return {
        **row,
        "eval/accuracy": 0.12 + 0.84 * done + draw.uniform(-0.02, 0.02),
        "eval/accuracy_sampled": 0.3 + 0.6 * done + draw.uniform(-0.02, 0.02),
        "eval/reverse_kl": 0.5 - 0.48 * done + draw.uniform(0, 0.01),
        "eval/response_length_mean": 45 + draw.uniform(-1, 1),
    }


def _update(step: int, updates: int, max_staleness: int, draw: random.Random) -> dict:
    done, noise = _progress(step, updates), draw.uniform(0.8, 1.2)
    return {
        "step": step,
        "policy_version": step,
        "wall_seconds": 20.0 + 0.5 * step,
        "trajectories": 64 * step,
        "tokens_generated": 2900 * step,
        "tokens_trained": round(2900 * noise),
        "loss": (0.5 - 0.46 * done) * noise,
        "reverse_kl": (0.5 - 0.46 * done) * noise,
        "forward_kl_old": 1e-4 * noise,
        "entropy": 0.05 - 0.03 * done * noise,
        "clip_fraction": 0.01 * noise,
        "ratio_mean": 1 + 1e-3 * noise,
        "ratio_max": 1.5 * noise,
        "importance_ess": 0.97 + 0.02 * noise,
        "grad_norm": 40.0 if step == 7 else (2 - 1.5 * done) * noise,
        "learning_rate": 2e-4 * min(1, step / 5),
        "staleness_mean": max_staleness * 0.6 * noise,
        "staleness_max": max_staleness,
        "staleness_histogram": [64 if behind == max_staleness else 0 for behind in range(max_staleness + 1)],
        "dropped": step // 10,
        "dropped_share": step // 10 / (64 * step + step // 10),
        "truncated_fraction": 0.02 * noise,
        "response_length_mean": 45 * noise,
        "engine_logprob_abs_diff": 3e-3 * noise,
        "busy_rollout": 0.8 * noise,
        "busy_teacher": 0.2 * noise,
        "busy_learner": 0.3 * noise,
        "publish_seconds": 0.015 * noise,
        "prepare_seconds": 0.004 * noise,
        "standstill_seconds": 0.002 * noise,
        "publish_bytes": 446720,
    }


def _events(updates: int, faults: bool, finished: bool) -> list[dict]:
    def event(wall: float, kind: str, cause: str = "", **fields: object) -> dict:
        return {**fields, "time": START + wall, "wall_seconds": wall, "kind": kind, "cause": cause}

    actors = ("learner-0", "teacher.default-0", "rollout-0", "rollout-1")
    events = [event(1, "started", step=0), *(event(10 + i, "actor_started", actor=a) for i, a in enumerate(actors))]
    events.append(event(20, "loop_started", step=0))
    middle, end = 20 + updates / 4, 20 + updates / 2
    if faults:
        events.append(event(middle, "actor_died", "ActorDiedError: SIGKILL <worker>", actor="rollout-1"))
        events.append(event(middle + 4, "actor_restarted", actor="rollout-1", restarts=1))
        events.append(event(middle + 5, "scaled", role="rollout", before=2, after=3))
        events.append(event(middle + 6, "actor_started", actor="rollout-2"))
        events.append(event(middle + 8, "scaled", role="rollout", before=3, after=2))
        events.append(event(middle + 8.5, "actor_ended", actor="rollout-2"))
    events.append(event(end - 0.5, "checkpoint", step=updates, path=f"/runs/checkpoints/step_{updates:08d}"))
    return [*events, event(end, "finished", step=updates)] if finished else events


def _trajectory(step: int, prompt: int, done: float, length: int, draw: random.Random) -> dict:
    tokens = [draw.choice("0123456789+=,;") for _ in range(length - 1)] + ["<eos>"]
    student = [-draw.expovariate(8) for _ in tokens]
    surprise = [draw.expovariate(0.6) if draw.random() > 0.85 + 0.14 * done else 0.0 for _ in tokens]
    return {
        "id": f"-1/{prompt}/1",
        "step": step,
        "prompt": f"<user>{draw.randrange(1000)}+{draw.randrange(1000)}<assistant>",
        "response": "".join(tokens[:-1]),
        "tokens": tokens,
        "student_logprobs": [round(s, 5) for s in student],
        "teacher_logprobs": [round(s - x, 5) for s, x in zip(student, surprise, strict=True)],
        "policy_versions": [step] * len(tokens),
        "finish_reason": "stop",
        "reference": "1234",
        "reward": float(draw.random() < 0.2 + 0.75 * done),
    }


def _summary(metrics: list[dict], updates: int) -> dict:
    busy = {role: sum(row.get(f"busy_{role}", 0.0) for row in metrics) for role in ("rollout", "teacher", "learner")}
    evaluated = [row for row in metrics if "eval/accuracy" in row]
    return {
        "accuracy_start": evaluated[0]["eval/accuracy"],
        "accuracy_end": evaluated[-1]["eval/accuracy"],
        "accuracy_teacher": 0.99,
        "accuracy_sampled_start": evaluated[0]["eval/accuracy_sampled"],
        "accuracy_sampled_end": evaluated[-1]["eval/accuracy_sampled"],
        "reverse_kl_start": evaluated[0]["eval/reverse_kl"],
        "reverse_kl_end": evaluated[-1]["eval/reverse_kl"],
        "updates": updates,
        "tokens_generated": 2900 * updates,
        "wall_seconds": 20 + updates / 2,
        "busy": busy,
        "loop_seconds": updates / 2,
        "wall_over_slowest_stage": updates / 2 / max(busy["rollout"] / 2, busy["teacher"], busy["learner"]),
        "faults": 1,
        "utilisation": {"roles": {}, "actors": {}},
        "ledger": {"issued": 64 * updates, "sampled": 0, "scored": 0, "trained": 64 * updates, "dropped": 4},
    }


def _write_lines(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
