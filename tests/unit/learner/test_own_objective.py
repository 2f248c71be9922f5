"""An estimator, a divergence and a cost of the user's own, as docs/extending.md shows them, in an update of the learner."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.config import TeacherConfig
from actors.errors import UserError
from cluster.config_file import load_config
from cluster.preflight import checks
from learner.config import ObjectiveConfig
from learner.costs import check_own_functions
from learner.validation import refuse_contradictions
from tests.documented import python_examples
from tests.tiny_updates import make_learner, sampled
from tests.unit.learner.test_trained import rows_of

UNCLIPPED = {"clip_low": None, "clip_high": None}
WRONG = """
import torch
def fails(a, b, **more): raise RuntimeError("no luck")
def ends(a, b, **more): raise SystemExit(0)
def divides(a, b, **more): return a / (b - b)
def short(a, b, **more): return a[:, :1]
def number(a, b, **more): return 3.0
def whole(a, b, **more): return torch.ones(a.shape, dtype=torch.int64)
def detached(a, b): return (a.exp() * (a - b)).sum(-1).detach()
def teaches(a, b): return a
teaches.text_by = "teacher"
def means(a, mask, group_B): return a - a.mean(0)
means.needs_whole_update = True
def expects(a, mask, kl_BT): return a - kl_BT
expects.needs_distribution = True
value = 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    [text] = python_examples("docs/extending.md", "An estimator, a divergence or a cost")
    (tmp_path / "own_objective.py").write_text(text, "utf-8")
    (tmp_path / "wrong_objective.py").write_text(WRONG, "utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    yield "own_objective"
    for name in ("own_objective", "wrong_objective"):
        sys.modules.pop(name, None)


def updated(models: dict[str, Path], objective: ObjectiveConfig) -> dict[str, float]:
    written, scores = sampled(models, "other", "full")
    return make_learner(models, objective=objective).update(written.ids, written, scores)


def test_an_estimator_of_ones_own_has_the_loss_of_its_formula(models: dict[str, Path], own: str) -> None:
    objective = ObjectiveConfig(estimator=f"{own}:windowed", gamma=0.7, **UNCLIPPED)
    written, _ = sampled(models, "other", "full")
    students, _ = rows_of(models["student"], written)
    teachers, _ = rows_of(models["other"], written)
    costs, at = [], 0
    for pi, q in zip(students, teachers, strict=True):
        tokens = written.response_tokens[at : at + len(pi)].tolist()
        at += len(pi)
        r = [(pi[i, token] - q[i, token]).item() for i, token in enumerate(tokens)]
        costs += [sum(0.7**k * x for k, x in enumerate(r[i : i + 8])) for i in range(len(r))]
    assert updated(models, objective)["loss"] == pytest.approx(np.mean(costs), rel=1e-4)


def test_one_that_sees_the_whole_update_or_a_distribution_is_given_it(models: dict[str, Path], own: str) -> None:
    for name, built_in in (("means", None), ("expects", ObjectiveConfig(baseline="exact_kl", **UNCLIPPED))):
        mine = ObjectiveConfig(estimator=f"wrong_objective:{name}", **UNCLIPPED)
        one, cut = (
            make_learner(models, objective=mine, microbatch_tokens=tokens).update(
                sampled(models, "other")[0].ids, *sampled(models, "other")
            )
            for tokens in (4096, 1)
        )
        assert one["loss"] == pytest.approx(cut["loss"], rel=1e-4)
        if built_in:
            assert one["loss"] == pytest.approx(updated(models, built_in)["loss"], rel=1e-5)


def test_a_divergence_of_ones_own_is_minimised(models: dict[str, Path], own: str) -> None:
    written, _ = sampled(models, "other", "full")
    pi, q = (torch.cat(rows_of(models[name], written)[0]) for name in ("student", "other"))
    expected = (1 - (pi.exp() * q.exp()).sqrt().sum(-1)).mean().item()
    objective = ObjectiveConfig(estimator="full", divergence=f"{own}:hellinger")
    assert updated(models, objective)["loss"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("estimator", ["immediate", "to_go", "full"])
def test_a_cost_of_ones_own_takes_the_place_of_the_log_ratio(models: dict[str, Path], own: str, estimator: str) -> None:
    written, _ = sampled(models, "other", "full")
    objective = ObjectiveConfig(estimator=estimator, cost=f"{own}:squashed", aggregation="sequence_sum", **UNCLIPPED)
    costs, at = [], 0
    for pi, q in zip(*(rows_of(models[name], written)[0] for name in ("student", "other")), strict=True):
        tokens = written.response_tokens[at : at + len(pi)].tolist()
        at += len(pi)
        table = 5 * torch.tanh((pi - q) / 5)
        c = [table[i, token].item() for i, token in enumerate(tokens)]
        costs.append({
            "immediate": sum(c),
            "to_go": sum(sum(c[i:]) for i in range(len(c))),
            "full": (pi.exp() * table).sum().item(),
        }[estimator])  # fmt: skip
    assert updated(models, objective)["loss"] == pytest.approx(np.mean(costs), rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "wrong_objective:fails"}, r"estimator: found wrong_objective:fails: RuntimeError: no luck"),
        ({"estimator": "wrong_objective:ends"}, r"estimator: found wrong_objective:ends: SystemExit: 0"),
        ({"cost": "wrong_objective:divides"}, r"cost: found wrong_objective:divides: NaN or infinity, expected finite"),
        ({"estimator": "wrong_objective:short"}, r"short: torch.float32 \[3, 1\], expected a float tensor \[3, 5\]"),
        ({"cost": "wrong_objective:number"}, r"cost: found wrong_objective:number: float, expected a float tensor"),
        ({"cost": "wrong_objective:whole"}, r"whole: torch.int64"),
        ({"divergence": "wrong_objective:detached", "estimator": "full"}, r"detached: no gradient, expected"),
    ],
)
def test_a_function_that_does_not_work_is_refused_when_the_learner_starts(
    own: str, models: dict[str, Path], settings: dict[str, str], message: str
) -> None:
    objective = ObjectiveConfig(**settings)  # type: ignore[arg-type]
    for start in (lambda: check_own_functions(objective), lambda: make_learner(models, objective=objective)):
        with pytest.raises(UserError, match=message):
            start()


def test_check_tries_the_functions_also_offline(own: str) -> None:
    def check(cost: str) -> str:
        settings = [
            f"learner.objective.{key}='{value}'" for key, value in (("estimator", f"{own}:windowed"), ("cost", cost))
        ]
        run = dict(checks(load_config("configs/quickstart.yaml", settings), offline=True))["objective"]
        assert run is not None
        return run()

    assert check(f"{own}:squashed") == f"{own}:windowed, {own}:squashed, tried on a small example"
    with pytest.raises(UserError, match=r"learner.objective.cost: found own_objective:windowed: TypeError"):
        check(f"{own}:windowed")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"estimator": "wrong_objective:teaches"}, r"with the attribute text_by, expected only needs_distribution"),
        ({"estimator": "wrong_objective:absent"}, r"estimator: found wrong_objective:absent, expected a function in"),
        ({"estimator": "nowhere_at_all:f"}, r"estimator: found nowhere_at_all:f \(ModuleNotFoundError"),
        ({"estimator": "imediate"}, r"estimator: found 'imediate', expected one of trajectory.*immediate"),
        ({"divergence": "reverse"}, r"divergence: found 'reverse', expected one of reverse_kl"),
        ({"cost": "squashed"}, r"cost: found 'squashed', expected package.module:function of your own"),
        (
            {"cost": "own_objective:squashed", "log_ratio_clip": 3.0},
            r"cost: found own_objective:squashed, expected null",
        ),
        ({"estimator": "wrong_objective:expects"}, r"teachers.a.signal: found sampled, expected topk"),
    ],
)
def test_what_cannot_be_found_or_does_not_fit_is_refused_before_the_start(
    own: str, settings: dict[str, object], message: str
) -> None:
    objective = replace(ObjectiveConfig(), **settings)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        refuse_contradictions(objective, {"a": TeacherConfig("model", signal="sampled")}, "model", 1)
