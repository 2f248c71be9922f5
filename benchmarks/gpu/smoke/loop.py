"""(f) The demo's loop in one process: the rollout actor, the teacher and the learner of a campaign, without Ray.

Where vLLM is installed and there is a GPU, its engine samples; otherwise transformers does (engine.py). The rest is the
campaign's own: trajectories, scores, updates, weight versions with checksums.
"""

import argparse
import asyncio
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actors.config import PromptsConfig, RolloutConfig, SamplingConfig, StudentConfig, TeacherConfig
from actors.data.tokenizer import load_tokenizer, stop_token_ids
from actors.prompts.prompt_set import PromptSet, load_prompts, requests
from actors.rollout.actor import RolloutActor
from actors.teacher.local import LocalTeacher
from actors.trajectory import Trajectories
from benchmarks.gpu.smoke.report import Report
from learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from learner.learner import Learner

DEMO = Path(__file__).resolve().parents[3] / "examples" / "addition"
ANSWER = re.compile(r";(\d+)$")


class Parts(NamedTuple):
    """The roles, and what they work on."""

    actor: RolloutActor
    teacher: LocalTeacher
    learner: Learner
    prompts: PromptSet
    heldout: PromptSet
    tokenizer: Any


def loop(report: Report, options: argparse.Namespace) -> None:
    """Updates of the demo; the reverse KL must fall, and the first update must be on-policy."""
    on_gpu = options.device == "cuda"
    vllm = on_gpu and find_spec("vllm") is not None
    report.figure("engine", "vllm" if vllm else "transformers")
    parts = build(vllm, on_gpu)
    updates, count = (20, 64) if on_gpu else (10, 32)
    asyncio.run(run(report, parts, updates, count))


def build(vllm: bool, on_gpu: bool) -> Parts:
    """The demo's models, as configs/quickstart.yaml has them."""
    student, teacher = str(DEMO / "student"), str(DEMO / "teacher")
    tokenizer = load_tokenizer(student, False, "student.model")
    sampling = SamplingConfig(max_response_tokens=80)
    backend = "vllm" if vllm else "benchmarks.gpu.smoke.engine:TransformersEngine"
    engine = {"max_num_seqs": 64, "kv_cache_memory_bytes": 64 << 20} if vllm else {}
    rollout = RolloutConfig(backend=backend, dtype="float32", engine=engine)
    config = LearnerConfig(
        compute_dtype="float32",
        objective=ObjectiveConfig(estimator="full"),
        optimizer=OptimizerConfig(learning_rate=2e-4 if on_gpu else 1e-3, warmup_updates=2),
    )
    learner = Learner(
        StudentConfig(student), config, total_updates=60, temperature=1.0, publish_dtype="float32", bucket_bytes=1 << 20
    )
    scoring = LocalTeacher(TeacherConfig(teacher, signal="full", dtype="float32"), "teachers.default")
    train, heldout = (
        load_prompts(PromptsConfig(path=str(DEMO / f"{name}.jsonl"), limit=limit), tokenizer, 128, "prompts")
        for name, limit in (("train", 2048), ("heldout", 64 if on_gpu else 32))
    )
    stop = stop_token_ids(student, tokenizer)
    actor = RolloutActor(student, rollout, sampling, stop, 0, vocabulary=len(tokenizer))
    return Parts(actor, scoring, learner, train, heldout, tokenizer)


async def run(report: Report, parts: Parts, updates: int, count: int) -> None:
    """Sample, score, update, publish, load; `updates` times with `count` prompts each."""
    await load(parts)
    before, gap_before = await judged(parts)
    found: list[dict[str, Any]] = []
    seconds = dict.fromkeys(("rollout", "teacher", "learner"), 0.0)
    for update in range(updates):
        ids = np.array([(0, update * count + row, 0) for row in range(count)])
        counts, written = await parts.actor.generate(requests(parts.prompts, ids, 0))
        scored, scores = parts.teacher.score(ids, written)
        found.append(parts.learner.update(ids, written, scores))
        await load(parts)
        seconds["rollout"] += counts.busy_seconds
        seconds["teacher"] += scored.busy_seconds
        seconds["learner"] += found[-1]["busy_seconds"]
    after, gap_after = await judged(parts)
    await parts.actor.close()
    first, last = found[0], found[-1]
    report.figure("updates", updates)
    for name in ("loss", "reverse_kl"):
        report.figure(f"{name} of the first and of the last update", f"{first[name]:.4f}, {last[name]:.4f}")
    report.figure("correct answers before and after", f"{before:.0%}, {after:.0%}")
    for role, spent in seconds.items():
        report.figure(f"{role}, an update of {count} trajectories", round(spent / updates, 4), "s")
    report.check("first update: largest ratio of student and engine, less 1", abs(first["ratio_max"] - 1), 1e-2)
    report.check(
        "log-probs of engine and learner, mean difference", max(m["engine_logprob_abs_diff"] for m in found), 1e-3
    )
    report.figure("reverse KL on held-out prompts before and after", f"{gap_before:.4f}, {gap_after:.4f}", "nats")
    report.check("reverse KL on held-out prompts, after over before", gap_after / gap_before, 0.9)
    report.holds("all gradients are finite", bool(np.isfinite([m["grad_norm"] for m in found]).all()))


async def load(parts: Parts) -> None:
    """The learner's weights, published and loaded by the engine."""
    await parts.actor.load_weights(*[part.copy() if isinstance(part, np.ndarray) else part for part in parts.learner.publish()])  # type: ignore[arg-type] # fmt: skip


async def judged(parts: Parts) -> tuple[float, float]:
    """(share of right answers, nats a token between student and teacher) of the student's answers to held-out prompts.

    The second is an estimate of the reverse KL, from samples with the same seeds each time.
    """
    ids = np.array([(-1, row, 0) for row in range(len(parts.heldout))])
    _, written = await parts.actor.generate(requests(parts.heldout, ids, 0))
    _, scores = parts.teacher.score(ids, written)
    texts = zip(answers(written, parts.tokenizer), parts.heldout.references, strict=True)
    right = [bool(found := ANSWER.search(text)) and found[1] == reference for text, reference in texts]
    return float(np.mean(right)), float(np.nanmean(written.behaviour_logprobs - scores.logprobs))


def answers(written: Trajectories, tokenizer: Any) -> list[str]:
    """[B] the responses as text, without special tokens."""
    rows = np.split(written.response_tokens, written.response_offsets[1:-1])
    return [tokenizer.decode(row, skip_special_tokens=True) for row in rows]
