"""How many tokens a model reads, by its configuration: as transformers has it, and as vLLM takes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from actors.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "seq_length",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
"""What architectures call their context length in config.json."""
SCALED_ALREADY = ("default", "su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")
"""Kinds of rope scaling whose `max_position_embeddings` has the factor in it, in vLLM as in transformers."""


def context_length(config: PreTrainedConfig) -> int:
    """The model's context length in tokens, prompt and response together. UserError: config.json does not have one.

    The smallest of the names that it has, times the factor of its rope scaling, as vLLM computes it. A sliding window is
    no limit, and neither is the tokenizer's model_max_length.
    """
    text = config.get_text_config()
    found = [value for name in CONTEXT_NAMES if _is_length(value := getattr(text, name, None))]
    if _is_length(most := getattr(text, "model_max_length", None)):  # Cohere's models, which means this one
        return most
    if not found:
        file = Path(config.name_or_path, "config.json") if config.name_or_path else "config.json"
        wrong = [f"{name} {value!r}" for name in CONTEXT_NAMES if (value := getattr(text, name, None)) is not None]
        if wrong:
            raise UserError(str(file), " and ".join(wrong), "a number of tokens, at least 1")
        expected = f"{', '.join(CONTEXT_NAMES[:-1])} or {CONTEXT_NAMES[-1]}"
        raise UserError(f"{file} of a {config.model_type} model", "no context length", expected)
    scaled = [rope for rope in _ropes(text) if rope.get("rope_type", rope.get("type")) not in SCALED_ALREADY]
    # Gemma 3 writes a context that is scaled already beside a linear factor.
    factor = 1.0 if "gemma3" in text.model_type else max([1.0, *(float(rope.get("factor") or 1) for rope in scaled)])
    return int(min(found) * factor)


def engine_context(config: PreTrainedConfig, options: Mapping[str, Any], key: str) -> int:
    """The context of a vLLM engine with these options of the user's: `max_model_len`, or what vLLM takes by default.

    key: of the options, for example "rollout.engine". UserError: max_model_len is no number of tokens.
    """
    given = options.get("max_model_len")
    if given is not None and given != -1:  # -1: as much as fits the memory
        if not _is_length(given):
            raise UserError(f"{key}.max_model_len", repr(given), "a number of tokens, at least 1")
        # A model without a length of its own has the engine's.
        return min(given, context_length(config)) if has_context(config) else given
    text = config.get_text_config()
    original = [
        value
        for rope in _ropes(text)
        if rope.get("rope_type", rope.get("type")) == "longrope"
        and _is_length(
            value := rope.get("original_max_position_embeddings")
            or getattr(text, "original_max_position_embeddings", None)
        )
    ]
    return min([context_length(config), *original])


def _is_length(value: object) -> TypeGuard[int]:
    return type(value) is int and value > 0


def has_context(config: PreTrainedConfig) -> bool:
    """Whether config.json says how many tokens the model reads; models with a state instead of positions do not.

    Also where it says nonsense, which `context_length` refuses.
    """
    text = config.get_text_config()
    return any(getattr(text, name, None) is not None for name in CONTEXT_NAMES) or _is_length(
        getattr(text, "model_max_length", None)
    )


def _ropes(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """The parameters of the rotary embeddings: one for all layers, or one for each kind of layer."""
    found = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    return nested or [found]
