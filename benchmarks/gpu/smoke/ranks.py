"""(b) A learner that is sharded over a group of one rank (NCCL on a GPU) against one that is not.

Loads, shards, computes in float32 and in mixed precision, clips, publishes, saves, loads and goes on. With one rank every
collective runs for real, over nothing; what several ranks add is in tests/unit/learner/test_sharding.py, with gloo.
"""

import argparse
import math
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from actors.weights.buckets import WeightVersion, unpack, verify
from benchmarks.gpu.smoke.report import Report
from benchmarks.gpu.smoke.work import learner_of, model_of, scored
from learner.config import OptimizerConfig
from learner.learner import Learner
from learner.student.sharding import Ranks

STEADY = OptimizerConfig(learning_rate=1e-4, warmup_updates=0, epsilon=1e-5, max_grad_norm=1e-2)
"""Adam divides by the size of the gradient. If that is only rounding error, so is the step without this epsilon."""
LIMITS = {"float32": (1e-4, 1e-3), "bfloat16": (0.02, 0.1)}
"""Relative errors of metrics, and of the sum of all steps of the weights."""
MEASURED = ("loss", "reverse_kl", "entropy", "grad_norm", "ratio_mean", "forward_kl_old", "top1_agreement")

Work = tuple[Trajectories, TeacherScores]


def ranks(report: Report, options: argparse.Namespace) -> None:
    """Both dtypes, each from the first weights to an update after a resume."""
    shape = options.shape if options.shape == "tiny" else "small"
    model = model_of(shape, options.models)
    tokens, length = (4096, 512) if shape == "small" else (96, 24)
    work = scored(shape, tokens, length, 8, "hidden")
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/meeting", 1)
        joined = Ranks.join(store, 0, 1, options.device)
        sharded = Ranks(joined.rank, joined.size, sharded=True)
        report.figure("process group", str(dist.get_backend()))
        for dtype in LIMITS:
            compared(report, dtype, model, work, tokens // 3, sharded, Path(folder))
        dist.destroy_process_group()


def compared(report: Report, dtype: str, model: Path, work: Work, tokens: int, sharded: Ranks, folder: Path) -> None:
    """One learner with shards and one without, side by side."""
    how: dict[str, Any] = {"compute_dtype": dtype, "optimizer": STEADY, "head_chunk_tokens": 256}
    how["bucket_bytes"] = 8 << 20
    plain, split = (learner_of(model, tokens, ranks=given, **how) for given in (None, sharded))
    parameters = list(split._model.parameters())
    report.holds(f"{dtype}: every parameter is sharded", all(isinstance(p, DTensor) for p in parameters))
    before = published(plain)
    report.check(f"{dtype}: first published weights that differ", differing(before, published(split)), 0)
    of_metrics, of_weights = LIMITS[dtype]
    for update in (1, 2):
        report.check(f"{dtype}: metrics of update {update}", apart(step(plain, work), step(split, work)), of_metrics)
    norm = step(split, work)["grad_norm"]
    step(plain, work)
    report.holds(f"{dtype}: the gradient is clipped", norm > STEADY.max_grad_norm, f"its norm is {norm:.3g}")
    report.check(f"{dtype}: steps of the weights", moved_apart(plain, split, before), of_weights)
    saved = save(split, folder / dtype)
    again, elsewhere = (learner_of(model, tokens, ranks=given, checkpoint=saved, **how) for given in (sharded, None))
    report.check(f"{dtype}: loaded weights that differ", differing(published(split), published(again)), 0)
    report.check(f"{dtype}: the same, loaded without shards", differing(published(split), published(elsewhere)), 0)
    expected = step(split, work)
    report.check(f"{dtype}: metrics after a resume", apart(expected, step(again, work)), of_metrics)
    report.check(f"{dtype}: the same without shards", apart(expected, step(elsewhere, work)), of_metrics)
    report.check(f"{dtype}: steps after a resume", moved_apart(split, again, before), of_weights)


def step(learner: Learner, work: Work) -> dict[str, float]:
    """One update's metrics."""
    written, scores = work
    found = learner.update(written.ids, written, scores)
    return {name: found[name] for name in MEASURED if name in found}


def apart(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """The largest relative difference of a metric; NaN if one side has other metrics."""
    if ours.keys() != theirs.keys():
        return math.nan
    return max(abs(ours[name] - theirs[name]) / max(abs(theirs[name]), 1e-3) for name in ours)


def published(learner: Learner) -> dict[str, torch.Tensor]:
    """Name -> published tensor, after its checksums are verified."""
    buckets: list[np.ndarray] = []
    for part in learner.publish():
        if isinstance(part, WeightVersion):
            verify(part, buckets)
            return {name: tensor.clone() for name, tensor in unpack(part, buckets)}
        assert isinstance(part, np.ndarray)
        buckets.append(part.copy())
    raise AssertionError("no manifest")


def differing(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> int:
    """Tensors that are not equal bit for bit, or are missing on one side."""
    names = ours.keys() | theirs.keys()
    return sum(not (n in ours and n in theirs and torch.equal(ours[n], theirs[n])) for n in names)


def moved_apart(ours: Learner, theirs: Learner, before: dict[str, torch.Tensor]) -> float:
    """The norm of the masters' difference, over that of what they have moved since `before`."""
    difference = moved = 0.0
    for (name, a), (_, b) in zip(ours._model.named_parameters(), theirs._model.named_parameters(), strict=True):
        first, second = (p.detach().to_local() if isinstance(p, DTensor) else p.detach() for p in (a, b))
        difference += (first - second).double().pow(2).sum().item()
        moved += (second - before[name].to(second)).double().pow(2).sum().item()
    return math.sqrt(difference / moved) if moved else math.nan


def save(learner: Learner, folder: Path) -> Path:
    """A checkpoint, once it is on disk."""
    learner.save(str(folder))
    while not learner.saved():
        time.sleep(0.01)
    return folder
