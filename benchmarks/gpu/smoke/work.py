"""Models and updates of real shapes for the parts: trajectories of random tokens, with the scores of each signal.

Shapes: N response tokens, K support, H hidden size.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from actors.config import StudentConfig, TeacherConfig
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from benchmarks.gpu.shapes import SHAPES, make_model, make_work
from learner.config import LearnerConfig, ObjectiveConfig, OptimizerConfig
from learner.learner import Learner
from learner.student.sharding import Ranks

TOP_K = 64
WIDE = "wide"
"""Name of the teacher that sends hidden states; others are `teacher`."""


def model_of(shape: str, folder: Path) -> Path:
    """The directory of a model of this shape; made by the first part that needs it."""
    model = folder / shape
    if not model.is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        os.replace(make_model(folder / f".{shape}.{os.getpid()}", shape), model)
    return model


def scored(shape: str, tokens: int, length: int, prompt: int, signal: str) -> tuple[Trajectories, TeacherScores]:
    """`tokens` tokens in trajectories of `length`, and scores as a teacher with this signal (topk, hidden) sends them."""
    written, scores = make_work(shape, tokens, length, prompt)
    rng, total = np.random.default_rng(1), len(scores.logprobs)
    size = SHAPES[shape]
    if signal == "hidden":
        # Half of a bfloat16's bits are its sign and exponent: numbers around 1, as after the last norm.
        states = rng.standard_normal((total, size["hidden_size"]), np.float32)
        return written, replace(scores, teacher=WIDE, hidden=(states.view(np.uint32) >> 16).astype(np.uint16))
    count = min(TOP_K, size["vocab_size"] // 2)
    # Distinct ids: a random start, and steps of more than nothing that do not reach around.
    step = size["vocab_size"] // count
    ids = (rng.integers(0, size["vocab_size"], (total, 1)) + step * np.arange(count)) % size["vocab_size"]
    logits = np.sort(rng.standard_normal((total, count), np.float32) * 3, -1)[:, ::-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True)) + np.float32(np.log(0.95))
    return written, replace(scores, support_ids=ids.astype(np.int32), support_logprobs=np.ascontiguousarray(logprobs))


def config_of(tokens: int) -> LearnerConfig:
    """As a campaign has it, with the objective `full`. tokens: of a micro-batch."""
    return LearnerConfig(
        gradient_checkpointing=True,
        microbatch_tokens=tokens,
        objective=ObjectiveConfig(estimator="full"),
        optimizer=OptimizerConfig(learning_rate=1e-6, warmup_updates=0),
    )


def learner_of(model: Path, tokens: int, *, ranks: Ranks | None = None, checkpoint: Path | None = None,
               bucket_bytes: int = 256 << 20, **changes: Any) -> Learner:  # fmt: skip
    """A learner with this configuration. changes: of LearnerConfig."""
    return Learner(
        StudentConfig(str(model)),
        replace(config_of(tokens), **changes),
        total_updates=100,
        temperature=1.0,
        publish_dtype="bfloat16",
        bucket_bytes=bucket_bytes,
        checkpoint=None if checkpoint is None else str(checkpoint),
        teachers={WIDE: TeacherConfig(str(model), signal="hidden")},
        ranks=ranks,
    )
