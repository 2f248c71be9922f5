"""Perplexity of models on examples/heal/text.txt, 26 passages that no model has seen, and how far the models differ.

    python -m examples.heal.perplexity MODEL [MODEL …] [--text FILE] [--seed 0]

MODEL: a directory or a hub name. Prints for each model the mean negative log-prob of a token (nats), perplexity and bits a
byte; and for each after the first the paired difference in nats. Intervals (95%) are over passages, which are drawn again.
A passage follows the token that begins a text, if the tokenizer writes one; else its own first token is not counted.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from actors.data.models import load_model
from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError

TEXT = Path(__file__).with_name("text.txt")
DRAWS = 10_000


def passages(file: Path) -> list[str]:
    """The passages of a text, which are parted by empty lines."""
    found = [part.strip() for part in file.read_text("utf-8").split("\n\n") if part.strip()]
    if len(found) < 2:
        raise UserError("--text", file, "at least two passages, parted by empty lines")
    return found


def negative_logprobs(model: Any, tokenizer: Any, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(sum of the negative log-probs of each passage's tokens [M] in nats, number of these tokens [M])."""
    import torch

    sums, counts = [], []
    for text in texts:
        tokens = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            logprobs = model(tokens).logits[0, :-1].float().log_softmax(-1)
        sums.append(-logprobs.gather(-1, tokens[0, 1:, None]).double().sum().item())
        counts.append(tokens.shape[1] - 1)
    return np.array(sums), np.array(counts)


def interval(sums: np.ndarray, counts: np.ndarray, seed: int) -> tuple[float, float]:
    """The 95% interval of sum(sums) / sum(counts) when passages [M] are drawn again with replacement."""
    rows = np.random.default_rng(seed).integers(0, len(sums), (DRAWS, len(sums)))
    low, high = np.quantile(sums[rows].sum(1) / counts[rows].sum(1), [0.025, 0.975])
    return float(low), float(high)


def main() -> None:
    """Prints one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="MODEL")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--seed", type=int, default=0, help="of the draws of the intervals")
    options = parser.parse_args()
    try:
        compare(options.models, options.text, options.seed)
    except UserError as error:
        parser.exit(2, f"perplexity: {error}\n")


def compare(models: list[str], file: Path, seed: int) -> None:
    """Prints what the models say to a text. UserError: a model cannot be loaded, or the file holds one passage."""
    texts = passages(file)
    nbytes = sum(len(text.encode()) for text in texts)
    first: tuple[np.ndarray, np.ndarray] | None = None
    for name in models:
        tokenizer = load_tokenizer(name, False, "MODEL")
        sums, counts = negative_logprobs(load_model(name, "float32", "cpu", False, "MODEL"), tokenizer, texts)
        mean, (low, high) = sums.sum() / counts.sum(), interval(sums, counts, seed)
        line = (
            f"{name}: {mean:.4f} nats a token [{low:.4f}, {high:.4f}], perplexity {np.exp(mean):.2f} "
            f"[{np.exp(low):.2f}, {np.exp(high):.2f}], {sums.sum() / np.log(2) / nbytes:.4f} bits a byte, {counts.sum()} tokens"
        )
        if first is None:
            first = sums, counts
        elif np.array_equal(counts, first[1]):
            low, high = interval(sums - first[0], counts, seed)
            line += f"; {(sums - first[0]).sum() / counts.sum():+.4f} [{low:+.4f}, {high:+.4f}] to the first"
        else:
            line += "; other tokens than the first: compare bits a byte"
        print(line, flush=True)


if __name__ == "__main__":
    main()
