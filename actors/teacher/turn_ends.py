"""A teacher with the student's vocabulary that ends its turns with another token, as an instruct model does for a base one.

The two tokens change places in all that the teacher reads and sends of a response: where the student writes its end, the
teacher reads and scores its own. A swap is one-to-one, so the teacher's distribution stays one, and every signal works.
Shapes: N response tokens, K support, V the student's vocabulary.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from actors.config import SamplingConfig, TeacherConfig
from actors.teacher.base import Teacher, TeacherCounts
from actors.teacher_scores import TeacherScores, normalised
from actors.trajectory import Limits, Prompts, Requests, RolloutCounts, Trajectories


class TurnEnds(NamedTuple):
    """The tokens with which two models end a turn. Example: TurnEnds(student=151643, teacher=151645)."""

    student: int
    teacher: int

    def swapped(self, tokens: np.ndarray) -> np.ndarray:
        """The tokens, any shape, with each of the two in the other's place."""
        student, teacher = tokens.dtype.type(self.student), tokens.dtype.type(self.teacher)
        return np.where(tokens == student, teacher, np.where(tokens == teacher, student, tokens))


class TurnEndTeacher(Teacher):
    """Wraps a teacher of any backend."""

    def __init__(self, teacher: type, config: TeacherConfig, key: str, vocabulary: int, ends: TurnEnds):
        """Builds a teacher of the class `teacher`. vocabulary: V. Errors: see the class."""
        super().__init__(config, key, vocabulary)
        self._ends = ends
        # The teacher's own end may be a token that the student has no row for.
        self._teacher: Any = teacher(config, key, max(vocabulary, ends.teacher + 1))

    def score(
        self,
        ids: np.ndarray,
        *batches: Trajectories,
        prompts: Prompts | None = None,
        log_weights: np.ndarray | None = None,
    ) -> tuple[TeacherCounts, TeacherScores]:
        """See Teacher. Prompts are read as they are. With `hidden` the learner swaps the rows of the teacher's head."""
        read = [
            replace(
                batch,
                response_tokens=self._ends.swapped(batch.response_tokens),
                support_ids=self._ends.swapped(batch.support_ids),
            )
            for batch in batches
        ]
        counts, scores = self._teacher.score(ids, *read, prompts=prompts, log_weights=log_weights)
        named, support = self._ends.swapped(scores.support_ids), scores.support_logprobs
        if named.shape[1]:
            beyond = named >= self.vocabulary
            named, support = np.where(beyond, 0, named), np.where(beyond, np.float32(np.nan), support)
        elif support.shape[1]:
            support = swapped_columns(support, self._ends, self.vocabulary)
        return counts, replace(scores, support_ids=named, support_logprobs=support)

    def generate(self, prompts: Prompts, limits: Limits) -> tuple[np.ndarray, np.ndarray]:
        """See Teacher. The teacher's end stops a response, and is the student's in the result."""
        stop = self._ends.swapped(np.array(limits.stop_token_ids, np.int64)).tolist()
        tokens, offsets = self._teacher.generate(prompts, limits._replace(stop_token_ids=stop))
        return self._ends.swapped(tokens), offsets

    def sample(
        self,
        requests: Requests,
        policy_version: int,
        sampling: SamplingConfig,
        stop_token_ids: list[int],
        prompts: Prompts | None = None,
    ) -> tuple[RolloutCounts, Trajectories]:
        """See WritingTeacher."""
        stop = self._ends.swapped(np.array(stop_token_ids, np.int64)).tolist()
        counts, written = self._teacher.sample(requests, policy_version, sampling, stop, prompts)
        return counts, replace(written, response_tokens=self._ends.swapped(written.response_tokens))

    def status(self) -> dict[str, float]:
        """See Teacher."""
        return self._teacher.status()


def swapped_columns(logprobs_NV: np.ndarray, ends: TurnEnds, vocabulary: int) -> np.ndarray:
    """[N, V'] log-probs of all tokens with the columns of the two ends swapped, cut to the student's V and normalised."""
    order = ends.swapped(np.arange(logprobs_NV.shape[1]))
    swapped = logprobs_NV[:, order[:vocabulary]]
    return swapped if swapped.shape == logprobs_NV.shape else normalised(swapped)
