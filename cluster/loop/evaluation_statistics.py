"""Statistics of evaluations: means with intervals, paired differences, pass@k, majority votes. Pure functions.

The prompts of a set are a sample of the prompts that could have been asked, and the answers to one prompt (or the tokens of
one answer) are not independent. So every error is clustered by prompt: Miller 2024, "Adding Error Bars to Evals" (arXiv
2411.00640), section 2.2. Intervals have a confidence of 95%.

Shapes: C prompts; a `Tally` holds for each of them the sum of its scores and how many there are.
"""

import math
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

CONFIDENCE = 0.95
"""Share of evaluations whose interval holds the true value."""
MANY = 500
"""From so many degrees of freedom on, the normal quantile stands for that of Student's t: they differ by less than 0.3%."""


class Tally(NamedTuple):
    """The scores of one quantity, prompt by prompt."""

    sums: np.ndarray
    """[C] float64, sum of the scores of each prompt."""
    counts: np.ndarray
    """[C] number of scores; 0: the prompt has none, and counts for nothing."""


class Estimate(NamedTuple):
    """A value with its interval. A bound is NaN where the scores do not tell: a mean needs two prompts for it."""

    value: float
    low: float
    high: float

    @property
    def half_width(self) -> float:
        """The larger distance from the value to a bound: `value ± half_width` holds the whole interval."""
        return max(self.value - self.low, self.high - self.value)


def tally(scores: Sequence[Sequence[float]]) -> Tally:
    """[C] lists of scores, of any length each; NaN is no score."""
    rows = [np.asarray(row, np.float64) for row in scores]
    there = [row[~np.isnan(row)] for row in rows]
    return Tally(np.array([row.sum() for row in there]), np.array([len(row) for row in there]))


def mean_of(scores: Tally) -> float:
    """The mean over all scores: sum of sums over sum of counts; NaN without any."""
    total = float(scores.counts.sum())
    return float(scores.sums[scores.counts > 0].sum()) / total if total else math.nan


def clustered_error(scores: Tally) -> float:
    """Standard error of `mean_of`, clustered by prompt: sqrt(C / (C - 1) sum_c e_c^2) / sum_c n_c.

    e_c = sum of the prompt's scores - n_c x mean. It is equation 4 of Miller 2024, whose sums over the pairs of one prompt
    are e_c^2 multiplied out, with the small-sample factor of Cameron & Miller 2015 (J. Human Resources 50, section VI.B). If
    all n_c are equal, it is the standard error of the mean of the prompts' means. NaN with fewer than two prompts.
    """
    residuals = _residuals(scores)
    return _error(residuals) if len(residuals) > 1 else math.nan


def estimate(scores: Tally, *, share: bool = False) -> Estimate:
    """The mean and its interval.

    Student's t with C - 1 degrees of freedom. share: the scores lie between 0 and 1, as those of right and wrong do; the
    interval is then Wilson's (1927), with the same t, at the effective number of answers p (1 - p) / error^2 (Korn & Graubard
    1998; Dean & Pagano 2015, J. Survey Statistics and Methodology 3), which lies between the number of prompts and that of
    answers. It stays within 0 and 1, and where all answers are right it does not shrink to nothing: 30 of 30 gives 87.8% to
    100%.
    """
    value, error = mean_of(scores), clustered_error(scores)
    if share:
        return Estimate(value, *_wilson(value, error, int((scores.counts > 0).sum()), int(scores.counts.sum())))
    reach = quantile(int((scores.counts > 0).sum()) - 1) * error if not math.isnan(error) else math.nan
    return Estimate(value, value - reach, value + reach)


def difference(ours: Tally, theirs: Tally, *, share: bool = False) -> Estimate:
    """Mean of ours - mean of theirs over the same prompts in the same order, paired: Miller 2024, section 4.2.

    From the two intervals and the correlation r of the prompts' residuals (MOVER: Zou & Donner 2008, Statistics in Medicine
    27; for right and wrong it is method 10 of Newcombe 1998, Statistics in Medicine 17, without its continuity correction):
    low = d - sqrt((a - a_low)^2 + (b_high - b)^2 - 2 r (a - a_low)(b_high - b)), high with the other two bounds. With the
    intervals of Student's t it is the t interval of the paired differences. Prompts that one side has no score of are left
    out on both. ValueError: other numbers of prompts.
    """
    if len(ours.counts) != len(theirs.counts):
        raise ValueError(f"{len(ours.counts)} prompts and {len(theirs.counts)}: they are not paired")
    both = (ours.counts > 0) & (theirs.counts > 0)
    a, b = (Tally(one.sums[both], one.counts[both]) for one in (ours, theirs))
    first, second = estimate(a, share=share), estimate(b, share=share)
    r = _correlation(_residuals(a), _residuals(b))
    value = first.value - second.value

    def reach(x: float, y: float) -> float:
        return math.sqrt(max(x * x + y * y - 2 * r * x * y, 0.0)) if not math.isnan(x + y) else math.nan

    below = reach(first.value - first.low, second.high - second.value)
    above = reach(first.high - first.value, second.value - second.low)
    return Estimate(value, value - below, value + above)


def over_seeds(of_each: Sequence[Estimate], *, share: bool = False) -> Estimate:
    """The mean over campaigns that differ in their seed alone, and its interval for another seed and other prompts.

    of_each: each campaign's estimate on the same prompts, with its interval over prompts. From the mean to a bound it is
    sqrt(mean reach to the prompts' bound ^ 2 + (t s / sqrt(S)) ^ 2), with the standard deviation s of the S values and t of
    S - 1 degrees of freedom. The campaigns share their prompts, so that their mean has the prompts' error of one of them at
    most; and s holds the draws of the answers a second time: the interval is rather too wide. share: bounds within 0 and 1.
    With one seed there is the interval over prompts alone.
    """
    values = np.array([one.value for one in of_each])
    seeds, value = len(values), float(values.mean())
    apart = quantile(seeds - 1) * float(values.std(ddof=1)) / math.sqrt(seeds) if seeds > 1 else 0.0
    low = value - math.hypot(float(np.mean([one.value - one.low for one in of_each])), apart)
    high = value + math.hypot(float(np.mean([one.high - one.value for one in of_each])), apart)
    return Estimate(value, max(low, 0.0), min(high, 1.0)) if share else Estimate(value, low, high)


def pass_at(k: int, right: int, samples: int) -> float:
    """Unbiased estimate of the probability that one of k answers is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv 2107.03374), equation 1, with c = `right` of n = `samples` answers. ValueError: k > n.
    """
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} answers")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def majority(answers: Sequence[str | None], rewards: Sequence[float]) -> float:
    """Reward of the answer that most samples of one prompt gave; of several such answers, the mean over them.

    None: a sample without an answer, which has no vote; 0 where none has. The same answer may have other rewards where the
    verifier reads more than it: the mean of them counts.
    """
    votes = Counter(answer for answer in answers if answer is not None)
    if not votes:
        return 0.0
    most = max(votes.values())
    of_each = [
        math.fsum(reward for own, reward in zip(answers, rewards, strict=True) if own == answer) / most
        for answer, count in votes.items()
        if count == most
    ]
    return math.fsum(of_each) / len(of_each)


@lru_cache
def quantile(degrees: int) -> float:
    """The t with P(|T| <= t) = CONFIDENCE for Student's T with these degrees of freedom, a whole number of at least 1."""
    normal = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    if degrees >= MANY:
        return normal
    low, high = normal, 100.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, degrees) < CONFIDENCE else (low, middle)
    return high


def _within(t: float, degrees: int) -> float:
    """P(|T| <= t): Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, square = math.sin(angle), math.cos(angle) ** 2
    odd = degrees % 2
    term = total = math.cos(angle) if odd else 1.0
    for i in range(2 + odd, degrees - 1, 2):
        term *= square * (i - 1) / i
        total += term
    if not odd:
        return sine * total
    return 2 / math.pi * (angle + (sine * total if degrees > 1 else 0.0))


def _wilson(share: float, error: float, prompts: int, answers: int) -> tuple[float, float]:
    if math.isnan(share):
        return math.nan, math.nan
    spread = share * (1 - share)
    # Answers to the same prompt that agree tell nothing more: where all agree, one answer for each prompt is counted.
    size = prompts if spread <= 0 else answers if error <= 0 else spread / error**2
    size = min(max(size, prompts), answers)
    if prompts < 2:  # whatever the answers to a single prompt are, they tell nothing of others
        return 0.0, 1.0
    t = quantile(prompts - 1)
    middle = (share + t * t / (2 * size)) / (1 + t * t / size)
    reach = t / (1 + t * t / size) * math.sqrt(max(spread, 0.0) / size + (t / (2 * size)) ** 2)
    return max(0.0, min(middle - reach, share)), min(1.0, max(middle + reach, share))


def _residuals(scores: Tally) -> np.ndarray:
    """[C'] e_c / sum of counts, of the prompts that have scores; their sum is 0."""
    there = scores.counts > 0
    return (scores.sums[there] - scores.counts[there] * mean_of(scores)) / max(float(scores.counts.sum()), 1.0)


def _error(residuals: np.ndarray) -> float:
    count = len(residuals)
    return math.sqrt(count / (count - 1) * float(residuals @ residuals))


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Of residuals, whose means are 0; 0 where one of them does not vary, which tells nothing of the pair."""
    size = math.sqrt(float(a @ a) * float(b @ b))
    return float(np.clip(a @ b / size, -1, 1)) if size > 1e-300 else 0.0
