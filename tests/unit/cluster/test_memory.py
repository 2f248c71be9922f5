"""What `check` says of the memory of each role, for every shipped recipe, and what it refuses."""

import re
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3MoeConfig

from actors.accelerator import Card
from actors.errors import UserError
from cluster import preflight
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.planning import memory
from cluster.planning.memory import roles, version_bytes, versions_sentence
from cluster.records.event_table import describe
from tests.tiny_models import make_tiny_model

ROOT = Path(__file__).resolve().parents[3]
RECIPES = sorted(path.name for path in (ROOT / "configs").glob("*.yaml"))
QWEN3 = {"vocab_size": 151_936, "head_dim": 128, "num_key_value_heads": 8, "max_position_embeddings": 40_960}
SHAPES: dict[str, dict[str, Any]] = {
    "Qwen/Qwen3-0.6B": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "tied": True, "h": 16},
    "Qwen/Qwen3-1.7B": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28, "tied": True, "h": 16},
    "Qwen/Qwen3-4B": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "tied": True, "h": 32},
    "Qwen/Qwen3-8B": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "tied": False, "h": 32},
    "Qwen/Qwen3-14B": {
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "tied": False,
        "h": 40,
    },
    "Qwen/Qwen3-32B": {
        "hidden_size": 5120,
        "intermediate_size": 25600,
        "num_hidden_layers": 64,
        "tied": False,
        "h": 64,
    },
}
"""The configurations that the hub has for the models of the recipes, which are not on this machine."""
H100 = Card("NVIDIA H100 80GB HBM3", 85_000_000_000)
CARD_OF_24 = Card("NVIDIA GeForce RTX 4090", 25_300_000_000)


def network(model: str, trust_remote_code: bool, key: str) -> Any:
    model = model.partition("@")[0]
    if Path(model).is_dir() or model.removesuffix("-Base") not in SHAPES:
        if "Coder-30B-A3B" in model:
            experts = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768}
            sizes = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 48, "num_attention_heads": 32}
            return Qwen3MoeConfig(**QWEN3 | {"num_key_value_heads": 4}, **sizes, **experts)
        return real_load_config(model, trust_remote_code, key)
    shape = dict(SHAPES[model.removesuffix("-Base")])
    tied, heads = shape.pop("tied"), shape.pop("h")
    return Qwen3Config(**QWEN3, **shape, num_attention_heads=heads, tie_word_embeddings=tied)


real_load_config = memory.load_config
networks = cache(memory.network_without_memory)
"""A network of many layers takes seconds to describe."""


@pytest.fixture(autouse=True)
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(memory, "load_config", network)
    monkeypatch.setattr(memory, "network_without_memory", networks)


def recipe(name: str, *overrides: str) -> CampaignConfig:
    return load_config(ROOT / "configs" / name, overrides)


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_has_the_memory_of_each_role_by_item(name: str) -> None:
    config = recipe(name)
    found = {role.name: role.sentence(None) for role in roles(config)}
    assert found.keys() == {"learner", "rollout", *(f"teachers.{teacher}" for teacher in config.teachers)}
    for parts in (
        ("weights", "gradients", "AdamW's moments"),
        ("weights", "cache of one"),
    ):
        sentence = found["learner" if "gradients" in parts else "rollout"]
        assert all(part in sentence for part in parts), sentence
    assert "a copy for the checkpoint that is being written" in found["learner"]
    if name != "quickstart.yaml" and "24gb" not in name:
        for role in roles(config):
            role.demand_room(H100)
            assert "too little" not in role.sentence(H100), role.sentence(H100)


def test_the_figures_of_the_eight_billion() -> None:
    learner, rollout, teacher = roles(recipe("qwen3_8b_from_32b.yaml"))
    items = {item.name: round(item.nbytes / 1e9, 1) for item in learner.device}
    assert items["float32 weights"] == items["gradients"] == 8.2 and items["AdamW's moments"] == 16.4
    assert rollout.sentence(None).startswith("17.9 GB: weights 16.4, cache of one sequence 1.5")
    assert "weights 65.5" in teacher.sentence(None)


@pytest.mark.parametrize(
    ("name", "overrides", "card", "refusal"),
    [
        (
            "qwen3_8b_from_32b.yaml",
            ["learner.replicas=1"],
            H100,
            r"learner\.replicas: found 1, .* 1[34]\d\.\d GB at least",
        ),
        (
            "qwen3_4b_privileged.yaml",
            ["teachers.self.ema_decay=0.99"],
            H100,
            r"learner\.replicas: found 1, .* moving averages 16\.1.*offload_optimizer: true",
        ),
        ("qwen3_4b_privileged.yaml", [], CARD_OF_24, r"learner\.replicas: found 1, .* the memory of NVIDIA GeForce"),
        (
            "qwen3_8b_from_32b.yaml",
            [],
            CARD_OF_24,
            r"teachers\.default\.tensor_parallel_size: found 1, .*quantization",
        ),
    ],
)
def test_what_cannot_fit_is_refused_by_its_key(name: str, overrides: list[str], card: Card, refusal: str) -> None:
    with pytest.raises(UserError, match=refusal):
        for role in reversed(roles(recipe(name, *overrides))):
            role.demand_room(card)


def test_check_says_it_and_refuses_on_a_known_card(monkeypatch: pytest.MonkeyPatch) -> None:
    def checks(config: CampaignConfig) -> dict[str, Any]:
        return {name: check for name, check in preflight.checks(config, offline=False) if name.startswith("memory of ")}

    config = recipe("qwen3_8b_from_32b.yaml")
    found = checks(config)
    assert list(found) == ["memory of learner", "memory of rollout", "memory of teachers.default"]
    monkeypatch.setattr(preflight, "card_here", lambda: None)
    assert "of 85.0 GB" not in found["memory of learner"]()
    monkeypatch.setattr(preflight, "card_here", lambda: H100)
    assert "of 85.0 GB (NVIDIA H100 80GB HBM3)" in found["memory of learner"]()
    with pytest.raises(UserError, match=r"teachers\.default\.tensor_parallel_size"):
        monkeypatch.setattr(preflight, "card_here", lambda: CARD_OF_24)
        found["memory of teachers.default"]()
    on_cpu = checks(recipe("qwen3_8b_from_32b.yaml", "teachers.default.gpus_per_replica=0"))
    on_cpu["memory of teachers.default"]()


APPLIED = "the version that deltas are applied to, and the next"
SHARED = "a version, once a node for all engines"


@pytest.mark.parametrize(
    ("name", "overrides", "expected"),
    [
        ("qwen3_8b_from_32b.yaml", [], {"a version in pinned memory": 16.4}),
        ("qwen3_8b_from_32b.yaml", ["rollout.tensor_parallel_size=2"], {SHARED: 16.4}),
        ("qwen3_8b_from_32b.yaml", ["rollout.tensor_parallel_size=2", "rollout.dtype=float32"], {SHARED: 32.8}),
        ("qwen3_8b_from_32b.yaml", ["weights.encoding=delta"], {APPLIED: 32.8}),
        (
            "qwen3_8b_from_32b.yaml",
            ["weights.encoding=delta", "rollout.tensor_parallel_size=2"],
            {SHARED: 16.4, APPLIED: 32.8},
        ),
        ("qwen3_8b_from_32b.yaml", ["rollout.gpus_per_replica=0"], {}),
        ("qwen3_8b_from_32b.yaml", ["rollout.gpus_per_replica=0", "rollout.tensor_parallel_size=2"], {SHARED: 16.4}),
        ("qwen3_8b_lora.yaml", [], {}),
        ("qwen3_8b_lora.yaml", ["student.lora.publish=merged"], {"a version in pinned memory": 16.4}),
    ],
)
def test_the_host_memory_in_which_engines_stage_versions_is_told(
    name: str, overrides: list[str], expected: dict[str, float]
) -> None:
    rollout = roles(recipe(name, *overrides))[1]
    assert {item.name: round(item.nbytes / 1e9, 1) for item in rollout.host} == expected
    assert rollout.sentence(None).partition("; host: ")[2] == ", ".join(f"{k} {v}" for k, v in expected.items())


def test_where_engines_of_a_node_share_a_version_an_event_says_so() -> None:
    assert not memory.shares_version(recipe("qwen3_8b_from_32b.yaml"))
    assert memory.shares_version(recipe("qwen3_8b_from_32b.yaml", "rollout.tensor_parallel_size=2"))
    assert not memory.shares_version(recipe("qwen3_8b_lora.yaml", "rollout.tensor_parallel_size=2"))
    told = describe("version_shared", {"role": "rollout", "ranks": 2, "gigabytes": 16.38})
    assert told.endswith("all engines of a node map one copy of each weight version, 16.4 GB")


def test_a_served_teacher_is_not_counted() -> None:
    served = [
        "teachers.default.backend=http",
        "teachers.default.urls=[http://h:1/v1]",
        "teachers.default.signal=sampled",
    ]
    config = recipe("qwen3_8b_from_32b.yaml", *served, "learner.objective.estimator=immediate")
    assert [role.name for role in roles(config)] == ["learner", "rollout"]
    checks = dict(preflight.checks(config, offline=False))
    assert checks["memory of teachers.default"]() == "on its servers"


def test_a_version_that_is_too_large_for_the_object_store_is_told() -> None:
    student, _ = memory.student_numbers(recipe("qwen3_8b_from_32b.yaml"))
    assert versions_sentence(version_bytes(recipe("qwen3_8b_from_32b.yaml"), student, None), None) == "16.4 GB each"
    large = recipe("qwen3_8b_from_32b.yaml", "student.model=Qwen/Qwen3-32B")
    nbytes = version_bytes(large, *memory.student_numbers(large))
    said = versions_sentence(nbytes, 2.5e9)
    assert said.startswith("65.5 GB each, above 40 GB") and "here 2.50 GB/s, 26 s a version" in said
    assert "WeightTransport" in said and "between two nodes" not in versions_sentence(nbytes, None)
    adapters = recipe("qwen3_8b_lora.yaml")
    numbers, thin = memory.student_numbers(adapters)
    assert version_bytes(adapters, numbers, thin) == 87_293_952


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (
            ["rollout.engine={kv_cache_memory_bytes: 1000}"],
            r"rollout\.engine\.kv_cache_memory_bytes: found 1,000, expected at least 1,509,949,440 \(1,509\.9 MB\), the cache of "
            r"one sequence of 10,240 tokens; or nothing",
        ),
        (
            ["teachers.default={backend: vllm, engine: {kv_cache_memory_bytes: 1000, max_model_len: 100}}"],
            r"teachers\.default\.engine\.kv_cache_memory_bytes: found 1,000, expected at least 26,214,400 ",
        ),
        (
            ["rollout.gpus_per_replica=0.02"],
            r"rollout\..*: found 1, with which each GPU holds 17\.\d GB at least .*at most 5\.0 GB",
        ),
        (
            ["learner.gpus_per_replica=0.2", "learner.replicas=1"],
            r"learner\.replicas: found 1, .*the largest GPU of 288 GB",
        ),
        (
            ["teachers.default.gpus_per_replica=0.01"],
            r"teachers\.default\.tensor_parallel_size: found 1, .* at most 2\.1 GB",
        ),
    ],
)
def test_what_fits_no_gpu_at_all_is_refused_without_one(
    overrides: list[str], refusal: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "card_here", lambda: None)
    config = recipe("qwen3_8b_from_32b.yaml", *overrides)
    with pytest.raises(UserError, match=refusal):
        for name, check in preflight.checks(config, offline=False):
            if name.startswith("memory of "):
                check and check()


def test_a_small_cache_may_be_enough_where_layers_keep_less_than_all_keys() -> None:
    config = recipe("qwen3_8b_from_32b.yaml", "rollout.engine={kv_cache_memory_bytes: 1000000000}")
    numbers, _ = memory.student_numbers(config)
    memory.rollout_role(config, replace(numbers, partial_cache=True), None)
    with pytest.raises(UserError, match="kv_cache_memory_bytes"):
        memory.rollout_role(config, numbers, None)
    halved = recipe("qwen3_8b_from_32b.yaml", "rollout.engine={kv_cache_memory_bytes: 1000000000, kv_cache_dtype: fp8}")
    memory.rollout_role(halved, numbers, None)


def test_small_models_are_told_in_megabytes(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "model")
    config = recipe("quickstart.yaml", f"student.model={model}", f"teachers.default.model={model}")
    for role in roles(config):
        found = role.sentence(None)
        assert re.match(r"\d+\.\d MB: ", found) and not re.search(r" 0\.0+(?!\d)", found), found
        with pytest.raises(UserError, match=r"holds \d+\.\d MB at least .*at most 0\.1 MB, the memory of a card"):
            role.demand_room(Card("a card", 100_000))
