"""A teacher with a tokenizer of its own: it reads the student's text, and its scores are brought back to the student's tokens.

Around a teacher of any backend, which sees trajectories of its own tokens and nothing else. What is exact, and what is
by a rule, is in `actors/teacher/alignment.py`.
"""

import time
from dataclasses import replace
from typing import Any

import numpy as np

from actors.config import StudentConfig, TeacherConfig
from actors.data.models import context_length, find_model, load_config
from actors.data.tokenizer import load_tokenizer, stop_token_ids
from actors.teacher.alignment import make_reader, shares
from actors.teacher.backends import backend_of
from actors.teacher.base import TeacherCounts
from actors.trajectory import FINISH_REASONS, TeacherScores, Trajectories, offsets_of, ragged_rows, select_trajectories

UNBOUNDED = 1 << 31


class ForeignTeacher:
    """Scores, and writes, for a student whose tokens are others."""

    def __init__(self, backend: type, config: TeacherConfig, key: str, student: StudentConfig, chat: bool):
        """Loads the teacher of this backend and both tokenizers; chat: responses follow a chat template.

        UserError: as the backend, or a tokenizer whose tokens are not pieces of text.
        """
        assert config.tokenizer is not None
        self._name = key.rpartition(".")[2]
        self._student = load_tokenizer(student.model, student.trust_remote_code, "student.model")
        self._own = load_tokenizer(config.tokenizer, config.trust_remote_code, f"{key}.tokenizer")
        self._reader = make_reader(self._student, self._own, f"{key}.tokenizer", chat)
        directory = find_model(config.tokenizer, f"{key}.tokenizer", weights=False, code=config.trust_remote_code)
        self._stop = sorted({self._reader.end, *stop_token_ids(directory, self._own)})
        self._context = UNBOUNDED
        if backend_of(config, key).has_model_files:
            network = load_config(config.model, config.trust_remote_code, f"{key}.model")
            self._context = min(context_length(network), int(config.engine.get("max_model_len") or UNBOUNDED)) - 1
        self._teacher: Any = backend(config, key)
        self._busy_seconds = 0.0

    def score(
        self,
        ids: np.ndarray,
        *batches: Trajectories,
        prompts: tuple[np.ndarray, np.ndarray],
        log_weights: np.ndarray | None = None,
    ) -> tuple[TeacherCounts, TeacherScores]:
        """As TeacherActor.score; prompts: as this teacher reads them, in its own tokens.

        A token that the teacher cannot read, and what follows it, has no score: NaN, and is counted.
        """
        start = time.perf_counter()
        written = select_trajectories(ids, batches)
        read, groups, our_groups = self._translate(written, prompts)
        total = len(written.response_tokens)
        sums: np.ndarray = np.zeros(0)
        if len(read):
            scored = self._teacher.score(read.ids, read)[1].logprobs
            sums = np.bincount(groups, scored.astype(np.float64))
        logprobs = shares(our_groups, sums, written.behaviour_logprobs).astype(np.float32)
        nothing = np.empty((total, 0), np.float32)
        scores = TeacherScores(
            ids=written.ids,
            response_offsets=written.response_offsets,
            logprobs=logprobs,
            teacher=self._name,
            log_weights=np.zeros(len(ids), np.float32) if log_weights is None else log_weights,
            support_ids=nothing.astype(np.int32),
            support_logprobs=nothing,
        )
        seconds = time.perf_counter() - start
        self._busy_seconds += seconds
        return TeacherCounts(int(np.isnan(logprobs).sum()), seconds), scores

    def generate(
        self,
        prompt_tokens: np.ndarray,
        prompt_offsets: np.ndarray,
        max_response_tokens: int,
        stop_token_ids: list[int],
        pad_token_id: int,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The teacher's own responses to B prompts in its tokens, as the student's tokens [N] and offsets [B + 1]."""
        tokens, offsets = self._teacher.generate(
            prompt_tokens, prompt_offsets, max_response_tokens, self._stop, self._reader.end
        )
        rows = []
        for written in np.split(tokens, offsets[1:-1]):
            ended = len(written) > 0 and written[-1] in self._stop
            text = self._own.decode(written[: len(written) - ended], skip_special_tokens=True)
            told = self._student(text, add_special_tokens=False)["input_ids"]
            rows.append(np.array([*told, *(stop_token_ids[:1] if ended else [])], np.int32))
        return np.concatenate(rows), offsets_of(map(len, rows))

    def status(self) -> dict[str, float]:
        """Busy seconds so far, and the mean log-prob of the self-test's probe."""
        return {**self._teacher.status(), "busy_seconds": self._busy_seconds}

    def _translate(
        self, written: Trajectories, prompts: tuple[np.ndarray, np.ndarray]
    ) -> tuple[Trajectories, np.ndarray, np.ndarray]:
        """(what the teacher can read of it, M tokens in all; the group of each; that of each of the student's N)."""
        stop = FINISH_REASONS.index("stop")
        rooms = self._context - np.diff(prompts[1])
        tokens, groups, our_groups, base = [], [], [], 0
        for row, response in enumerate(np.split(written.response_tokens, written.response_offsets[1:-1])):
            ended = written.finish_reasons[row] == stop
            read, theirs, ours = self._reader.read(response.tolist(), bool(ended), max(0, int(rooms[row])))
            tokens.append(np.array(read, np.int32))
            groups.append(theirs + base)
            our_groups.append(np.where(ours >= 0, ours + base, -1))
            base += theirs.max(initial=-1) + 1
        rows = np.flatnonzero([len(read) > 0 for read in tokens])  # no backend is asked about nothing
        flat = np.concatenate([*tokens, np.zeros(0, np.int32)])
        nowhere = np.zeros(len(flat), np.float32)
        found = replace(
            written,
            ids=written.ids[rows],
            prompt_tokens=ragged_rows(prompts[0], prompts[1], rows),
            prompt_offsets=offsets_of(np.diff(prompts[1])[rows]),
            response_tokens=flat,
            response_offsets=offsets_of(len(tokens[row]) for row in rows),
            behaviour_logprobs=nowhere,
            policy_versions=nowhere.astype(np.int32),
            finish_reasons=written.finish_reasons[rows],
            support_ids=np.zeros((0, 0), np.int32),
            rewards=np.zeros(0, np.float32),
        )
        return found, np.concatenate(groups), np.concatenate(our_groups)
