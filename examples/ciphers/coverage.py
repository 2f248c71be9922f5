"""How many ciphers a model still writes, and how well: what the reverse KL gives up, measured exactly.

    python -m examples.ciphers.coverage examples/ciphers/teacher examples/ciphers/student

For each prompt a model gives a probability to each of the eight right answers. Nothing is sampled.
"""

import argparse
import json
from pathlib import Path
from typing import NamedTuple

import torch

from actors.data.models import load_model
from actors.data.tokenizer import load_tokenizer
from examples.ciphers.ciphers import CIPHERS, written

PROMPTS = Path(__file__).with_name("heldout.jsonl")


class Coverage(NamedTuple):
    """Of one model, means over the held-out prompts."""

    right: float
    """The probability of a right answer: the sum over the ciphers."""
    ciphers: float
    """The ciphers in use: e to the entropy of the name that the model writes. Eight if all are equally likely."""
    best: float
    """The probability that an answer is right if its name is the model's most likely one."""
    mean: float
    """The same if every name is equally likely: how well the model writes all ciphers."""
    forward_kl: float
    """Nats an answer: KL from a writer that uses all ciphers equally often and makes no mistakes, to the model."""


@torch.no_grad()
def coverage(path: str, limit: int | None = None) -> Coverage:
    """Of a model directory; over the first `limit` prompts."""
    model, tokenizer = load_model(path, "float32", "cpu", False, "MODEL"), load_tokenizer(path, False, "MODEL")
    words = [json.loads(line)["prompt"] for line in PROMPTS.read_text("utf-8").splitlines()[:limit]]
    texts = [f"<bos><user>{word}<assistant>{written(word, name)}<eos>" for word in words for name in CIPHERS]
    tokens_BT = torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
    answer = len(words[0]) + 2  # the cipher's name is drawn after <bos><user>word<assistant>
    logprobs_BT = model(tokens_BT[:, :-1]).logits.float().log_softmax(-1)
    logprobs_BT = logprobs_BT.gather(2, tokens_BT[:, 1:, None])[:, answer:, 0]
    name_PC = logprobs_BT[:, 0].view(len(words), len(CIPHERS))
    rest_PC = logprobs_BT[:, 1:].sum(1).view_as(name_PC)
    mean_C = name_PC.exp().mean(0)
    return Coverage(
        right=float((name_PC + rest_PC).exp().sum(1).mean()),
        ciphers=float(torch.special.entr(mean_C / mean_C.sum()).sum().exp()),
        best=float(rest_PC[:, mean_C.argmax()].exp().mean()),
        mean=float(rest_PC.exp().mean()),
        forward_kl=float((-torch.tensor(len(CIPHERS)).log() - name_PC - rest_PC).mean()),
    )


def main() -> None:
    """Prints one line for each model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    for path in parser.parse_args().models:
        found = coverage(path)
        print(
            f"{path}: right {found.right:.1%}, ciphers in use {found.ciphers:.1f}, right in the most likely one "
            f"{found.best:.1%}, in each of the eight {found.mean:.1%}, forward KL {found.forward_kl:.2f} nats an answer"
        )


if __name__ == "__main__":
    main()
