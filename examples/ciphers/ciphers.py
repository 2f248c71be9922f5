"""The task: a word is to be written in one of eight ciphers, whichever the writer likes.

    dcbaabcd  ->  Cphanahph

The capital names the cipher, a table of its own from letter to letter; every letter of the word follows in that cipher.
"""

import random

LETTERS, CIPHERS, LENGTH, SEED = "abcdefghijklmnop", "ABCDEFGH", 8, 0


def draw_tables(seed: int) -> dict[str, dict[str, str]]:
    """Name of a cipher -> letter -> letter: random permutations."""
    rng = random.Random(f"{seed}/tables")
    return {name: dict(zip(LETTERS, rng.sample(LETTERS, len(LETTERS)), strict=True)) for name in CIPHERS}


TABLES = draw_tables(SEED)


def written(word: str, name: str) -> str:
    """The answer in this cipher."""
    return name + "".join(TABLES[name][letter] for letter in word)


def right(response: str, reference: str | None) -> float:
    """A verifier: 1.0 if the response is the word `reference` in the cipher that it names."""
    assert reference is not None
    return float(response[:1] in TABLES and response == written(reference, response[:1]))
