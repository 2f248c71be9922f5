"""A teacher that vLLM runs: for models that need several GPUs, or one of vLLM's quantisations.

vLLM computes the log-probs of a prompt's tokens (`prompt_logprobs`); the trajectory is sent as the prompt, and one token,
which is thrown away, is sampled after it. They are kept as the tensors that the engine has computed: vLLM would make a
Python object of each log-prob, and we arrays of those again. Nothing is detokenised. What the engine does not offer, `student_topk` and `hidden`, is refused by the configuration.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.config import TeacherConfig
from actors.data.models import load_config
from actors.errors import UserError
from actors.teacher.base import Scorer
from actors.trajectory import Trajectories, offsets_of
from actors.vllm_startup import build_llm, importing_vllm

REPEATS = 0.02
"""Nats by which an answer may differ when asked again: batches are cut differently, and kernels follow their shape."""


class VllmTeacher(Scorer):
    """One frozen model in a vLLM engine of this process, or of one process for each GPU it is spread over."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Loads the model; `key` is the configuration key that errors name, vocabulary the student's output rows."""
        self._config, self._name = config, key.rpartition(".")[2]
        rows = load_config(config.model, config.trust_remote_code, f"{key}.model").get_text_config().vocab_size
        self._rows, self._vocabulary = rows, min(rows, vocabulary or rows)
        asked = {"sampled": 0, "topk": min(config.top_k, self._vocabulary), "full": rows}
        self._asked = asked[config.signal]
        options = {
            "model": config.model,
            "dtype": config.dtype,
            "tensor_parallel_size": config.tensor_parallel_size,
            "trust_remote_code": config.trust_remote_code,
            "max_logprobs": -1,
            "logprobs_mode": "raw_logprobs",
            # Requests that ask for the log-probs of their prompt do not read the prefix cache.
            "enable_prefix_caching": False,
            # vLLM holds [tokens of a step, vocabulary] log-probs at a time.
            "max_num_batched_tokens": config.microbatch_tokens,
        }
        keep_tensors()
        self._llm = build_llm(options, config.engine, f"teachers.{self._name}.engine")
        self._self_test(key, self._vocabulary, REPEATS)

    def _forward(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """As Scorer. UserError: a trajectory is longer than the engine's context."""
        from vllm import SamplingParams

        # A token that the engine has no row for would end it; its score is masked afterwards.
        known = np.minimum(trajectories.response_tokens, self._rows - 1)
        texts = [
            np.concatenate(pair).tolist()
            for pair in zip(
                np.split(trajectories.prompt_tokens, trajectories.prompt_offsets[1:-1]),
                np.split(known, trajectories.response_offsets[1:-1]),
                strict=True,
            )
        ]
        room = self._llm.llm_engine.model_config.max_model_len
        if (longest := max(map(len, texts), default=0)) >= room:
            raise UserError(f"teachers.{self._name}.engine.max_model_len", room, f"more than {longest} tokens")
        params = SamplingParams(prompt_logprobs=self._asked, max_tokens=1, temperature=0.0, detokenize=False)
        answers = self._llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
        tokens, logprobs = flat_rows([answer.prompt_logprobs for answer in answers], trajectories.lengths)
        assert np.array_equal(tokens[:, 0], known), "vLLM has scored other tokens than it was asked for"
        return {"logprobs": logprobs[:, 0].copy(), **self._support(tokens[:, 1:], logprobs[:, 1:])}

    def _support(self, tokens: np.ndarray, logprobs: np.ndarray) -> dict[str, np.ndarray]:
        """From what vLLM names at each position, [N, asked], to the fields of the signal."""
        total = len(tokens)
        nothing = np.empty((total, 0), np.float32)
        fields = {"support_ids": nothing.astype(np.int32), "support_logprobs": nothing, "hidden": nothing}
        if self._config.signal == "topk":
            fields |= {"support_ids": tokens, "support_logprobs": logprobs}
        elif self._config.signal == "full":
            by_token = np.empty((total, self._rows), np.float32)
            np.put_along_axis(by_token, tokens.astype(np.int64), logprobs, axis=1)
            fields["support_logprobs"] = by_token[:, : self._vocabulary]
        return fields

    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_offsets: np.ndarray,
        max_response_tokens: int,
        stop_token_ids: list[int],
        pad_token_id: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's own greedy responses to B prompts: (tokens [N], offsets [B + 1])."""
        from vllm import SamplingParams

        params = SamplingParams(
            max_tokens=max_response_tokens, temperature=0.0, stop_token_ids=stop_token_ids, detokenize=False
        )
        prompts = [{"prompt_token_ids": row.tolist()} for row in np.split(prompt_tokens, prompt_offsets[1:-1])]
        answers = self._llm.generate(prompts, params, use_tqdm=False)
        rows = [np.asarray(answer.outputs[0].token_ids, np.int32) for answer in answers]
        return np.concatenate(rows), offsets_of(map(len, rows))


def keep_tensors() -> None:
    """From here on this process's engines answer `prompt_logprobs` with [None, LogprobsTensors, …], one for each part that
    they computed of the prompt. The names are private to vLLM; the self-test fails where they are gone."""
    with importing_vllm():
        from vllm.v1.engine import logprobs, output_processor

    class Kept(logprobs.LogprobsProcessor):
        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            kept: Any = self.prompt_logprobs
            kept.append(prompt_logprobs_tensors)

    output_processor.LogprobsProcessor = Kept  # type: ignore[misc]


def flat_rows(answers: Sequence[Any], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of what `keep_tensors` makes of each prompt, (token ids int32, log-probs float32), [N, 1 + asked] each, of its last
    tokens, as many as `lengths` says: the token of the prompt first, then the most likely ones."""
    parts = [[np.concatenate([t[field].numpy() for t in kept[1:]]) for kept in answers] for field in (0, 1)]
    tokens, logprobs = (
        np.concatenate([row[-length:] for row, length in zip(rows, lengths, strict=True)]) for rows in parts
    )
    return tokens.astype(np.int32, copy=False), logprobs.astype(np.float32, copy=False)
