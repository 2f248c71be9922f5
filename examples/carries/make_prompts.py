"""Makes prompts for examples/addition's student that it nearly always gets wrong: sums with at least four carries.

The student drops each carry with probability 0.6, so it gets one in 40 to 100 right: a reward that is rarely seen.

    python -m examples.carries.make_prompts [--seed 0] [--output examples/carries]
"""

import argparse
import json
import random
from pathlib import Path

LEAST = 4


def carries(a: int, b: int) -> int:
    """The number of carries of a + b in written addition."""
    carry = count = 0
    while a or b:
        carry = (a % 10 + b % 10 + carry) // 10
        count, a, b = count + carry, a // 10, b // 10
    return count


def main() -> None:
    """Writes held-out and training prompts, none of them twice."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    rng = random.Random(f"{options.seed}/carries")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < 128 + 1024:
        a, b = rng.randrange(10_000, 100_000), rng.randrange(10_000, 100_000)
        if carries(a, b) >= LEAST:
            pairs[a, b] = None
    records = [json.dumps({"prompt": f"{a}+{b}", "answer": str(a + b)}) for a, b in pairs]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, chosen in (("heldout.jsonl", records[:128]), ("train.jsonl", records[128:])):
        (options.output / name).write_text("\n".join(chosen) + "\n", "utf-8")


if __name__ == "__main__":
    main()
