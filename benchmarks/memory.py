"""Measures the memory of a learner's process over updates, publications and checkpoints.

    python -m benchmarks.memory [--layers 12] [--hidden 768] [--vocabulary 50257] [--set compute_dtype=bfloat16]

The default is a model of the size of GPT-2 (124M parameters) with random weights. One rank, on the CPU, with malloc as it is
by default. Prints a line for each phase, in bytes a parameter above an idle process: the peak of the phase, what the process
holds after it, and what its tensors hold.
"""

import argparse
import gc
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.ranks import reset_peak, resident


def live_bytes() -> int:
    """Bytes of all tensors and arrays of this process; views count once."""
    found = {}
    for one in gc.get_objects():
        if isinstance(one, torch.Tensor):
            found[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
        elif isinstance(one, np.ndarray) and one.base is None:
            found[one.ctypes.data] = one.nbytes
    return sum(found.values())


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("hidden", 768), ("layers", 12), ("vocabulary", 50257), ("updates", 6)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--set", nargs="*", default=[], help="keys of `learner`, such as compute_dtype=bfloat16")
    arguments = parser.parse_args()
    from actors.trajectory import TeacherScores
    from tests.tiny_architectures import make_architecture
    from tests.tiny_updates import make_learner, random_trajectories

    size = {"n_embd": arguments.hidden, "n_layer": arguments.layers, "n_head": arguments.hidden // 64}
    lengths = np.full(16, 64)
    written = random_trajectories(
        np.random.default_rng(0), [(0, i // 2, i % 2) for i in range(16)], lengths // 2, lengths
    )
    written.behaviour_logprobs[:] = -5
    scores = TeacherScores(
        ids=written.ids,
        response_offsets=written.response_offsets,
        logprobs=np.full(lengths.sum(), -5, np.float32),
        teacher="teacher",
        log_weights=np.zeros(16, np.float32),
        support_ids=np.zeros((lengths.sum(), 0), np.int32),
        support_logprobs=np.zeros((lengths.sum(), 0), np.float32),
    )
    with tempfile.TemporaryDirectory() as name:
        model = {"vocab_size": arguments.vocabulary, "bos_token_id": 1, "initializer_range": 0.02, **size}
        student = make_architecture(Path(name, "student"), "GPT2Config", model)
        gc.collect()
        idle, idle_live = reset_peak(), live_bytes()
        settings = dict(pair.split("=", 1) for pair in arguments.set)
        learner = make_learner({"student": student}, publish_dtype="bfloat16", bucket_bytes=256 << 20, **settings)
        parameters = sum(parameter.numel() for parameter in learner._model.parameters())
        print(f"{parameters:,} parameters; bytes for each\n{'':24}   peak   held   tensors")

        def say(phase: str) -> None:
            peak = resident("VmHWM") - idle
            gc.collect()
            found = (peak, reset_peak() - idle, live_bytes() - idle_live)
            print(f"{phase:24}", *(f"{value / parameters:6.1f}" for value in found), flush=True)

        say("built")
        for update in range(1, arguments.updates + 1):
            learner.update(written.ids, written, scores)
            say(f"update {update}")
            for _ in learner.publish():
                pass
            say(f"published {update}")
            if update % 2 == 0:
                learner.save(str(Path(name, f"step_{update}")))
                say("copied for a checkpoint")
                while not learner.saved():
                    time.sleep(0.01)
                time.sleep(0.1)  # the thread drops the copy just after
                say("checkpoint written")


if __name__ == "__main__":
    main()
