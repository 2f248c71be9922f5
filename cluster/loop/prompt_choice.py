"""Which prompts are passed over, by how far student and teacher are apart on them: `prompts.keep`, `prompts.curriculum`.

The order of prompts stays what the seed makes it. A prompt that is passed over takes its place and its numbers in the ledger,
which drops them with the reason, so that a resumed campaign asks the same prompts. The state holds what is known of each
prompt: with `pipeline.max_staleness: 0` the choice is a function of the updates before.
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np

from actors.config import TrainingPromptsConfig

AGREED, LATER = "agreed", "later"
"""Reasons in the ledger: student and teacher agree on the prompt; the curriculum has it later."""
REASONS = (AGREED, LATER)
AGAIN_EPOCHS = 4
"""A prompt is asked again in the fourth epoch after it was trained on, however it is judged: the student has changed since."""
NEWEST = 0.5
"""Weight of the newest value in a prompt's running estimate."""
FIRST_SHARE = 0.25
"""Share of the prompts with which a curriculum begins, once they are known."""


class PromptChoice:
    """The choice of one campaign.

    Example: with keep "margin" and margin 0.1, and 0.05 nats a token known of prompt 7 from epoch 0, `passes(1, 7, 0)` is
    "agreed".
    """

    def __init__(self, config: TrainingPromptsConfig, updates: int, known: dict[int, tuple[float, int]]):
        """updates: of the campaign. known: of the state, which `learn` changes: prompt -> (running estimate of its reverse KL
        in nats a token, epoch of its last update)."""
        self._margin = config.margin if config.keep == "margin" else None
        self._curriculum, self._updates, self._known = config.curriculum, updates, known
        self._bound = lru_cache(maxsize=1)(self._bound_after)

    def passes(self, epoch: int, prompt: int, step: int) -> str | None:
        """Why a prompt is passed over in this epoch of its source, after `step` updates; None: it is asked.

        A prompt that was never trained on is asked; so is one that was last trained on AGAIN_EPOCHS ago.
        """
        if prompt not in self._known:
            return None
        estimate, last = self._known[prompt]
        if epoch >= last + AGAIN_EPOCHS:
            return None
        if self._margin is not None and estimate < self._margin:
            return AGREED
        if self._curriculum == "none":
            return None
        bound = self._bound(step)
        return LATER if (estimate > bound if self._curriculum == "easy_first" else estimate < bound) else None

    def learn(self, ids: np.ndarray, reverse_kl: Sequence[float]) -> None:
        """Takes in an update: ids [B, 3] of its trajectories in the order of the ledger, and the mean reverse KL [B] of
        each; NaN is no value."""
        found: dict[int, list[float]] = {}
        epochs: dict[int, int] = {}
        for (epoch, prompt, _), value in zip(ids.tolist(), reverse_kl, strict=True):
            if math.isfinite(value):
                found.setdefault(prompt, []).append(value)
                epochs[prompt] = epoch
        for prompt, values in found.items():
            new = math.fsum(values) / len(values)
            old = self._known[prompt][0] if prompt in self._known else new
            self._known[prompt] = (old + NEWEST * (new - old), epochs[prompt])
        self._bound.cache_clear()

    def _bound_after(self, step: int) -> float:
        """The quantile of all estimates up to which (from which, hardest first) prompts are asked.

        Their share grows as the competence of Platanios et al. 2019 (arXiv 1903.09848, equation 8 with the square root), from
        FIRST_SHARE to 1 at half of the campaign.
        """
        progress = min(1.0, 2 * step / self._updates)
        share = math.sqrt(progress * (1 - FIRST_SHARE**2) + FIRST_SHARE**2)
        estimates = np.array([estimate for estimate, _ in self._known.values()])
        return float(np.quantile(estimates, share if self._curriculum == "easy_first" else 1 - share))


def choice_of(config: TrainingPromptsConfig, updates: int, known: dict[int, tuple[float, int]]) -> PromptChoice | None:
    """None: every prompt is asked."""
    return None if config.keep == "all" and config.curriculum == "none" else PromptChoice(config, updates, known)


def passed_over(dropped: Mapping[str, int]) -> dict[str, int]:
    """Metrics: how many trajectories were passed over so far, by reason. dropped: of the ledger."""
    return {f"passed_over_{reason}": dropped.get(reason, 0) for reason in REASONS}
