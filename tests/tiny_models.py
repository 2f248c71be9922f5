"""Real Hugging Face model directories that are written in less than a second, for tests."""

from pathlib import Path
from typing import Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3MoeConfig

SPECIAL = ["<pad>", "<eos>", "<system>", "<user>", "<assistant>", "<unk>"]
CHARACTERS = ["\n", *map(chr, range(32, 127))]
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}<eos>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_tiny_tokenizer(characters: list[str] = CHARACTERS) -> PreTrainedTokenizerFast:
    """One token a character, fast, with pad, eos and a chat template."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *characters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def make_tiny_model(
    path: Path | str,
    *,
    hidden: int = 64,
    layers: int = 2,
    vocab_extra: int = 0,
    tie: bool = True,
    seed: int = 0,
    architecture: Literal["qwen3", "qwen3_moe", "llama"] = "qwen3",
    context: int = 256,
    dtype: torch.dtype = torch.float32,
    tokenizer: PreTrainedTokenizerFast | None = None,
    heads_of_keys: int = 1,
    head_dim: int = 32,
) -> Path:
    """Writes config, safetensors, tokenizer and generation config to `path`, from a seed, and returns the path.

    hidden: a multiple of 32; there is one attention head for each 32, of size head_dim. vocab_extra: rows of the embedding
    beyond the tokenizer's, as real models have them. qwen3_moe: four experts a layer; each token uses two of them.
    """
    tokenizer = tokenizer or make_tiny_tokenizer()
    options = {
        "vocab_size": len(tokenizer) + vocab_extra,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": heads_of_keys,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "tie_word_embeddings": tie,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.1,
    }
    if architecture == "qwen3_moe":
        options |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": hidden, "norm_topk_prob": True}
    config = {"qwen3": Qwen3Config, "qwen3_moe": Qwen3MoeConfig, "llama": LlamaConfig}[architecture](**options)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
