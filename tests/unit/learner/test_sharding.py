"""Learners of 2 and 4 ranks (processes with gloo) have the metrics, weights, published bytes and files of one rank."""

import os
import pickle
import re
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from actors.config import LoraConfig
from actors.errors import GivenUpError, NonFiniteLossError
from actors.teacher_scores import TeacherScores
from actors.trajectory import Trajectories
from actors.weights.buckets import join, unpack, verify
from actors.weights.delta import DeltaVersion, Receiver
from learner.config import MismatchConfig, ObjectiveConfig, OptimizerConfig, TrustRegionConfig
from learner.learner import Learner
from learner.student.sharding import Ranks, full_tensor, own_rows
from tests import clean_process
from tests.tiny_architectures import ARCHITECTURES, make_architecture
from tests.tiny_models import make_tiny_model
from tests.tiny_updates import make_learner, received, sampled, teacher_config

SIZES = (2, 4)
STEADY = OptimizerConfig(learning_rate=1e-3, warmup_updates=0, epsilon=1e-5)
"""Adam divides by the size of the gradient. If that is only rounding error, so is the step without this epsilon."""
FULL = ObjectiveConfig(estimator="full")
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"signal": "topk"},
    "untied": {"signal": "topk", "student": "untied", "objective": FULL},
    "experts": {"student": "experts", "objective": FULL},
    "recomputed": {"gradient_checkpointing": True, "objective": FULL},
    "recomputed with dropout": {"student": "dropping", "gradient_checkpointing": True, "objective": FULL},
    "many passes": {"microbatch_tokens": 1, "minibatches_per_update": 2, "epochs_per_update": 2},
    "steps without tokens": {
        "minibatches_per_update": 6,
        "objective": ObjectiveConfig(masked_token_ids=list(range(6, 36))),
        "optimizer": replace(STEADY, weight_decay=0.1),
    },
    "sequences": {"objective": ObjectiveConfig(aggregation="sequence_mean", estimator="to_go")},
    "turns": {
        "batch": "turns",
        "minibatches_per_update": 2,
        "objective": ObjectiveConfig(estimator="discounted", gamma=0.9, turn_discount=0.5, baseline="group_mean"),
    },
    "the first turns": {"batch": "turns", "objective": replace(FULL, first_turns=1, aggregation="sequence_mean")},
    "the last turns": {"batch": "turns", "objective": ObjectiveConfig(estimator="to_go", last_turns=1)},
    "whole update": {
        "objective": ObjectiveConfig(
            estimator="to_go_expected", baseline="group_mean", mismatch=MismatchConfig(correction="truncate")
        )
    },
    "adaptive": {
        "signal": "hidden",
        "objective": ObjectiveConfig(
            estimator="full", trust_region=TrustRegionConfig(estimator="exact", beta=0.1, target_kl=1e-6)
        ),
    },
    "taken back": {
        "minibatches_per_update": 3,
        "offload_optimizer": True,
        "objective": ObjectiveConfig(trust_region=TrustRegionConfig(max_kl=1e-4)),
        "optimizer": replace(STEADY, learning_rate=0.02),
    },
}

if find_spec("peft"):
    SETTINGS = {
        "adapters": {"lora": LoraConfig(rank=3), "objective": FULL},
        "adapters with lengths": {"lora": LoraConfig(rank=3, dora=True), "objective": FULL},
        "adapters alone": {"lora": LoraConfig(rank=3, publish="adapter"), "objective": FULL},
        **SETTINGS,
    }


@dataclass
class Material:
    """The inputs of all learners of a test."""

    models: dict[str, Path]
    batches: dict[str, tuple[Trajectories, TeacherScores]]
    """Trajectories and scores by the teacher's signal; `turns`: of `full`, with words of others among the student's."""
    folder: Path

    def learner(self, name: str, ranks: Ranks | None, **changes: Any) -> Learner:
        settings = {"optimizer": STEADY, **SETTINGS.get(name, {}), **changes}
        signal, student = settings.pop("signal", "full"), settings.pop("student", "student")
        settings.pop("batch", None)
        teachers = {
            "teacher": teacher_config(self.models, "other", signal),
            "mean": teacher_config(self.models, "student", "full", ema_decay=0.7),
        }
        models = {**self.models, "student": self.models[student]}
        return make_learner(models, ranks=ranks, teachers=teachers, **settings)

    def update(self, learner: Learner, name: str) -> dict[str, float]:
        settings = SETTINGS.get(name, {})
        written, scores = self.batches[settings.get("batch") or settings.get("signal", "full")]
        return learner.update(written.ids, written, scores, domains=["odd", "even"] * 3)


class Published(list):
    """Buckets and manifest of one rank."""


def state_of(learner: Learner) -> dict[str, Any]:
    """The full weights on one rank. A collective: all ranks must call it."""
    gradients = [full_tensor(p.grad).flatten() for p in learner._model.parameters() if p.grad is not None]
    weights, average = Published(received(learner.publish())), Published(received(learner.publish_average("mean")))
    return {"gradients": torch.cat(gradients).numpy(), "weights": weights, "average": average}


def save(learner: Learner, folder: Path) -> None:
    learner.save(str(folder))
    while not learner.saved():
        time.sleep(0.001)


def trial(material: Material, ranks: Ranks | None) -> dict[str, Any]:
    """Everything that is compared, by setting. Saves a checkpoint and takes one more update after it."""
    size = ranks.size if ranks else 1
    found: dict[str, Any] = {}
    for name in SETTINGS:
        learner = material.learner(name, ranks, publish_dtype="bfloat16")
        fresh = Published(received(learner.publish()))
        learner = material.learner(name, ranks)
        metrics = [material.update(learner, name) for _ in range(2)]
        found[name] = {"metrics": metrics, "fresh": fresh, **state_of(learner)}
        if name in ("experts", "adapters"):
            save(learner, material.folder / f"{name}-{size}")
    learner.save(str(material.folder / f"saved-{size}"))
    half = material.learner("recomputed", ranks, compute_dtype="bfloat16")
    found["half"] = [material.update(half, "recomputed") for _ in range(3)]
    found["after"] = {"metrics": [material.update(learner, name)], **state_of(learner)}
    while not learner.saved():
        time.sleep(0.001)
    found["held"] = [sum(own_rows(p.detach())[0].numel() for p in learner._model.parameters())]
    if ranks:
        dist.barrier()
    for other in (1, 2, 4):
        if (material.folder / f"saved-{other}").is_dir():
            learner = material.learner(name, ranks, checkpoint=material.folder / f"saved-{other}")
            found[f"from {other}"] = {"metrics": [material.update(learner, name)], **state_of(learner)}
    found["delta"] = changes(material, ranks)
    if ranks:
        found |= refused(material, ranks) | {"given_up": given_up(material, ranks)}
    return found


def changes(material: Material, ranks: Ranks | None) -> dict[str, list[Any]]:
    """Two versions; the second both as a delta and dense."""
    learner = material.learner("plain", ranks, publish_dtype="bfloat16", keep_published=True)
    learner._optimizer.param_groups[0]["lr"] = 1e-6
    first = Published(received(learner.publish()))
    material.update(learner, "plain")
    return {
        "first": first,
        "change": Published(received(learner.publish(True))),
        "second": Published(received(learner.publish())),
    }


def refused(material: Material, ranks: Ranks) -> dict[str, Any]:
    """The error of each rank for a trajectory with a NaN log-prob, and whether its weights are unchanged."""
    written, scores = material.batches["topk"]
    bad = written.behaviour_logprobs.copy()
    bad[: written.response_offsets[1]] = np.nan
    learner = material.learner("plain", ranks, microbatch_tokens=1)
    before = Published(received(learner.publish()))
    with pytest.raises(NonFiniteLossError) as error:
        learner.update(written.ids, replace(written, behaviour_logprobs=bad), scores)
    after = Published(received(learner.publish()))
    return {"refusal": str(error.value), "unchanged": before[-1] == after[-1]}  # the manifest, checksums included


def given_up(material: Material, ranks: Ranks) -> list[tuple[str, int, bool]]:
    """Of each rank: its error where only the last one is told to give up, in its first pass; the passes that it has
    begun; whether its weights are unchanged."""
    learner = material.learner("plain", ranks, microbatch_tokens=1)
    before = Published(received(learner.publish()))
    loss, passes = learner._forward.loss, [0]

    def counted(*arguments: Any, **keywords: Any) -> Any:
        passes[0] += 1
        if passes[0] == 1 and ranks.rank == ranks.size - 1:
            learner.give_up()
        return loss(*arguments, **keywords)

    learner._forward.loss = counted  # type: ignore[method-assign]
    with pytest.raises(GivenUpError) as error:
        material.update(learner, "plain")
    after = Published(received(learner.publish()))
    told: list[Any] = [None] * ranks.size
    dist.all_gather_object(told, (str(error.value), passes[0], before[-1] == after[-1]))
    return told


def run_rank(rank: int, size: int, material: Material) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    ranks = Ranks.join(dist.FileStore(str(material.folder / f"meeting-{size}"), size), rank, size, "cpu")
    found = trial(material, ranks)
    (material.folder / f"found-{size}-{rank}").write_bytes(pickle.dumps(found))
    dist.destroy_process_group()


def run_ranks(size: int, *arguments: Any, body: Any = run_rank, folder: Path) -> None:
    processes = [
        clean_process.start(body, rank, size, *arguments, log=folder / f"log-{size}-{rank}") for rank in range(size)
    ]
    for rank, process in enumerate(processes):
        process.join(600)
        assert process.exitcode == 0, (folder / f"log-{size}-{rank}").read_text()[-4000:]


@pytest.fixture(scope="module")
def material(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Material:
    folder = tmp_path_factory.mktemp("ranks")
    experts = make_tiny_model(folder / "experts", hidden=32, layers=1, architecture="qwen3_moe")
    models = {
        **models,
        "experts": experts,
        "dropping": make_architecture(folder / "dropping", *ARCHITECTURES["gpt2"]),
        "untied": make_tiny_model(folder / "untied", hidden=32, layers=2, tie=False, vocab_extra=2),
    }
    batches = {s: sampled(models, "other", s) for s in ("full", "topk", "hidden")}
    return Material(models, batches | {"turns": in_turns(*batches["full"])}, folder)


def in_turns(written: Trajectories, scores: TeacherScores) -> tuple[Trajectories, TeacherScores]:
    """The same responses, whose second, fifth and eighth tokens another has written: of one to three turns."""
    place = np.arange(len(written.response_tokens)) - np.repeat(written.response_offsets[:-1], written.lengths)
    own = place % 3 != 1
    told = np.where(own, written.behaviour_logprobs, np.float32(np.nan))
    assert set(replace(written, trained=own).turn_counts.tolist()) >= {2, 3}
    return replace(written, trained=own, behaviour_logprobs=told), scores


@pytest.fixture(scope="module")
def found(material: Material) -> dict[int, dict[str, Any]]:
    """Number of ranks -> the results of rank 0, and the published versions of all ranks."""
    for size in SIZES:
        run_ranks(size, material, folder=material.folder)
    files = {size: [material.folder / f"found-{size}-{rank}" for rank in range(size)] for size in SIZES}
    several = {size: together([pickle.loads(file.read_bytes()) for file in files[size]]) for size in SIZES}
    return {1: together([trial(material, None)]), **several}


def together(found: list[Any]) -> Any:
    """The results of rank 0, with the published versions of every rank."""
    if isinstance(found[0], dict):
        return {key: together([own[key] for own in found]) for key in found[0]}
    return found if isinstance(found[0], Published) else found[0]


def tensors(ranks: list[Published], receiver: Receiver | None = None) -> dict[str, torch.Tensor]:
    """The tensors that an engine gets for a version, by name; afterwards the receiver holds this version."""
    receiver = receiver or Receiver(False)
    version = receiver.receive(*(part for own in ranks for part in own))
    receiver.hold(version)
    verify(*join(version))
    return dict(unpack(*join(version)))


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert list(ours) == list(theirs)
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


def assert_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Equal to 1e-6: metrics, gradients, weights, averages."""
    for mine, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        expected = {key: value for key, value in other.items() if key not in ("busy_seconds", "processor_seconds")}
        counts = (metrics["log_ratio_histogram"] for metrics in (mine, expected))
        assert np.abs(np.subtract(*counts)).sum() <= 2  # one token on an edge
        expected = {key: value for key, value in expected.items() if key != "log_ratio_histogram"}
        assert {key: mine[key] for key in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6, nan_ok=True)
    np.testing.assert_allclose(ours["gradients"], theirs["gradients"], rtol=0, atol=1e-6)
    for kind in ("weights", "average"):
        mine, other = tensors(ours[kind]), tensors(theirs[kind])
        assert mine.keys() == other.keys() and len(mine) > 1
        for tensor in mine:
            np.testing.assert_allclose(mine[tensor], other[tensor], rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", SETTINGS)
def test_several_ranks_take_the_update_that_one_takes(name: str, size: int, found: dict[int, dict[str, Any]]) -> None:
    assert_equal(found[size][name], found[1][name])
    assert found[1][name]["metrics"][1]["grad_norm"] > 1e-4


def test_the_settings_do_what_they_are_there_for(found: dict[int, dict[str, Any]]) -> None:
    steps = found[1]["steps without tokens"]["metrics"][0]
    assert steps["steps_taken"] > 0 and steps["steps_skipped"] > 0
    assert found[1]["taken back"]["metrics"][0]["step_scale"] < 1
    assert found[1]["adaptive"]["metrics"][1]["beta"] != found[1]["adaptive"]["metrics"][0]["beta"]


@pytest.mark.parametrize("size", SIZES)
def test_what_several_ranks_publish_is_what_one_publishes_to_the_bit(
    size: int, found: dict[int, dict[str, Any]]
) -> None:
    for name in SETTINGS:
        assert_same_bits(tensors(found[size][name]["fresh"]), tensors(found[1][name]["fresh"]))


@pytest.mark.parametrize("size", (1, *SIZES))
def test_what_several_ranks_say_has_changed_makes_the_next_version_of_the_one_before(
    size: int, found: dict[int, dict[str, Any]]
) -> None:
    first, change, second = (found[size]["delta"][what] for what in ("first", "change", "second"))
    for before, after in zip(first, change, strict=True):
        assert isinstance(after[-1], DeltaVersion) and after[-1].nbytes < before[-1].nbytes
    receiver = Receiver(True)
    tensors(first, receiver)
    assert_same_bits(tensors(change, receiver), tensors(second))
    assert_same_bits(tensors(change, receiver), tensors(second))  # a second time


@pytest.mark.parametrize("size", SIZES)
def test_each_rank_holds_and_publishes_its_share(size: int, material: Material, found: dict) -> None:
    own = [pickle.loads((material.folder / f"found-{size}-{rank}").read_bytes()) for rank in range(size)]
    held = [rank["held"][0] for rank in own]
    assert sum(held) == found[1]["held"][0]
    assert max(held) < 1.1 * sum(held) / size
    for name in SETTINGS:
        published = [sum(entry.nbytes for entry in rank[name]["fresh"][-1].tensors) for rank in own]
        [whole] = found[1][name]["fresh"]
        assert sum(published) == sum(entry.nbytes for entry in whole[-1].tensors)
        assert max(published) < 1.2 * sum(published) / size


@pytest.mark.parametrize("size", SIZES)
def test_every_rank_refuses_a_loss_that_is_no_number_and_names_the_trajectory(size: int, material: Material) -> None:
    for rank in range(size):
        own = pickle.loads((material.folder / f"found-{size}-{rank}").read_bytes())
        assert own["unchanged"] and re.search(r"update 1: the loss is .* \(trajectories 0/0/0\)", own["refusal"])


@pytest.mark.parametrize("size", (1, *SIZES))
def test_a_checkpoint_goes_on_with_any_number_of_ranks(size: int, found: dict[int, dict[str, Any]]) -> None:
    for other in (n for n in (1, *SIZES) if f"from {n}" in found[size]):
        assert_equal(found[size][f"from {other}"], found[1]["after"])
    assert f"from {size}" in found[size] and "from 2" in found[4] and "from 4" in found[1]


def test_a_checkpoint_of_several_ranks_is_a_whole_model_directory(material: Material, found: dict) -> None:
    model = AutoModelForCausalLM.from_pretrained(material.folder / "saved-2")
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    before = tensors(found[2]["taken back"]["weights"])
    assert weights.numel() == found[1]["held"][0] and weights.isfinite().all()
    assert torch.equal(weights, torch.cat([tensor.flatten() for tensor in before.values()]))
    for name in ("model.safetensors", "training/optimizer.safetensors", "training/averages.safetensors"):
        ours, theirs = (load_file(material.folder / f"saved-{size}" / name) for size in (2, 4))
        assert ours.keys() == theirs.keys()
        assert all(ours[key].shape == theirs[key].shape for key in ours)


@pytest.mark.parametrize("size", SIZES)
def test_in_sixteen_bits_ranks_compute_what_one_computes_but_for_rounding(size: int, found: dict) -> None:
    for mine, other in zip(found[size]["half"], found[1]["half"], strict=True):
        assert mine["reverse_kl"] == pytest.approx(other["reverse_kl"], rel=0.01)
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=0.02)


def test_experts_are_written_one_by_one_as_of_one_rank(material: Material, found: dict) -> None:
    one, *others = (load_file(material.folder / f"experts-{size}" / "model.safetensors") for size in (1, *SIZES))
    assert "model.layers.0.mlp.experts.3.up_proj.weight" in one
    for other in others:
        assert other.keys() == one.keys()
        for name in one:
            torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)
    AutoModelForCausalLM.from_pretrained(material.folder / "experts-2")


@pytest.mark.skipif("adapters" not in SETTINGS, reason="no library peft")
def test_adapters_are_written_as_of_one_rank(material: Material, found: dict) -> None:
    for file in ("model.safetensors", "adapter/adapter_model.safetensors", "training/optimizer.safetensors"):
        one, *others = (load_file(material.folder / f"adapters-{size}" / file) for size in (1, *SIZES))
        for other in others:
            assert other.keys() == one.keys()
            for name in one:
                torch.testing.assert_close(other[name], one[name], rtol=0, atol=1e-6)


def test_trajectories_are_shared_out_by_their_tokens() -> None:
    costs, steps = np.array([9, 1, 1, 1, 9, 2, 2, 2]), [np.arange(0, 8, 2), np.arange(1, 8, 2)]
    shares = [Ranks(rank, 3).own_trajectories(costs, steps) for rank in range(3)]
    assert (np.sum(shares, axis=0) == 1).all()
    for rows in steps:
        loads = [costs[rows][share[rows]].sum() for share in shares]
        assert max(loads) <= max(9, -(-costs[rows].sum() // 3) + 1)
    assert Ranks().own_trajectories(costs, steps).all()


@pytest.mark.parametrize("size", SIZES)
def test_all_ranks_give_up_in_the_same_pass_though_one_of_them_is_told(
    found: dict[int, dict[str, Any]], size: int
) -> None:
    assert found[size]["given_up"] == [("update 1 was given up before its first step", 1, True)] * size
