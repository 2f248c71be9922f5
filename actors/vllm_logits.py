"""Changes the logits inside vLLM's workers, before anything is computed from them.

vLLM's own temperature comes too late for two things: it leaves the log-probs of a prompt at temperature 1, which is what
a teacher sends, and it hides the student's log-probs before top-k and top-p. Here the model itself answers with tempered
logits, so that every log-prob that vLLM computes is at this temperature, exactly, over the whole vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

EXTENSION = "actors.vllm_logits.WorkerExtension"
"""Value of vLLM's option `worker_extension_cls`."""


class WorkerExtension:
    """A base class of vLLM's workers; `LLM.collective_rpc` calls its methods in each of them."""

    def shape_logits(self, temperature: float, vocabulary: int | None = None) -> None:
        """From now on the model divides its logits by `temperature`, and gives no probability to ids from `vocabulary` on."""
        worker: Any = self
        model = worker.get_model()
        model.compute_logits = shaped(model.compute_logits, temperature, vocabulary)


def shaped(
    compute_logits: Callable[..., torch.Tensor | None], temperature: float, vocabulary: int | None
) -> Callable[..., torch.Tensor | None]:
    """A model's `compute_logits` with logits [n, V] divided by the temperature, and -inf from `vocabulary` on.

    In float32, as the learner does: a quotient in the model's bfloat16 would round logits of 20 by 0.06.
    """

    def compute(*arguments: Any, **keywords: Any) -> torch.Tensor | None:
        logits = compute_logits(*arguments, **keywords)
        if logits is None:  # a tensor-parallel rank without the gathered logits
            return None
        if temperature != 1.0:
            logits = logits.float().div_(temperature)
        if vocabulary is not None and vocabulary < logits.shape[-1]:
            logits[..., vocabulary:] = -torch.inf
        return logits

    return compute
