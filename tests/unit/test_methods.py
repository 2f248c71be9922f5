"""The engine of benchmarks/methods.py: the same samples as one response at a time, however requests come together."""

from concurrent.futures import wait
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from actors.config import RolloutConfig, SamplingConfig
from actors.trajectory import Requests, offsets_of
from benchmarks.methods import BatchEngine, OneClock
from tests.light_engine import LightEngine
from tests.tiny_models import make_tiny_model


def asked(prompts: list[list[int]], first: int) -> Requests:
    count = len(prompts)
    return Requests(
        ids=np.array([(0, first + i, 0) for i in range(count)], np.int64),
        prompt_tokens=np.concatenate([np.array(prompt, np.int32) for prompt in prompts]),
        prompt_offsets=offsets_of([len(prompt) for prompt in prompts]),
        seeds=np.arange(first, first + count, dtype=np.int64),
    )


@pytest.mark.parametrize("greedy", [False, True])
def test_a_batch_gives_what_one_at_a_time_gives(tmp_path: Path, greedy: bool) -> None:
    make_tiny_model(tmp_path / "model", hidden=32, layers=1, context=64)
    config, sampling = RolloutConfig(), SamplingConfig(max_response_tokens=7, temperature=0.8)
    calls = [asked([[5, 6, 7], [8, 9]], 0), asked([[9, 5, 4]], 2), asked([[7, 8], [5, 5], [6, 4, 9]], 3)]
    found = []
    for engine_class in (LightEngine, BatchEngine):
        engine = engine_class(str(tmp_path / "model"), config, sampling, stop_token_ids=[3])
        engine.version = 4
        answers = [engine.generate(call, sampling, greedy=greedy) for call in calls]
        wait(answers)
        found.append([answer.result() for answer in answers])
        engine.close()
    for one, many in zip(*found, strict=True):
        assert one.response_tokens.tolist() == many.response_tokens.tolist()
        assert one.finish_reasons.tolist() == many.finish_reasons.tolist()
        np.testing.assert_allclose(one.behaviour_logprobs, many.behaviour_logprobs, atol=1e-5)
        assert set(many.policy_versions) == {4} and one.ids.tolist() == many.ids.tolist()


def test_calls_that_sample_otherwise_are_answered_each_in_its_own_way(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "model", hidden=32, layers=1, context=64)
    sampling, call = SamplingConfig(max_response_tokens=7), asked([[5, 6, 7], [8, 9]], 0)
    kinds = [(sampling, False), (sampling, True), (SamplingConfig(max_response_tokens=3), False), (sampling, False)]
    engine = BatchEngine(str(tmp_path / "model"), RolloutConfig(), sampling, stop_token_ids=[])
    engine.version = 0
    alone = [engine.generate(call, own, greedy=greedy).result().response_tokens.tolist() for own, greedy in kinds]
    assert engine.tokens_sampled == sum(map(len, alone)) == 2 * (7 + 7 + 3 + 7) and engine.busy_seconds > 0
    together = [engine.generate(call, own, greedy=greedy) for own, greedy in kinds]
    assert [answer.result().response_tokens.tolist() for answer in together] == alone
    assert alone[0] == alone[3] != alone[1]
    engine.close()


def test_roles_of_one_process_count_its_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 1.5, 3.0, 4.0, 9.0])
    monkeypatch.setattr("benchmarks.methods.time", SimpleNamespace(process_time=lambda: next(times)))
    one, other = OneClock(), OneClock()
    assert [one.since_report(), other.since_report(), one.since_report()] == [1.5, 1.0, 5.0]
