"""A teacher with its own tokenizer: it reads the student's text, and its scores are mapped back to the student's tokens.

It wraps a teacher of any backend, which only sees trajectories in its own tokens. `alignment.py` explains which log-probs
are exact and which follow a rule. Shapes: N tokens of the student, M of the teacher.
"""

import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from actors.config import StudentConfig, TeacherConfig
from actors.data.models import find_model
from actors.data.tokenizer import load_tokenizer, stop_token_ids
from actors.teacher.alignment import make_reader, shares
from actors.teacher.backends import backend_of
from actors.teacher.base import UNBOUNDED, Teacher, TeacherCounts, context_of
from actors.teacher_scores import TeacherScores
from actors.trajectory import (
    FINISH_REASONS,
    Limits,
    Prompts,
    Trajectories,
    offsets_of,
    ragged_rows,
    select_trajectories,
)


class CrossTokenizerTeacher(Teacher):
    """Scores, and answers, for a student with another tokenizer. The signal is always `sampled`."""

    def __init__(
        self,
        teacher: type,
        config: TeacherConfig,
        key: str,
        student: StudentConfig,
        chat: bool,
        arguments: Mapping[str, Any] | None = None,
    ):
        """Loads both tokenizers, and builds a teacher of the class `teacher`.

        chat: responses follow a chat template, with the arguments of the prompts, so the template's end token ends them.
        UserError: a tokenizer whose
        tokens are not pieces of text, or see the class.
        """
        super().__init__(config, key)
        assert config.tokenizer is not None
        self._student = load_tokenizer(student.model, student.trust_remote_code, "student.model")
        self._own = load_tokenizer(config.tokenizer, config.trust_remote_code, f"{key}.tokenizer")
        self._reader = make_reader(self._student, self._own, f"{key}.tokenizer", chat, arguments)
        directory = find_model(config.tokenizer, f"{key}.tokenizer", weights=False, code=config.trust_remote_code)
        self._stop = sorted({self._reader.end, *stop_token_ids(directory, self._own)})
        self._context = UNBOUNDED
        if backend_of(config, key).has_model_files:
            self._context = context_of(config, key)
        # A server is asked which ids it accepts; a model's files say it themselves.
        rows = None if backend_of(config, key).has_model_files else len(self._own)
        self._teacher: Any = teacher(config, key, rows)

    def score(
        self,
        ids: np.ndarray,
        *batches: Trajectories,
        prompts: Prompts | None = None,
        log_weights: np.ndarray | None = None,
    ) -> tuple[TeacherCounts, TeacherScores]:
        """See Teacher. prompts is required: the prompts in the teacher's own tokens.

        Groups of tokens that spell the same bytes have an exact log-prob, the sum of the teacher's tokens' in it. It is
        divided among the student's tokens of the group (see `shares`). The first token that the teacher cannot read and
        all later ones have no score: NaN, counted as missing.
        """
        assert prompts is not None, "the student's prompts are tokens of another tokenizer"
        start = time.perf_counter()
        written = select_trajectories(ids, batches)
        read, groups, our_groups = self._translate(written, prompts)
        sums: np.ndarray = np.zeros(0)
        refused: dict[int, str] = {}
        if len(read):
            counts, found = self._teacher.score(read.ids, read)
            scored = found.logprobs
            rows = {tuple(id_): row for row, id_ in enumerate(written.ids.tolist())}
            refused = {rows[tuple(read.ids[row].tolist())]: reason for row, reason in counts.refused.items()}
            # A missing score (NaN) makes the sum of its group NaN: a partial sum is not the group's log-prob.
            sums = np.bincount(groups, scored.astype(np.float64))
        nothing = np.empty((len(written.response_tokens), 0), np.float32)
        scores = TeacherScores(
            ids=written.ids,
            response_offsets=written.response_offsets,
            logprobs=shares(our_groups, sums, written.student_logprobs).astype(np.float32),
            teacher=self.name,
            log_weights=np.zeros(len(ids), np.float32) if log_weights is None else log_weights,
            support_ids=nothing.astype(np.int32),
            support_logprobs=nothing,
        )
        return self._counted(scores, written.trained, start)._replace(refused=refused), scores

    def generate(self, prompts: Prompts, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """Greedy responses to B prompts in the teacher's tokens, as the student's tokens [N] and offsets [B + 1].

        limits: the length counts the teacher's tokens. If one of the teacher's stop tokens ended a response, it gets the
        student's first stop token in its place.
        """
        tokens, offsets = self._teacher.generate(prompts, Limits(limits.max_response_tokens, self._stop))
        rows = []
        for written in np.split(tokens, offsets[1:-1]):
            ended = len(written) > 0 and written[-1] in self._stop
            text = self._own.decode(written[: len(written) - ended], skip_special_tokens=True)
            ours = self._student(text, add_special_tokens=False)["input_ids"]
            rows.append(np.array([*ours, *(limits.stop_token_ids[:1] if ended else [])], np.int32))
        return np.concatenate(rows), offsets_of(map(len, rows))

    def full_length_test(self, tokens: int) -> None:
        """See HttpTeacher. The response may have another number of the teacher's tokens; what is longer is refused."""
        self._teacher.full_length_test(tokens)

    def status(self) -> dict[str, float]:
        """See Teacher. The probe is that of the wrapped teacher."""
        return {**self._teacher.status(), "busy_seconds": self._busy_seconds}

    def _translate(self, written: Trajectories, prompts: Prompts) -> tuple[Trajectories, np.ndarray, np.ndarray]:
        """(trajectories in the teacher's tokens, group of each teacher token [M], group of each student token [N]).

        Group numbers continue from one trajectory to the next. Trajectories without a readable token are left out.
        """
        stop = FINISH_REASONS.index("stop")
        rooms = self._context - np.diff(prompts.offsets)
        tokens, groups, our_groups, base = [], [], [], 0
        for row, response in enumerate(np.split(written.response_tokens, written.response_offsets[1:-1])):
            ended = written.finish_reasons[row] == stop
            read, theirs, ours = self._reader.read(response.tolist(), bool(ended), max(0, int(rooms[row])))
            tokens.append(np.array(read, np.int32))
            groups.append(theirs + base)
            our_groups.append(np.where(ours >= 0, ours + base, -1))
            base += theirs.max(initial=-1) + 1
        rows = np.flatnonzero([len(read) > 0 for read in tokens])  # backends need not know empty responses
        flat = np.concatenate([*tokens, np.zeros(0, np.int32)])
        zeros = np.zeros(len(flat), np.float32)
        found = Trajectories(  # of the fields with a default, a teacher with the signal `sampled` reads none
            ids=written.ids[rows],
            prompt_tokens=ragged_rows(prompts.tokens, prompts.offsets, rows),
            prompt_offsets=offsets_of(np.diff(prompts.offsets)[rows]),
            response_tokens=flat,
            response_offsets=offsets_of(len(tokens[row]) for row in rows),
            behaviour_logprobs=zeros,
            policy_versions=zeros.astype(np.int32),
            finish_reasons=written.finish_reasons[rows],
        )
        return found, np.concatenate(groups), np.concatenate(our_groups)
