"""Makes the calculator's models and prompts, all from a seed: sums of two numbers, to be found by calling a tool.

    4821+397  ->  <tool_call>{"name": "add", "arguments": {"a": 4821, "b": 397}}</tool_call>  ->  5218  ->  5218

The teacher calls the tool in the right form, tries again after an error, and answers with the result. The student has four
bad habits: it spoils the form of a call, slips in a digit, answers without a call, and answers with another number than the
result.

    python -m examples.calculator.make_models [--seed 0] [--output examples/calculator]
"""

import json
import random
from collections.abc import Collection
from functools import partial

from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from examples.addition import make_models as addition
from examples.addition.make_models import parsed, save, teach

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<tools>", "<user>", "<assistant>", "<tool>"]
WORDS = ["<tool_call>", "</tool_call>", "name", "add", "arguments", "a", "b", "x", "error"]
SIGNS = [*"0123456789+-.,:()[]{}\"' "]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% if tools %}<tools>{% for t in tools %}"
    "{{ t.function.name }}({{ t.function.parameters.properties | join(',') }}){% endfor %}{% endif %}"
    "{% for m in messages %}{{ '<' + m.role + '>' + (m.content or '') }}"
    "{% for c in m.tool_calls or [] %}<tool_call>"
    '{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}'
    "</tool_call>{% endfor %}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
OPENING = "<bos><tools>add(a,b)<user>"
"""What the template writes before the sum."""
SPOILED, SLIPPED, GUESSED, FORGOTTEN = 0.3, 0.15, 0.15, 0.3
"""Probabilities of the student's bad habits: a call of another form, one with a wrong digit, an answer without a call, and one
that is not the result."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A few words, digits and signs as tokens, and a chat template that writes tools, calls and results."""
    return addition.make_tokenizer([*WORDS, *SIGNS], SPECIAL, "</?[a-z_]+>|[a-z]+|.", CHAT_TEMPLATE)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 of 56,000 parameters."""
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    return addition.make_model(tokenizer, 48, 2, seed, **heads, intermediate_size=96, max_position_embeddings=256)


def draw_pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers of 2 or 3 digits."""
    a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (rng.randint(2, 3), rng.randint(2, 3)))
    return a, b


def call(a: int, b: int) -> str:
    """The call of the tool in its right form."""
    return f'<tool_call>{{"name": "add", "arguments": {{"a": {a}, "b": {b}}}}}</tool_call>'


def spoiled(text: str, rng: random.Random) -> str:
    """A call in a form that cannot be parsed, or with arguments that the tool does not have."""
    wrong = (('"b"', '"x"'), ("}}", "}"), ('"name"', "name"), (', "b"', ' "b"'), ('{"a": ', "["))
    return text.replace(*rng.choice(wrong))


def slipped(number: int, rng: random.Random) -> int:
    """The number with another last or middle digit."""
    place = 10 ** rng.randrange(len(str(number)) - 1)
    return number - number // place % 10 * place + rng.randrange(10) * place


def turn(a: int, b: int, rng: random.Random, habits: float) -> tuple[str, str]:
    """A call and what the environment answers. habits: the factor of the bad habits' probabilities."""
    if rng.random() < habits * SLIPPED:
        a, b = (slipped(a, rng), b) if rng.random() < 0.5 else (a, slipped(b, rng))
    if rng.random() < habits * SPOILED:
        return spoiled(call(a, b), rng), "error"
    return call(a, b), str(a + b)


def lesson(rng: random.Random, habits: float, held_out: Collection[tuple[int, int]]) -> tuple[str, str]:
    """An episode up to some turn, and the next turn. habits: 0 in the teacher's lessons, 1 in the student's.

    Earlier turns are of both: the teacher has to know what follows the student's.
    """
    while (pair := draw_pair(rng)) in held_out:
        pass
    text = f"{pair[0]}+{pair[1]}"
    answered = "error"
    for _ in range(rng.choice((0, 1, 1, 2))):
        if answered != "error":
            break
        written, answered = turn(*pair, rng, 2.0)
        text += f"<assistant>{written}<eos><tool>{answered}"
    if answered == "error":
        if rng.random() < habits * GUESSED:
            return text, str(rng.randrange(100, 1000))
        return text, turn(*pair, rng, habits)[0]
    return text, str(slipped(int(answered), rng) if rng.random() < habits * FORGOTTEN else answered)


def main() -> None:
    """Makes everything; `--steps 0.1` takes a tenth of the lessons, for a quick try."""
    options = parsed(__doc__, __file__, steps=1.0)
    rng = random.Random(options.seed)
    pairs = list(dict.fromkeys(draw_pair(rng) for _ in range(1300)))
    splits = {"heldout.jsonl": pairs[:128], "train.jsonl": pairs[128:1152]}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, chosen in splits.items():
        lines = [json.dumps({"prompt": f"{a}+{b}", "answer": str(a + b)}) for a, b in chosen]
        (options.output / name).write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer, held_out = make_tokenizer(), set(splits["heldout.jsonl"])
    for name, habits in (("teacher", 0.0), ("student", 1.0)):
        model, lessons = make_model(tokenizer, options.seed), random.Random(f"{options.seed}/{name}")
        steps = max(1, round(options.steps * 1000))
        teach(name, model, tokenizer, steps=steps, lesson=partial(lesson, lessons, habits, held_out), opening=OPENING)
        save(model.bfloat16(), tokenizer, options.output / name)


if __name__ == "__main__":
    main()
