"""The memory that `check` reckons for a learner's rank (learner/memory_items.py), for a benchmark's model and update."""

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.gpu.shapes import SHAPES
from benchmarks.gpu.smoke.work import TOP_K
from learner.config import LearnerConfig
from learner.memory_items import Item, LearnerNumbers, ModelNumbers, learner_items, peak


def reckoned(shape: str, tokens: int, config: LearnerConfig) -> tuple[int, list[Item]]:
    """(bytes, items) at the moment of an update when most is held; the wider of the two signals of the benchmark."""
    network = Qwen3Config(**SHAPES[shape])
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in Qwen3ForCausalLM(network).parameters())
    model = ModelNumbers.of(network, count)
    scores = max(2 * model.hidden, 12 * TOP_K)
    run = LearnerNumbers.of(
        config, teacher_heads_bytes=2 * model.head, update_tokens=tokens, score_bytes=scores, step="fused"
    )
    return peak(learner_items(model, run))
