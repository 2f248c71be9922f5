"""Makes the guessing game's models and prompts, all from a seed: a number from 0 to 9 is to be found in four guesses.

The teacher halves what is left. The student mostly tries the lowest number that is left, and so finds four in ten.

    python -m examples.guess.make_models [--seed 0] [--output examples/guess]
"""

import json
import random
from functools import partial

from examples.addition.make_models import make_model, make_tokenizer, parsed, save, teach

NUMBERS, TURNS, BAD_HABIT = 10, 4, 0.7
PROMPT = "0-9"


def lesson(rng: random.Random, bad_habit: float) -> tuple[str, str]:
    """A game up to some turn, and the next guess. bad_habit: the probability that it is the lowest number that is left.

    Earlier guesses are of both kinds, or any: the teacher has to know what follows the student's.
    """
    number, low, high, text = rng.randrange(NUMBERS), 0, NUMBERS - 1, PROMPT
    for _ in range(rng.randrange(TURNS)):
        guess = rng.choice([low, (low + high) // 2, rng.randint(low, high)])
        if guess == number:
            break
        higher = guess < number
        low, high = (guess + 1, high) if higher else (low, guess - 1)
        text += f"<assistant>{guess}<eos><user>{'higher' if higher else 'lower'}"
    return text, str(low if rng.random() < bad_habit else (low + high) // 2)


def main() -> None:
    """Makes everything; `--steps 0.1` takes a tenth of the lessons, for a quick try."""
    options = parsed(__doc__, __file__, steps=1.0)
    options.output.mkdir(parents=True, exist_ok=True)
    for split, rounds in (("train.jsonl", 20), ("heldout.jsonl", 10)):
        lines = [json.dumps({"prompt": PROMPT, "answer": str(i % NUMBERS)}) for i in range(NUMBERS * rounds)]
        (options.output / split).write_text("\n".join(lines) + "\n", "utf-8")
    tokenizer = make_tokenizer()
    for name, bad_habit in (("teacher", 0.0), ("student", BAD_HABIT)):
        model, rng = make_model(tokenizer, 64, 2, options.seed), random.Random(f"{options.seed}/{name}")
        teach(name, model, tokenizer, steps=max(1, round(options.steps * 600)), lesson=partial(lesson, rng, bad_habit))
        save(model, tokenizer, options.output / name)


if __name__ == "__main__":
    main()
