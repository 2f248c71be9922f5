"""Measures the memory of one learner rank, and the extra memory of publishing, with 1, 2 and 4 ranks on this machine.

    python -m benchmarks.ranks [--hidden 512] [--layers 8] [--vocabulary 16384]

Random weights, gloo, float32. The unit is bytes of resident memory above an idle process, for each parameter of the model;
pages of files, such as the code of libraries, are not counted. docs/scaling.md has the formula to compare with. Prints JSON.
"""

import argparse
import ctypes
import json
import multiprocessing
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

SIZES = (1, 2, 4)
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1
"""glibc's numbers of the options of mallopt."""


def resident(field: str) -> int:
    """Resident memory of this process in bytes. field: VmRSS (now) or VmHWM (the peak since `reset_peak`)."""
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field)]
    return int(line.split()[1]) << 10


def reset_peak() -> int:
    """Resets the peak VmHWM; returns the resident memory now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return resident("VmRSS")


def give_back_at_once() -> None:
    """Sets malloc to return freed memory: by default resident memory would be far above the memory in use."""
    libc = ctypes.CDLL(None)
    for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD):
        libc.mallopt(option, 1 << 16)


def measure(rank: int, size: int, model: Path, folder: Path, answers: Any, nodes: str = "") -> None:
    """Runs one rank in this process; puts (rank, bytes by phase) into the queue `answers`.

    nodes: the node of each rank; each node then keeps a copy of the weights. `build_own` is the highest memory of its own
    while a rank loads the model, without pages of files, which the ranks of a node share.
    """
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    give_back_at_once()
    import torch
    import torch.distributed as dist

    from learner.learner import Learner
    from learner.student import build
    from learner.student.sharding import Ranks
    from tests.tiny_updates import make_learner, sampled

    torch.set_num_threads(1)
    models = {"student": model}
    written, scores = sampled({"student": folder / "small", "other": folder / "small"}, "other", "sampled")
    ranks = None
    if size > 1:
        ranks = Ranks.join(dist.FileStore(str(folder / f"meeting-{size}{nodes}"), size), rank, size, "cpu", nodes)
    cast, own = build._as_trained, []
    build.device_bytes = lambda device: 1 << 50  # type: ignore[assignment]

    def cast_and_look(module: Any, **how: Any) -> None:
        cast(module, **how)
        own.append(resident("RssAnon"))

    build._as_trained = cast_and_look  # type: ignore[assignment]
    idle, idle_own = reset_peak(), resident("RssAnon")
    learner: Learner = make_learner(models, ranks=ranks, publish_dtype="bfloat16", bucket_bytes=8 << 20)
    found = {"build_own": max(own) - idle_own, "built": resident("RssAnon") - idle_own}
    # Pages of files, such as the code of libraries, are not counted: how many there are depends on the machine.
    idle = reset_peak() - found["built"]
    files = resident("RssFile")
    for _ in range(2):
        learner.update(written.ids, written, scores)
    read = resident("RssFile") - files
    found |= {"update_peak": resident("VmHWM") - read - idle, "updated": resident("RssAnon") - idle_own}
    before = reset_peak()
    published = 0
    for part in learner.publish():
        published += part.nbytes if isinstance(part, np.ndarray) else 0
        del part
    found |= {"publish_extra": max(0, resident("VmHWM") - before), "bucket_set": published}
    answers.put((rank, found))


def main() -> None:
    """Prints the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 512), ("layers", 8), ("vocabulary", 16384)):
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    import torch
    from safetensors.torch import load_file

    from tests.tiny_models import make_tiny_model

    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = {"hidden": arguments.hidden, "layers": arguments.layers, "vocab_extra": arguments.vocabulary}
        model = make_tiny_model(folder / "model", **shape, dtype=torch.bfloat16)
        make_tiny_model(folder / "small", hidden=32, layers=1)
        parameters = sum(tensor.numel() for tensor in load_file(model / "model.safetensors").values())
        result: dict[str, Any] = {"parameters": parameters}
        for size in SIZES:
            answers = context.Queue()
            ranks = [context.Process(target=measure, args=(rank, size, model, folder, answers)) for rank in range(size)]
            for rank in ranks:
                rank.start()
            found = dict(answers.get(timeout=300) for _ in ranks)
            for rank in ranks:
                rank.join()
            for rank in (0, size - 1):
                result[f"rank {rank} of {size}"] = {k: round(v / parameters, 2) for k, v in found[rank].items()}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
