"""Tiny models of many architectures, each with all the dropout and noise that its configuration can ask for."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM

from tests.tiny_models import make_tiny_tokenizer

LIKE_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "attention_dropout": 0.4,
}
LIKE_GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "attn_pdrop": 0.4}
DROPS = {"resid_pdrop": 0.4, "embd_pdrop": 0.4}
WINDOW = {"sliding_window": 4}
EXPERTS = {"num_experts_per_tok": 2}

ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2Config", {**LIKE_GPT2, **DROPS}),
    "gpt_bigcode": ("GPTBigCodeConfig", {**LIKE_GPT2, **DROPS}),
    "gpt_neox": ("GPTNeoXConfig", {**LIKE_LLAMA, "hidden_dropout": 0.4}),
    "llama": ("LlamaConfig", LIKE_LLAMA),
    "mistral": ("MistralConfig", {**LIKE_LLAMA, **WINDOW, "head_dim": 8}),
    "qwen2": ("Qwen2Config", {**LIKE_LLAMA, **WINDOW, "use_sliding_window": True, "max_window_layers": 1}),
    "gemma3": ("Gemma3TextConfig", {**LIKE_LLAMA, **WINDOW, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "phi": ("PhiConfig", {**LIKE_LLAMA, **DROPS}),
    "phi3": ("Phi3Config", {**LIKE_LLAMA, **DROPS, "pad_token_id": 0}),
    "falcon": ("FalconConfig", {**LIKE_LLAMA, "hidden_dropout": 0.4}),
    "stablelm": ("StableLmConfig", {**LIKE_LLAMA, "hidden_dropout": 0.4}),
    "mixtral": ("MixtralConfig", {**LIKE_LLAMA, **EXPERTS, "num_local_experts": 4, "router_jitter_noise": 0.4}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**LIKE_LLAMA, **EXPERTS, "num_experts": 4, "moe_intermediate_size": 32, "head_dim": 8},
    ),
}
"""Name -> (class of its configuration in transformers, arguments)."""
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma2": ("Gemma2Config", {**LIKE_LLAMA, "head_dim": 8, "final_logit_softcapping": None}, "soft cap"),
    "gemma2 with both caps": ("Gemma2Config", {**LIKE_LLAMA, "head_dim": 8}, "soft cap"),
    "opt": (
        "OPTConfig",
        {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "layerdrop": 0.4},
        "more than its output layer",
    ),
    "gptj": ("GPTJConfig", {**LIKE_GPT2, **DROPS, "rotary_dim": 4}, "sdpa attention"),
    "bloom": ("BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.4}, "sdpa attention"),
}
"""Architectures that the learner cannot compute exactly: the same, and a part of the error."""


def make_architecture(path: Path, config: str, arguments: dict[str, Any], *, seed: int = 0) -> Path:
    """Writes a model directory with the tokenizer of tests/tiny_models.py, from a seed, and returns the path."""
    tokenizer = make_tiny_tokenizer()
    # Weights far from 0, so that a lost cap, window or position changes much.
    spread = {"initializer_range": 0.2, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    kind = getattr(transformers, config)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(kind(**{"vocab_size": len(tokenizer), **spread, **arguments}))
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
