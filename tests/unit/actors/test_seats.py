"""Seats of an engine by the size of its cache, and the count of its preemptions."""

from types import SimpleNamespace
from typing import Any

import pytest

from actors.rollout.seats import RECENT, WAITING, Seats
from actors.rollout.vllm_engine import cache_of, count_preemptions


def test_seats_are_what_the_cache_holds_and_at_most_what_the_engine_allows() -> None:
    """An 8B model on an 80 GB GPU: a cache of 390k tokens, prompts of 500 tokens and answers of at most 2,500."""
    seats = Seats(256, 390_000, 16, 3000)
    assert seats.number == int(390_000 / (3000 * WAITING)) == 115
    assert seats.number * WAITING * 3000 <= 390_000
    assert Seats(64, 390_000, 16, 3000).number == 64
    assert Seats(64, 1000, 16, 3000).number == 1


def test_seats_follow_the_lengths_of_what_has_ended_lately() -> None:
    seats = Seats(256, 390_000, 16, 8692)
    assert seats.number == 39
    seats.ended(100)
    assert seats.number < 45, "the first to end are the shortest: one of them says little"
    for _ in range(RECENT):
        seats.ended(1500)
    usual = (32 * 8692 + RECENT * 1504) / (32 + RECENT)  # in whole blocks
    assert seats.number == int(390_000 / (usual * WAITING)) > 150
    for _ in range(RECENT):
        seats.ended(6000)
    assert seats.number < 60, "what ended long ago no longer counts"


@pytest.mark.parametrize(("tokens", "expected"), [(4000, 4000), (None, 16 * 300)])
def test_the_cache_of_an_engine_is_read_from_what_vllm_says_of_it(tokens: int | None, expected: int) -> None:
    cache = SimpleNamespace(kv_cache_size_tokens=tokens, num_gpu_blocks=300, block_size=16)
    assert cache_of(SimpleNamespace(cache_config=cache, scheduler_config=SimpleNamespace(max_num_seqs=9))) == (9, expected, 16)  # fmt: skip


def test_what_is_computed_again_for_new_weights_counts_as_no_preemption() -> None:
    class Scheduler:
        def __init__(self) -> None:
            self.done: list[tuple[str, bool]] = []

        def _preempt_request(self, request: str, timestamp: float, drop_stale_output: bool = False) -> None:
            self.done.append((request, drop_stale_output))

    scheduler: Any = Scheduler()
    found: list[None] = []
    count_preemptions(scheduler, lambda: found.append(None))
    scheduler._preempt_request("a", 0.0)
    scheduler._preempt_request("b", 0.0, drop_stale_output=True)
    scheduler._preempt_request("c", 0.0, drop_stale_output=False)
    assert len(found) == 2 and scheduler.done == [("a", False), ("b", True), ("c", False)]
