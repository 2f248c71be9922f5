"""Measures how long a vLLM teacher's log-probs take to become arrays: by vLLM's objects, its flat lists, and our way.

    python -m benchmarks.teacher_path [--tokens 4096] [--top 32] [--rounds 7]

All three start with the tensors of one prompt as the engine passes them to its output processor, and end with the arrays
[tokens, 1 + top] that are sent to the learner. No model runs, nothing is detokenised. The fastest round counts. Prints
JSON.
"""

import argparse
import gc
import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from actors.teacher.vllm_teacher import flat_rows, keep_tensors
from actors.vllm_startup import importing_vllm


def best(run: Callable[[], Any], rounds: int) -> float:
    """Seconds of the fastest round."""
    seconds = []
    for _ in range(rounds):
        gc.collect()
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def processed(tensors: Any, top: int, *, flat: bool, kind: Any) -> Any:
    """The `prompt_logprobs` of a RequestOutput, as this kind of processor makes them."""
    from vllm.v1.engine.logprobs import create_prompt_logprobs

    processor = kind(
        tokenizer=None,
        logprobs=None,
        prompt_logprobs=create_prompt_logprobs(flat),
        cumulative_logprob=None,
        num_logprobs=None,
        num_prompt_logprobs=top,
    )
    processor._update_prompt_logprobs(tensors)
    return processor.pop_prompt_logprobs()


def from_objects(positions: Any) -> tuple[np.ndarray, np.ndarray]:
    """Arrays from a dictionary of objects for each position."""
    rows = [(list(row), [entry.logprob for entry in row.values()]) for row in positions[1:]]
    tokens, logprobs = zip(*rows, strict=True)
    return np.array(tokens, np.int32), np.array(logprobs, np.float32)


def from_lists(found: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Arrays from vLLM's flat lists."""
    tokens, logprobs = np.asarray(found.token_ids, np.int32), np.asarray(found.logprobs, np.float32)
    return tokens.reshape(-1, width), logprobs.reshape(-1, width)


def main() -> None:
    """Checks that all three ways agree, measures them, and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--top", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    with importing_vllm():
        from vllm.v1.engine import output_processor
        from vllm.v1.engine.logprobs import LogprobsProcessor
        from vllm.v1.outputs import LogprobsTensors
    keep_tensors()
    width = chosen.top + 1
    tokens = torch.stack([torch.randperm(151_936)[:width] for _ in range(chosen.tokens)]).int()
    logprobs = torch.log_softmax(torch.randn(chosen.tokens, width), -1)
    tensors = LogprobsTensors(tokens, logprobs, torch.ones(chosen.tokens, dtype=torch.int32))
    kept = output_processor.LogprobsProcessor
    ways: dict[str, Callable[[], Any]] = {
        "objects": lambda: processed(tensors, chosen.top, flat=False, kind=LogprobsProcessor),
        "objects, then arrays": lambda: from_objects(
            processed(tensors, chosen.top, flat=False, kind=LogprobsProcessor)
        ),
        "flat lists, then arrays": lambda: from_lists(
            processed(tensors, chosen.top, flat=True, kind=LogprobsProcessor), width
        ),
        "tensors kept": lambda: flat_rows(
            [processed(tensors, chosen.top, flat=False, kind=kept)], np.array([chosen.tokens])
        ),
    }
    wanted = ways["objects, then arrays"]()
    for name in ("flat lists, then arrays", "tensors kept"):
        for found, expected in zip(ways[name](), wanted, strict=True):
            np.testing.assert_array_equal(found, expected)
    seconds = {name: best(run, chosen.rounds) for name, run in ways.items()}
    shares = {name: value / seconds["objects"] for name, value in seconds.items()}
    print(json.dumps({"milliseconds": {n: round(s * 1e3, 3) for n, s in seconds.items()}, "over objects": shares}))


if __name__ == "__main__":
    main()
