"""What is asked of a small vLLM engine in tests, and what a plain forward pass says of its answers."""

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import llvmlite.binding  # noqa: F401  as in a process that has applied a delta: vLLM starts there, too
import numpy as np
import torch

from actors.config import SamplingConfig
from actors.rollout.engine import Engine
from actors.trajectory import Requests, Trajectories, offsets_of
from actors.weights.buckets import WeightVersion, join, pack_all
from actors.weights.delta import Receiver

SAMPLING = SamplingConfig(max_response_tokens=16)
OPTIONS = {"max_num_seqs": 16, "kv_cache_memory_bytes": 64 << 20}


class Brake:
    """Lets an engine take so many steps, and then none until it is released; calls are answered meanwhile. For what has to come
    in the middle of a response, however late this thread is."""

    def __init__(self, engine: Any, steps: int | None = None, until: Callable[[], object] = lambda: False):
        """until: no step is taken once this is so. With neither that nor a number it never stops the engine."""
        self._left = itertools.repeat(0) if steps is None else iter(range(steps))
        self._until, self._original = until, engine._engine.step
        self._taken, self._released = threading.Event(), threading.Event()
        engine._engine.step = self._step

    def wait(self) -> None:
        """Until it holds the engine."""
        assert self._taken.wait(600)

    def release(self) -> None:
        """The engine goes on."""
        self._released.set()

    def _step(self) -> list[Any]:
        if self._released.is_set() or (not self._until() and next(self._left, None) is not None):
            return self._original()
        self._taken.set()
        time.sleep(0.001)  # which leaves the processor to others
        return []


def publish(model: Any, version: int) -> tuple[WeightVersion, list[np.ndarray]]:
    return pack_all(version, list(model.named_parameters()), "float32", 40_000)


def deliver(engine: Engine, manifest: WeightVersion, buckets: list[np.ndarray]) -> float:
    """Loads a version as a rollout actor does: verified first, then loaded."""
    return engine.load_weights(*join(Receiver(False).receive(*buckets, manifest))).result(timeout=600)


def change(model: Any, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))


def ask(prompts: list[list[int]], seed: int = 0) -> Requests:
    return Requests(
        ids=np.array([(0, i, 0) for i in range(len(prompts))]),
        seeds=np.arange(len(prompts)) + seed,
        prompt_tokens=np.concatenate(prompts).astype(np.int32),
        prompt_offsets=offsets_of(map(len, prompts)),
    )


def difference(model: Any, written: Trajectories) -> float:
    """Largest difference between the recorded log-probs and a plain forward pass of each sequence."""
    worst = 0.0
    for i in range(len(written)):
        prompt = written.prompt_tokens[slice(*written.prompt_offsets[i : i + 2])]
        span = slice(*written.response_offsets[i : i + 2])
        tokens = torch.from_numpy(np.concatenate([prompt, written.response_tokens[span]]).astype(np.int64))
        with torch.no_grad():
            logprobs = torch.log_softmax(model(tokens[None]).logits[0, len(prompt) - 1 : -1], -1)
        expected = logprobs.gather(-1, tokens[len(prompt) :, None])[:, 0].numpy()
        worst = max(worst, float(np.abs(expected - written.behaviour_logprobs[span]).max()))
    return worst
