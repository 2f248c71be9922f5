"""Several sources take turns by their weights: a pure function of the place, exact and without state."""

from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.prompts.order import PromptOrder, prompt_order, shares_of, turn_at

COUNTS = {"prompts.sources.sums": 5, "prompts.sources.words": 2, "prompts.sources.code": 9}
WEIGHTS = st.lists(st.decimals("0.01", "100", places=2).map(float), min_size=1, max_size=5)


@given(weights=WEIGHTS, places=st.integers(1, 400))
def test_every_beginning_has_each_source_by_its_share_and_its_turns_in_order(weights, places):
    total, drawn = sum(Fraction(str(weight)) for weight in weights), Counter()
    for place in range(places):
        source, turn = turn_at(place, shares_of(weights))
        assert turn == drawn[source]
        drawn[source] += 1
        for other, weight in enumerate(weights):
            assert abs(drawn[other] - (place + 1) * Fraction(str(weight)) / total) < len(weights)


def test_without_weights_an_epoch_of_all_sources_issues_each_prompt_once():
    for order in (PromptOrder(3, COUNTS), PromptOrder(3, COUNTS, [None, None, None])):
        assert sorted(order.id_at(place) for place in range(16)) == [(0, prompt) for prompt in range(16)]
        assert sorted(order.id_at(place) for place in range(16, 32)) == [(1, prompt) for prompt in range(16)]


def test_each_source_has_epochs_and_an_order_of_its_own_whatever_the_weights():
    for weights in ((1.0, 1.0, 1.0), (0.7, 0.2, 0.1)):
        order = PromptOrder(3, COUNTS, weights)
        issued = [order.id_at(place) for place in range(300)]
        assert len(set(issued)) == 300
        sums = [(epoch, prompt) for epoch, prompt in issued if prompt < 5]
        expected = [(e, p) for e in range(60) for p in prompt_order("3/prompts.sources.sums", e, 5, True).tolist()]
        assert sums == expected[: len(sums)]
    assert Counter(prompt >= 5 for _, prompt in issued)[False] == 210, "7 in 10"


def test_any_place_is_found_without_those_before_it():
    order = PromptOrder(0, COUNTS, (0.1, 0.2, 0.7))
    assert [order.id_at(place) for place in reversed(range(50))][::-1] == [order.id_at(place) for place in range(50)]
    # The pattern repeats after ten places, of which the sources have 1, 2 and 7; floats could not tell 10^18 from 10^18 + 1.
    shares = shares_of([0.1, 0.2, 0.7])
    for place in range(10):
        source, turn = turn_at(place, shares)
        assert turn_at(10**18 + place, shares) == (source, turn + (1, 2, 7)[source] * 10**17)


def test_weights_are_decimal_numbers_not_their_nearest_floats():
    assert shares_of([0.1, 0.2, 0.7]) == [Fraction(1, 10), Fraction(2, 9), 1]
    with pytest.raises(AssertionError):
        turn_at(0, [Fraction(1, 2)])
