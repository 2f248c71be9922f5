"""A learner and one update's worth of trajectories, small enough for milliseconds."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from actors.config import StudentConfig, TeacherConfig
from actors.teacher import TeacherActor
from actors.trajectory import TeacherScores, Trajectories, offsets_of
from learner.config import LearnerConfig, OptimizerConfig
from learner.learner import Learner


def make_learner(models: dict[str, Path], **changes: object) -> Learner:
    config = LearnerConfig(compute_dtype="float32", optimizer=OptimizerConfig(learning_rate=1e-3, warmup_updates=0))
    return Learner(
        StudentConfig(str(models["student"])),
        replace(config, **changes),  # type: ignore[arg-type]
        total_updates=10,
        temperature=1.0,
        publish_dtype="float32",
        bucket_bytes=1 << 20,
    )


def sampled(models: dict[str, Path], teacher: str, signal: str = "full") -> tuple[Trajectories, TeacherScores]:
    """Six trajectories, two a prompt, with the log-probs that the student itself gives its tokens."""
    rng = np.random.default_rng(0)
    lengths, prompts = rng.integers(3, 9, 6), np.full(6, 4)
    blank = Trajectories(
        ids=np.array([(0, i // 2, i % 2) for i in range(6)]),
        prompt_tokens=rng.integers(6, 40, prompts.sum()).astype(np.int32),
        prompt_offsets=offsets_of(prompts),
        response_tokens=rng.integers(6, 40, lengths.sum()).astype(np.int32),
        response_offsets=offsets_of(lengths),
        behaviour_logprobs=np.zeros(lengths.sum(), np.float32),
        policy_versions=np.zeros(lengths.sum(), np.int32),
        finish_reasons=np.zeros(6, np.uint8),
    )

    def score(model: str, kind: str) -> TeacherScores:
        config = TeacherConfig(str(models[model]), dtype="float32", signal=kind, top_k=8)  # type: ignore[arg-type]
        return TeacherActor(config).score(blank.ids, blank)[1]

    return replace(blank, behaviour_logprobs=score("student", "sampled").logprobs), score(teacher, signal)


def weights_of(learner: Learner) -> torch.Tensor:
    *buckets, _ = learner.publish()
    return torch.from_numpy(np.concatenate(buckets)).view(torch.float32)
