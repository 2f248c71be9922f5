"""Learners whose ranks share each row of tokens (processes with gloo) take the update of one rank."""

import os
import pickle
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from transformers import AutoConfig, LlamaConfig

from actors.config import LoraConfig, TeacherConfig
from actors.errors import NonFiniteLossError, UserError
from actors.forward.slices import KEY, Slices, check_slices
from actors.teacher.local import LocalTeacher
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from learner.collate import minibatch_rows, steps_of, tokens_of
from learner.config import MismatchConfig, ObjectiveConfig, OptimizerConfig, TrustRegionConfig
from learner.learner import Learner
from learner.student.sharding import Ranks, full_tensor
from tests.tiny_architectures import ARCHITECTURES, make_architecture
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, random_trajectories, teacher_config
from tests.unit.learner.test_sharding import run_ranks

SIZES = ((2, 2), (4, 2), (4, 4))
"""(ranks, ranks that share a row)."""
SHARED = ("gpt2", "gpt_bigcode", "gpt_neox", "mistral", "gemma3", "qwen3_moe")
"""Architectures whose attention can be replaced: one head of keys for all, windows, experts."""
PROMPTS, RESPONSES = np.array([4, 2, 4, 1, 3, 5]), np.array([7, 2, 41, 5, 8, 4])
"""One trajectory is longer than the slices of every row it is in; the shortest has fewer tokens than 4 ranks."""
STEADY = OptimizerConfig(learning_rate=1e-3, warmup_updates=0, epsilon=1e-5)
FULL = ObjectiveConfig(estimator="full")
EXTRAPOLATED = ObjectiveConfig(estimator="full", extrapolation=1.5, reference_teacher="base")
SETTINGS: dict[str, dict[str, Any]] = {
    "the token alone": {"signal": "topk"},
    "later tokens": {"signal": "sampled", "objective": ObjectiveConfig(estimator="to_go", aggregation="sequence_mean")},
    "later distributions": {"signal": "full", "objective": ObjectiveConfig(estimator="to_go_expected")},
    "position weights": {
        "signal": "topk",
        "objective": ObjectiveConfig(estimator="discounted", gamma=0.9, baseline="exact_kl", position_weight=0.5),
    },
    "whole update": {
        "signal": "full",
        "minibatches_per_update": 2,
        "objective": ObjectiveConfig(
            estimator="to_go_expected",
            baseline="group_mean",
            mismatch=MismatchConfig(correction="truncate", level="prefix"),
        ),
    },
    "rewards": {
        "signal": "sampled",
        "minibatches_per_update": 2,
        "epochs_per_update": 2,
        "objective": ObjectiveConfig(
            estimator="reward", mismatch=MismatchConfig(correction="truncate", level="sequence")
        ),
    },
    "text of the teacher": {"signal": "sampled", "objective": ObjectiveConfig(estimator="sft")},
    "supports of a mixture": {"signal": "student_topk", "objective": EXTRAPOLATED},
    "hidden states of a mixture": {"signal": "hidden", "objective": EXTRAPOLATED, "gradient_checkpointing": True},
    "exact and adaptive": {
        "signal": "hidden",
        "minibatches_per_update": 2,
        "objective": ObjectiveConfig(
            estimator="full", trust_region=TrustRegionConfig(estimator="exact", beta=0.1, target_kl=1e-6)
        ),
    },
    "a pass for each trajectory": {"signal": "full", "microbatch_tokens": 1, "objective": FULL},
    "taken back": {
        "signal": "topk",
        "minibatches_per_update": 3,
        "objective": ObjectiveConfig(trust_region=TrustRegionConfig(max_kl=1e-4)),
        "optimizer": replace(STEADY, learning_rate=0.02),
    },
    **{name: {"student": name, "signal": "full", "objective": FULL, "microbatch_tokens": 40} for name in SHARED},
}
if find_spec("peft"):
    SETTINGS["adapters"] = {"lora": LoraConfig(rank=3), "signal": "full", "objective": FULL}
    for wide in ("student_topk", "hidden"):
        SETTINGS[f"adapters, {wide}, layers computed again"] = {
            "lora": LoraConfig(rank=3),
            "signal": wide,
            "objective": EXTRAPOLATED,
            "gradient_checkpointing": True,
        }


@dataclass
class Material:
    """What all ranks are given."""

    models: dict[str, Path]
    written: Trajectories
    scores: dict[str, list[TeacherScores]]
    """By signal. Two teachers and a reference send hidden states and the student's support, one teacher the others."""
    folder: Path

    def learner(self, name: str, ranks: Ranks | None, together: int, **changes: Any) -> Learner:
        settings = {"optimizer": STEADY, **SETTINGS[name], **changes}
        signal, student = settings.pop("signal"), settings.pop("student", "student")
        teachers = {who: of_kind(self.models, who, signal) for who in {batch.teacher for batch in self.scores[signal]}}
        models = {**self.models, "student": self.models[student]}
        return make_learner(models, ranks=ranks, teachers=teachers, sequence_parallel=together, **settings)

    def update(self, learner: Learner, name: str, **changes: Any) -> dict[str, float]:
        scores = self.scores[SETTINGS[name]["signal"]]
        if SETTINGS[name].get("objective", FULL).reference_teacher is None:
            scores = [batch for batch in scores if batch.teacher != "base"]
        return learner.update(self.written.ids, replace(self.written, **changes), *scores, domains=["odd", "even"] * 3)


def of_kind(models: dict[str, Path], name: str, signal: str) -> TeacherConfig:
    return teacher_config(models, {"teacher": "other", "second": "student", "base": "base"}[name], signal)


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("slices")
    models = {
        # 4 heads and 2 of keys: with 4 ranks each head of keys is repeated
        "student": make_tiny_model(folder / "student", hidden=128, heads_of_keys=2),
        "other": make_tiny_model(folder / "other", hidden=32, layers=1, seed=7),
        "base": make_tiny_model(folder / "base", hidden=32, layers=1, seed=11),
        **{name: make_architecture(folder / name, *ARCHITECTURES[name]) for name in (*SHARED, "falcon")},
    }
    rng = np.random.default_rng(0)
    blank = random_trajectories(rng, [(0, i // 2, i % 2) for i in range(6)], PROMPTS, RESPONSES)
    own = LocalTeacher(teacher_config(models, "student", "topk")).score(blank.ids, blank)[1]
    written = replace(
        blank,
        behaviour_logprobs=own.logprobs + rng.normal(0, 0.1, len(own.logprobs)).astype(np.float32),
        support_ids=own.support_ids,
        rewards=rng.random(6).astype(np.float32),
        trained=rng.random(RESPONSES.sum()) < 0.8,  # the others are text of an environment
    )
    scores: dict[str, list[TeacherScores]] = {}
    for signal in ("sampled", "topk", "full", "hidden", "student_topk"):
        mixed = signal in ("hidden", "student_topk")
        share = np.log(np.array([0.25] * 4 + [1, 1], np.float32)) if mixed else None
        first = LocalTeacher(of_kind(models, "teacher", signal), "teachers.teacher")
        scores[signal] = [first.score(written.ids, written, log_weights=share)[1]]
        if mixed:
            second = LocalTeacher(of_kind(models, "second", signal), "teachers.second")
            rest = np.log(np.array([0.75] * 4, np.float32))
            scores[signal].append(second.score(written.ids[:4], written, log_weights=rest)[1])
            base = LocalTeacher(of_kind(models, "base", signal), "teachers.base")
            scores[signal].append(base.score(written.ids, written)[1])
    return Material(models, written, scores, folder)


def names_of(size: int, together: int) -> list[str]:
    """The settings that are tried with so many ranks: every objective with 2, what differs in groups and in slices with 4."""
    of_four = {
        (4, 2): ("later tokens", "whole update", "exact and adaptive", "a pass for each trajectory"),
        (4, 4): ("later tokens", "supports of a mixture", "a pass for each trajectory", *SHARED),
    }
    every = [name for name in SETTINGS if name not in SHARED or size == 1]
    return [name for name in SETTINGS if name in of_four.get((size, together), every)]


def trial(material: Material, ranks: Ranks | None, together: int) -> dict[str, Any]:
    """The metrics of one or two updates, and then the gradients and the weights, by setting."""
    found: dict[str, Any] = {}
    size = ranks.size if ranks else 1
    for name in names_of(size, together):
        learner = material.learner(name, ranks, together)
        metrics = [material.update(learner, name) for _ in range(2 if name in ("exact and adaptive", "rewards") else 1)]
        gradients = [full_tensor(p.grad).flatten() for p in learner._model.parameters() if p.grad is not None]
        weights = [full_tensor(p.detach()).flatten() for p in learner._model.parameters()]
        found[name] = {
            "metrics": metrics,
            "gradients": torch.cat(gradients).numpy(),
            "weights": torch.cat(weights).float().numpy(),
        }
    if (size, together) not in ((1, 1), (4, 2)):
        return found
    half = material.learner("hidden states of a mixture", ranks, together, compute_dtype="bfloat16")
    found["half"] = [material.update(half, "hidden states of a mixture") for _ in range(2)]
    bad = material.written.behaviour_logprobs.copy()
    bad[material.written.response_offsets[2] :][:20] = np.nan
    learner = material.learner("the token alone", ranks, together, microbatch_tokens=1)
    with pytest.raises(NonFiniteLossError) as error:
        material.update(learner, "the token alone", behaviour_logprobs=bad)
    found["refusal"] = str(error.value)
    return found


def run_rank(rank: int, size: int, material: Material, together: int) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = Ranks.join(dist.FileStore(str(material.folder / f"meeting-{size}-{together}"), size), rank, size, "cpu")
    found = trial(material, ranks, together)
    (material.folder / f"found-{size}-{together}-{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(material: Material) -> dict[tuple[int, int], dict[str, Any]]:
    """(ranks, ranks that share a row) -> what the last rank found; (1, 1): what one rank finds."""
    for size, together in SIZES:
        run_ranks(size, material, together, body=run_rank, folder=material.folder)
    files = {key: material.folder / f"found-{key[0]}-{key[1]}-{key[0] - 1}" for key in SIZES}
    return {(1, 1): trial(material, None, 1), **{key: pickle.loads(file.read_bytes()) for key, file in files.items()}}


@pytest.mark.parametrize(("size", "name"), [(size, name) for size in SIZES for name in names_of(*size)])
def test_ranks_that_share_rows_take_the_update_of_one(name: str, size: tuple[int, int], found: dict) -> None:
    ours, theirs = found[size][name], found[1, 1][name]
    for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        left_out = ("busy_seconds", "processor_seconds", "log_ratio_histogram")
        expected = {key: value for key, value in other.items() if key not in left_out}
        counts = (metrics["log_ratio_histogram"] for metrics in (mine, other))
        assert np.abs(np.subtract(*counts)).sum() <= 2  # one token on an edge
        assert {key: mine[key] for key in expected} == pytest.approx(expected, rel=5e-6, abs=1e-6, nan_ok=True)
    assert theirs["metrics"][-1]["grad_norm"] > 1e-4
    for kind in ("gradients", "weights"):
        np.testing.assert_allclose(ours[kind], theirs[kind], rtol=0, atol=1e-6)


def test_in_sixteen_bits_they_do_but_for_rounding(found: dict) -> None:
    for mine, other in zip(found[4, 2]["half"], found[1, 1]["half"], strict=True):
        assert mine["reverse_kl"] == pytest.approx(other["reverse_kl"], rel=0.01)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)


def test_each_rank_refuses_a_loss_that_is_no_number_and_names_its_trajectory_once(found: dict) -> None:
    assert "(trajectories 0/1/0)" in found[1, 1]["refusal"]
    assert found[4, 2]["refusal"] == found[1, 1]["refusal"]


@pytest.mark.parametrize("together", [2, 3, 4])
def test_each_token_is_predicted_by_one_rank_of_its_group_alone(together: int, material: Material) -> None:
    written, counts = material.written, []
    rows = minibatch_rows(len(written), 2)
    predicted = np.zeros(len(written.response_tokens), int)
    for place in range(together):
        slices: Any = Slices(place, together, None)  # type: ignore[arg-type]
        steps = steps_of(written, rows, np.ones(len(written), bool), 40, slices, Ranks(), "cpu")
        predicted += tokens_of(steps, len(predicted))
        own = [slices.own(len(one.input_ids)) for step in steps for one in step.passes]
        counts.append([cut.stop - cut.start for cut in own])
    assert (predicted == 1).all()
    assert (np.ptp(counts, axis=0) <= 1).all()  # slices differ by one token at most


def test_a_row_of_fewer_tokens_than_ranks_is_filled_with_a_sequence_of_its_own() -> None:
    slices: Any = Slices(3, 4, None)  # type: ignore[arg-type]
    tokens, lengths = slices.filled(np.array([9, 8]), np.array([2]))
    assert tokens.tolist() == [9, 8, 0, 0] and lengths.tolist() == [2, 2]
    assert slices.own(2) == slices.own(4) == slice(3, 4)


def test_what_cannot_be_shared_is_refused_with_its_numbers(material: Material) -> None:
    student = AutoConfig.from_pretrained(material.models["student"])
    check_slices(student, 4)
    with pytest.raises(UserError, match=f"{KEY}: found 3, and student.model with 4 attention heads.*one of 1, 2, 4"):
        check_slices(student, 3)
    ropes = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(UserError, match=f"{KEY}: found 2, .*depends on the length of a pass"):
        check_slices(LlamaConfig(num_attention_heads=4, rope_parameters=ropes), 2)
    with pytest.raises(UserError, match=f"{KEY}: found 2, .*divisor of learner.replicas"):
        material.learner("the token alone", None, 2)
    with pytest.raises(UserError, match=f"{KEY}: found 2 and Falcon.*a model whose attention can be replaced"):
        material.learner("the token alone", None, 2, student="falcon")
