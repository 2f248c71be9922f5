"""The teacher backend `vllm`: for models that need several GPUs, or one of vLLM's quantisations.

vLLM computes the log-probs of a prompt's tokens (`prompt_logprobs`), so the trajectory is sent as the prompt. vLLM always
samples at least one token after it, which is discarded. The log-probs stay in the tensors that the engine computed: by
default vLLM makes a Python object of each, which takes far longer (benchmarks/teacher_path.py).
vLLM cannot send the signals `student_topk` and `hidden`, so the backend's row in backends.py does not have them.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from actors.config import TeacherConfig
from actors.data.models import find_model, load_config
from actors.teacher.base import Teacher, known_prompts, texts_of
from actors.trajectory import Limits, Prompts, Trajectories, normalised, offsets_of
from actors.vllm_logits import EXTENSION
from actors.vllm_startup import build_llm, importing_vllm

REPEATS = 0.02
"""Nats by which an answer may differ when asked again: the engine may batch differently, and rounding depends on shapes."""


class VllmTeacher(Teacher):
    """One frozen model in a vLLM engine of this process, or of one process for each GPU it is spread over."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Loads the model. UserError: an option of `engine` that vLLM does not know. CampaignError: see `self_test`."""
        super().__init__(config, key, vocabulary)
        rows = load_config(config.model, config.trust_remote_code, f"{key}.model").get_text_config().vocab_size
        self._rows, self.vocabulary = rows, min(rows, self.vocabulary)
        asked = {"sampled": 0, "topk": min(config.top_k, self.vocabulary), "full": rows}
        self._asked = asked[config.signal]
        options = {
            "model": str(find_model(config.model, f"{key}.model", code=config.trust_remote_code)),
            "dtype": config.dtype,
            "tensor_parallel_size": config.tensor_parallel_size,
            "trust_remote_code": config.trust_remote_code,
            "max_logprobs": -1,  # no limit; by default vLLM refuses more than 20
            "logprobs_mode": "raw_logprobs",  # of the logits as `shape_logits` leaves them, whatever a request asks for
            "worker_extension_cls": EXTENSION,
            # Requests that ask for the log-probs of their prompt do not read the prefix cache.
            "enable_prefix_caching": False,
            # Bounds memory: vLLM holds [tokens of a step, vocabulary] log-probs at a time.
            "max_num_batched_tokens": config.microbatch_tokens,
        }
        keep_tensors()
        self._llm = build_llm(options, config.engine, f"{key}.engine", config.gpus_per_replica)
        self._llm.collective_rpc("shape_logits", args=(self.temperature,))
        # It writes one token after what it scores.
        self.context = self._llm.llm_engine.model_config.max_model_len - 1
        self.self_test(repeats=REPEATS)

    def score_tokens(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """See Teacher."""
        from vllm import SamplingParams

        texts = texts_of(trajectories)
        params = SamplingParams(prompt_logprobs=self._asked, max_tokens=1, temperature=0.0, detokenize=False)
        answers = self._llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
        tokens, logprobs = flat_rows([answer.prompt_logprobs for answer in answers], trajectories.lengths)
        # The rows are cut from the end of the kept chunks; a shift by one would otherwise go unnoticed.
        assert np.array_equal(tokens[:, 0], trajectories.response_tokens), (
            "vLLM has scored other tokens than it was asked for"
        )
        return {"logprobs": logprobs[:, 0].copy(), **self._support(tokens[:, 1:], logprobs[:, 1:])}

    def _support(self, tokens: np.ndarray, logprobs: np.ndarray) -> dict[str, np.ndarray]:
        """The support fields of the signal, from the likeliest tokens and their log-probs, [N, asked] each."""
        if self.config.signal == "topk":
            return {"support_ids": tokens, "support_logprobs": logprobs}
        if self.config.signal == "full":  # vLLM orders by log-prob, TeacherScores by token id
            by_token = np.empty((len(tokens), self._rows), np.float32)
            np.put_along_axis(by_token, tokens.astype(np.int64), logprobs, axis=1)
            return {"support_logprobs": normalised(by_token[:, : self.vocabulary])}
        return {}

    def generate(self, prompts: Prompts, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """Greedy responses: see Teacher."""
        from vllm import SamplingParams

        prompts, limits = known_prompts(prompts, limits, self.vocabulary)
        params = SamplingParams(
            max_tokens=limits.max_response_tokens,
            temperature=0.0,
            stop_token_ids=limits.stop_token_ids,
            detokenize=False,
        )
        texts = [{"prompt_token_ids": row.tolist()} for row in prompts.rows()]
        answers = self._llm.generate(texts, params, use_tqdm=False)
        rows = [np.asarray(answer.outputs[0].token_ids, np.int32) for answer in answers]
        return np.concatenate(rows), offsets_of(map(len, rows))


def keep_tensors() -> None:
    """Makes the engines of this process answer `prompt_logprobs` with [None, LogprobsTensors, ...].

    There is one LogprobsTensors for each chunk of the prompt that the engine computed. The names that this replaces are
    private to vLLM; the self-test fails if a later release renames them.
    """
    with importing_vllm():
        from vllm.v1.engine import logprobs, output_processor

    class Kept(logprobs.LogprobsProcessor):
        def _update_prompt_logprobs(self, prompt_logprobs_tensors: Any) -> None:
            kept: Any = self.prompt_logprobs
            kept.append(prompt_logprobs_tensors)

    output_processor.LogprobsProcessor = Kept  # type: ignore[misc]


def flat_rows(answers: Sequence[Any], lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Flattens kept prompt log-probs (see `keep_tensors`) to (token ids int32, log-probs float32), [N, 1 + asked] each.

    answers: one list for each of B prompts. lengths: [B], how many of its last tokens to keep; they add up to N.
    Column 0 is the prompt's own token, the others are the most likely tokens.
    """
    # Entry 0 is None: nothing predicts a prompt's first token.
    parts = [[np.concatenate([t[field].numpy() for t in kept[1:]]) for kept in answers] for field in (0, 1)]
    tokens, logprobs = (
        np.concatenate([row[-length:] for row, length in zip(rows, lengths, strict=True)]) for rows in parts
    )
    return tokens.astype(np.int32, copy=False), logprobs.astype(np.float32, copy=False)
