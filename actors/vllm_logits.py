"""Changes the logits inside vLLM's workers, before anything is computed from them.

vLLM's own temperature comes too late for two things: it leaves the log-probs of a prompt at temperature 1, which is what
a teacher sends, and it hides the student's log-probs before top-k and top-p. Here the model itself answers with tempered
logits, so that every log-prob that vLLM computes is at this temperature, exactly, over the whole vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch

MARK = -1
"""Token id of the entry that holds the log-prob before the filters."""
EXTENSION = "actors.rollout.vllm_worker.WorkerExtension"
"""Value of vLLM's option `worker_extension_cls`. One class for all engines: vLLM refuses a second one in a process."""


class WorkerExtension:
    """A base class of vLLM's workers; `LLM.collective_rpc` calls its methods in each of them."""

    def shape_logits(self, temperature: float, vocabulary: int | None = None) -> None:
        """From now on the model divides its logits by `temperature`, and gives no probability to ids from `vocabulary` on."""
        worker: Any = self
        model = worker.get_model()
        model.compute_logits = shaped(model.compute_logits, temperature, vocabulary)

    def record_unfiltered(self) -> None:
        """From now on the last of a token's listed log-probs is the sampled token's before top-k and top-p, marked MARK.

        The other listed log-probs are of the most likely tokens before the filters, too. Requests must ask for one
        log-prob more than they need, and the engine for `processed_logprobs`.
        """
        worker: Any = self
        sampler = worker.model_runner.sampler
        # A subclass, and no wrapper: vLLM asks for the sampler's class and attributes.
        sampler.__class__ = type("Recording", (_Recording, type(sampler)), {})


class _Recording:
    """A base class of vLLM's samplers (of both model runners, which take the logits as their first argument)."""

    def __call__(self, logits: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        # Before the call, which filters the logits in place.
        whole = torch.log_softmax(logits, dim=-1, dtype=torch.float32)
        output = super().__call__(logits, *arguments, **keywords)  # type: ignore[misc]
        if (listed := output.logprobs_tensors) is not None:
            ids, logprobs = listed.logprob_token_ids, listed.logprobs
            likeliest = whole.topk(ids.shape[1] - 2, dim=-1)
            ids[:, 1:-1], logprobs[:, 1:-1] = likeliest.indices.to(ids.dtype), likeliest.values
            logprobs[:, -1:] = whole.gather(-1, ids[:, :1].long())
            ids[:, -1] = MARK
        return output


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
