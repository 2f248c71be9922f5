"""Makes the demo's task: a teacher, a student with a bad habit, and prompts, all from a seed.

The task is written addition, one step a column from the right with its carry, then the result:

    4821+397  ->  1+7+0=08,2+9+0=11,8+3+1=12,4+0+1=05;5218

The teacher learns correct answers. The student learns from text in which 60% of the carries are dropped (a 0 instead of
a 1): it writes fluently, and mostly wrong. An early slip makes the rest wrong.

    python examples/addition/make_models.py [--seed 0] [--output examples/addition]

Both are real Hugging Face model directories (Qwen3 architecture, characters as tokens, a chat template).
"""

import argparse
import json
import random
import string
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

SPECIAL = ["<pad>", "<bos>", "<eos>", "<unk>", "<user>", "<assistant>"]
CHARACTERS = [*string.digits, *string.ascii_letters, *"+=,;- "]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<' + m['role'] + '>' + m['content'] }}{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"
)
BAD_HABIT = 0.6
"""Probability of dropping a carry in the student's lessons."""


def worked_sum(a: int, b: int, rng: random.Random, bad_habit: float = 0.0) -> str:
    """The columns of a + b from the right, then the result. bad_habit: the probability of dropping a carry."""
    left, right = str(a)[::-1], str(b)[::-1]
    carry, columns, digits = 0, [], []
    for i in range(max(len(left), len(right))):
        x, y = (int(s[i]) if i < len(s) else 0 for s in (left, right))
        total = x + y + carry
        columns.append(f"{x}+{y}+{carry}={total:02d}")
        digits.append(str(total % 10))
        carry = 0 if rng.random() < bad_habit else total // 10
    result = "".join([*digits, str(carry) if carry else ""][::-1])
    return ",".join(columns) + ";" + str(int(result))


def make_tokenizer(
    tokens: Sequence[str] = CHARACTERS,
    special: Sequence[str] = SPECIAL,
    pattern: str = ".",
    chat_template: str = CHAT_TEMPLATE,
) -> PreTrainedTokenizerFast:
    """What a regular expression matches as tokens: the special ones first, and then the others."""
    vocabulary = {token: i for i, token in enumerate([*special, *tokens])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        unk_token="<unk>",
        additional_special_tokens=[token for token in special if token not in ("<pad>", "<bos>", "<eos>", "<unk>")],
        chat_template=chat_template,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, hidden: int, layers: int, seed: int, **others: Any
) -> Qwen3ForCausalLM:
    """A randomly initialised Qwen3 with heads of 32. others: what its configuration has in place of the usual."""
    shape = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 32,
        "num_key_value_heads": hidden // 32,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(**shape | others))


def draw_pair(rng: random.Random) -> tuple[int, int]:
    """Two numbers of 3 to 5 digits."""
    a, b = (rng.randrange(10 ** (n - 1), 10**n) for n in (rng.randint(3, 5), rng.randint(3, 5)))
    return a, b


def teach(
    name: str,
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    *,
    steps: int,
    lesson: Callable[[], tuple[str, str]],
    opening: str = "<bos><user>",
) -> None:
    """Supervised training with 64 lessons (prompt, answer) a step. opening: what the chat template writes before a prompt."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.99), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        prompts, answers = [], []
        for _ in range(64):
            prompt, answer = lesson()
            prompts.append(f"{opening}{prompt}<assistant>")
            answers.append(answer + "<eos>")
        asked = tokenizer(prompts, add_special_tokens=False)["input_ids"]
        given = tokenizer(answers, add_special_tokens=False)["input_ids"]
        width = max(len(p) + len(a) for p, a in zip(asked, given, strict=True))
        ids = torch.zeros(64, width, dtype=torch.long)
        labels = torch.full((64, width), -100)
        for row, (prompt, answer) in enumerate(zip(asked, given, strict=True)):
            ids[row, : len(prompt) + len(answer)] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 200 == 0 or step == steps:
            print(
                f"{name}: step {step}/{steps}, loss {loss.item():.4f}, {time.perf_counter() - start:.0f} s", flush=True
            )


def sums(rng: random.Random, bad_habit: float, held_out: Collection[tuple[int, int]]) -> tuple[str, str]:
    """A lesson in addition; the sums of `held_out` never occur."""
    while (pair := draw_pair(rng)) in held_out:
        pass
    return f"{pair[0]}+{pair[1]}", worked_sum(*pair, rng, bad_habit)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """A Hugging Face model directory."""
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    print(f"{path}: {sum(p.numel() for p in model.parameters()):,} parameters")


def parsed(description: str | None, script: str, steps: float | None = None) -> argparse.Namespace:
    """The command line of a script that makes an example's files: --seed, --output, and --steps where there is a default."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(script).parent)
    if steps is not None:
        parser.add_argument("--steps", type=type(steps), default=steps)
    options = parser.parse_args()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    return options


def main() -> None:
    """Makes everything; the same seed on the same machine gives the same bytes."""
    options = parsed(__doc__, __file__)
    rng = random.Random(options.seed)
    tokenizer = make_tokenizer()
    pairs = list(dict.fromkeys(draw_pair(rng) for _ in range(4500)))
    splits = {"heldout.jsonl": pairs[:256], "train.jsonl": pairs[256:4352]}
    options.output.mkdir(parents=True, exist_ok=True)
    for name, chosen in splits.items():
        lines = [json.dumps({"prompt": f"{a}+{b}", "answer": str(a + b)}) for a, b in chosen]
        (options.output / name).write_text("\n".join(lines) + "\n", "utf-8")
    held_out = set(splits["heldout.jsonl"])
    for name, hidden, layers, steps, bad_habit in (
        ("teacher", 128, 3, 1000, 0.0),
        ("student", 64, 2, 2500, BAD_HABIT),
    ):
        model = make_model(tokenizer, hidden, layers, options.seed)
        lessons = random.Random(f"{options.seed}/{name}")
        teach(name, model, tokenizer, steps=steps, lesson=partial(sums, lessons, bad_habit, held_out))
        save(model, tokenizer, options.output / name)


if __name__ == "__main__":
    main()
