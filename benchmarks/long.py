"""Measures the learner's memory for one long trajectory: an update on a single one of 4,096 to 32,768 tokens.

    python -m benchmarks.long [--hidden 512] [--layers 4] [--vocabulary 16384] [--tokens 4096 16384 32768] [--ranks 2]

Random weights, one rank or several that share the row (`learner.sequence_parallel`), one thread each, bfloat16 with gradient checkpointing; each length runs in its own process. Prints a
table of the update's peak resident memory above the memory before it, minus that of a short update, beside the formula of
docs/scaling.md in bytes: 4 t H L for the layers' inputs, 60 t H for the layer that is recomputed, 12 c V for a chunk of the
head (t tokens of a rank, H hidden size, L layers, c tokens of a chunk, V vocabulary). Of several ranks it is the one with most.
"""

import argparse
import multiprocessing
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ranks import reset_peak, resident

CHUNK = 1024
"""Tokens of a head chunk."""
SHORT = 64
"""Tokens of the short update, whose memory is the part that does not grow with the trajectory."""


def measure(model: Path, tokens: int, answers: Any, rank: int = 0, size: int = 1, meeting: Path | None = None) -> None:
    """Runs one update in this process; puts (peak bytes above the memory before, seconds) into the queue `answers`.

    size: ranks that share the row. meeting: the file by which they find each other.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    import torch
    import torch.distributed as dist

    from actors.teacher_scores import TeacherScores
    from actors.trajectory import Trajectories, offsets_of
    from learner.student.sharding import Ranks
    from tests.tiny_updates import make_learner

    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    written = Trajectories(
        ids=np.array([(0, 0, 0)]),
        prompt_tokens=draw.integers(6, 40, 16).astype(np.int32),
        prompt_offsets=offsets_of([16]),
        response_tokens=draw.integers(6, 40, tokens - 16).astype(np.int32),
        response_offsets=offsets_of([tokens - 16]),
        behaviour_logprobs=np.full(tokens - 16, -9.0, np.float32),
        policy_versions=np.zeros(tokens - 16, np.int32),
        finish_reasons=np.zeros(1, np.uint8),
    )
    scores = TeacherScores(
        ids=written.ids,
        response_offsets=written.response_offsets,
        logprobs=np.full(tokens - 16, -9.5, np.float32),
        teacher="t",
        log_weights=np.zeros(1, np.float32),
        support_ids=np.zeros((tokens - 16, 0), np.int32),
        support_logprobs=np.zeros((tokens - 16, 0), np.float32),
    )
    learner = make_learner(
        {"student": model},
        ranks=None if size == 1 else Ranks.join(dist.FileStore(str(meeting), size), rank, size, "cpu"),
        sequence_parallel=size,
        compute_dtype="bfloat16",
        gradient_checkpointing=True,
        microbatch_tokens=tokens,
        head_chunk_tokens=CHUNK,
    )
    learner._optimizer.param_groups[0]["lr"] = 0.0
    before, start = reset_peak(), time.perf_counter()
    learner.update(written.ids, written, scores)
    answers.put((resident("VmHWM") - before, time.perf_counter() - start))


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("hidden", 512), ("layers", 4), ("vocabulary", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384, 32768])
    parser.add_argument("--ranks", type=int, default=1, help="ranks that share the row")
    options = parser.parse_args()
    from tests.tiny_models import make_tiny_model

    # By default malloc keeps freed memory, and the resident memory would be far above the memory in use.
    os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    context = multiprocessing.get_context("spawn")
    found: dict[int, tuple[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        model = make_tiny_model(
            Path(folder, "model"),
            hidden=options.hidden,
            layers=options.layers,
            vocab_extra=options.vocabulary,
            context=max(options.tokens),
        )
        for tokens in (SHORT, *options.tokens):
            answers = context.Queue()
            shared = (options.ranks, Path(folder, f"meeting-{tokens}"))
            ranks = [
                context.Process(target=measure, args=(model, tokens, answers, rank, *shared))
                for rank in range(options.ranks)
            ]
            for process in ranks:
                process.start()
            found[tokens] = max(answers.get(timeout=1800) for _ in ranks)
            for process in ranks:
                process.join()
    print("| tokens | MiB above a short update | formula | seconds |\n|---|---|---|---|")
    for tokens in options.tokens:
        extra = (found[tokens][0] - found[SHORT][0]) / (1 << 20)
        of_rank = tokens // options.ranks
        head = 12 * (min(of_rank, CHUNK) - SHORT // options.ranks) * options.vocabulary
        formula = (of_rank * options.hidden * (4 * options.layers + 60) + head) / (1 << 20)
        print(f"| {tokens:,} | {extra:.0f} | {formula:.0f} | {found[tokens][1]:.0f} |", flush=True)


if __name__ == "__main__":
    main()
