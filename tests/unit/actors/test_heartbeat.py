"""What a process tells of its start."""

import pytest

from actors import heartbeat


def test_the_phases_of_a_start_end_with_the_next_and_the_last_with_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [10.0]
    monkeypatch.setattr(heartbeat, "_phases", [])
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    assert heartbeat.phases() == [] and heartbeat.doing() == ""
    for what, seconds in (("imports and sets up", 1.0), ("loads its model", 4.0), ("imports and sets up", 0.5)):
        heartbeat.phase(what)
        assert heartbeat.doing() == what
        now[0] += seconds
    expected = [("imports and sets up", 1.0), ("loads its model", 4.0), ("imports and sets up", 0.5)]
    assert heartbeat.phases() == expected, "the one under way counts until now"
    heartbeat.phase("")
    now[0] += 100.0
    assert heartbeat.phases() == expected and heartbeat.doing() == ""
