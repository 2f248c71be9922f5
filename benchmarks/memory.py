"""Measures the memory of a learner's process, or of a rollout actor's, over updates.

    python -m benchmarks.memory [--layers 12] [--hidden 768] [--vocabulary 50257] [--set compute_dtype=bfloat16]
    OMP_NUM_THREADS=1 python -m benchmarks.memory rollout [--updates 2000] [--any-size] [--set KEY=VALUE …]

`learner`, over updates, publications and checkpoints: the default is a model of the size of GPT-2 (124M parameters) with
random weights. One rank, on the CPU, with malloc as it is by default. Prints a line for each phase, in bytes a parameter above an idle process: the peak of the phase, what the process
holds after it, and what its tensors hold.

`rollout`: the actor with vLLM's CPU engine and the quickstart's student, without Ray; its coroutines run in one thread, as
in Ray. Each update loads new weights and answers as many prompts as the quickstart's. Prints MB: resident memory, the part
of it that no other process shares, and the blocks of malloc in use.
"""

import argparse
import asyncio
import ctypes
import gc
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

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


class _Mallinfo2(ctypes.Structure):
    """glibc's `struct mallinfo2`, summed over all arenas."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    ]


def allocated_bytes() -> int:
    """Bytes that this process has got from glibc's malloc and not freed."""
    mallinfo2 = ctypes.CDLL(None).mallinfo2
    mallinfo2.restype = _Mallinfo2
    found = mallinfo2()
    return found.uordblks + found.hblkhd


def private_bytes() -> int:
    """Resident bytes of this process that it has written to and no other process shares."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    [line] = [line for line in lines if line.startswith("Private_Dirty")]
    return int(line.split()[1]) << 10


def measure_rollout(updates: int, every: int, overrides: list[str], *, any_size: bool, keep_freed: bool) -> None:
    """Prints a line for every `every`-th update of a rollout actor."""
    import actors.rollout.actor as module
    from actors.data.models import load_model
    from actors.prompts.prompt_set import requests
    from actors.weights.buckets import pack_all
    from cluster.config_file import load_config
    from cluster.inputs import read_inputs

    torch.set_num_threads(1)
    if keep_freed:
        module.give_back = lambda: None  # type: ignore[attr-defined]
    config = load_config("configs/quickstart.yaml", overrides)
    inputs = read_inputs(config)
    student = load_model(config.student.model, "float32", "cpu", False, "student.model")
    weights = {name: value.detach() for name, value in student.named_parameters()}
    arguments: tuple[Any, ...] = (config.rollout, config.sampling, inputs.stop_token_ids, config.seed)
    actor = module.RolloutActor(config.student.model, *arguments, vocabulary=inputs.vocabulary)
    most = config.pipeline.prompts_per_update

    random = np.random.default_rng(0)

    async def update(version: int) -> None:
        count = int(random.integers(1, most + 1)) if any_size else most
        new = [(name, value + 1e-4 * torch.randn_like(value)) for name, value in weights.items()]
        manifest, buckets = pack_all(version, new, "float32", 1 << 28)
        await actor.load_weights(*buckets, manifest)
        ids = np.zeros((count, 3), np.int64)
        ids[:, 0], ids[:, 1] = np.divmod(version * most + np.arange(count), len(inputs.prompts))
        # A few at a time, as in a campaign: the sizes of the engine's batches then vary.
        for start in range(0, count, 8):
            places = range(start, min(start + 8, count))
            wanted = [(i, requests(inputs.prompts, ids[i : i + 1], config.seed)) for i in places]
            await actor.submit("campaign", wanted)
        answered = 0
        while answered < count:
            answers, _ = await actor.collect("campaign", False)
            answered += len(answers)
            for _, answer in answers:
                if isinstance(answer, Exception):
                    raise answer

    async def run() -> None:
        print("update  resident   private    in use", flush=True)
        for version in range(updates + 1):
            await update(version)
            if version % every == 0:
                found = (resident("VmRSS"), private_bytes(), allocated_bytes())
                print(f"{version:6}", *(f"{value / 1e6:9.0f}" for value in found), flush=True)
        await actor.close()

    thread = threading.Thread(target=lambda: asyncio.run(run()))
    thread.start()
    thread.join()


def main() -> None:
    """Prints the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("learner", "rollout"), default="learner")
    for name, default in (("hidden", 768), ("layers", 12), ("vocabulary", 50257)):
        parser.add_argument(f"--{name}", type=int, default=default, help="learner: of its model")
    parser.add_argument("--updates", type=int, help="default: 6 of a learner, 2,000 of a rollout actor")
    parser.add_argument("--every", type=int, default=20, help="rollout: updates between two lines")
    parser.add_argument("--any-size", action="store_true", help="rollout: a random number of prompts in each update")
    parser.add_argument("--keep-freed", action="store_true", help="rollout: leave freed memory to malloc")
    parser.add_argument("--set", nargs="*", default=[], help="keys of `learner`, or of the campaign for `rollout`")
    arguments = parser.parse_args()
    if arguments.part == "rollout":
        updates = 2000 if arguments.updates is None else arguments.updates
        measure_rollout(
            updates, arguments.every, arguments.set, any_size=arguments.any_size, keep_freed=arguments.keep_freed
        )
    else:
        measure_learner(arguments)


def measure_learner(arguments: argparse.Namespace) -> None:
    """Prints a line for each phase of a learner's updates."""
    from actors.teacher_scores import TeacherScores
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
        for update in range(1, (arguments.updates or 6) + 1):
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
