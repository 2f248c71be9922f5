"""Gauges for Prometheus stay while a campaign stands still: Ray's agent forgets what nobody sets for 20 s."""

import threading

import pytest

from cluster.tracking import ray_prometheus
from tests.waiting import until


def test_gauges_are_set_again_until_the_campaign_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, float, str]] = []

    class FakeGauge:
        def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]):
            self._name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            told.append((self._name, value, tags["run"]))

    monkeypatch.setattr(ray_prometheus, "Gauge", FakeGauge)
    monkeypatch.setattr(ray_prometheus, "REPEAT_SECONDS", 0.001)
    others = set(threading.enumerate())
    tracker = ray_prometheus.Prometheus("mine")
    [thread] = set(threading.enumerate()) - others
    tracker.log(0, {"eval/accuracy": 0.25})
    tracker.log(1, {"reverse_kl": 0.5})  # an update without an evaluation: the last accuracy stays
    wanted = {("understudy_step", 1.0, "mine"), ("understudy_reverse_kl", 0.5, "mine")}
    wanted.add(("understudy_eval_accuracy", 0.25, "mine"))
    before = len(told)
    until(lambda: len(told) >= before + 6, "two repetitions", lambda: True)
    assert set(told[before:]) == wanted
    tracker.close()
    thread.join(60)
    assert not thread.is_alive()
