"""The teacher backend `vllm`: for models that need several GPUs, or one of vLLM's quantisations.

vLLM computes the log-probs of a prompt's tokens (`prompt_logprobs`), so the trajectory is sent as the prompt. vLLM always
samples at least one token after it, which is discarded. The log-probs stay in the tensors that the engine computed: by
default vLLM makes a Python object of each, which takes far longer (benchmarks/teacher_path.py).
With `student_topk` it scores the tokens that the student has named (`prompt_logprob_token_ids`), which only its second model
runner can do: it needs Triton, so a GPU. `hidden` it cannot send.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from actors.config import SamplingConfig, TeacherConfig
from actors.data.models import find_model, vocabulary_rows
from actors.errors import UserError
from actors.teacher.backends import NAMED_TOKENS, full_tokens
from actors.teacher.base import REPEATS, UNBOUNDED, known_prompts, texts_of
from actors.teacher.writing import WritingTeacher
from actors.teacher_scores import normalised
from actors.trajectory import Limits, Prompts, Trajectories, offsets_of
from actors.vllm_logits import EXTENSION
from actors.vllm_startup import build_llm, importing_vllm

OF_A_TEXT: dict[str, Any] = {"max_tokens": 1, "temperature": 0.0, "detokenize": False}
"""How a text is asked for. vLLM samples one token after it."""
LEAST_BATCH, SEQUENCES = 2048, 64
"""A step of fewer tokens has at most so many requests; vLLM's own number may be above the tokens."""


class VllmTeacher(WritingTeacher):
    """One frozen model in a vLLM engine of this process, or of one process for each GPU it is spread over."""

    def __init__(self, config: TeacherConfig, key: str = "teacher", vocabulary: int | None = None):
        """Loads the model. UserError: an option of `engine` that vLLM does not know. CampaignError: see `self_test`."""
        super().__init__(config, key, vocabulary)
        rows = vocabulary_rows(config.model, config.trust_remote_code, f"{key}.model")
        self._rows, self.vocabulary = rows, min(rows, self.vocabulary)
        asked = {"sampled": 0, "topk": min(config.top_k, self.vocabulary), "full": rows}
        self._asked = asked.get(config.signal, 0)
        # Log-probs of a whole text over the whole vocabulary are in memory at once; of longer ones there are none.
        self._at_once = full_tokens(rows) if config.signal == "full" else UNBOUNDED
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
            "max_num_batched_tokens": min(config.microbatch_tokens, self._at_once),
        }
        if self._at_once < LEAST_BATCH:  # vLLM takes no more requests than tokens in a step
            options["max_num_seqs"] = min(SEQUENCES, self._at_once)
        keep_tensors()
        self._llm = build_llm(options, config.engine, f"{key}.engine", config.gpus_per_replica)
        self._llm.collective_rpc("shape_logits", args=(self.temperature,))
        # It writes one token after what it scores.
        self.context = min(self._llm.llm_engine.model_config.max_model_len - 1, self._at_once)
        if config.signal == "student_topk" and not self._llm.llm_engine.vllm_config.use_v2_model_runner:
            raise UserError(f"{key}.signal", "student_topk", NAMED_TOKENS)
        self.self_test(repeats=REPEATS)

    def score_tokens(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        """See Teacher."""
        from vllm import SamplingParams

        texts = texts_of(trajectories)
        prompts = [{"prompt_token_ids": text} for text in texts]
        if self.config.signal == "student_topk":
            named = [SamplingParams(**OF_A_TEXT, **one) for one in named_requests(trajectories, self._rows)]
            return named_scores(self._llm.generate(prompts, named, use_tqdm=False), trajectories)
        params = SamplingParams(prompt_logprobs=self._asked, **OF_A_TEXT)
        fields: dict[str, np.ndarray] = {}
        # In groups of as many tokens as are in memory at once; all in one where the signal is narrow.
        for first, last in groups([len(text) for text in texts], self._at_once):
            answers = self._llm.generate(prompts[first:last], params, use_tqdm=False)
            kept = [answer.prompt_logprobs for answer in answers]
            tokens, logprobs = flat_rows(kept, trajectories.lengths[first:last])
            places = slice(*trajectories.response_offsets[[first, last]])
            # The rows are cut from the end of the kept chunks; a shift by one would otherwise go unnoticed.
            assert np.array_equal(tokens[:, 0], trajectories.response_tokens[places]), (
                "vLLM has scored other tokens than it was asked for"
            )
            found = {"logprobs": logprobs[:, 0], **self._support(tokens[:, 1:], logprobs[:, 1:])}
            for name, values in found.items():
                shape = (len(trajectories.response_tokens), *values.shape[1:])
                fields.setdefault(name, np.empty(shape, values.dtype))[places] = values
        return fields

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
        prompts, limits = known_prompts(prompts, limits, self.vocabulary)
        rows = self._written(prompts, limits, [{"temperature": 0.0}] * len(prompts.rows()))
        return np.concatenate(rows), offsets_of(map(len, rows))

    def write(
        self, prompts: Prompts, limits: Limits, sampling: SamplingConfig, seeds: np.ndarray
    ) -> list[np.ndarray | str]:
        """See WritingTeacher. A response depends on its prompt and seed, not on the batch."""
        # The model's own logits are tempered already (`shape_logits`).
        drawn = {
            "temperature": sampling.temperature / self.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
        }
        return [*self._written(prompts, limits, [{**drawn, "seed": seed} for seed in seeds.tolist()])]

    def _written(self, prompts: Prompts, limits: Limits, options: Sequence[dict[str, Any]]) -> list[np.ndarray]:
        """The tokens of a response to each prompt, the stop token included. options: of vLLM's SamplingParams, for each."""
        from vllm import SamplingParams

        ends: dict[str, Any] = {
            "max_tokens": limits.max_response_tokens,
            "stop_token_ids": limits.stop_token_ids,
            "detokenize": False,
        }
        texts = [{"prompt_token_ids": row.tolist()} for row in prompts.rows()]
        params = [SamplingParams(**ends, **one) for one in options]
        answers = self._llm.generate(texts, params, use_tqdm=False)
        return [np.asarray(answer.outputs[0].token_ids, np.int32) for answer in answers]


def named_requests(trajectories: Trajectories, rows: int) -> Iterator[dict[str, Any]]:
    """For each trajectory, the arguments of vLLM's SamplingParams that score its own tokens and those that it names.

    `prompt_logprob_token_ids` [n, 1 + K]: the token itself, then its support; -1, which vLLM leaves out, for an id that is
    not below `rows`. Row i predicts token `prompt_logprob_start` + i + 1 of the text, so the prompt's last token comes first.
    """
    ids = np.concatenate([trajectories.response_tokens[:, None], trajectories.support_ids], axis=1)
    ids = np.where((ids >= 0) & (ids < rows), ids, -1).astype(np.int32)
    starts = np.diff(trajectories.prompt_offsets) - 1
    for start, own in zip(starts, np.split(ids, trajectories.response_offsets[1:-1]), strict=True):
        yield {"prompt_logprob_token_ids": own, "prompt_logprob_start": int(start)}


def named_scores(answers: Sequence[Any], trajectories: Trajectories) -> dict[str, Any]:
    """The fields of `score_tokens` from vLLM's answers to `named_requests`. -inf: the token has no score.

    An answer without scores, or with those of another number of tokens, refuses its trajectory.
    """
    width = 1 + trajectories.support_ids.shape[1]
    found: list[np.ndarray] = []
    refused: dict[int, str] = {}
    for row, (answer, length) in enumerate(zip(answers, trajectories.lengths, strict=True)):
        scores = answer.prompt_token_id_logprobs
        if scores is None or scores.shape != (length, width):
            shape = "nothing" if scores is None else f"{list(scores.shape)}"
            refused[row] = f"vLLM scored {shape}, expected {[int(length), width]} named tokens"
            scores = np.full((length, width), np.nan, np.float32)
        found.append(scores)
    logprobs = np.concatenate(found).astype(np.float32, copy=False)
    return {
        "logprobs": logprobs[:, 0].copy(),
        "support_ids": trajectories.support_ids.copy(),
        "support_logprobs": logprobs[:, 1:].copy(),
        "refused": refused,
    }


def groups(lengths: Sequence[int], tokens: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of neighbours that have at most so many tokens together; a longer one is alone."""
    first, held = 0, 0
    for place, length in enumerate(lengths):
        if place > first and held + length > tokens:
            yield first, place
            first, held = place, 0
        held += length
    yield first, len(lengths)


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
