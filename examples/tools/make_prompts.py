"""Makes the questions of examples/tools: prices of the shop's items, sums and products of two numbers, none of them twice.

python -m examples.tools.make_prompts [--seed 0] [--output examples/tools]
"""

import argparse
import json
import random
from pathlib import Path

from examples.tools.shop import EXAMPLES, PRICES

PRICE = (
    "How much does a {item} cost?",
    "What is the price of a {item}?",
    "I want to buy a {item}. What do I have to pay?",
)
SUM = ("What is {a} plus {b}?", "How much is {a} + {b}?")
PRODUCT = ("What is {a} times {b}?", "How much is {a} * {b}?")
HELDOUT = {"price": 20, "sum": 20, "product": 20}
TRAIN = {"price": 48, "sum": 56, "product": 56}


def questions(rng: random.Random, kind: str) -> list[dict[str, str]]:
    """Enough questions of a kind for both files, in random order. One pair of numbers is asked for in one way only."""
    if kind == "price":
        asked = [(text.format(item=item), price) for item, price in PRICES.items() for text in PRICE]
        rng.shuffle(asked)
    else:
        texts, result = (SUM, int.__add__) if kind == "sum" else (PRODUCT, int.__mul__)
        pairs = rng.sample([(a, b) for a in range(11, 100) for b in range(11, 100)], HELDOUT[kind] + TRAIN[kind])
        asked = [(rng.choice(texts).format(a=a, b=b), result(a, b)) for a, b in pairs]
    shown = [message["content"] for message in EXAMPLES]  # what every prompt begins with is no question of its own
    return [{"prompt": prompt, "answer": str(answer)} for prompt, answer in asked if prompt not in shown]


def main() -> None:
    """Writes held-out and training questions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent)
    options = parser.parse_args()
    rng = random.Random(f"{options.seed}/tools")
    files: dict[str, list[dict[str, str]]] = {"heldout.jsonl": [], "train.jsonl": []}
    for kind, count in HELDOUT.items():
        asked = questions(rng, kind)
        files["heldout.jsonl"] += asked[:count]
        files["train.jsonl"] += asked[count : count + TRAIN[kind]]
    options.output.mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        rng.shuffle(records)
        (options.output / name).write_text("\n".join(map(json.dumps, records)) + "\n", "utf-8")


if __name__ == "__main__":
    main()
