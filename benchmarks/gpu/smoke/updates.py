"""(c) Updates at the shapes of real models: speed, memory against what is reckoned, host synchronisations, compiled layers.

An update is what a campaign's learner does with 16,384 tokens: collating, passes with gradient checkpointing, one step. The
signals are a teacher's top 64 and its hidden states, at the real vocabulary.
"""

import argparse
import time
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch._dynamo

from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from benchmarks.gpu.shapes import forward_flops
from benchmarks.gpu.smoke.memory import reckoned
from benchmarks.gpu.smoke.report import Report
from benchmarks.gpu.smoke.timing import peak_bytes, peak_flops, seconds_of
from benchmarks.gpu.smoke.work import config_of, learner_of, model_of, scored
from learner.learner import Learner

SIGNALS = ("topk", "hidden")
TARGETS = {"4b": ">= 0.35"}
"""Share of the peak, by shape."""


class Sizes:
    """Tokens of an update, and of each trajectory and prompt."""

    def __init__(self, shape: str):
        self.tokens, self.length, self.prompt = (256, 64, 8) if shape == "tiny" else (16384, 4096, 64)


def update(report: Report, options: argparse.Namespace) -> None:
    """Updates with each signal; memory against what `check` reckons."""
    shape, sizes = options.shape, Sizes(options.shape)
    model = model_of(shape, options.models)
    room = torch.cuda.get_device_properties(0).total_memory if torch.cuda.is_available() else float("inf")
    config = config_of(sizes.tokens)
    bound, items = reckoned(shape, sizes.tokens, config)
    if bound > 0.97 * room:
        config = replace(config, offload_optimizer=True)
        bound, items = reckoned(shape, sizes.tokens, config)
        report.note(
            "more is reckoned than the card has: moments are in host memory (offload_optimizer), times include it"
        )
    learner = learner_of(model, sizes.tokens, offload_optimizer=config.offload_optimizer)
    if torch.cuda.is_available() and not config.offload_optimizer:
        report.holds("AdamW is fused on a GPU", bool(learner._optimizer.param_groups[0].get("fused")))
    report.figure("reckoned, at most", round(bound / 1e9, 3), "GB")
    for item in items:
        report.figure(f"reckoned: {item.name}", round(item.nbytes / 1e9, 3), "GB")
    for signal in SIGNALS:
        work = scored(shape, sizes.tokens, sizes.length, sizes.prompt, signal)
        metrics = learner.update(work[0].ids, *work)  # the first one makes moments and compiles kernels
        report.holds(f"{signal}: loss and gradient are finite", 0 < metrics["grad_norm"] < float("inf"))
        one(report, learner, shape, sizes, work, signal, bound)
    synchronisations(report, learner, work)
    profile(report, learner, work)


def one(
    report: Report, learner: Learner, shape: str, sizes: Sizes, work: tuple[Trajectories, TeacherScores], signal: str,
    bound: float,
) -> None:  # fmt: skip
    """Speed and memory of an update with this signal. bound: bytes that are reckoned."""

    def take() -> None:
        learner.update(work[0].ids, *work)

    peak, before = peak_bytes(take)
    seconds = seconds_of(take, 3 if torch.cuda.is_available() else 1)
    flops, most = 3 * forward_flops(shape, sizes.tokens, sizes.length, head=True), peak_flops()
    report.figure(f"{signal}: an update", round(seconds, 4), "s")
    report.figure(f"{signal}: tokens a second", round(sizes.tokens / seconds))
    target = TARGETS.get(shape, "") if signal == "topk" else ""
    report.figure(f"{signal}: model FLOPs utilisation", most and flops / seconds / most, target=target)
    if not peak:
        return
    report.figure(f"{signal}: held before the update", round(before / 1e9, 2), "GB")
    report.figure(f"{signal}: highest in the update", round(peak / 1e9, 2), "GB")
    report.figure(f"{signal}: reserved by torch", round(torch.cuda.max_memory_reserved() / 1e9, 2), "GB")
    report.check(f"{signal}: highest memory over what is reckoned", peak / bound, 1.02)


def synchronisations(report: Report, learner: Learner, work: tuple[Trajectories, TeacherScores]) -> None:
    """Counts where an update waits for the GPU."""
    if not torch.cuda.is_available():
        return
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        learner.update(work[0].ids, *work)
        torch.cuda.set_sync_debug_mode("default")
    places = Counter(f"{w.filename.rpartition('/')[2]}:{w.lineno}" for w in seen if "synchroniz" in str(w.message))
    report.figure("host synchronisations in an update", sum(places.values()))
    report.note("it waits at " + ", ".join(f"{place} ({count})" for place, count in places.most_common(12)))


def profile(report: Report, learner: Learner, work: tuple[Trajectories, TeacherScores], rows: int = 12) -> None:
    """The kernels with the most time in one update."""
    if not torch.cuda.is_available():
        return
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        learner.update(work[0].ids, *work)
        torch.cuda.synchronize()
    kernels = sorted(profiler.key_averages(), key=lambda k: -k.self_device_time_total)
    total = sum(kernel.self_device_time_total for kernel in kernels)
    report.figure("time of all kernels in an update", round(total / 1e6, 4), "s")
    for kernel in kernels[:rows]:
        share = kernel.self_device_time_total / total
        report.note(f"{share:.1%} in {kernel.count} calls of {kernel.key[:100]}")


def compiled(report: Report, options: argparse.Namespace) -> None:
    """Compiled decoder layers: the same gradient, the time of compiling, and the time of an update with and without."""
    shape, sizes = options.shape, Sizes(options.shape)
    model = model_of(shape, options.models)
    work = scored(shape, sizes.tokens, sizes.length, sizes.prompt, "topk")
    other = scored(shape, sizes.tokens // 2, sizes.length, sizes.prompt, "topk")  # another number of tokens
    found = {
        how: stepped(report, learner_of(model, sizes.tokens, compile=how), work, other, how) for how in (False, True)
    }
    counters = torch._dynamo.utils.counters
    report.figure("compiled graphs", counters["stats"].get("unique_graphs", 0))
    report.figure("calls that were not compiled", sum(counters["unimplemented"].values()))
    for name in ("loss", "grad_norm"):
        error = abs(found[True][name] - found[False][name]) / max(abs(found[False][name]), 1e-3)
        report.check(f"compiled against eager: {name} of the second update", error, 0.05)


def stepped(report: Report, learner: Learner, work: Any, other: Any, compile_: bool) -> dict[str, float]:
    """Times the first and later updates with this learner; the metrics of an update of another size between them."""
    first = seconds_of_one(learner, work)
    metrics = learner.update(other[0].ids, *other)
    seconds = seconds_of(lambda: learner.update(work[0].ids, *work), 3 if torch.cuda.is_available() else 1)
    name = "compiled" if compile_ else "eager"
    report.figure(f"{name}: the first update", round(first, 2), "s")
    report.figure(f"{name}: an update", round(seconds, 4), "s")
    return metrics


def seconds_of_one(learner: Learner, work: tuple[Trajectories, TeacherScores]) -> float:
    """Of a single update, whatever it has to prepare."""
    begun = time.perf_counter()
    learner.update(work[0].ids, *work)
    return time.perf_counter() - begun


def head(report: Report, options: argparse.Namespace) -> None:
    """Memory and time of the chunked head over all tokens, forward and backward."""
    from benchmarks.gpu.__main__ import measure_head

    sizes = Sizes(options.shape)
    found = measure_head(argparse.Namespace(shape=options.shape, tokens=sizes.tokens, repeats=3), options.models)
    report.figure("the head, forward and backward", found["seconds"], "s")
    extra = found["extra_gb"] - found["gradients_gb"]
    # On a CPU the resident memory of the process says nothing about a few megabytes.
    target = "<= 1.5" if torch.cuda.is_available() else ""
    report.figure("memory of the head over its gradients", round(extra, 3), "GB", target=target)
