"""Errors, intervals and differences of evaluations, against enumeration, the bootstrap and other derivations."""

import itertools
import math
import statistics

import numpy as np
import pytest

from cluster.loop.evaluation_statistics import (
    CONFIDENCE,
    Tally,
    clustered_error,
    difference,
    estimate,
    majority,
    mean_of,
    over_seeds,
    pass_at,
    quantile,
    tally,
)

SIMULATED = 1000
"""Evaluations."""


def ragged(seed: int = 3, prompts: int = 60) -> list[list[float]]:
    """Scores of prompts of 1 to 30 answers, which share a part of their score with the others of the prompt."""
    draw = np.random.default_rng(seed)
    return [
        (draw.normal() + draw.normal(size=1 + 4 * int(draw.integers(8)))).tolist() for _ in range(prompts)
    ]  # fmt: skip


def test_the_error_is_that_of_miller_with_its_pairs_written_out() -> None:
    scores = ragged(prompts=7)
    every = [score for row in scores for score in row]
    mean, total = statistics.mean(every), len(every)
    pairs = math.fsum((a - mean) * (b - mean) for row in scores for a, b in itertools.product(row, row))
    assert clustered_error(tally(scores)) == pytest.approx(math.sqrt(pairs * 7 / 6) / total)
    even = [row[:1] * 3 for row in scores]
    of_means = statistics.stdev(row[0] for row in even) / math.sqrt(7)
    assert clustered_error(tally(even)) == pytest.approx(of_means)


def test_the_error_is_that_of_a_bootstrap_over_prompts() -> None:
    scores = tally(ragged())
    draw = np.random.default_rng(0)
    again = []
    for _ in range(4000):
        chosen = draw.integers(60, size=60)
        again.append(scores.sums[chosen].sum() / scores.counts[chosen].sum())
    assert clustered_error(scores) == pytest.approx(np.std(again), rel=0.06)
    apart = Tally(np.concatenate([[x] for row in ragged() for x in row]), np.ones(int(scores.counts.sum())))
    assert clustered_error(apart) < 0.7 * clustered_error(scores)  # what the clusters are for


def test_quantiles_are_those_of_printed_tables() -> None:
    assert {d: round(quantile(d), 3) for d in (1, 2, 5, 10, 30, 120)} == {
        1: 12.706, 2: 4.303, 5: 2.571, 10: 2.228, 30: 2.042, 120: 1.980
    }  # fmt: skip
    assert quantile(499) == pytest.approx(quantile(500), rel=0.003) and round(quantile(10**6), 3) == 1.960


@pytest.mark.parametrize("right", [0, 1, 17, 30])
def test_the_bounds_of_a_share_are_the_shares_that_a_score_test_just_accepts(right: int) -> None:
    found = estimate(tally([[float(i < right)] for i in range(30)]), share=True)
    for bound in (found.low, found.high):
        # Wilson's interval inverts the test |share - bound| <= t sqrt(bound (1 - bound) / n).
        if 0 < bound < 1:
            assert abs(right / 30 - bound) == pytest.approx(quantile(29) * math.sqrt(bound * (1 - bound) / 30))
    assert found.low <= right / 30 <= found.high and found.half_width > 0.1
    assert (found.low == 0) == (right == 0) and (found.high == 1) == (right == 30)


def test_more_answers_to_the_same_prompts_narrow_an_interval_only_where_they_differ() -> None:
    same = [estimate(tally([[float(i < 20)] * k for i in range(30)]), share=True) for k in (1, 8)]
    assert same[0] == pytest.approx(same[1])
    right = [estimate(tally([[1.0] * k] * 30), share=True) for k in (1, 8)]
    assert right[0] == right[1] and right[0].low < 0.9
    halves = estimate(tally([[1.0, 0.0] * 4] * 30), share=True)
    single = estimate(tally([[float(i % 2)] for i in range(30)]), share=True)
    assert halves.value == single.value and halves.half_width < single.half_width
    one = estimate(tally([[1.0] * 50]), share=True)
    assert (one.low, one.high) == (0, 1)
    assert math.isnan(estimate(tally([[1.0, 3.0]])).low) and math.isnan(estimate(tally([[math.nan]])).value)


def test_a_paired_difference_of_means_is_the_t_interval_of_the_differences() -> None:
    draw = np.random.default_rng(1)
    a, b = draw.normal(size=(2, 20))
    b += 3 * a
    found = difference(tally(a[:, None].tolist()), tally(b[:, None].tolist()))
    mean, error = statistics.mean(a - b), statistics.stdev(a - b) / math.sqrt(20)
    assert found == pytest.approx((mean, mean - quantile(19) * error, mean + quantile(19) * error))
    gap = [[math.nan] if i == 4 else [x] for i, x in enumerate(a)]
    there = np.arange(20) != 4
    assert difference(tally(gap), tally(b[:, None].tolist())).value == pytest.approx(np.mean((a - b)[there]))
    with pytest.raises(ValueError, match="not paired"):
        difference(tally([[1.0]]), tally([[1.0], [2.0]]))


@pytest.mark.parametrize("cells", [(0.5, 0.2, 0.05, 0.25), (0.85, 0.1, 0.02, 0.03), (0.3, 0.2, 0.2, 0.3)])
def test_the_interval_of_a_paired_difference_of_shares_covers_by_enumeration(cells: tuple[float, ...]) -> None:
    """Every outcome of 14 prompts, with its probability: both right, only ours, only theirs, none."""
    n, covered, truth = 14, 0.0, cells[1] - cells[2]
    for both, ours, theirs in itertools.product(range(n + 1), repeat=3):
        none = n - both - ours - theirs
        if none < 0:
            continue
        ways = math.factorial(n) / math.prod(map(math.factorial, (both, ours, theirs, none)))
        probability = ways * math.prod(p**k for p, k in zip(cells, (both, ours, theirs, none), strict=True))
        if probability < 1e-6:
            continue
        a = [1.0] * (both + ours) + [0.0] * (theirs + none)
        b = [1.0] * both + [0.0] * ours + [1.0] * theirs + [0.0] * none
        found = difference(Tally(np.array(a), np.ones(n)), Tally(np.array(b), np.ones(n)), share=True)
        covered += probability * (found.low <= truth <= found.high)
    assert covered > 0.93


def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer() -> None:
    for samples, right in ((5, 0), (5, 2), (6, 5), (4, 4)):
        for k in range(1, samples + 1):
            subsets = list(itertools.combinations([1] * right + [0] * (samples - right), k))
            assert pass_at(k, right, samples) == pytest.approx(sum(map(max, subsets)) / len(subsets))
    with pytest.raises(ValueError, match="pass@3 of 2"):
        pass_at(3, 1, 2)


def test_a_majority_is_the_mean_over_what_a_fair_draw_of_ties_would_choose() -> None:
    assert majority(["4", "5", "4"], [1, 0, 1]) == 1 and majority(["4", "5", "5"], [1, 0, 0]) == 0
    assert majority(["4", "5"], [1, 0]) == 0.5 and majority(["4", "5", "6"], [1, 0, 0]) == pytest.approx(1 / 3)
    assert majority([None, None, "4"], [0, 0, 1]) == 1 and majority([None], [0]) == 0


EASE = 1.2
"""Both parameters of the Beta distribution of how easy prompts are."""


def answers(draw: np.random.Generator, prompts: int, samples: int, gap: float) -> tuple[Tally, Tally]:
    """Two models on the same prompts: each prompt has a difficulty, and the first model is better by `gap` at each of them."""
    ease = draw.beta(EASE, EASE, size=prompts) * (1 - gap)
    right = (draw.binomial(samples, ease + gap), draw.binomial(samples, ease))
    return tuple(Tally(one.astype(float), np.full(prompts, samples)) for one in right)  # type: ignore[return-value]


def power_of(prompts: int, samples: int, gap: float) -> float:
    """Probability that the paired interval lies above 0, by the normal distribution.

    Given the prompt, answers are independent, so the paired difference of a prompt has the variance
    E[p (1 - p) + (p + gap) (1 - p - gap)] / samples; how easy the prompts are is no part of it.
    """
    mean, square = (1 - gap) / 2, (1 - gap) ** 2 * (EASE + 1) / (2 * (2 * EASE + 1))
    of_theirs, of_ours = mean - square, mean + gap - (square + 2 * gap * mean + gap**2)
    error = math.sqrt((of_theirs + of_ours) / samples / prompts)
    return statistics.NormalDist().cdf(gap / error - quantile(prompts - 1))


def expected(tries: int, share: float, chance: float = 1e-3) -> tuple[int, int]:
    """(least, most): a binomial count falls below the one, or above the other, with at most this chance."""
    chances = [math.comb(tries, k) * share**k * (1 - share) ** (tries - k) for k in range(tries + 1)]
    least = next(k for k in range(tries + 1) if sum(chances[: k + 1]) > chance)
    return least, next(k for k in range(tries, -1, -1) if sum(chances[k:]) > chance)


def test_a_planted_difference_of_two_models_is_found_with_the_stated_coverage_and_power() -> None:
    draw, gap = np.random.default_rng(17), 0.08
    covered = found = alone = false_alarms = 0
    for _ in range(SIMULATED):
        ours, theirs = answers(draw, 150, 4, gap)
        paired = difference(ours, theirs, share=True)
        covered += paired.low <= gap <= paired.high
        found += paired.low > 0
        alone += estimate(ours, share=True).low > estimate(theirs, share=True).high
        none = difference(*answers(draw, 150, 4, 0.0), share=True)
        false_alarms += not none.low <= 0 <= none.high
    least, most = expected(SIMULATED, CONFIDENCE)
    assert least <= covered <= most and least <= SIMULATED - false_alarms <= most
    assert 0.88 < power_of(150, 4, gap) < 0.95
    least, most = expected(SIMULATED, power_of(150, 4, gap))
    assert least <= found <= most
    assert alone < 0.5 * SIMULATED  # pairing is what finds it
    assert mean_of(ours) > mean_of(theirs)


@pytest.mark.parametrize(("between", "seeds"), [(0.0, 3), (0.05, 3), (0.05, 6)])
def test_the_interval_over_seeds_covers_the_mean_of_all_seeds_and_prompts(between: float, seeds: int) -> None:
    """Students of different seeds are better or worse by a normal draw, on prompts that all of them are asked."""
    draw, covered, prompts, samples = np.random.default_rng(5), 0, 100, 2
    for _ in range(SIMULATED):
        ease = draw.uniform(0.3, 0.7, size=prompts)
        skills = np.clip(draw.normal(0, between, size=seeds), -0.2, 0.2)
        students = [
            Tally(draw.binomial(samples, ease + skill).astype(float), np.full(prompts, samples)) for skill in skills
        ]
        of_each = [estimate(one, share=True) for one in students]
        found = over_seeds(of_each, share=True)
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.half_width > 0.9 * min(one.half_width for one in of_each)
        covered += found.low <= 0.5 <= found.high
    assert covered >= expected(SIMULATED, CONFIDENCE)[0]


def test_one_seed_has_the_interval_over_prompts_and_the_spread_of_several_widens_it() -> None:
    one = estimate(tally([[1.0]] * 20 + [[0.0]] * 10), share=True)
    assert over_seeds([one], share=True) == pytest.approx(one)
    exact = [one._replace(value=x, low=x, high=x) for x in (0.1, 0.2, 0.6)]
    reach = quantile(2) * statistics.stdev([0.1, 0.2, 0.6]) / math.sqrt(3)
    assert over_seeds(exact) == pytest.approx((0.3, 0.3 - reach, 0.3 + reach))
    assert over_seeds(exact, share=True).low == 0
