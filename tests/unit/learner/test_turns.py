"""Responses with several turns against exact enumeration: a tiny policy in an environment that answers at random.

Every episode of tests/oracles/episodes.py is a trajectory of one update, whose tokens' weights are the episode's probability: the
loss of `Forward.loss` is then an expectation, and its gradient is compared with that of the sequence-level objective.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from actors.forward.packing import microbatches
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories, offsets_of
from learner.collate import UpdateBatch, collate
from learner.config import LearnerConfig, MismatchConfig, ObjectiveConfig, TrustRegionConfig
from learner.costs import coefficients, importance_of, needs_whole_update
from learner.forward import Forward, exact_reverse_kl, no_columns
from learner.metrics import UpdateMetrics
from learner.objective.estimator_table import reads_distribution
from learner.student.sharding import Ranks
from tests.oracles import episodes
from tests.oracles.episodes import Episodes

FREE: dict[str, Any] = {"clip_low": None, "clip_high": None, "aggregation": "sequence_sum"}
EXACT: dict[str, dict[str, Any]] = {
    "(i)": {"estimator": "trajectory"},
    "(ii)": {"estimator": "to_go"},
    "(iii) exact KL": {"estimator": "to_go", "baseline": "exact_kl"},
    "(iv)": {"estimator": "to_go_expected"},
    "(v) exact KL": {"estimator": "to_go_expected", "baseline": "exact_kl"},
}
"""The estimators that are unbiased for the sequence-level objective."""


class Tabular(torch.nn.Module):
    """The policy as a network: the hidden state after a prompt of one token and some of an episode is its logits."""

    def __init__(self, world: Episodes, theta_F: torch.Tensor):
        super().__init__()
        self.world, self.theta = world, torch.nn.Parameter(theta_F.float())

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor | None = None, **_: Any) -> Any:
        tokens = input_ids[0].tolist()
        places = range(len(tokens)) if position_ids is None else position_ids[0].tolist()
        contexts, history = [], ()
        for place, token in zip(places, tokens, strict=True):
            history = (*history, token) if place else ()
            contexts.append(
                self.world.place.get(history, 0)
            )  # an episode's end is no context; nothing is predicted there
        logits = self.world.features_CVF.float()[contexts] @ self.theta
        return type("Output", (), {"last_hidden_state": logits[None]})


@dataclass(frozen=True)
class Case:
    """A student, its teacher, and the policy that sampled, in one world."""

    world: Episodes
    student: torch.Tensor
    teacher: torch.Tensor
    behaviour: torch.Tensor


@pytest.fixture(scope="module", params=[(3, 2, 2), (3, 1, 3)], ids=["two turns", "three turns"])
def case(request: pytest.FixtureRequest) -> Case:
    world = episodes.episodes(*request.param)
    student = world.policy(1)
    return Case(world, student, world.policy(2, 1.5), student + 0.3 * world.policy(3))


def update_of(case: Case, rows: np.ndarray, sampled_by: torch.Tensor, spoil: Callable) -> tuple[Any, Any]:
    """(trajectories, scores) of these episodes: two neighbours are a group. What the environment wrote has the log-probs that
    the models give it, as an engine and a teacher may record them; spoil: changes the trajectories and the scores."""
    w, there = case.world, case.world.exists_SN[rows]
    q, mu = w.logprobs(case.teacher), w.logprobs(sampled_by)
    lengths = there.sum(1).tolist()
    groups = np.arange(len(rows)) // 2
    ids = np.stack([np.zeros_like(groups), groups, np.arange(len(rows)) % 2], 1)
    of = [values[rows][there].numpy() for values in (w.tokens_SN, w.along(mu), w.along(q), w.own_SN)]
    written = Trajectories(
        ids=ids,
        prompt_tokens=np.zeros(len(rows), np.int32),
        prompt_offsets=np.arange(len(rows) + 1),
        response_tokens=of[0].astype(np.int32),
        response_offsets=offsets_of(lengths),
        behaviour_logprobs=of[1].astype(np.float32),
        policy_versions=np.zeros(len(of[0]), np.int32),
        finish_reasons=np.zeros(len(rows), np.uint8),
        trained=of[3],
    )
    scores = TeacherScores(
        ids=ids,
        response_offsets=written.response_offsets,
        logprobs=of[2].astype(np.float32),
        teacher="teacher",
        log_weights=np.zeros(len(rows), np.float32),
        support_ids=np.zeros((len(of[0]), 0), np.int32),
        support_logprobs=q[w.contexts_SN[rows][there]].numpy().astype(np.float32),
    )
    return spoil(written, scores)


def nothing_spoilt(written: Trajectories, scores: TeacherScores) -> tuple[Any, Any]:
    return written, scores


def unknown(written: Trajectories, scores: TeacherScores) -> tuple[Any, Any]:
    """Neither engine nor teacher say anything about what the environment wrote."""
    own = written.trained
    return replace(
        written,
        behaviour_logprobs=np.where(own, written.behaviour_logprobs, np.float32(np.nan)),
        policy_versions=np.where(own, written.policy_versions, -7).astype(np.int32),
    ), replace(
        scores,
        logprobs=np.where(own, scores.logprobs, np.float32(np.nan)),
        support_logprobs=np.where(own[:, None], scores.support_logprobs, np.float32(np.nan)),
    )


def all_trained(written: Trajectories, scores: TeacherScores) -> tuple[Any, Any]:
    """The mistake: what the environment wrote is taken for the student's."""
    return replace(written, trained=np.ones_like(written.trained)), scores


def loss_gradient(
    case: Case,
    objective: ObjectiveConfig,
    *,
    sampled_by: torch.Tensor | None = None,
    pairs: bool = False,
    spoil: Callable = unknown,
    beta: float = 0.0,
    budget: int = 1 << 20,
    change: Callable[[UpdateBatch], None] = lambda batch: None,
) -> torch.Tensor:
    """[F] the expected gradient of the loss over episodes of `sampled_by` (default: the student), or over pairs of them."""
    w = case.world
    sampled_by = case.student if sampled_by is None else sampled_by
    p_S, count = w.joint(sampled_by).exp(), len(w.tokens_SN)
    rows, p = np.arange(count), p_S
    if pairs:
        first, second = np.arange(count).repeat(count), np.tile(np.arange(count), count)
        rows, p = np.stack([first, second], 1).reshape(-1), (p_S[first] * p_S[second]).repeat_interleave(2) / 2
    written, scores = update_of(case, rows, sampled_by, spoil)
    batch, _ = batch_of(written, scores, objective)
    body = Tabular(w, case.student)
    head = torch.eye(w.features_CVF.shape[1])
    config = LearnerConfig(compute_dtype="float32", objective=objective)
    forward = Forward(body, head, None, config, "cpu", temperature=1.0, vocabulary=None, named_by_student=False)
    cut = microbatches(
        written.prompt_tokens, written.prompt_offsets, written.response_tokens, written.response_offsets, budget
    )
    look_ahead(forward, batch, cut, objective)
    batch.weigh(np.arange(len(rows)), objective, beta)
    # In place of the mean over the episodes of an update: the expectation over all there are.
    each = np.repeat(p.numpy() * len(rows), written.lengths).astype(np.float32)
    batch.tensors["weights"] = batch.tensors["weights"] * torch.from_numpy(each)
    change(batch)
    metrics = UpdateMetrics()
    metrics.begin_step(1.0, again=False, moved=False)
    for one in cut:
        forward.loss(batch.part(one), one, beta, metrics).backward()
    return body.theta.grad.double()


def batch_of(
    written: Trajectories, scores: TeacherScores, objective: ObjectiveConfig
) -> tuple[UpdateBatch, ObjectiveConfig]:
    """The update as the learner collates it, and its objective."""
    everything = np.ones(len(written), bool), np.ones(len(written.response_tokens), bool)
    options: dict[str, Any] = {"masked_token_ids": [], "vocabulary": scores.support_logprobs.shape[1], "heads": {}}
    batch = collate(written, [scores], *everything, 0, objective, "cpu", ranks=Ranks(), sliced=False, **options)
    return batch, objective


def look_ahead(forward: Forward, batch: UpdateBatch, cut: list[Any], objective: ObjectiveConfig) -> None:
    """What the learner computes for a whole update before its first step (old_policy.py:OldPolicy.look_ahead)."""
    correct = objective.mismatch.correction != "none"
    if not (correct or needs_whole_update(objective)):
        return
    found = {name: torch.zeros(len(batch.tensors["mask"])) for name in ("logprobs", "kl")}
    with torch.no_grad():
        for one in cut:
            part = batch.part(one)
            reduce = partial(exact_reverse_kl, part, objective) if reads_distribution(objective) else no_columns
            for name, column in forward.columns(part, one, reduce).items():
                found[name][one.tokens] = column
    own = found["logprobs"]
    if correct:
        batch.tensors["importance"] = importance_of(own, batch.all_tokens(), objective)
        batch.tensors["old_logprobs"] = batch.tensors["start_logprobs"] = own
    if needs_whole_update(objective):
        kl = found["kl"] if reads_distribution(objective) else None
        batch.tensors["coefficient"] = coefficients(own, kl, batch.all_tokens(), batch.groups(), objective)


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return (a - b).norm().item() <= tolerance * b.norm().item()


def test_the_environment_cancels_in_the_objective_and_the_oracle_is_a_distribution(case: Case) -> None:
    w = case.world
    p, q = w.joint(case.student), w.joint(case.teacher)
    assert torch.isclose(p.exp().sum(), torch.ones((), dtype=torch.double))
    # The reverse KL between whole episodes, the environment's answers included, is the sum over the student's tokens alone.
    assert torch.isclose((p.exp() * (p - q)).sum(), episodes.reverse_kl(w, case.student, case.teacher))
    step = 1e-5 * torch.eye(len(case.student), dtype=torch.double)
    ends = [[episodes.reverse_kl(w, case.student + sign * e, case.teacher) for sign in (1, -1)] for e in step]
    numeric = torch.stack([(above - below) / 2e-5 for above, below in ends])
    exact = episodes.gradient(w, case.student, case.teacher)
    assert close(exact, numeric, 1e-8)
    assert close(sum(episodes.by_distance(w, case.student, case.teacher).values()), exact, 1e-10)
    assert (~w.own_SN & w.exists_SN).any(1).sum() > len(w.tokens_SN) / 2


@pytest.mark.parametrize("name", EXACT)
def test_each_unbiased_estimator_has_the_exact_gradient_in_an_environment(case: Case, name: str) -> None:
    objective = ObjectiveConfig(**EXACT[name], **FREE)
    exact = episodes.gradient(case.world, case.student, case.teacher)
    assert close(loss_gradient(case, objective), exact)
    # What engine and teacher record of the environment's tokens changes nothing, to the bit.
    known, told = (loss_gradient(case, objective, spoil=how, budget=40) for how in (nothing_spoilt, unknown))
    assert torch.equal(known, told) and close(told, exact)


@pytest.mark.parametrize("estimator", ["trajectory", "to_go", "to_go_expected"])
def test_a_baseline_by_position_among_the_students_tokens_is_unbiased(estimator: str) -> None:
    world = episodes.episodes(3, 2, 2) if estimator == "to_go" else episodes.episodes(3, 1, 2)
    case = Case(world, world.policy(1), world.policy(2, 1.5), world.policy(1))
    objective = ObjectiveConfig(estimator=estimator, baseline="group_mean", **FREE)
    exact = episodes.gradient(case.world, case.student, case.teacher)
    assert close(loss_gradient(case, objective, pairs=True), exact, 1e-4)
    # A batch of one group is the same baseline.
    rows = np.arange(len(case.world.tokens_SN))[[0, -1]]
    written, scores = update_of(case, rows, case.student, unknown)
    found = [batch_of(written, scores, replace(objective, baseline=name)) for name in ("group_mean", "batch_mean")]
    # A baseline by the position among all tokens would be unbiased too, but it is another one.
    columns = found[0][0].all_tokens().columns[torch.from_numpy(written.trained)].tolist()
    assert columns == [place for count in written.trained_lengths for place in range(count)]
    own = torch.linspace(-1, 0, len(written.response_tokens))
    one, other = (coefficients(own, own.abs(), b.all_tokens(), b.groups(), o) for b, o in found)
    assert torch.equal(one, other) and one.any() and not one[~torch.from_numpy(written.trained)].any()


def test_immediate_and_full_have_the_gradient_of_the_kl_at_the_students_contexts(case: Case) -> None:
    visits = episodes.at_visits(case.world, case.student, case.teacher)
    for estimator, baseline in (("immediate", "none"), ("immediate", "exact_kl"), ("full", "none")):
        assert close(loss_gradient(case, ObjectiveConfig(estimator=estimator, baseline=baseline, **FREE)), visits)
    assert not close(visits, episodes.gradient(case.world, case.student, case.teacher), 0.05)


@pytest.mark.parametrize("estimator", ["discounted", "to_go_expected"])
@pytest.mark.parametrize("gamma, turn_discount", [(0.7, 1.0), (1.0, 0.4), (0.7, 0.4), (1.0, 0.0), (0.0, 0.5)])
def test_discounts_count_the_students_tokens_and_turns(
    case: Case, estimator: str, gamma: float, turn_discount: float
) -> None:
    objective = ObjectiveConfig(estimator=estimator, gamma=gamma, turn_discount=turn_discount, **FREE)
    terms = episodes.by_distance(case.world, case.student, case.teacher)
    expected = sum(gamma**d * turn_discount**k * term for (d, k), term in terms.items())
    assert close(loss_gradient(case, objective), expected)


@pytest.mark.parametrize("name", EXACT)
def test_off_policy_the_weights_of_the_students_tokens_restore_the_exact_gradient(case: Case, name: str) -> None:
    mismatch = MismatchConfig("truncate", "sequence", high=1e9)
    objective = ObjectiveConfig(**EXACT[name], mismatch=mismatch, **FREE)
    exact = episodes.gradient(case.world, case.student, case.teacher)
    found = {
        spoil: loss_gradient(case, objective, sampled_by=case.behaviour, spoil=spoil)
        for spoil in (unknown, nothing_spoilt)
    }
    assert all(close(gradient, exact, 1e-4) for gradient in found.values())
    assert not close(
        loss_gradient(case, replace(objective, mismatch=MismatchConfig()), sampled_by=case.behaviour), exact, 0.01
    )


@pytest.mark.parametrize("estimator", ["immediate", "full"])
def test_off_policy_products_over_a_prefix_skip_the_environment(case: Case, estimator: str) -> None:
    mismatch = MismatchConfig("truncate", "prefix", high=1e9)
    objective = ObjectiveConfig(estimator=estimator, mismatch=mismatch, **FREE)
    visits = episodes.at_visits(case.world, case.student, case.teacher)
    assert close(loss_gradient(case, objective, sampled_by=case.behaviour), visits, 1e-4)


def test_means_are_over_the_students_tokens(case: Case) -> None:
    w = case.world
    per_episode = 1 / w.own_SN.sum(1, keepdim=True)
    objective = ObjectiveConfig(estimator="full", **FREE | {"aggregation": "sequence_mean"})
    expected = episodes.at_visits(w, case.student, case.teacher, per_episode)
    assert close(loss_gradient(case, objective), expected)
    # token_mean: one denominator for the update, here of every episode once.
    count = int(w.own_SN.sum())
    objective = ObjectiveConfig(estimator="full", **FREE | {"aggregation": "token_mean"})
    expected = episodes.at_visits(w, case.student, case.teacher) * len(w.tokens_SN) / count
    assert close(loss_gradient(case, objective), expected)


@pytest.mark.parametrize("keys", [{"first_turns": 1}, {"last_turns": 1}, {"first_turns": 2}])
def test_turns_that_are_left_out_are_as_if_another_had_written_them(case: Case, keys: dict[str, int]) -> None:
    w = case.world
    first, last = keys.get("first_turns", 9), keys.get("last_turns", 9)
    kept = w.own_SN & (w.turns_SN < first) & (w.turns_SN >= w.turns_SN.max(1, keepdim=True).values + 1 - last)
    theta = case.student.clone().requires_grad_()
    if (
        "first_turns" in keys
    ):  # the objective of an episode whose other turns are written by a policy that stays as it is
        moving, fixed = w.own(theta), w.own(case.student)
        cost_S = ((moving - w.own(case.teacher)) * kept).sum(1)
        law_S = (w.environment_S + torch.where(kept, moving, fixed).sum(1)).exp()
        expected = torch.autograd.grad((law_S * cost_S.detach()).sum(), theta)[0]
    else:  # which turn is the last depends on what is written: the terms of these turns, and the gradient of no such objective
        r_SN = (w.own(case.student) - w.own(case.teacher)) * kept
        to_go_SN = r_SN.flip(1).cumsum(1).flip(1) * kept
        p_S = w.joint(case.student).exp()[:, None]
        expected = torch.autograd.grad((p_S * to_go_SN * w.own(theta)).sum(), theta)[0]
    assert close(loss_gradient(case, ObjectiveConfig(estimator="to_go", **keys, **FREE)), expected)
    visits = episodes.at_visits(w, case.student, case.teacher, kept.double())
    assert close(loss_gradient(case, ObjectiveConfig(estimator="full", **keys, **FREE)), visits)


def test_estimators_of_the_trust_region_sum_to_the_kl_between_episodes(case: Case) -> None:
    """E_old[sum over the student's tokens of k1, k3 or the exact KL] is KL(pi_old || pi_theta) of whole episodes."""
    w = case.world
    theta = case.student.clone().requires_grad_()
    old, new = w.joint(case.behaviour), w.joint(theta)
    exact = torch.autograd.grad((old.exp() * (old - new)).sum(), theta)[0]
    reward_free = {"estimator": "reward", **FREE}  # no rewards: the penalty is all there is
    for name in ("k1", "k3"):
        objective = ObjectiveConfig(**reward_free, trust_region=TrustRegionConfig(name, beta=1.0))
        found = loss_gradient(case, objective, sampled_by=case.behaviour, beta=1.0)
        if name == "k1":
            assert close(found, exact)
        else:  # k3 = ratio - 1 - log ratio at each context: its mean there is the exact KL, at the contexts that pi_old visits
            visits = old.exp().detach()[:, None] * w.own_SN
            there = w.logprobs(case.behaviour), w.logprobs(theta)
            kl_C = (there[0].exp() * (there[0] - there[1])).sum(1)
            assert close(found, torch.autograd.grad((visits * kl_C[w.contexts_SN]).sum(), theta)[0])
            assert close(found, exact)


def test_three_wrong_ways_are_caught(case: Case) -> None:
    exact = episodes.gradient(case.world, case.student, case.teacher)
    to_go = ObjectiveConfig(estimator="to_go", **FREE)
    # 1. The environment's log-ratios in the sum: what it writes is taken for the student's.
    assert not close(loss_gradient(case, to_go, spoil=all_trained), exact, 0.02)
    # 2. Its tokens in the mean.
    mean = ObjectiveConfig(estimator="full", **FREE | {"aggregation": "sequence_mean"})
    per_episode = 1 / case.world.own_SN.sum(1, keepdim=True)
    expected = episodes.at_visits(case.world, case.student, case.teacher, per_episode)
    own = torch.from_numpy(update_of(case, np.arange(len(per_episode)), case.student, unknown)[0].trained)

    def counted(batch: UpdateBatch) -> None:  # their cost is 0 still, but they divide
        lengths = torch.from_numpy(batch.trajectories.lengths)
        batch.tensors["weights"] *= torch.repeat_interleave(
            torch.from_numpy(batch.trajectories.trained_lengths) / lengths, lengths
        )

    assert not close(loss_gradient(case, mean, change=counted), expected, 0.02)
    # 3. Weights that include them: engine and learner differ there, as they may where nobody samples.
    mismatch = MismatchConfig("truncate", "sequence", high=1e9)
    weighed = replace(to_go, mismatch=mismatch)

    def with_environment(batch: UpdateBatch) -> None:
        w, offsets = case.world, batch.trajectories.response_offsets
        theirs = (w.along(w.logprobs(case.student)) - w.along(w.logprobs(case.behaviour))) * ~w.own_SN
        wrong = np.repeat(theirs.sum(1).exp().numpy(), np.diff(offsets)).astype(np.float32)
        batch.tensors["importance"] = batch.tensors["importance"] * torch.from_numpy(wrong)

    assert close(loss_gradient(case, weighed, sampled_by=case.behaviour), exact, 1e-4)
    assert not close(loss_gradient(case, weighed, sampled_by=case.behaviour, change=with_environment), exact, 0.02)
    assert own.any() and not own.all()
