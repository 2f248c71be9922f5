"""Makes the models and prompts of the ciphers, all from a seed.

The teacher has two layers and writes all eight ciphers equally often. The student has one layer, which has no room for
them all; it begins with a short lesson in each.

    python -m examples.ciphers.make_models [--seed 0] [--output examples/ciphers]
"""

import json
import random
from functools import partial

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.addition import make_models as addition
from examples.addition.make_models import parsed, save, teach
from examples.ciphers.ciphers import CIPHERS, LENGTH, LETTERS, written

SHAPES = {
    "teacher": {"intermediate_size": 96, "layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2},
    "student": {"intermediate_size": 64, "layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2},
}
STEPS = {"teacher": 800, "student": 500}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Characters as tokens: 6 special ones, letters, names of ciphers."""
    return addition.make_tokenizer([*LETTERS, *CIPHERS])


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, *, layers: int, **shape: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of width 32. Its positions turn fast, so that it soon learns to copy."""
    rope = {"rope_type": "default", "rope_theta": 30.0}
    own = {"max_position_embeddings": 64, "initializer_range": 0.15, "rope_parameters": rope}
    return addition.make_model(tokenizer, 32, layers, seed, **own, **shape)


def word(rng: random.Random) -> str:
    """Random letters."""
    return "".join(rng.choice(LETTERS) for _ in range(LENGTH))


def lesson(rng: random.Random) -> tuple[str, str]:
    """A word, and the answer in any of the ciphers."""
    text = word(rng)
    return text, written(text, rng.choice(CIPHERS))


def main() -> None:
    """Makes everything; `--steps 0.1` takes a tenth of the lessons, for a quick try."""
    options = parsed(__doc__, __file__, steps=1.0)
    options.output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"{options.seed}/words")
    words = list(dict.fromkeys(word(rng) for _ in range(2304)))
    for split, chosen in (("heldout.jsonl", words[:256]), ("train.jsonl", words[256:])):
        lines = [json.dumps({"prompt": text, "answer": text}) for text in chosen]
        (options.output / split).write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = make_tokenizer()
    for name, shape in SHAPES.items():
        model, lessons = make_model(tokenizer, options.seed, **shape), random.Random(f"{options.seed}/{name}")
        steps = max(1, round(options.steps * STEPS[name]))
        teach(name, model, tokenizer, steps=steps, lesson=partial(lesson, lessons))
        save(model, tokenizer, options.output / name)


if __name__ == "__main__":
    main()
