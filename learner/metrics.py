"""What is measured of one update while it is taken: the metrics of metrics.jsonl that the learner knows.

Shapes: n tokens of a micro-batch.
"""

import math

import numpy as np
import torch
from torch import Tensor

from learner.batch import Part


class MetricSums:
    """Sums over the update's tokens, kept on the device until the end."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._ratio_max: Tensor | None = None
        self._log_ratios: list[Tensor] = []

    def add(
        self,
        loss: Tensor,
        part: Part,
        logprobs: Tensor,
        entropies: Tensor,
        reverse_kl: Tensor,
        forward_kl: Tensor,
        clipped: Tensor,
    ) -> None:
        """Adds one micro-batch; all but `loss` are [n]."""
        mask, difference = part.mask, logprobs - part.behaviour_logprobs
        ratio = (logprobs - part.old_logprobs).exp() * mask
        new = {
            "loss": loss.detach(),
            "tokens": mask.sum(),
            "reverse_kl": (reverse_kl * mask).sum(),
            "forward_kl_old": (forward_kl * mask).sum(),
            "entropy": (entropies * mask).sum(),
            "clip_fraction": (clipped & mask).sum(),
            "ratio": ratio.sum(),
            "ratio_squared": ratio.square().sum(),
            "on_policy": part.on_policy.sum(),
            "engine_difference": (difference.abs() * part.on_policy).sum(),
        }
        self._log_ratios.append((logprobs - part.teacher_logprobs)[mask])
        self._sums = {name: self._sums.get(name, 0) + value.double() for name, value in new.items()}
        largest = ratio.max()
        self._ratio_max = largest if self._ratio_max is None else torch.maximum(self._ratio_max, largest)

    def means(self) -> dict[str, float]:
        """The update's metrics, by their names in metrics.jsonl."""
        sums = {name: value.item() for name, value in self._sums.items()}
        tokens, on_policy = max(sums["tokens"], 1.0), sums["on_policy"]
        assert self._ratio_max is not None
        tails = (
            np.quantile(torch.cat(self._log_ratios).cpu().numpy(), [0.01, 0.99]) if sums["tokens"] else [math.nan] * 2
        )
        return {
            "loss": sums["loss"],
            "tokens_trained": int(sums["tokens"]),
            **{name: sums[name] / tokens for name in ("reverse_kl", "forward_kl_old", "entropy", "clip_fraction")},
            "log_ratio_p01": float(tails[0]),
            "log_ratio_p99": float(tails[1]),
            "ratio_mean": sums["ratio"] / tokens,
            "ratio_max": self._ratio_max.item(),
            "importance_ess": sums["ratio"] ** 2 / max(tokens * sums["ratio_squared"], 1e-30),
            "engine_logprob_abs_diff": sums["engine_difference"] / on_policy if on_policy else float("nan"),
        }
