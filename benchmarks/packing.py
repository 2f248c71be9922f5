"""Measures what packing saves: computed tokens, and seconds of attention.

    OMP_NUM_THREADS=1 python -m benchmarks.packing

First the share of real tokens among the computed ones, for 64 padded trajectories with responses of log-normal length
(median 64, cut at 512): all padded to the longest, or sorted and cut by a token budget. With packing it is 1. Then the
processor seconds of a forward and backward pass of the demo's student over a row of short sequences: attention by sequence,
against a mask of the whole row, which transformers makes from position ids that restart. Best of three. Prints JSON.
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.forward.packing import hidden_states, use_packed_attention

STUDENT = Path(__file__).resolve().parent.parent / "examples" / "addition" / "student"
PROMPT = 2


def real_share(lengths: np.ndarray, budget: int) -> float:
    """Share of real tokens where rows are sorted by length and cut so that rows x longest <= budget."""
    lengths, computed, start = np.sort(lengths), 0, 0
    for end in range(1, len(lengths) + 1):
        if end == len(lengths) or (end + 1 - start) * lengths[end] > budget:
            computed += (end - start) * int(lengths[end - 1])
            start = end
    return float(lengths.sum() / computed)


def best(run: Callable[[], Any]) -> float:
    """Processor seconds of the fastest of three calls."""
    seconds = []
    for _ in range(3):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return min(seconds)


def attention_seconds(tokens: int) -> dict[str, float]:
    """Processor seconds for one row of about this many tokens, in sequences of 40 to 65 tokens."""
    draw = np.random.default_rng(0)
    lengths = np.sort(draw.integers(40, 66, tokens // 52))
    row = draw.integers(3, 70, lengths.sum())
    position_ids = torch.from_numpy(np.concatenate([np.arange(length) for length in lengths]))[None]
    model = AutoModelForCausalLM.from_pretrained(STUDENT, attn_implementation="sdpa")
    body = model.base_model

    def masked() -> torch.Tensor:
        return body(input_ids=torch.from_numpy(row)[None], position_ids=position_ids, use_cache=False).last_hidden_state

    def packed() -> torch.Tensor:
        return hidden_states(body, row, lengths, "cpu")

    found = {"mask of the row": best(lambda: masked().sum().backward())}
    assert use_packed_attention(model)
    return found | {"by sequence": best(lambda: packed().sum().backward())}


def main() -> None:
    """Prints both measurements."""
    torch.set_num_threads(1)
    draw = np.random.default_rng(0)
    samples = [
        np.exp(draw.normal(np.log(64), 1.0, 64)).round().clip(1, 512).astype(np.int64) + PROMPT for _ in range(50)
    ]
    shares: dict[str, float] = {
        f"budget of {budget}": float(np.mean([real_share(lengths, budget) for lengths in samples]))
        for budget in (2048, 8192, 16384)
    }
    shares["all to the longest"] = float(np.mean([lengths.mean() / lengths.max() for lengths in samples]))
    attention = {tokens: attention_seconds(tokens) for tokens in (2048, 4096, 8192)}
    print(json.dumps({"real tokens where padded": shares, "seconds of a pass": attention}, indent=1))


if __name__ == "__main__":
    main()
