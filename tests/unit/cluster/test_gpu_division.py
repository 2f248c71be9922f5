"""Several roles on one GPU: what each may take, who starts when, and what is refused. The GPU is a stand-in."""

import asyncio
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from actors import accelerator, vllm_startup
from actors.accelerator import keep_to_share
from actors.config import TeacherConfig
from actors.errors import UnavailableError, UserError
from actors.gpu_share import PROCESS_BYTES, engine_fraction, torch_fraction
from actors.prompts.columns import Coded, Texts
from actors.prompts.prompt_set import PromptSet
from actors.rollout.engine import PromptLengths
from actors.trajectory import offsets_of
from actors.vllm_options import share_options
from actors.vllm_startup import build_llm
from cluster import preflight, roles
from cluster.config import CampaignConfig
from cluster.config_file import load_config
from cluster.fleet import supervision
from cluster.fleet.gpu_division import division, least_gpus, refuse_overdrawn
from cluster.fleet.ray_actor import _keeping_its_error
from cluster.fleet.ray_cluster import check_fits, role_resources
from cluster.fleet.ray_fleet import Fleet
from cluster.loop.teachers import PromptRoutes
from cluster.roles import SPARE_TOKENS, build_fleets, build_learner, starts_last
from cluster.run import in_order
from learner.memory_items import LearnerNumbers, ModelNumbers, learner_items, peak, teacher_items
from tests.actors_of_this_process import Events, with_fleet
from tests.small_config import config
from tests.tiny_models import make_tiny_model

CARD = 25_757_220_864
"""Bytes of a GPU sold as 24 GB."""


def inputs_of(lengths: list[int], held_out: list[int] | None = None, privileged: list[int] | None = None) -> Any:
    """What was read, of prompts with these lengths."""

    def prompts(lengths: list[int]) -> PromptSet:
        none: list[Any] = [None] * len(lengths)
        return PromptSet(
            tokens=np.zeros(sum(lengths), np.int32),
            offsets=offsets_of(lengths),
            references=Texts.of(none),
            domains=Coded.of(none),
            texts=Texts.of([""] * len(lengths)),
        )

    routes = PromptRoutes([], {"default": prompts(privileged)} if privileged else {})
    return SimpleNamespace(
        prompts=prompts(lengths),
        prompt_routes=routes,
        held_out=prompts(held_out) if held_out else None,
        held_out_routes=routes if held_out else None,
        sets={},
        stop_token_ids=[],
        vocabulary=9,
        turn_ends={},
        masked_role_token_ids=[],
    )


def gpus(wanted: CampaignConfig, there: float = 1.0) -> dict[str, float]:
    return {role: one.gpus for role, (_, one) in role_resources(wanted, there, private=False).items()}


@pytest.mark.parametrize("shares", [(0.33, 0.33, 0.33), (0.2, 0.5, 0.3), (0.25, 0.25, 0.25, 0.25)])
@pytest.mark.parametrize("card", [CARD, 85_024_112_640])
def test_what_the_processes_of_a_gpu_may_hold_together_is_at_most_the_gpu(shares: tuple[float, ...], card: int) -> None:
    """The first is an engine; each process has a context besides, and vLLM may need 150 MiB more than it measures."""
    engine = engine_fraction(shares[0], card) * card + (150 << 20)
    torch_roles = sum(torch_fraction(share, card) * card for share in shares[1:])
    together = engine + torch_roles + len(shares) * PROCESS_BYTES
    assert 0.96 * card < together <= card


def test_an_engine_on_a_share_gets_what_its_share_leaves_and_one_with_a_whole_gpu_is_left_alone() -> None:
    found = share_options({"max_num_seqs": 8}, 0.4, CARD, "rollout.engine")
    assert found == {"gpu_memory_utilization": engine_fraction(0.4, CARD)} and 0.35 < engine_fraction(0.4, CARD) < 0.36
    for whole in (None, 0, 1, 2):
        assert share_options({"gpu_memory_utilization": 0.95}, whole, CARD, "rollout.engine") == {}
    assert share_options({"gpu_memory_utilization": 0.3}, 0.4, CARD, "rollout.engine")


@pytest.mark.parametrize(
    ("options", "card", "told"),
    [
        (
            {"gpu_memory_utilization": 0.9},
            CARD,
            "rollout.engine.gpu_memory_utilization: found 0.9, expected at most 0.358 in the share of 0.4 GPUs of 25.8 GB",
        ),
        (
            {"gpu_memory_utilization": 0.9},
            0,
            "expected at most 0.4 in the share of 0.4 GPUs (gpus_per_replica), or nothing",
        ),
        ({"kv_cache_memory_bytes": 10**10}, CARD, "rollout.engine.kv_cache_memory_bytes: found 10000000000 (10.0 GB)"),
        ({}, 1 << 30, "rollout.gpus_per_replica: found 0.4, expected more: nothing is left for an engine"),
    ],
)
def test_an_engine_that_asks_for_more_than_its_share_is_refused_with_what_fits(
    options: dict[str, Any], card: int, told: str
) -> None:
    with pytest.raises(UserError) as caught:
        share_options(options, 0.4, card, "rollout.engine")
    assert told in str(caught.value)


def test_what_roles_leave_of_the_only_gpu_is_shared_by_the_others(tmp_path: Path) -> None:
    assert gpus(config(tmp_path)) == {"rollout": 0.33, "teacher.default": 0.33, "learner": 0.33}
    served = ["teachers.default.backend=http", "teachers.default.urls=[http://h:1/v1]"]
    assert gpus(config(tmp_path, *served)) == {"rollout": 0.5, "teacher.default": 0.0, "learner": 0.5}
    some = config(tmp_path, "learner.gpus_per_replica=0.6")
    assert gpus(some) == {"rollout": 0.2, "teacher.default": 0.2, "learner": 0.6}
    check_fits(role_resources(some, 1.0, private=False), {"CPU": 8, "GPU": 1}, "here")
    none = config(tmp_path, "learner.gpus_per_replica=1")
    with pytest.raises(UserError, match=r"3 GPUs asked .* 1 GPUs of here"):
        check_fits(role_resources(none, 1.0, private=False), {"CPU": 8, "GPU": 1}, "here")


def test_check_names_an_engine_that_exceeds_its_share_and_says_the_division(tmp_path: Path) -> None:
    greedy = config(tmp_path, "rollout.engine={gpu_memory_utilization: 0.9}", "rollout.gpus_per_replica=0.4")
    with pytest.raises(UserError, match=r"rollout\.engine\.gpu_memory_utilization: found 0\.9, expected at most 0\.4"):
        preflight._engine(greedy)
    divided = config(tmp_path, "rollout.engine={gpu_memory_utilization: 0.9}")
    preflight._engine(divided)  # how many GPUs there are is not known here
    with pytest.raises(UserError, match=r"at most 0\.33 "):
        refuse_overdrawn(divided, gpus(divided))
    refuse_overdrawn(divided, gpus(divided, 8.0))
    teacher = config(tmp_path, "teachers.default={backend: vllm, engine: {gpu_memory_utilization: 0.8}}")
    with pytest.raises(UserError, match=r"teachers\.default\.engine\.gpu_memory_utilization: found 0\.8"):
        refuse_overdrawn(teacher, gpus(teacher), CARD)
    two = config(tmp_path, "rollout.tensor_parallel_size=2")
    with pytest.raises(
        UserError, match=r"rollout\.gpus_per_replica: found 0\.33, expected at least 2, one for each rank"
    ):
        refuse_overdrawn(two, gpus(two))
    needed = {"rollout": (1, 0.3), "teacher.default": (2, 0.2), "learner": (1, 0.3), "teacher.served": (1, 0.0)}
    assert division(needed, CARD) == (
        "a GPU of 25.8 GB is shared: rollout 1 x 0.3 (7.7 GB), teacher.default 2 x 0.2 (5.2 GB), learner 1 x 0.3 (7.7 GB), "
        "each with 0.8 GB for its process"
    )
    assert division({"rollout": (4, 1.0), "learner": (1, 1.0)}, CARD) == ""


@pytest.mark.parametrize(
    ("overrides", "refusal"),
    [
        (
            ["rollout.gpus_per_replica=0.00001"],
            r"rollout\.gpus_per_replica: found 1e-05, 2\.88 MB of the largest GPU there is",
        ),
        (
            ["learner.gpus_per_replica=0.002"],
            r"learner\.gpus_per_replica: found 0\.002, .*expected more than the 0\.8 GB that a",
        ),
        (["teachers.default.gpus_per_replica=0.001"], r"teachers\.default\.gpus_per_replica: found 0\.001"),
        (
            ["teachers.default={tensor_parallel_size: 2, gpus_per_replica: 0.5}"],
            r"teachers\.default\.gpus_per_replica: found 0\.5, expected at least 2, one for each rank "
            r"\(teachers\.default\.tensor_parallel_size\)",
        ),
        (
            ["teachers.default={tensor_parallel_size: 4, gpus_per_replica: 2}"],
            r"default\.gpus_per_replica: found 2, expected at least 4",
        ),
        (
            ["rollout={gpus_per_replica: 0.1, engine: {kv_cache_memory_bytes: 100000000000}}"],
            r"kv_cache_memory_bytes: .*less than the 28\.8 GB in the share of 0\.1 GPUs of the largest GPU there is",
        ),
        (
            ["teachers.default={backend: vllm, signal: student_topk, gpus_per_replica: 0}"],
            r"teachers\.default\.signal: found student_topk without a GPU",
        ),
    ],
)
def test_shares_that_no_gpu_can_give_are_refused_without_one(
    tmp_path: Path, overrides: list[str], refusal: str
) -> None:
    checks = dict(preflight.checks(config(tmp_path, *overrides), offline=True))
    with pytest.raises(UserError, match=refusal):
        checks["engine"]()  # type: ignore[misc]


def test_the_self_divided_gpu_of_a_teacher_over_several_is_refused_when_the_cluster_is_known(tmp_path: Path) -> None:
    two = config(tmp_path, "teachers.default.tensor_parallel_size=2")
    with pytest.raises(UserError, match=r"teachers\.default\.gpus_per_replica: found 0\.33, expected at least 2"):
        refuse_overdrawn(two, gpus(two))
    refuse_overdrawn(two, gpus(two, 8.0))


@pytest.mark.parametrize(
    ("actors", "least"),
    [
        ({"a": (1, 0.6), "b": (1, 0.6)}, 2),
        ({"a": (3, 0.6)}, 3),  # 1.8 in all, and no two of them on one GPU
        ({"a": (3, 0.33)}, 1),
        ({"a": (20, 0.05)}, 1),  # in floating point their sum is a little more than 1
        ({"a": (1, 0.5), "b": (2, 0.5), "c": (2, 1.0)}, 4),
        ({"a": (4, 0.0)}, 0),
    ],
)
def test_shares_take_as_many_gpus_as_they_can_be_put_on(actors: dict[str, tuple[int, float]], least: int) -> None:
    assert least_gpus(actors) == least


def test_shares_that_add_up_and_cannot_be_put_on_the_gpus_are_refused(tmp_path: Path) -> None:
    apart = config(tmp_path, *(f"{role}.gpus_per_replica=0.6" for role in ("rollout", "learner", "teachers.default")))
    needed = role_resources(apart, 2.0, private=False)
    with pytest.raises(
        UserError, match=r"gpus_per_replica: found .*, which take 3 GPUs, since a share lies on one, expected shares"
    ):
        check_fits(needed, {"CPU": 8, "GPU": 2}, "here")
    check_fits(needed, {"CPU": 8, "GPU": 3}, "here")
    told = dict(preflight.checks(apart, offline=True))["shares of GPUs"]()  # type: ignore[misc]
    assert told == "rollout 1 x 0.6, teacher.default 1 x 0.6, learner 1 x 0.6: with all others at least 3 GPUs"
    assert "shares of GPUs" not in dict(preflight.checks(config(tmp_path), offline=True))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A GPU that answers each question for its free bytes with the next of `free`; `limit` is the limit that the process has set."""
    there = SimpleNamespace(free=[CARD], limit=None, options=None, error=None, slept=0.0)

    class Llm:
        def __init__(self, **options: Any):
            if there.error:
                raise there.error
            there.options, self.llm_engine = options, SimpleNamespace(step=lambda: None)

    vllm: Any = ModuleType("vllm")
    vllm.LLM = Llm
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    for name, fake in {
        "is_available": lambda: True,
        "init": lambda: None,
        "mem_get_info": lambda: (there.free.pop(0) if len(there.free) > 1 else there.free[0], CARD),
        "set_per_process_memory_fraction": lambda fraction: setattr(there, "limit", fraction),
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)

    def sleep(seconds: float) -> None:
        there.slept += seconds

    monkeypatch.setattr(vllm_startup, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: there.slept))
    return there


def build(gpus: float | None, **more: Any) -> Any:
    return build_llm({"model": "m", "tensor_parallel_size": 1}, more, "rollout.engine", gpus)


def test_an_engine_is_given_its_share_once_the_memory_is_free(gpu: SimpleNamespace) -> None:
    gpu.free = [CARD, CARD // 10, CARD // 5, CARD // 2]
    build(0.4, max_num_seqs=8)
    assert gpu.options["gpu_memory_utilization"] == engine_fraction(0.4, CARD) and gpu.options["max_num_seqs"] == 8
    assert gpu.slept == 1.0
    build(0.4, gpu_memory_utilization=0.2)
    assert gpu.options["gpu_memory_utilization"] == 0.2
    build(1.0)
    assert "gpu_memory_utilization" not in gpu.options


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (
            None,
            "rollout.gpus_per_replica: found 2.6 of the 25.8 GB of its GPU free, expected 9.2 GB: other roles hold more",
        ),
        (
            ValueError("No available memory for the cache blocks."),
            "found 0.4, expected room for the engine in this share",
        ),
        (
            AssertionError("Error in memory profiling. Initial free memory 3"),
            "expected room for the engine in this share",
        ),
        (torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB; 8 GiB allowed"), "(CUDA out of memory. Tried 9 GiB"),
    ],
)
def test_a_share_without_room_is_told_by_its_key_and_tried_again(
    gpu: SimpleNamespace, error: Exception | None, told: str
) -> None:
    gpu.error = error
    gpu.free = [CARD if error else CARD // 10]
    with pytest.raises(UnavailableError) as caught:  # which a fleet that replaces an actor tries again
        build(0.4)
    assert str(caught.value).startswith("rollout.gpus_per_replica: ") and told in str(caught.value)


def test_every_role_on_a_share_limits_itself_and_one_with_a_whole_gpu_does_not(
    gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cluster.fleet.ray_actor.require_gpu", lambda reserved: "card")

    class Role:
        pass

    for reserved in (0.0, 1.0, 2.0):
        _keeping_its_error(Role, reserved)()
        assert gpu.limit is None
    _keeping_its_error(Role, 0.3)()
    assert gpu.limit == torch_fraction(0.3, CARD) < 0.3
    assert accelerator.card_bytes() == CARD
    with pytest.raises(UserError, match=r"gpus_per_replica: found 0\.02, 0\.5 of the 25\.8 GB .* 0\.8 GB of a process"):
        keep_to_share(0.02)


def test_roles_are_told_their_share_and_have_one_turn_in_common(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(roles, "Fleet", lambda role, *arguments, **keywords: made.update({role: (arguments, keywords)}))
    wanted = config(tmp_path, "teachers.default={backend: vllm, engine: {max_model_len: 64}}", "teachers.other.model=o", "teachers.other.domains=[d]", "prompts.domain_field=x")  # fmt: skip
    inputs = inputs_of([5, 7])
    for there, shared in ((1.0, True), (8.0, False), (0.0, False)):
        needed = role_resources(wanted, there, private=False)
        build_fleets(wanted, inputs, needed, dict.fromkeys(needed, 1), print, turn := asyncio.Lock())
        build_learner(wanted, inputs, None, [], needed, print, turn)
        own = needed["rollout"][1].gpus
        [rollout] = [one for one in made["rollout"][0][1] if type(one) is type(wanted.rollout)]
        [teacher] = [one for one in made["teacher.default"][0][1] if type(one) is type(wanted.teachers["default"])]
        assert (rollout.gpus_per_replica, teacher.gpus_per_replica) == (own, own)
        assert {keywords["turn"] for _, keywords in made.values()} == {turn if shared else None}
    assert starts_last(wanted) == {"rollout", "teacher.default"}


def test_engines_have_room_for_the_longest_text_of_the_campaign_and_not_for_the_whole_context(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: dict[str, Any] = {}

    def fleet(role: str, *arguments: Any, **keywords: Any) -> SimpleNamespace:
        made[role] = (arguments, keywords)
        return SimpleNamespace()

    monkeypatch.setattr(roles, "Fleet", fleet)
    model = make_tiny_model(tmp_path / "model", context=4096)
    vllm = f"teachers.default={{backend: vllm, model: {model}}}"
    wanted = config(tmp_path, vllm, "sampling.max_response_tokens=100", f"student.model={model}")
    needed = role_resources(wanted, 8.0, private=False)

    def engine_of_teacher(inputs: Any, *overrides: str) -> dict[str, Any]:
        told = config(tmp_path, vllm, "sampling.max_response_tokens=100", *overrides)
        build_fleets(told, inputs, needed, dict.fromkeys(needed, 1), print, asyncio.Lock())
        [teacher] = [one for one in made["teacher.default"][0][1] if type(one) is TeacherConfig]
        return teacher.engine

    inputs = inputs_of([5, 7, 12], held_out=[30])
    assert engine_of_teacher(inputs) == {"max_model_len": 30 + 100 + SPARE_TOKENS}
    assert made["rollout"][0][2]["prompts"] == PromptLengths(usual=8, longest=12, whole=30 + 100)
    privileged = inputs_of([5], privileged=[700])
    assert engine_of_teacher(privileged) == {"max_model_len": 700 + 100 + SPARE_TOKENS}
    assert engine_of_teacher(inputs_of([4000])) == {"max_model_len": 4096}
    assert engine_of_teacher(inputs, "teachers.default.engine={max_model_len: 512}") == {"max_model_len": 512}
    # A prompt of an environment may be longer than its record, in an evaluation that has a length limit of its own, too.
    own = ("environment.name=examples.guess.game:Guess", "prompts.max_prompt_tokens=40")
    told = config(tmp_path, vllm, "sampling.max_response_tokens=100", "evaluation.max_response_tokens=200", *own)
    needed = role_resources(told, 8.0, private=False)
    build_fleets(told, inputs, needed, dict.fromkeys(needed, 1), print, asyncio.Lock())
    assert made["rollout"][0][2]["prompts"] == PromptLengths(usual=8, longest=40, whole=40 + 200)
    assert engine_of_teacher(inputs, "teachers.default.tokenizer=other") == {}


def test_on_a_shared_gpu_engines_start_after_the_others_and_elsewhere_all_start_at_once(tmp_path: Path) -> None:
    fleets: list[Any] = [SimpleNamespace(role=role) for role in ("learner", "rollout", "teacher.default")]
    wanted = config(tmp_path)
    for there, expected in ((1.0, [["learner", "teacher.default"], ["rollout"]]), (8.0, [["learner", "rollout", "teacher.default"], []])):  # fmt: skip
        needed = role_resources(wanted, there, private=False)
        assert [[fleet.role for fleet in group] for group in in_order(fleets, {"rollout"}, needed)] == expected


@pytest.mark.parametrize("shared", [True, False])
def test_actors_of_a_shared_gpu_are_built_one_after_the_other_also_when_they_are_replaced(
    monkeypatch: pytest.MonkeyPatch, shared: bool
) -> None:
    building, most = 0, 0

    class Worker:
        async def status(self) -> dict[str, Any]:
            nonlocal building, most
            building += 1
            most = max(most, building)
            await asyncio.sleep(0.01)
            building -= 1
            return {}

    async def body(fleet: Fleet, events: Events) -> None:
        for replica in fleet.replicas:
            replica.handle.dead.set()
        while sum(kind == "actor_restarted" for kind, _ in events) < 3:
            await asyncio.sleep(0.002)

    monkeypatch.setattr(supervision, "WATCH_SECONDS", 0.01)
    turn = asyncio.Lock() if shared else None
    with_fleet(monkeypatch, Worker, body, replicas=3, turn=turn)
    assert (most == 1) == shared


QWEN3 = {
    "Qwen/Qwen3-0.6B": ModelNumbers(596_049_920, 28, 1024, 151_936, 3072, 2048, 1024, 8, tied=True, inner_norms=True),
    "Qwen/Qwen3-1.7B": ModelNumbers(1_720_574_976, 28, 2048, 151_936, 6144, 2048, 1024, 8, tied=True, inner_norms=True),
    "Qwen/Qwen3-8B": ModelNumbers(
        8_190_735_360, 36, 4096, 151_936, 12_288, 4096, 1024, 8, tied=False, inner_norms=True
    ),
}
STEP_BYTES = 1.5e9
"""What an engine needs besides weights and cache: activations of a step, and CUDA graphs."""


@pytest.mark.parametrize(
    ("recipe", "card"), [("qwen3_0.6b_one_gpu_24gb", 23_600_000_000), ("qwen3_1.7b_one_gpu_80gb", 84_900_000_000)]
)
def test_the_roles_of_a_recipe_for_one_gpu_fit_their_shares(recipe: str, card: int) -> None:
    """card: the smallest GPU of its kind, in bytes."""
    here = load_config(Path(__file__).parents[3] / "configs" / f"{recipe}.yaml")
    shares, learner, teacher = gpus(here), here.learner, here.teachers["default"]
    check_fits(role_resources(here, 1.0, private=True), {"CPU": 8, "GPU": 1}, "here")
    refuse_overdrawn(here, shares, card)
    student = QWEN3[here.student.model]
    numbers = LearnerNumbers(
        pass_tokens=learner.microbatch_tokens,
        head_chunk_tokens=learner.head_chunk_tokens,
        checkpointing=learner.gradient_checkpointing,
        offload=learner.offload_optimizer,
        update_tokens=here.trajectories_per_update * here.sampling.max_response_tokens,
        score_bytes=12 * teacher.top_k,
    )
    held, _ = peak(learner_items(student, numbers))
    assert held < torch_fraction(shares["learner"], card) * card, f"{held / 1e9:.1f} GB"
    held, _ = peak(
        teacher_items(
            QWEN3[teacher.model],
            dtype_bytes=2,
            tensor_parallel=1,
            pass_tokens=teacher.microbatch_tokens,
            head_chunk_tokens=teacher.head_chunk_tokens,
        )
    )
    assert held < torch_fraction(shares["teacher.default"], card) * card, f"{held / 1e9:.1f} GB"
    cache = engine_fraction(shares["rollout"], card) * card - 2 * student.parameters - STEP_BYTES
    assert cache > 8 * student.cache_bytes(here.sampling.max_response_tokens + 512), f"{cache / 1e9:.1f} GB"
