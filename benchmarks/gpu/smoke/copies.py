"""(d) Rates of copies between host and card, pinned and pageable, and of publishing through them."""

import argparse

import torch

from actors.weights.buckets import Buffer, WeightVersion
from benchmarks.gpu.smoke.report import Report
from benchmarks.gpu.smoke.timing import peak_bytes, seconds_of
from benchmarks.gpu.smoke.work import learner_of, model_of


def copies(report: Report, options: argparse.Namespace) -> None:
    """Bytes there and back, then a weight version of a learner."""
    on_gpu = options.device == "cuda"
    nbytes = 1 << 30 if on_gpu else 1 << 20
    there = torch.randint(0, 256, (nbytes,), dtype=torch.uint8, device=options.device)
    for name, pinned in (("pinned", True), ("pageable", False)):
        host = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned and on_gpu)
        host.fill_(0)  # the pages exist
        back = torch.empty_like(there)
        rates = {"card to host": (host, there), "host to card": (back, host)}
        for way, (target, source) in rates.items():
            seconds = seconds_of(lambda: target.copy_(source), 5)  # noqa: B023
            report.figure(f"{name}, {way}", round(nbytes / seconds / 1e9, 2), "GB/s")
        report.holds(f"{name}: the bytes come back", torch.equal(back, there))
    other = torch.empty_like(there)
    report.figure("within the card", round(nbytes / seconds_of(lambda: other.copy_(there)) / 1e9, 1), "GB/s")
    first, second = (torch.empty(nbytes, dtype=torch.uint8).fill_(value) for value in (0, 1))
    report.figure(
        "within the host, all threads", round(nbytes / seconds_of(lambda: first.copy_(second)) / 1e9, 2), "GB/s"
    )
    buffer = torch.from_numpy(Buffer().of(1 << 20))
    report.holds("the buffer of buckets is pinned", not on_gpu or buffer.is_pinned())
    publishing(report, options)


def publishing(report: Report, options: argparse.Namespace) -> None:
    """A version of the shape's weights in bfloat16: laid out, copied, checksummed."""
    learner = learner_of(model_of(options.shape, options.models), 1024)
    nbytes = 0

    def publish() -> None:
        nonlocal nbytes
        for part in learner.publish():
            nbytes = part.nbytes if isinstance(part, WeightVersion) else nbytes

    seconds = seconds_of(publish, 3)
    peak, before = peak_bytes(publish)
    report.figure("a weight version", round(nbytes / 1e9, 3), "GB")
    report.figure("publishing it", round(nbytes / seconds / 1e9, 2), "GB/s")
    report.figure("memory on the card while publishing", round((peak - before) / 1e9, 3), "GB")
