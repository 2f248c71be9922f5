"""The teacher actor: scores the student's own token ids with a model of its own. A plain class, values in, values out."""

import time
from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from actors.config import SamplingConfig, TeacherConfig
from actors.data.models import load_model, response_head
from actors.errors import CampaignError, WeightError
from actors.forward.logprobs import chunked_head, to_array, token_logprobs
from actors.forward.packing import hidden_states, microbatches, use_packed_attention
from actors.heartbeat import beat
from actors.teacher.base import Scorer, probe
from actors.trajectory import FINISH_REASONS, Requests, RolloutCounts, Trajectories, offsets_of
from actors.weights.buckets import WeightVersion, join, shapes, unpack
from actors.weights.delta import Receiver


class TeacherActor(Scorer):
    """One Hugging Face model, frozen, or given the weights of each version where it follows the student."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Loads the model; `key` is the configuration key that errors name.

        vocabulary: rows of the student's output layer. A teacher that is padded to more rows is cut to these, since
        the student cannot write what lies beyond.
        """
        self._config, self._name = config, key.rpartition(".")[2]
        self._device = "cuda" if torch.cuda.is_available() else "cpu"
        self._model: Any = load_model(
            config.model,
            config.dtype,
            self._device,
            trust_remote_code=config.trust_remote_code,
            key=f"{key}.model",
            ranks=config.tensor_parallel_size,
        )
        self._body, self._weight, self._bias = response_head(self._model, f"{key}.model")
        if isinstance(self._weight, DTensor):  # whole on every rank, where there are several
            self._weight = self._weight.full_tensor()
            self._bias = self._bias.full_tensor() if isinstance(self._bias, DTensor) else self._bias
        # Where sequences cannot lie end to end, each has a pass of its own.
        self._pass_tokens = config.microbatch_tokens if use_packed_attention(self._model) else 1
        if vocabulary is not None:
            self._weight = self._weight[:vocabulary]
            self._bias = None if self._bias is None else self._bias[:vocabulary]
        self._vocabulary = len(self._weight)
        self._compare(self._self_test(key, self._vocabulary), key)

    @torch.no_grad()
    def load_weights(self, *published: np.ndarray | WeightVersion) -> None:
        """Verifies and loads a weight version in place, where this teacher follows the student. WeightError: it is damaged,
        or of another model. published: of each rank of the learner its buckets, and then their manifest."""
        manifest, buckets = join(Receiver(False).receive(*published))
        parameters = dict(self._model.named_parameters())
        if shapes(manifest) != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
            raise WeightError(f"version {manifest.version} has other tensors than teacher {self._name}")
        for name, tensor in unpack(manifest, buckets):
            parameters[name].copy_(tensor)

    @torch.inference_mode()
    def _forward(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """A forward pass takes `microbatch_tokens` tokens, the head `head_chunk_tokens` at a time."""
        signal, total = self._config.signal, len(trajectories.response_tokens)
        vocabulary, hidden_size = self._weight.shape
        named = torch.from_numpy(trajectories.support_ids.astype(np.int64)).to(self._device)
        width = {"topk": min(self._config.top_k, vocabulary), "student_topk": named.shape[1], "full": vocabulary}
        with_ids = signal in ("topk", "student_topk")
        hidden_dtype = to_array(self._weight[:0]).dtype
        fields = {
            "logprobs": np.empty(total, np.float32),
            "support_logprobs": np.empty((total, width.get(signal, 0)), np.float32),
            "support_ids": np.empty((total, width[signal] if with_ids else 0), np.int32),
            "hidden": np.empty((total, hidden_size if signal == "hidden" else 0), hidden_dtype),
        }
        tokens = torch.from_numpy(trajectories.response_tokens.astype(np.int64)).to(self._device)

        def reduce(chunk_nV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
            sampled = token_logprobs(chunk_nV, tokens[places[rows]].clamp(max=vocabulary - 1))
            if signal == "topk":
                return (sampled, *torch.topk(chunk_nV, width[signal], dim=-1))
            if signal == "student_topk":
                ids = named[places[rows]]
                logprobs = chunk_nV.gather(-1, ids.clamp(max=vocabulary - 1))
                return sampled, logprobs.masked_fill(ids >= vocabulary, torch.nan), ids
            return (sampled, chunk_nV) if signal == "full" else (sampled,)

        for batch in microbatches(
            trajectories.prompt_tokens,
            trajectories.prompt_offsets,
            trajectories.response_tokens,
            trajectories.response_offsets,
            self._pass_tokens,
        ):
            beat()
            places = torch.from_numpy(batch.tokens).to(self._device)
            states = hidden_states(self._body, batch.input_ids, batch.lengths, self._device)
            states = states[torch.from_numpy(batch.positions).to(self._device)]
            scored = chunked_head(states, self._weight, self._bias, reduce, chunk_tokens=self._config.head_chunk_tokens)
            for name, values in zip(fields, scored, strict=False):  # in the order of `fields`
                fields[name][batch.tokens] = values.cpu().numpy()
            if signal == "hidden":
                fields["hidden"][batch.tokens] = to_array(states)
        return fields

    def _compare(self, scored: np.ndarray, key: str) -> None:
        """CampaignError: the scores of the probe are not what a plain forward pass of the model gives."""
        written = probe(self._vocabulary)
        text = np.concatenate([written.prompt_tokens, written.response_tokens]).astype(np.int64)
        with torch.inference_mode():
            tokens = torch.from_numpy(text).to(self._device)[None]
            logits = self._model(tokens, use_cache=False).logits[0, :-1, : self._vocabulary].float()
            plain = token_logprobs(torch.log_softmax(logits, -1), tokens[0, 1:]).cpu().numpy()
        if np.abs(scored - plain).max() > (1e-3 if self._config.dtype == "float32" else 0.2):
            raise CampaignError(f"{key} fails its self-test: scores differ from a plain forward pass")

    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_offsets: np.ndarray,
        max_response_tokens: int,
        stop_token_ids: list[int],
        pad_token_id: int,
        **how: Any,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's own responses to B prompts: (tokens [N], offsets [B + 1]); greedy ones, to measure its accuracy,
        unless `how` says otherwise in the words of transformers' generate."""
        prompts = np.split(prompt_tokens, prompt_offsets[1:-1])
        width = max(map(len, prompts))
        input_ids = torch.full((len(prompts), width), pad_token_id)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):
            input_ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            written = self._model.generate(
                input_ids=input_ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=max_response_tokens,
                eos_token_id=stop_token_ids,
                pad_token_id=pad_token_id,
                logits_processor=[_counted],
                **{"do_sample": False} | how,
            )[:, width:]
        is_stop = torch.isin(written, torch.tensor(stop_token_ids, device=written.device)).cpu().numpy()
        lengths = np.where(is_stop.any(1), is_stop.argmax(1) + 1, written.shape[1])
        rows = [row[:length] for row, length in zip(written.cpu().numpy(), lengths, strict=True)]
        return np.concatenate(rows).astype(np.int32), offsets_of(lengths)

    def sample(
        self,
        requests: Requests,
        policy_version: int,
        sampling: SamplingConfig,
        stop_token_ids: list[int],
        privileged: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> tuple[RolloutCounts, Trajectories]:
        """Responses that the teacher writes for the student to copy, sampled as `sampling` says of the student.

        They are said to be of this policy version, since they do not go stale; their behaviour_logprobs are 0: what the
        teacher thinks of them is in its scores. privileged: tokens and offsets of the prompts as the teacher reads them.
        A function of the requests and their order.
        """
        start = time.perf_counter()
        torch.manual_seed(int(requests.seeds[0]))
        tokens, offsets = self.generate(
            *(privileged or (requests.prompt_tokens, requests.prompt_offsets)),
            sampling.max_response_tokens,
            stop_token_ids,
            stop_token_ids[0],
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        stopped = np.isin(tokens[offsets[1:] - 1], stop_token_ids)
        reason = np.where(stopped, FINISH_REASONS.index("stop"), FINISH_REASONS.index("length"))
        written = Trajectories(
            ids=requests.ids,
            prompt_tokens=requests.prompt_tokens,
            prompt_offsets=requests.prompt_offsets,
            response_tokens=tokens,
            response_offsets=offsets,
            behaviour_logprobs=np.zeros(len(tokens), np.float32),
            policy_versions=np.full(len(tokens), policy_version, np.int32),
            finish_reasons=reason.astype(np.uint8),
        )
        seconds = time.perf_counter() - start
        versions = np.full(len(requests.ids), policy_version, np.int32)
        return RolloutCounts(np.diff(offsets), versions, ~stopped, seconds), written


def _counted(_tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that changes nothing, and tells that a token is being written."""
    beat()
    return scores
