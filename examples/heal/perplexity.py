"""Perplexity of models on examples/heal/text.txt, 26 passages that no model has seen, and how far the models differ.

    python -m examples.heal.perplexity MODEL [MODEL …] [--text FILE] [--seed 0]

MODEL: a directory or a hub name. Prints for each model the mean negative log-prob of a token (nats), perplexity and bits a
byte; and for each after the first the paired difference in bits a byte, which holds between tokenizers, too. Intervals (95%)
are over passages, which are drawn again. A passage's first word is context and is not counted.
"""

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from actors.data.models import as_user_error, load_model
from actors.data.tokenizer import load_tokenizer
from actors.errors import UserError
from actors.json_files import bytes_of

TEXT = Path(__file__).with_name("text.txt")
DRAWS = 10_000


def passages(file: Path) -> list[str]:
    """The passages of a text, which are parted by empty lines. UserError: there is no such text, or it has one passage."""
    with as_user_error("--text", file, "a text in UTF-8"):
        found = [part.strip() for part in bytes_of(file).decode().split("\n\n") if part.strip()]
    if len(found) < 2:
        raise UserError("--text", file, "at least two passages, parted by empty lines")
    return found


class Measured(NamedTuple):
    """What a model says to M passages, each without its first word."""

    nats: np.ndarray
    """[M] sum of the negative log-probs of the tokens."""
    tokens: np.ndarray
    """[M] number of these tokens."""


def first_word(text: str) -> int:
    """How many characters the first word has; 0 in a text without a space."""
    return max(text.find(" "), 0)


def measured(model: Any, tokenizer: Any, texts: list[str]) -> Measured:
    """See Measured."""
    import torch

    nats, tokens = [], []
    for text in texts:
        read = tokenizer(text, return_offsets_mapping=True)
        ids = torch.tensor([read["input_ids"]])
        counted = torch.tensor([end > first_word(text) for _, end in read["offset_mapping"][1:]])
        with torch.no_grad():
            logprobs = model(ids).logits[0, :-1].float().log_softmax(-1)
        nats.append(-logprobs.gather(-1, ids[0, 1:, None])[counted].double().sum().item())
        tokens.append(int(counted.sum()))
    return Measured(np.array(nats), np.array(tokens))


def check_text(name: str, tokenizer: Any, texts: list[str]) -> None:
    """UserError: the tokenizer does not say which characters its tokens are of, or does not know all of them."""
    if not tokenizer.is_fast:
        raise UserError("MODEL", f"{name}, whose tokenizer is a slow one", "a fast tokenizer (tokenizer.json)")
    unknown = sum(tokenizer(text)["input_ids"].count(tokenizer.unk_token_id) for text in texts)
    if tokenizer.unk_token_id is not None and unknown:
        found = f"{name}, whose tokenizer has no token for {unknown} pieces of the text ({tokenizer.unk_token!r})"
        raise UserError("MODEL", found, "a tokenizer that writes the whole text, or another --text")


def model_with_room(name: str, tokenizer: Any, texts: list[str]) -> Any:
    """The model. UserError: it cannot be loaded, or its context is shorter than a passage."""
    model = load_model(name, "float32", "cpu", False, "MODEL")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
    if context is not None and longest > context:
        found = f"{name} with a context of {context} tokens"
        raise UserError("MODEL", found, f"one of {longest} tokens, as a passage has, or another --text")
    return model


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
    if options.seed < 0:
        parser.error(f"--seed: found {options.seed}, expected a number >= 0")
    try:
        compare(options.models, options.text, options.seed)
    except UserError as error:
        parser.exit(2, f"perplexity: {error}\n")


def compare(models: list[str], file: Path, seed: int) -> None:
    """Prints what the models say to a text. UserError: a model cannot be loaded, or the file holds one passage."""
    texts = passages(file)
    nbytes = np.array([len(text[first_word(text) :].encode()) for text in texts])
    first: np.ndarray | None = None
    for name in models:
        tokenizer = load_tokenizer(name, False, "MODEL")
        check_text(name, tokenizer, texts)
        nats, tokens = measured(model_with_room(name, tokenizer, texts), tokenizer, texts)
        mean, (low, high) = nats.sum() / tokens.sum(), interval(nats, tokens, seed)
        bits = nats / np.log(2)
        line = (
            f"{name}: {mean:.4f} nats a token [{low:.4f}, {high:.4f}], perplexity {np.exp(mean):.2f} "
            f"[{np.exp(low):.2f}, {np.exp(high):.2f}], {per_byte(bits, nbytes, seed)} bits a byte, {tokens.sum()} tokens"
        )
        if first is None:
            first = bits
        else:
            line += f"; {per_byte(bits - first, nbytes, seed, '+')} bits a byte to the first"
        print(line, flush=True)


def per_byte(bits: np.ndarray, nbytes: np.ndarray, seed: int, sign: str = "") -> str:
    """The mean of what M passages have, over their bytes [M], with its interval. sign: `+` writes one before all numbers."""
    low, high = interval(bits, nbytes, seed)
    return f"{bits.sum() / nbytes.sum():{sign}.4f} [{low:{sign}.4f}, {high:{sign}.4f}]"


if __name__ == "__main__":
    main()
