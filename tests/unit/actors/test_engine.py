import asyncio
import sys
import types
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from actors.config import RolloutConfig, SamplingConfig
from actors.errors import CampaignError, UserError
from actors.rollout.actor import RolloutActor
from actors.rollout.engine import METHODS, Response, check_answer, engine_class, make_engine, trajectories_of
from actors.rollout.vllm_engine import VllmEngine
from actors.trajectory import Requests
from actors.weights.buckets import WeightVersion
from cluster.config_file import load_config
from cluster.preflight import checks


@pytest.fixture
def module() -> Iterator[types.ModuleType]:
    found = types.ModuleType("own_engines")
    methods = {name: lambda self, *_, **__: None for name in (*METHODS, "__init__")}
    found.Complete = type("Complete", (), methods)  # type: ignore[attr-defined]
    found.Mute = type("Mute", (), {name: methods[name] for name in METHODS if name != "abort"})  # type: ignore[attr-defined]
    narrow = {"__init__": lambda self, model: None}, {"generate": lambda self, requests, sampling: None}
    found.Narrow, found.NoGreedy = (type("Narrow", (), methods | own) for own in narrow)  # type: ignore[attr-defined]
    found.number = 3  # type: ignore[attr-defined]
    sys.modules["own_engines"] = found
    yield found
    del sys.modules["own_engines"]


def test_the_class_is_found_by_its_name(module: types.ModuleType) -> None:
    assert engine_class("vllm") is VllmEngine
    assert engine_class("own_engines:Complete") is module.Complete


@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("own_engines:Mute", "without abort, expected a class with the methods generate, load_weights, abort, close"),
        ("own_engines:Compleat", "did you mean 'own_engines:Complete'"),
        ("own_engines:number", "own_engines:number, which is of type int, expected a class"),
        ("own_engines:Narrow", r"Narrow \(.*argument.*\), expected Class\(model, config, sampling, stop_token_ids"),
        (
            "own_engines:NoGreedy",
            r"NoGreedy.generate \(.*'greedy'\), expected generate\(requests, sampling, greedy=False",
        ),
        ("no_such_module:Engine", r"no_such_module:Engine \(ModuleNotFoundError: No module named"),
        ("sglang", "'sglang', expected the import path of a class, package.module:name"),
    ],
)
def test_what_cannot_be_an_engine_is_named(module: types.ModuleType, backend: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^rollout.backend: found .*{message}"):
        engine_class(backend)


def test_an_engine_without_an_attribute_is_refused_when_it_is_built(module: types.ModuleType) -> None:
    module.Complete.__init__ = lambda self, *a, **k: vars(self).update(version=None, seats=1)  # type: ignore[attr-defined]
    with pytest.raises(UserError, match="without busy_seconds, tokens_sampled"):
        make_engine("m", RolloutConfig(backend="own_engines:Complete"), SamplingConfig())


@pytest.mark.parametrize("backend", ["vlm", "package.module", "package:", ":Engine", "a b:Engine"])
def test_another_form_is_refused_before_anything_is_imported(backend: str) -> None:
    with pytest.raises(UserError, match=r"rollout.backend: found .*, expected vllm, or package.module:Class"):
        load_config("configs/quickstart.yaml", [f"rollout.backend={backend!r}"])
    config = load_config("configs/quickstart.yaml", ["rollout.backend='no_such_module:Engine'"])
    assert config.rollout.backend == "no_such_module:Engine"


def test_check_imports_the_engine_also_offline(module: types.ModuleType) -> None:
    def check(backend: str) -> str:
        config = load_config("configs/quickstart.yaml", [f"rollout.backend='{backend}'"])
        run = dict(checks(config, offline=True))["engine"]
        assert run is not None
        return run()

    assert check("own_engines:Complete") == "own_engines:Complete"
    with pytest.raises(UserError, match="without abort"):
        check("own_engines:Mute")


def test_an_answer_is_one_trajectory_for_each_request_in_their_order_with_finite_log_probs() -> None:
    requests = Requests(
        ids=np.array([[0, 0, 0], [0, 0, 1]]),
        seeds=np.array([1, 2]),
        prompt_tokens=np.array([5, 5], np.int32),
        prompt_offsets=np.array([0, 1, 2]),
    )
    good = trajectories_of(
        requests, [Response([1, 2], [-0.5, -1.0], [0, 0], "stop"), Response([3], [-2.0], [0], "stop")]
    )
    check_answer(requests, good)
    fewer, swapped = replace(good, ids=good.ids[:1]), replace(good, ids=good.ids[::-1])
    for wrong, message in (
        (fewer, "answered 1 of 2 requests"),
        (swapped, "or in another order"),
        (replace(good, behaviour_logprobs=np.array([-0.5, np.nan, -2.0])), "not finite"),
        (replace(good, trained=np.array([True, True, False])), "without a token that the student wrote"),
    ):
        with pytest.raises(CampaignError, match=f"^rollout.backend: .*{message}"):
            check_answer(requests, wrong)
    turns = [
        Response([1, 2, 9], [-0.5, np.nan, -1.0], [7, -1, 3], "stop", trained=[True, False, True]),
        Response([3], [-2.0], [4], "stop"),
    ]
    told = trajectories_of(requests, turns)
    check_answer(requests, told)  # of what another wrote nothing is known, and nothing asked
    assert told.trained.tolist() == [True, False, True, True]
    assert told.oldest_versions.tolist() == [3, 4] and told.trained_lengths.tolist() == [2, 1]


def test_an_engine_that_does_not_say_which_version_it_holds_is_refused_and_the_version_not_kept() -> None:
    done: Future = Future()
    done.set_result(None)
    held: list[object] = []
    ranks = [(WeightVersion(7, (), ()), [])]
    actor: Any = RolloutActor.__new__(RolloutActor)
    actor._loading = asyncio.Lock()
    actor._receiver = types.SimpleNamespace(receive=lambda *_: ranks, hold=held.append)
    actor._engine = types.SimpleNamespace(load_weights=lambda *_: done, version=None)
    with pytest.raises(CampaignError, match=r"^rollout.backend: after a load the engine's version is None, expected 7"):
        asyncio.run(actor.load_weights())
    assert not held
    actor._engine.version = 7
    assert asyncio.run(actor.load_weights()).stood_still == 0.0 and held == [ranks]


@pytest.mark.parametrize("support", [0, 2])
def test_responses_become_flat_arrays_in_the_order_of_the_requests(support: int) -> None:
    requests = Requests(
        ids=np.array([(0, 7, 0), (0, 3, 1)]), seeds=np.arange(2),
        prompt_tokens=np.array([5, 6, 8], np.int32), prompt_offsets=np.array([0, 2, 3]),
    )  # fmt: skip
    assert [prompt.tolist() for prompt in requests.prompts] == [[5, 6], [8]]
    ids = [np.arange(n * support).reshape(n, support) if support else None for n in (3, 1)]
    found = trajectories_of(
        requests, [Response([1, 2, 3], [-1.0, -2.0, -3.0], [4, 4, 5], "length", ids[0]), Response([9], [-0.5], [5], "stop", ids[1])]
    )  # fmt: skip
    assert found.ids.tolist() == [[0, 7, 0], [0, 3, 1]] and found.response_offsets.tolist() == [0, 3, 4]
    assert found.response_tokens.tolist() == [1, 2, 3, 9] and found.policy_versions.tolist() == [4, 4, 5, 5]
    assert found.behaviour_logprobs.tolist() == [-1.0, -2.0, -3.0, -0.5] and found.finish_reasons.tolist() == [1, 0]
    assert found.support_ids.shape == (4, support)
