"""(e) A teacher's speed over that of a bare prefill, and whether it repeats itself bit for bit."""

import argparse
from typing import Any

import numpy as np
import torch

from actors.config import TeacherConfig
from actors.errors import CampaignError
from actors.forward.packing import hidden_states
from actors.teacher.base import probe
from actors.teacher.local import LocalTeacher
from benchmarks.gpu.shapes import forward_flops, make_work
from benchmarks.gpu.smoke.report import Report
from benchmarks.gpu.smoke.timing import peak_bytes, peak_flops, seconds_of
from benchmarks.gpu.smoke.updates import Sizes
from benchmarks.gpu.smoke.work import TOP_K, model_of


class Untested(LocalTeacher):
    """Without its self-test, which would refuse what is to be measured."""

    def self_test(self, *_: Any, **__: Any) -> np.ndarray:
        """Scores the probe once."""
        written = probe(self.vocabulary)
        return self.score(written.ids, written)[1].logprobs


def teacher(report: Report, options: argparse.Namespace) -> None:
    """One model, every signal that a large vocabulary allows."""
    shape, sizes = options.shape, Sizes(options.shape)
    model = str(model_of(shape, options.models))
    written, _ = make_work(shape, sizes.tokens, sizes.length, sizes.prompt)
    scoring = Untested(TeacherConfig(model, microbatch_tokens=sizes.tokens, top_k=TOP_K), "teachers.teacher")
    repeats(report, scoring, sizes, shape)
    count = len(written)
    row = np.concatenate([written.prompt_tokens.reshape(count, -1), written.response_tokens.reshape(count, -1)], 1)
    tokens, lengths = row.reshape(-1).astype(np.int64), np.full(count, sizes.length)
    with torch.inference_mode():
        prefill = seconds_of(lambda: hidden_states(scoring._body, tokens, lengths, scoring._device), 3)
    report.figure("bare prefill, without the head", round(prefill, 4), "s")
    most = peak_flops()
    for signal in ("sampled", "topk", "hidden"):
        scoring.config.signal = signal  # type: ignore[assignment]
        peak, before = peak_bytes(lambda: scoring.score(written.ids, written))
        seconds = seconds_of(lambda: scoring.score(written.ids, written), 3)
        target = ">= 0.85" if signal == "sampled" and torch.cuda.is_available() else ""
        report.figure(f"{signal}: speed over prefill", prefill / seconds, target=target)
        report.figure(f"{signal}: tokens a second", round(sizes.tokens / seconds))
        flops = forward_flops(shape, sizes.tokens, sizes.length, head=True)
        report.figure(f"{signal}: model FLOPs utilisation", most and flops / seconds / most)
        report.figure(f"{signal}: memory above the weights", round((peak - before) / 1e9, 3), "GB")


def repeats(report: Report, scoring: Untested, sizes: Sizes, shape: str) -> None:
    """The probe ten times, a full batch twice, and the probe's verdict in a campaign."""
    written = probe(scoring.vocabulary)
    first, *others = (scoring.score(written.ids, written)[1].logprobs for _ in range(10))
    report.figure(
        "the probe ten times: largest difference", max(float(np.abs(o - first).max()) for o in others), "nats"
    )
    report.figure("the probe repeats bit for bit", "yes" if all(np.array_equal(first, o) for o in others) else "no")
    work, _ = make_work(shape, sizes.tokens, sizes.length, sizes.prompt)
    once, twice = (scoring.score(work.ids, work)[1].logprobs for _ in range(2))
    report.figure("a full batch twice: largest difference", float(np.abs(once - twice).max()), "nats")
    report.holds("all scores are finite", bool(np.isfinite(once).all()))
    try:
        scoring._compare(LocalTeacher.self_test(scoring))
        refused = ""
    except CampaignError as error:
        refused = str(error)
    report.holds("a campaign accepts its self-test", not refused, refused)
