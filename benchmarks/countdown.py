"""A task whose answers have lengths of choice: count down from the number in the prompt. Student and teacher are made
by hand, in a second: what is measured is time, with work that has the shape of real work.

A number is a token; `137` is answered by 136, 135, … 1, <eos>: 137 tokens. Prompts are drawn so that lengths are
log-normal. The layers of both models are of full size and trained, but start without a say (their outputs are zero),
and the output layer looks up the token before each: the student is wrong now and then, the teacher hardly ever.
"""

import json
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>"]
SHARPNESS = {"student": 14.0, "teacher": 20.0}
"""Logit of the right token; the others' are normal with a standard deviation of this over the root of HIDDEN."""
HIDDEN, LAYERS = 256, 8
"""7.1M parameters."""


def make(folder: Path, *, median: float, sigma: float, longest: int, prompts: int, seed: int = 0) -> None:
    """Writes student/, teacher/ and train.jsonl: lengths exp(normal(log median, sigma)), cut at `longest`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *map(str, range(1, longest + 1))])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
    lengths = np.exp(np.random.default_rng(seed).normal(np.log(median), sigma, prompts)).round().clip(1, longest)
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"prompt": str(int(length))}) for length in lengths]
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    for name, sharpness in SHARPNESS.items():
        model = counting_model(tokenizer, longest, sharpness, seed)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def counting_model(tokenizer: PreTrainedTokenizerFast, longest: int, sharpness: float, seed: int) -> Qwen3ForCausalLM:
    """Answers n with n - 1, and 1 with <eos>."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=HIDDEN,
            intermediate_size=3 * HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HIDDEN // 64,
            num_key_value_heads=HIDDEN // 64,
            head_dim=64,
            max_position_embeddings=longest + 64,
            tie_word_embeddings=False,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    first = len(SPECIAL)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        embedding = torch.nn.functional.normalize(torch.randn(len(tokenizer), HIDDEN), dim=-1)
        model.model.embed_tokens.weight.copy_(embedding * HIDDEN**0.5)
        head = torch.zeros_like(embedding)
        head[first : first + longest - 1] = embedding[first + 1 : first + longest]  # n - 1 is what follows n
        head[tokenizer.eos_token_id] = embedding[first]
        model.lm_head.weight.copy_(head * sharpness / HIDDEN**0.5)
    model.generation_config.update(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    return model
