"""The teacher backend `transformers`: scores token ids with a Hugging Face model in the actor's process."""

from typing import Any

import numpy as np
import torch
from torch.distributed.tensor import DTensor

from actors.accelerator import deterministic, settle_algorithms, torch_device
from actors.config import SamplingConfig, TeacherConfig
from actors.data.models import load_model, response_head
from actors.errors import CampaignError, WeightError
from actors.forward.logprobs import chunked_head, to_array, token_logprobs
from actors.forward.packing import hidden_states, microbatches, use_packed_attention
from actors.heartbeat import beat
from actors.teacher.base import REPEATS, context_of, known_prompts, probe
from actors.teacher.writing import WritingTeacher
from actors.trajectory import Limits, Prompts, Trajectories, offsets_of
from actors.weights.buckets import WeightVersion, join, shapes, unpack
from actors.weights.delta import Receiver


class LocalTeacher(WritingTeacher):
    """One Hugging Face model. It is frozen, or loads new weights after each update (`ema_decay`)."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Loads the model and runs the self-test.

        vocabulary: rows of the student's output layer. Further rows of the teacher's output layer are cut off, so that
        its log-probs are normalised over the tokens that the student can write. UserError: model files are missing or
        broken, or `response_head` refuses the architecture. CampaignError: see `self_test`.
        """
        super().__init__(config, key, vocabulary)
        settle_algorithms()
        self._device = torch_device()
        self._model: Any = load_model(
            config.model,
            config.dtype,
            self._device,
            trust_remote_code=config.trust_remote_code,
            key=f"{key}.model",
            ranks=config.tensor_parallel_size,
        )
        self.context = context_of(config, key)
        self._body, self._weight, self._bias = response_head(self._model, f"{key}.model")
        if isinstance(self._weight, DTensor):  # each rank applies the whole head: only the layers below it are divided
            self._weight = self._weight.full_tensor()
            self._bias = self._bias.full_tensor() if isinstance(self._bias, DTensor) else self._bias
        # A budget of one token gives each sequence a forward pass of its own.
        self._pass_tokens = config.microbatch_tokens if use_packed_attention(self._model) else 1
        if vocabulary is not None:
            self._weight = self._weight[:vocabulary]
            self._bias = None if self._bias is None else self._bias[:vocabulary]
        embedding: Any = self._model.get_input_embeddings()
        self.vocabulary = min(len(self._weight), len(embedding.weight))
        self._compare(self.self_test(repeats=repeats_of(self._device)))

    @torch.no_grad()
    def load_weights(self, *published: np.ndarray | WeightVersion) -> None:
        """Verifies a weight version and loads it in place.

        published: for each rank of the learner its buckets, followed by their manifest. WeightError: the version is
        damaged, or of another model; the weights are then unchanged.
        """
        # Dense versions only, so the receiver keeps no base for deltas.
        manifest, buckets = join(Receiver(False).receive(*published))
        parameters = dict(self._model.named_parameters())
        if shapes(manifest) != {name: tuple(parameter.shape) for name, parameter in parameters.items()}:
            raise WeightError(f"version {manifest.version} has other tensors than teacher {self.name}")
        for name, tensor in unpack(manifest, buckets):
            parameters[name].copy_(tensor)

    @torch.inference_mode()
    def score_tokens(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """See Teacher. A forward pass takes `microbatch_tokens` tokens, the head `head_chunk_tokens` at a time."""
        signal, total = self.config.signal, len(trajectories.response_tokens)
        vocabulary, hidden_size = self._weight.shape
        student_support = torch.from_numpy(trajectories.support_ids.astype(np.int64)).to(self._device)
        width = {
            "topk": min(self.config.top_k, vocabulary),
            "student_topk": student_support.shape[1],
            "full": vocabulary,
        }
        with_ids = signal in ("topk", "student_topk")
        hidden_dtype = to_array(self._weight[:0]).dtype
        # The first three in the order in which `reduce` returns them: the loop below zips names with values.
        fields = {
            "logprobs": np.empty(total, np.float32),
            "support_logprobs": np.empty((total, width.get(signal, 0)), np.float32),
            "support_ids": np.empty((total, width[signal] if with_ids else 0), np.int32),
            "hidden": np.empty((total, hidden_size if signal == "hidden" else 0), hidden_dtype),
        }
        tokens = torch.from_numpy(trajectories.response_tokens.astype(np.int64)).to(self._device)

        def reduce(chunk_nV: torch.Tensor, rows: slice) -> tuple[torch.Tensor, ...]:
            sampled = token_logprobs(chunk_nV, tokens[places[rows]])
            if signal == "topk":
                return (sampled, *torch.topk(chunk_nV, width[signal], dim=-1))
            if signal == "student_topk":
                ids = student_support[places[rows]]
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
            scored = chunked_head(
                states,
                self._weight,
                self._bias,
                reduce,
                chunk_tokens=self.config.head_chunk_tokens,
                temperature=self.temperature,
            )
            for name, values in zip(fields, scored, strict=False):
                fields[name][batch.tokens] = values.cpu().numpy()
            if signal == "hidden":
                fields["hidden"][batch.tokens] = to_array(states)
        return fields

    def _compare(self, scored: np.ndarray) -> None:
        """CampaignError: the probe's scores differ from a plain forward pass: packing or the chunked head is wrong."""
        written = probe(min(self.vocabulary, self.context + 1))
        text = np.concatenate([written.prompt_tokens, written.response_tokens]).astype(np.int64)
        with torch.inference_mode():
            tokens = torch.from_numpy(text).to(self._device)[None]
            logits = self._model(tokens, use_cache=False).logits[0, :-1, : self.vocabulary].float() / self.temperature
            plain = token_logprobs(torch.log_softmax(logits, -1), tokens[0, 1:]).cpu().numpy()
        if np.abs(scored - plain).max() > (1e-3 if self.config.dtype == "float32" else 0.2):
            raise CampaignError(f"{self.key} fails its self-test: scores differ from a plain forward pass")

    def generate(self, prompts: Prompts, limits: Limits, **options: Any) -> tuple[np.ndarray, np.ndarray]:
        """Responses to B prompts: see Teacher. options: of transformers' `generate`; greedy by default."""
        prompts, limits = known_prompts(prompts, limits, self.vocabulary)
        rows, stop = prompts.rows(), limits.stop_token_ids
        width = max(map(len, rows))
        pad = [*stop, 0][
            0
        ]  # any token will do: the mask hides it in prompts, and responses are cut at their stop token
        input_ids = torch.full((len(rows), width), pad)
        mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(rows):  # padded on the left, so that all responses begin in one column
            input_ids[row, width - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
            mask[row, width - len(prompt) :] = 1
        with torch.inference_mode():
            written = self._model.generate(
                input_ids=input_ids.to(self._device),
                attention_mask=mask.to(self._device),
                max_new_tokens=limits.max_response_tokens,
                eos_token_id=stop or None,
                pad_token_id=pad,
                logits_processor=[_beat],
                **{"do_sample": False} | options,
            )[:, width:]
        is_stop = torch.isin(written, torch.tensor(stop, device=written.device, dtype=written.dtype)).cpu().numpy()
        lengths = np.where(is_stop.any(1), is_stop.argmax(1) + 1, written.shape[1])
        responses = [row[:length] for row, length in zip(written.cpu().numpy(), lengths, strict=True)]
        return np.concatenate(responses).astype(np.int32), offsets_of(lengths)

    def write(
        self, prompts: Prompts, limits: Limits, sampling: SamplingConfig, seeds: np.ndarray
    ) -> list[np.ndarray | str]:
        """See WritingTeacher. The result is a function of the requests and their order."""
        # transformers samples a batch from torch's global generator: requests cannot have seeds of their own.
        torch.manual_seed(int(seeds[0]))
        tokens, offsets = self.generate(
            prompts,
            limits,
            do_sample=True,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )
        return list(np.split(tokens, offsets[1:-1]))


def repeats_of(device: str) -> float:
    """Nats by which the answers to one text may differ there: a GPU's kernels may add in another order each time, unless
    they are told not to (`deterministic`)."""
    return REPEATS if device == "cuda" and not deterministic() else 0.0


def _beat(_tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """A logits processor that changes nothing: transformers calls it once for every new token."""
    beat()
    return scores
