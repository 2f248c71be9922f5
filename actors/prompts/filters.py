"""Which prompts are left out, and which are in two sets: filters of `prompts`. Pure.

Two prompts are the same where the student reads the same text, whatever their references, domains and sources are.
"""

from typing import NamedTuple

import numpy as np

from actors.errors import UserError
from actors.prompts.columns import Texts
from actors.prompts.prompt_set import PromptSet

SHOWN = 3
"""Examples of an overlap that are told."""


class Dropped(NamedTuple):
    """What was read from one source, and what of it was left out."""

    read: int
    too_long: int
    duplicates: int

    def __str__(self) -> str:
        found = [
            f"{count:,} {what}"
            for count, what in ((self.too_long, "too long"), (self.duplicates, "duplicates"))
            if count
        ]
        return f"{self.too_long + self.duplicates:,} of {self.read:,} prompts dropped ({', '.join(found)})"


def whole_texts(prompts: PromptSet) -> Texts:
    """[M] what tells two prompts apart: their texts, and their responses where they have some."""
    if prompts.responses is None:
        return prompts.texts
    tokens, ends = prompts.responses.tokens, prompts.responses.offsets
    return Texts.of(
        f"{text}\0{tokens[ends[row] : ends[row + 1]].tobytes().hex()}" for row, text in enumerate(prompts.texts)
    )


def repeated(texts: Texts, among: np.ndarray) -> np.ndarray:
    """[M] bool: a text that an earlier one repeats. among: [M] bool, the texts that are looked at.

    Costs 16 bytes a text: digests are sorted, and texts with the same digest are compared.
    """
    rows = np.flatnonzero(among)
    digests = texts.digests()[rows]
    order = np.argsort(digests, kind="stable")  # equal ones stay in the order of the texts
    found, first = np.zeros(len(texts), bool), -1
    for place in np.flatnonzero(np.diff(digests[order]) == 0):
        if first < 0 or digests[order[first]] != digests[order[place]]:
            first = int(place)
        row = rows[order[place + 1]]
        found[row] = texts[row] == texts[rows[order[first]]]
    return found


def dropped(prompts: PromptSet, too_long: np.ndarray, duplicates: np.ndarray) -> dict[str, Dropped]:
    """Configuration key -> what is left out of that source, for those of which anything is. too_long, duplicates: [M] bool.

    UserError: nothing of a source would be left.
    """
    found = {}
    for key in dict.fromkeys(origin.key for origin in prompts.origins):
        rows = prompts.rows_of(key)
        its = slice(rows.start, rows.stop)
        one = Dropped(len(rows), int(too_long[its].sum()), int(duplicates[its].sum()))
        if one.too_long + one.duplicates == one.read:
            raise UserError(key, str(one), "at least one prompt that is left")
        if one.too_long + one.duplicates:
            found[key] = one
    return found


def overlap(held_out: PromptSet, prompts: PromptSet) -> str:
    """One sentence about held-out prompts that are trained on; "" where there are none."""
    digests, theirs = np.unique(held_out.texts.digests()), prompts.texts.digests()
    alike = np.flatnonzero(digests[np.minimum(np.searchsorted(digests, theirs), len(digests) - 1)] == theirs)
    wanted = set(held_out.texts)
    trained = {text for row in alike.tolist() if (text := prompts.texts[row]) in wanted}
    shared = [row for row, text in enumerate(held_out.texts) if text in trained]
    if not shared:
        return ""
    examples = ", ".join(held_out.where(row) for row in shared[:SHOWN])
    count = f"{len(shared):,} of {len(held_out):,} held-out prompts are among those that are trained on"
    return f"{count} ({examples}{', …' if len(shared) > SHOWN else ''}): what is measured on them is no held-out figure"
