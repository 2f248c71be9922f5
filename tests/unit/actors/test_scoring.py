"""Implausible scores are masked and counted, whichever backend computed them."""

import numpy as np
import pytest

from actors.config import TeacherConfig
from actors.teacher.base import Teacher, probe
from actors.trajectory import Trajectories


class Constant(Teacher):
    """Always returns these fields."""

    def __init__(self, fields: dict[str, np.ndarray]):
        super().__init__(TeacherConfig("m"), "teachers.wise", 40)
        self._fields = fields

    def score_tokens(self, trajectories: Trajectories) -> dict[str, np.ndarray]:
        return self._fields


@pytest.mark.parametrize(
    ("where", "wrong"),
    [
        *(("logprobs", wrong) for wrong in (np.nan, np.inf, -np.inf, 0.5, -9999.0)),
        *(("vocabulary", wrong) for wrong in (np.nan, np.inf, -np.inf, 0.5)),
    ],
)
def test_a_score_that_cannot_be_true_masks_its_token_and_is_counted(where: str, wrong: float) -> None:
    written = probe(40)
    count = len(written.response_tokens)

    fields = {
        "logprobs": np.full(count, -2.0, np.float32),
        "support_ids": np.zeros((count, 0), np.int32),
        "support_logprobs": np.full((count, 40), -3.0, np.float32),
    }
    fields["support_logprobs" if where == "vocabulary" else where].reshape(count, -1)[5, -1] = wrong
    counts, scores = Constant(fields).score(written.ids, written)
    assert counts.missing == 1
    assert np.flatnonzero(np.isnan(scores.logprobs)).tolist() == [5]


@pytest.mark.parametrize(
    ("token", "wrong"), [(4, np.nan), (4, np.inf), (4, -np.inf), (4, 0.5), (40, -3.0), (-1, -3.0), (2**31 - 1, -3.0)]
)
def test_an_entry_of_a_support_that_cannot_be_true_is_left_out_alone(token: int, wrong: float) -> None:
    """A support with one unknown token is a smaller support; only a support with nothing left masks its token."""
    written = probe(40)
    count = len(written.response_tokens)
    fields = {
        "logprobs": np.full(count, -2.0, np.float32),
        "support_ids": np.tile(np.array([[1, 2, 3]], np.int32), (count, 1)),
        "support_logprobs": np.full((count, 3), -3.0, np.float32),
    }
    fields["support_ids"][5, 1], fields["support_logprobs"][5, 1] = token, wrong
    fields["support_ids"][7], fields["support_logprobs"][7] = token, wrong
    counts, scores = Constant(fields).score(written.ids, written)
    assert counts.missing == 1 and np.flatnonzero(np.isnan(scores.logprobs)).tolist() == [7]
    assert np.argwhere(np.isnan(scores.support_logprobs)).tolist() == [[5, 1], [7, 0], [7, 1], [7, 2]]
    assert scores.support_ids[5].tolist() == [1, 0, 3], "an id that the learner can look up"


def test_scores_at_the_edge_of_what_can_be_true_are_kept() -> None:
    written = probe(40)
    count = len(written.response_tokens)
    edges = np.linspace(-999, 0, count, dtype=np.float32)
    fields = {"logprobs": edges, "support_logprobs": np.zeros((count, 0), np.float32),
              "support_ids": np.zeros((count, 0), np.int32)}  # fmt: skip
    counts, scores = Constant(fields).score(written.ids, written)
    assert counts.missing == 0 and np.array_equal(scores.logprobs, edges)
