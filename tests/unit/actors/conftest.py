"""What the tests of actors share."""

import pytest

from actors.environment.actor import EnvironmentActor


@pytest.fixture(autouse=True)
def a_late_event_loop_ends_no_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests host environments in their own process, with limits that a busy machine may exceed."""
    monkeypatch.setattr(EnvironmentActor, "exit", staticmethod(lambda status: None))
