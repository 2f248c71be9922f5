"""Which prompt is issued at each place of a campaign: a pure function of the place and the seed.

Each source has its own epochs: in one epoch it issues each of its prompts once, in an order of its own. Several sources take
turns so that, among the first k prompts, each has its share to within about one prompt for each source, for every k.
Order and seeds come from hashes and raw generator streams, which are the same in every release of the libraries.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache, partial

import numpy as np


def prompt_order(seed: int | str, epoch: int, count: int, shuffle: bool) -> np.ndarray:
    """The numbers 0 ... count - 1 in the order of this epoch, [count] int64, read-only. Not shuffled: ascending."""
    order = np.arange(count)
    if shuffle:
        # NumPy guarantees the raw stream of a bit generator for all releases, but not that of `permutation`.
        keys = np.random.Philox(key=hash_of(f"order/{seed}/{epoch}")).random_raw(count)
        order = np.argsort(keys, kind="stable")
    order.flags.writeable = False  # all callers share a cached array
    return order


class PromptOrder:
    """The order in which the prompts of one source, or of several, are issued.

    Example: PromptOrder(3, {"": 8}).id_at(9) is an epoch, 1, and the number of the prompt that epoch 1 issues second.
    """

    def __init__(
        self, seed: int, counts: dict[str, int], weights: Sequence[float | None] = (), *, shuffle: bool = True
    ):
        """counts: source -> number of its prompts; a single source is called "". The sources' prompts are numbered one source
        after the other. weights: of the sources, in their order; None, or no weights: in proportion to their counts."""
        self._counts = list(counts.values())
        self._starts = np.concatenate([[0], np.cumsum(self._counts)]).tolist()
        self._shares = shares_of([w or n for w, n in zip(weights or self._counts, self._counts, strict=True)])
        # Two epochs: trajectories of the last one are issued again when an actor is lost.
        self._orders = [
            lru_cache(maxsize=2)(partial(self._order, f"{seed}/{name}" if name else seed, count, shuffle))
            for name, count in counts.items()
        ]

    def id_at(self, cursor: int) -> tuple[int, int]:
        """(epoch of its source, prompt) of the prompt that is issued at this cursor (from 0)."""
        source, turn = turn_at(cursor, self._shares)
        epoch, place = divmod(turn, self._counts[source])
        return epoch, self._starts[source] + int(self._orders[source](epoch)[place])

    @staticmethod
    def _order(seed: int | str, count: int, shuffle: bool, epoch: int) -> np.ndarray:
        return prompt_order(seed, epoch, count, shuffle)


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """For each source its share among itself and those after it: exact, so that no place depends on rounding."""
    exact = [Fraction(str(weight)) for weight in weights]  # 0.1 is a tenth here, not the nearest float
    return [weight / sum(exact[place:]) for place, weight in enumerate(exact)]


def turn_at(cursor: int, shares: Sequence[Fraction]) -> tuple[int, int]:
    """(source, its turn, from 0) at this cursor.

    Of the first k places, floor(k share) are the first source's; the others are divided in the same way among the sources
    after it. No state and no draw: the place alone decides, and every window has each source's share to about one prompt.
    """
    for source, share in enumerate(shares):
        before, after = (place * share.numerator // share.denominator for place in (cursor, cursor + 1))
        if after > before:
            return source, before
        cursor -= before
    raise AssertionError("the last source's share is 1")


def hash_of(text: str) -> int:
    """64 bits that depend on the text alone, unlike Python's `hash`, which differs between processes."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
