"""How episodes divide their time between an engine and their environments, by a clock that the test moves."""

import random

import pytest

from actors.rollout.thinking import Thinking


class Clock:
    def __init__(self) -> None:
        self.now = 10.0

    def __call__(self) -> float:
        return self.now


def test_only_seconds_without_a_turn_to_write_and_with_an_environment_at_work_are_idle() -> None:
    clock = Clock()
    found = Thinking(clock)
    clock.now += 1  # nothing is under way: earlier stages, or later ones, are at fault
    with found.asking():
        clock.now += 2
        with found.writing():
            clock.now += 4
            with found.asking():
                clock.now += 8
        clock.now += 16
    with found.writing():
        clock.now += 32
    clock.now += 64
    with pytest.raises(ValueError, match="raised"), found.asking():
        clock.now += 128
        raise ValueError("raised")
    clock.now += 256
    with found.asking():
        pass
    assert found.idle_seconds == 2 + 16 + 128


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9])
def test_an_engine_is_full_with_as_many_episodes_as_keep_its_seats_taken(share: float) -> None:
    """Episodes that draw how long they think: the turns that are being written, in the mean, are the seats."""
    draw, found = random.Random(1), Thinking()
    assert found.at_once(8) == 8  # nothing is known yet
    for _ in range(2000):
        taken = draw.uniform(0.5, 1.5)
        found.ended(taken * share * draw.choice((0.9, 1.1)), taken)
    expected = 8 / (1 - share)
    assert expected * 0.85 <= found.at_once(8) <= expected * 1.15 + 1
    assert found.at_once(16) >= 2 * found.at_once(8) - 1


def test_the_share_follows_what_environments_do_now() -> None:
    found = Thinking()
    for waited, expected in ((0.0, 8), (0.75, 32), (0.0, 8)):
        for _ in range(1000):
            found.ended(waited, 1.0)
        assert found.at_once(8) == expected
