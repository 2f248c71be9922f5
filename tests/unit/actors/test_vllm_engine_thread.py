"""The engine's thread when callers give up and when loads fail, with a stand-in for vLLM that steps when it is told."""

import asyncio
import itertools
import queue
import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.errors import EngineError, WeightError
from actors.rollout.seats import Seats
from actors.rollout.vllm_engine import VllmEngine
from actors.trajectory import Requests


class SteppedVllm:
    """Finishes every request, with one token, in its second step. Each step waits for `allow`."""

    def __init__(self) -> None:
        self.allow = threading.Semaphore(0)
        self.left: dict[str, int] = {}

    def add_request(self, name: str, *_: Any, **__: Any) -> None:
        self.left[name] = 2

    def abort_request(self, names: list[str]) -> None:
        for name in names:
            del self.left[name]

    def step(self) -> list[Any]:
        self.allow.acquire()
        self.left = {name: steps - 1 for name, steps in self.left.items()}
        done = [name for name, steps in self.left.items() if not steps]
        for name in done:
            del self.left[name]
        token = SimpleNamespace(
            token_ids=[1],
            weight_versions=[SimpleNamespace(start=0, end=1, version="0")],
            logprobs=SimpleNamespace(logprobs=[-1.0], token_ids=[1]),
            finish_reason="stop",
        )
        return [SimpleNamespace(finished=True, request_id=name, outputs=[token]) for name in done]


@pytest.fixture
def engine() -> Any:
    made: Any = VllmEngine.__new__(VllmEngine)
    made.version, made.busy_seconds, made.tokens_sampled, made._failure = 0, 0.0, 0, None
    made._waiting, made._commands, made._names = {}, queue.Queue(), itertools.count()
    made._support_size, made._recompute_kv, made._request, made._adapter = 0, True, None, None
    made._sampling_params = lambda *_: None
    made._check_tensors = lambda _: None
    made._seats = Seats(8, 1000, 16, 100)
    made._engine = SteppedVllm()
    made._thread = threading.Thread(target=made._run, daemon=True)
    made._thread.start()
    return made


def request(sample: int) -> Requests:
    return Requests(
        ids=np.array([[0, 0, sample]]),
        seeds=np.array([1]),
        prompt_tokens=np.array([1], np.int32),
        prompt_offsets=np.array([0, 1]),
    )


def test_a_caller_that_gives_up_while_its_request_waits_for_a_load_harms_nobody(engine: Any) -> None:
    async def body() -> None:
        first = asyncio.wrap_future(engine.generate(request(0), None))
        loaded = engine._submit(lambda: None, "idle")  # as a load with `on_new_weights: wait`
        given_up = asyncio.wrap_future(engine.generate(request(1), None))
        await asyncio.wrap_future(engine._submit(lambda: None, "any"))  # the commands before it are in the thread
        given_up.cancel()
        await asyncio.sleep(0)  # the cancellation reaches the future
        engine._engine.allow.release(6)
        await first
        await asyncio.wrap_future(loaded)
        third = await asyncio.wrap_future(engine.generate(request(2), None))
        assert third.ids.tolist() == [[0, 0, 2]] and engine._failure is None

    asyncio.run(body())


def test_no_token_is_sampled_after_a_load_that_fails_halfway(engine: Any) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("half loaded")

    engine._wait_for_running, engine._replace_weights = False, fails
    running = engine.generate(request(0), None)
    loading = engine.load_weights(SimpleNamespace(version=1), [])
    engine._engine.allow.release(2)  # the step that may have begun, and one that must not be
    with pytest.raises(WeightError, match="half loaded"):
        loading.result()
    later = engine.generate(request(1), None)
    with pytest.raises(EngineError, match="half loaded"):
        later.result()
    with pytest.raises(EngineError, match="half loaded"):
        running.result()
    assert engine.version == 0 and engine.tokens_sampled == 0
