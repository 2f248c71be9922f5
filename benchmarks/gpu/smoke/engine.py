"""An engine for the smoke test where vLLM is not installed: transformers, one batch at a time.

`rollout.backend: benchmarks.gpu.smoke.engine:TransformersEngine`. The draws of a batch come from one generator, seeded by its
first request, so a sample depends on its company; a campaign's engine must not have this (actors/rollout/engine.py).
"""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from actors.accelerator import torch_device
from actors.data.models import load_model
from actors.heartbeat import beat
from actors.rollout.engine import Response, trajectories_of, unpack
from actors.trajectory import Requests, Trajectories


class TransformersEngine:
    """See `Engine`. It samples at a temperature, without top-k and top-p."""

    def __init__(self, model: str, config: Any, sampling: Any, *, stop_token_ids: list[int], **_: Any):
        """Loads the model; its weights are replaced by the first version."""
        self.version: int | None = None
        self.seats, self.busy_seconds, self.tokens_sampled = 64, 0.0, 0
        self._device = torch_device()
        self._model: Any = load_model(model, config.dtype, self._device, False, "student.model")
        self._stop = torch.tensor(stop_token_ids, device=self._device)
        self._thread = ThreadPoolExecutor(1)

    def generate(self, requests: Requests, sampling: Any, *, greedy: bool = False) -> Future:
        """See `Engine`."""
        return self._thread.submit(self._generate, requests, sampling, greedy)

    def load_weights(self, manifest: Any, buckets: Any) -> Future:
        """See `Engine`. Between two batches."""
        return self._thread.submit(self._load, manifest, buckets)

    def abort(self, ids: Any = None) -> Future:
        """Does nothing."""
        return self._thread.submit(lambda: None)

    def close(self) -> None:
        """See `Engine`."""
        self._thread.shutdown(wait=False)

    @torch.no_grad()
    def _load(self, manifest: Any, buckets: Any) -> float:
        parameters = dict(self._model.named_parameters())
        for name, tensor in unpack(manifest, buckets):
            parameters[name].copy_(tensor)
        self.version = manifest.version
        return 0.0

    @torch.inference_mode()
    def _generate(self, requests: Requests, sampling: Any, greedy: bool) -> Trajectories:
        begun = time.perf_counter()
        prompts = requests.prompts
        width, most = max(map(len, prompts)), sampling.max_response_tokens
        ids = torch.zeros(len(prompts), width, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):  # padded on the left, so that all responses begin in one column
            ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        ids, mask = ids.to(self._device), mask.to(self._device)
        generator = torch.Generator(self._device).manual_seed(int(requests.seeds[0]))
        position, cache = mask.cumsum(1).sub(1).clamp(min=0), None
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=self._device)
        tokens, logprobs = [], []
        while len(tokens) < most and not ended.all():
            beat()
            out = self._model(
                input_ids=ids, attention_mask=mask, position_ids=position, past_key_values=cache, use_cache=True
            )
            cache = out.past_key_values
            logprobs_BV = torch.log_softmax(out.logits[:, -1].float() / sampling.temperature, -1)
            chosen = (
                logprobs_BV.argmax(-1) if greedy else torch.multinomial(logprobs_BV.exp(), 1, generator=generator)[:, 0]
            )
            tokens.append(chosen)
            logprobs.append(logprobs_BV.gather(1, chosen[:, None])[:, 0])
            ended |= torch.isin(chosen, self._stop)
            ids, position = chosen[:, None], position[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(ids)], 1)
        found = trajectories_of(requests, self._responses(torch.stack(tokens, 1), torch.stack(logprobs, 1), most))
        self.tokens_sampled += len(found.response_tokens)
        self.busy_seconds += time.perf_counter() - begun
        return found

    def _responses(self, tokens_BT: torch.Tensor, logprobs_BT: torch.Tensor, most: int) -> list[Response]:
        """Each row up to its stop token."""
        stops = torch.isin(tokens_BT, self._stop).cpu().numpy()
        tokens, logprobs = tokens_BT.cpu().numpy(), logprobs_BT.cpu().numpy()
        out = []
        for row, stop in enumerate(stops):
            length = int(stop.argmax()) + 1 if stop.any() else stop.size
            versions = np.full(length, self.version, np.int32)
            reason = "stop" if stop.any() else "length"
            out.append(Response(tokens[row, :length], logprobs[row, :length], versions, reason))
        return out
