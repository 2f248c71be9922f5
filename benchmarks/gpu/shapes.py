"""Models of real shapes with random weights, what they are given to do, and how many operations that takes."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories, offsets_of

QWEN3 = {"vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40960}
SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32,
             "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
             "max_position_embeddings": 4096},
    "small": {"vocab_size": 8192, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 4, "head_dim": 128,
              "num_attention_heads": 8, "num_key_value_heads": 4, "tie_word_embeddings": True,
              "max_position_embeddings": 4096},
    "0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "4b": {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": True},
    "8b": {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
"""Of Qwen3."""
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
"""Dense bfloat16, by the vendor's data sheets; a part of the device's name -> operations a second."""


def make_model(path: Path, shape: str) -> Path:
    """A model directory of this shape, bfloat16, without a tokenizer, from a seed; made on the GPU where there is one."""
    from transformers import AutoModelForCausalLM, Qwen3Config

    config = Qwen3Config(**SHAPES[shape], eos_token_id=1, pad_token_id=0)
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(path)
    return path


def make_work(shape: str, tokens: int, length: int, prompt: int) -> tuple[Trajectories, TeacherScores]:
    """Trajectories of `length` tokens each, `prompt` of them the prompt's, `tokens` in all, and scores of theirs."""
    rng, count = np.random.default_rng(0), tokens // length
    written = length - prompt
    offsets = offsets_of([written] * count)
    ids = np.array([(0, row, 0) for row in range(count)], np.int64)

    def draw(number: int) -> np.ndarray:
        return rng.integers(2, SHAPES[shape]["vocab_size"], number).astype(np.int32)

    trajectories = Trajectories(
        ids=ids,
        prompt_tokens=draw(count * prompt),
        prompt_offsets=offsets_of([prompt] * count),
        response_tokens=draw(count * written),
        response_offsets=offsets,
        behaviour_logprobs=rng.uniform(-12, -8, count * written).astype(np.float32),
        policy_versions=np.zeros(count * written, np.int32),
        finish_reasons=np.zeros(count, np.uint8),
    )
    nothing = np.zeros((count * written, 0), np.float32)
    scores = TeacherScores(
        ids=ids,
        response_offsets=offsets,
        logprobs=rng.uniform(-12, -8, count * written).astype(np.float32),
        teacher="teacher",
        log_weights=np.zeros(count, np.float32),
        support_ids=nothing.astype(np.int32),
        support_logprobs=nothing,
    )
    return trajectories, scores


def forward_flops(shape: str, tokens: int, length: int, *, head: bool) -> float:
    """Operations of one forward pass: 2 for each weight of a matrix and token, and the causal half of attention's
    4 * length * width a token and layer. A backward pass takes twice as many; recomputation is not counted."""
    s = SHAPES[shape]
    width, kv = s["num_attention_heads"] * s["head_dim"], s["num_key_value_heads"] * s["head_dim"]
    layer = s["hidden_size"] * (2 * width + 2 * kv + 3 * s["intermediate_size"])
    weights = s["num_hidden_layers"] * layer + (s["vocab_size"] * s["hidden_size"] if head else 0)
    return tokens * (2.0 * weights + s["num_hidden_layers"] * 2.0 * length * width)
