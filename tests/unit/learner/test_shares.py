"""Ranks that are each given their share of what teachers send take the update of ranks that are given all of it."""

import os
import pickle
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist

from actors.config import TeacherConfig
from actors.errors import CampaignError
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores, split_scores
from actors.trajectory import Trajectories, TrajectoryId
from learner.collate import minibatch_rows
from learner.config import ObjectiveConfig
from learner.learner import Learner
from learner.objective.estimator_table import reads_distribution
from learner.student.sharding import Ranks, own_rows, owners
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, sampled, teacher_config
from tests.unit.learner.test_sharding import run_ranks

SIZES = (2, 4)
"""With four, one rank has no trajectory in any of the two steps."""
EXTRAPOLATED = ObjectiveConfig(estimator="full", extrapolation=1.5, reference_teacher="base")
CASES: dict[str, tuple[str, ObjectiveConfig, bool]] = {
    "topk": ("topk", ObjectiveConfig(estimator="full"), False),
    "topk, sampled tokens alone": ("topk", ObjectiveConfig(), False),
    "full": ("full", EXTRAPOLATED, True),
    "hidden": ("hidden", EXTRAPOLATED, True),
    "student_topk": ("student_topk", EXTRAPOLATED, True),
}
"""Signal, objective, and whether two teachers are mixed, beside which there is a reference teacher."""
MINIBATCHES = 2


@dataclass
class Material:
    """What all ranks are given."""

    models: dict[str, Path]
    written: Trajectories
    scores: dict[str, list[TeacherScores]]
    """By case."""
    folder: Path

    def learner(self, case: str, ranks: Ranks | None) -> Learner:
        signal, objective, _ = CASES[case]
        teachers = {name: self.teacher(name, signal) for name in ("teacher", "second", "base")}
        return make_learner(
            self.models, ranks=ranks, teachers=teachers, objective=objective, minibatches_per_update=MINIBATCHES
        )

    def teacher(self, name: str, signal: str) -> TeacherConfig:
        model = {"teacher": "other", "second": "student", "base": "base"}[name]
        return teacher_config(self.models, model, signal)


def spoiled(scores: TeacherScores, token: int) -> TeacherScores:
    """This token has no support left, or where there is none no score."""
    logprobs, support, hidden = scores.logprobs.copy(), scores.support_logprobs.copy(), scores.hidden.copy()
    if support.size:
        support[token] = np.nan
    else:
        logprobs[token], hidden[token] = np.nan, np.nan
    return replace(scores, logprobs=logprobs, support_logprobs=support, hidden=hidden)


@pytest.fixture(scope="module")
def material(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("shares")
    models = {**models, "base": make_tiny_model(folder / "base", hidden=32, layers=1, seed=11)}
    written, _ = sampled(models, "other", "student_topk")
    made = Material(models, written, {}, folder)
    share = np.log(np.array([0.25] * 4, np.float32))
    for case, (signal, _, mixed) in CASES.items():
        # The first teaches all, the second with it the first four; the second has fewer rows in its output layer.
        weights = np.concatenate([share, np.zeros(2, np.float32)]) if mixed else None
        first = LocalTeacher(made.teacher("teacher", signal), "teachers.teacher")
        batches = [first.score(written.ids[rows], written, log_weights=None if weights is None else weights[rows])[1]
                   for rows in (slice(1, 6), slice(0, 1))]  # fmt: skip
        batches[0] = spoiled(batches[0], 2)  # of the second trajectory
        if mixed:
            vocabulary = 60 if signal == "full" else None
            second = LocalTeacher(made.teacher("second", signal), "teachers.second", vocabulary)
            batches.append(second.score(written.ids[:4], written, log_weights=np.log1p(-np.exp(share)))[1])
            base = LocalTeacher(made.teacher("base", signal), "teachers.base").score(written.ids, written)[1]
            batches.append(spoiled(base, len(base.logprobs) - 1))
        made.scores[case] = batches
    return made


def shares(material: Material, case: str, ranks: int) -> list[list[TeacherScores]]:
    """By rank: the scores of each of its trajectories, from each teacher, as they come out of another process."""
    written = material.written
    costs = np.diff(written.prompt_offsets) + written.lengths
    owner = owners(costs, minibatch_rows(len(written), MINIBATCHES), ranks)
    rank_of = {TrajectoryId(*row): rank for row, rank in zip(written.ids.tolist(), owner.tolist(), strict=True)}
    own: list[list[TeacherScores]] = [[] for _ in range(ranks)]
    for batch in material.scores[case]:
        for part in pickle.loads(pickle.dumps(split_scores(batch), protocol=5)):
            own[rank_of[TrajectoryId(*part.ids[0].tolist())]].append(part)
    return own


def run_rank(rank: int, size: int, material: Material) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = Ranks.join(dist.FileStore(str(material.folder / f"meeting-{size}"), size), rank, size, "cpu")
    found: dict[str, Any] = {}
    for case in CASES:
        given = {"whole": material.scores[case], "shares": shares(material, case, size)[rank][::-1]}
        for kind, batches in given.items():
            learner = material.learner(case, ranks)
            metrics = [learner.update(material.written.ids, *batches, material.written) for _ in range(2)]
            found[case, kind] = metrics, [own_rows(p.detach())[0].numpy() for p in learner._model.parameters()]
    found["given"] = {
        case: [TrajectoryId(*part.ids[0].tolist()) for part in shares(material, case, size)[rank]] for case in CASES
    }
    (material.folder / f"found-{size}-{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(material: Material) -> dict[int, list[dict[Any, Any]]]:
    """By the number of ranks: what each of them found."""
    for size in SIZES:
        run_ranks(size, material, body=run_rank, folder=material.folder)
    return {size: [pickle.loads((material.folder / f"found-{size}-{r}").read_bytes()) for r in range(size)]
            for size in SIZES}  # fmt: skip


def without_times(metrics: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in one.items() if key not in ("busy_seconds", "processor_seconds")}
        for one in metrics
    ]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_an_update_from_shares_is_that_from_all_to_the_bit(case: str, size: int, found: dict) -> None:
    for rank in found[size]:
        (metrics, weights), (expected, expected_weights) = rank[case, "shares"], rank[case, "whole"]
        np.testing.assert_equal(without_times(metrics), without_times(expected))
        for mine, other in zip(weights, expected_weights, strict=True):
            np.testing.assert_array_equal(mine.view(np.int32), other.view(np.int32))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("case", CASES)
def test_a_token_whose_support_only_its_rank_knows_is_masked_on_all_where_the_objective_reads_it(
    case: str, size: int, material: Material, found: dict
) -> None:
    total, (_, objective, mixed) = len(material.written.response_tokens), CASES[case]
    # One that reads no support trains on a token that has none.
    masked = (2 if mixed else 1) if reads_distribution(objective) else 0
    for rank in found[size]:
        assert [one["tokens_trained"] for one in rank[case, "shares"][0]] == [total - masked] * 2
    alone = material.learner(case, None)
    expected = alone.update(material.written.ids, material.written, *material.scores[case])
    mine = found[size][0][case, "shares"][0][0]
    for key in ("loss", "grad_norm", "reverse_kl", "tokens_trained"):
        assert mine[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("size", SIZES)
def test_every_trajectory_is_with_one_rank(size: int, material: Material, found: dict) -> None:
    for case in CASES:
        given = [set(rank["given"][case]) for rank in found[size]]
        assert sorted(name for own in given for name in own) == [TrajectoryId(*row) for row in material.written.ids]
        assert sum(map(bool, given)) > 1


def test_a_rank_that_lacks_scores_of_its_own_trajectories_names_one(material: Material) -> None:
    learner = material.learner("topk", None)  # one rank, to which all of them belong
    gone, *others = split_scores(material.scores["topk"][0])
    message = f"trajectory {TrajectoryId(*gone.ids[0].tolist())}: scores of teachers with 0 of the whole weight came"
    with pytest.raises(CampaignError, match=message):
        learner.update(material.written.ids, material.written, material.scores["topk"][1], *others)
    learner = material.learner("full", None)
    *first, second, base = material.scores["full"]
    with pytest.raises(CampaignError, match=r"trajectory 0/0/0: scores of teachers with 0.25 of the whole weight came"):
        learner.update(material.written.ids, material.written, *first, *split_scores(second)[1:], base)
