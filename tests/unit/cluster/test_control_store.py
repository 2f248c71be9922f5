"""The watch over Ray's control store, with a store that the test takes away and brings back."""

import asyncio
from types import SimpleNamespace

import pytest

from actors.errors import CampaignError
from cluster.fleet import ray_control_store


def test_a_store_that_comes_back_costs_nothing_and_one_that_stays_away_is_one_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[str] = []

    def probe(address: str, seconds: float) -> None:
        asked.append(address)
        now[0] += 0.5
        if len(asked) > 3 and len(asked) not in (6, 7):  # away twice, the first time for a moment
            raise ConnectionError("Connection refused")

    monkeypatch.setattr(ray_control_store, "probe", probe)
    now = [0.0]
    monkeypatch.setattr(ray_control_store, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(ray_control_store, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(ray_control_store, "PATIENCE_SECONDS", 1.8)
    context = SimpleNamespace(gcs_address="10.0.0.1:6379")
    monkeypatch.setattr(ray_control_store.ray, "get_runtime_context", lambda: context)
    told = r"control store at 10\.0\.0\.1:6379 has not answered for 1\.8 s \(Connection refused\)"
    with pytest.raises(CampaignError, match=told):
        asyncio.run(ray_control_store.control_store_lost())
    assert len(asked) == 7 + 4, "heard at the seventh question, and two seconds later no more"
