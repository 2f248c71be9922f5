"""Makes a student that can be its own teacher: it adds well when it reads the result, and badly otherwise.

The task is that of examples/addition. On a plain prompt, `4821+397`, the student has been taught to drop carries in 60%
of the cases; on one that ends with the result, `4821+397;5218`, it has been taught to work it out right.

    python -m examples.privileged.make_models [--seed 0] [--output examples/privileged] [--steps 2500]
"""

import json
import random
from pathlib import Path

from examples.addition.make_models import BAD_HABIT, make_model, make_tokenizer, parsed, save, sums, teach, worked_sum

ADDITION = Path(__file__).parent.parent / "addition"


def main() -> None:
    """Makes the student; prompts are those of examples/addition."""
    options = parsed(__doc__, __file__, steps=2500)
    rng = random.Random(f"{options.seed}/privileged")
    lines = (ADDITION / "heldout.jsonl").read_text("utf-8").splitlines()
    held_out = {tuple(map(int, json.loads(line)["prompt"].split("+"))) for line in lines}

    def lesson() -> tuple[str, str]:
        prompt, answer = sums(rng, BAD_HABIT, held_out)  # type: ignore[arg-type]
        if rng.random() < 0.5:
            return prompt, answer
        a, b = map(int, prompt.split("+"))
        return f"{prompt};{a + b}", worked_sum(a, b, rng)

    tokenizer = make_tokenizer()
    model = make_model(tokenizer, 64, 2, options.seed)
    teach("student", model, tokenizer, steps=options.steps, lesson=lesson)
    save(model, tokenizer, options.output / "student")


if __name__ == "__main__":
    main()
