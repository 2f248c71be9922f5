"""Makes two domains, a teacher for the second (the first has that of examples/addition), and a student that is bad at both.

    sum       4821+397  ->  1+7+0=08,2+9+0=11,8+3+1=12,4+0+1=05;5218     as in examples/addition
    running   -48217     ->  4+0=4,8+4=2,2+2=4,1+4=5,7+5=2;42452          running sums of the digits, modulo 10

The student has been taught to drop carries in 60% of the cases, and to pass over a digit in 25%; neither teacher knows the
other's domain.

    python -m examples.two_domains.make_models [--seed 0] [--output examples/two_domains] [--steps 1]
"""

import json
import random
from functools import partial
from pathlib import Path

from examples.addition.make_models import BAD_HABIT, make_model, make_tokenizer, parsed, save, sums, teach

ADDITION = Path(__file__).parent.parent / "addition"
DIGITS, PASSED_OVER = 5, 0.25


def running(rng: random.Random, passed_over: float = 0.0) -> tuple[str, str]:
    """A lesson in running sums, with a probability of skipping a digit."""
    digits = [rng.randrange(10) for _ in range(DIGITS)]
    before, steps, totals = 0, [], []
    for digit in digits:
        total = (before + (0 if rng.random() < passed_over else digit)) % 10
        steps.append(f"{digit}+{before}={total}")
        totals.append(str(total))
        before = total
    return "-" + "".join(map(str, digits)), ",".join(steps) + ";" + "".join(totals)


def records(rng: random.Random, split: str, count: int) -> list[dict[str, str]]:
    """Equally many prompts of each domain, alternating."""
    first = (ADDITION / split).read_text("utf-8").splitlines()[:count]
    found = []
    for line in first:
        prompt, answer = running(rng)
        result = answer.partition(";")[2]
        found += [{**json.loads(line), "domain": "sum"}, {"prompt": prompt, "answer": result, "domain": "running"}]
    return found


def main() -> None:
    """Makes everything; `--steps 0.1` takes a tenth of the lessons, for a quick try."""
    options = parsed(__doc__, __file__, steps=1.0)
    tokenizer, rng = make_tokenizer(), random.Random(f"{options.seed}/domains")
    options.output.mkdir(parents=True, exist_ok=True)
    for split, count in (("heldout.jsonl", 128), ("train.jsonl", 1024)):
        lines = [json.dumps(record) for record in records(rng, split, count)]
        (options.output / split).write_text("\n".join(lines) + "\n", "utf-8")
    held_out = {
        tuple(map(int, json.loads(line)["prompt"].split("+")))
        for line in (ADDITION / "heldout.jsonl").read_text("utf-8").splitlines()
    }

    def both() -> tuple[str, str]:
        return sums(rng, BAD_HABIT, held_out) if rng.random() < 0.7 else running(rng, PASSED_OVER)  # type: ignore[arg-type]

    for name, steps, lesson in (("teacher_running", 800, partial(running, rng)), ("student", 3000, both)):
        model = make_model(tokenizer, 64, 2, options.seed)
        teach(name, model, tokenizer, steps=max(1, round(options.steps * steps)), lesson=lesson)
        save(model, tokenizer, options.output / name)


if __name__ == "__main__":
    main()
