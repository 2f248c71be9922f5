"""A learner and one update's worth of trajectories, small enough for milliseconds."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.config import LoraConfig, StudentConfig, TeacherConfig
from actors.teacher.local import LocalTeacher
from actors.teacher.turn_ends import TurnEnds
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories, offsets_of
from learner.config import LearnerConfig, OptimizerConfig
from learner.learner import Learner
from learner.student.sharding import Ranks


def make_learner(
    models: dict[str, Path],
    *,
    teachers: dict[str, TeacherConfig] | None = None,
    temperature: float = 1.0,
    turn_ends: dict[str, TurnEnds] | None = None,
    vocabulary: int | None = None,
    ranks: Ranks | None = None,
    lora: LoraConfig | None = None,
    checkpoint: Path | None = None,
    publish_dtype: str = "float32",
    bucket_bytes: int = 1 << 20,
    keep_published: bool = False,
    **changes: object,
) -> Learner:
    config = LearnerConfig(compute_dtype="float32", optimizer=OptimizerConfig(learning_rate=1e-3, warmup_updates=0))
    return Learner(
        StudentConfig(str(models["student"]), lora=lora),
        replace(config, **changes),  # type: ignore[arg-type]
        total_updates=10,
        temperature=temperature,
        vocabulary=vocabulary,
        publish_dtype=publish_dtype,
        bucket_bytes=bucket_bytes,
        keep_published=keep_published,
        checkpoint=None if checkpoint is None else str(checkpoint),
        teachers=teachers,
        turn_ends=turn_ends,
        ranks=ranks,
    )


def teacher_config(models: dict[str, Path], model: str, signal: str, **changes: object) -> TeacherConfig:
    return TeacherConfig(str(models[model]), signal=signal, **{"dtype": "float32", "top_k": 8} | changes)  # type: ignore[arg-type]


def random_trajectories(
    rng: np.random.Generator,
    ids: list[tuple[int, int, int]],
    before: np.ndarray,
    after: np.ndarray,
    tokens: tuple[int, int] = (6, 40),
) -> Trajectories:
    """Prompts of `before` and responses of `after` tokens each, all certain, of the first policy version."""
    return Trajectories(
        ids=np.array(ids),
        prompt_tokens=rng.integers(*tokens, before.sum()).astype(np.int32),
        prompt_offsets=offsets_of(before),
        response_tokens=rng.integers(*tokens, after.sum()).astype(np.int32),
        response_offsets=offsets_of(after),
        behaviour_logprobs=np.zeros(after.sum(), np.float32),
        policy_versions=np.zeros(after.sum(), np.int32),
        finish_reasons=np.zeros(len(ids), np.uint8),
    )


def sampled(
    models: dict[str, Path], teacher: str, signal: str = "full", **changes: object
) -> tuple[Trajectories, TeacherScores]:
    """Six trajectories, two a prompt, with the log-probs and the top 8 that the student itself gives at its tokens."""
    rng = np.random.default_rng(0)
    lengths, prompts = rng.integers(3, 9, 6), np.full(6, 4)
    blank = random_trajectories(rng, [(0, i // 2, i % 2) for i in range(6)], prompts, lengths)
    temperature = {"temperature": changes.get("temperature")}
    own = LocalTeacher(teacher_config(models, "student", "topk", **temperature)).score(blank.ids, blank)[1]
    written = replace(blank, behaviour_logprobs=own.logprobs, support_ids=own.support_ids)
    return written, LocalTeacher(teacher_config(models, teacher, signal, **changes)).score(blank.ids, written)[1]


def received(published: Iterator[Any]) -> list[Any]:
    """What comes out of Ray of what a learner publishes: each bucket is copied before the next is asked for."""
    return [part.copy() if isinstance(part, np.ndarray) else part for part in published]


def weights_of(learner: Learner) -> torch.Tensor:
    *buckets, _ = received(learner.publish())
    return torch.from_numpy(np.concatenate(buckets)).view(torch.float32)
