"""Confidence bounds of the headline metrics."""

import numpy as np
from numpy.typing import NDArray

from callbacks.metrics import Counts, MetricRules, Ranking, headline


def bootstrap(
    ranking: Ranking, rules: MetricRules, replicates: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bound each headline metric by the percentile bootstrap (Efron, 1979).

    Args:
        ranking: the scores.
        rules: the same as for the point values.
        replicates: how many resampled sets stand behind the bounds.
        confidence: share of the replicates between the bounds, in (0, 1).
        seed: equal seeds give equal bounds.

    Returns:
        metric -> (low, high), as fractions.
    """
    return {metric: bounds(draws, confidence) for metric, draws in redraw(ranking, rules, replicates, seed).items()}


def redraw(
    ranking: Ranking, rules: MetricRules, replicates: int = 1000, seed: int = 0
) -> dict[str, NDArray[np.float64]]:
    """Measure each headline metric on (R,) resampled sets; arguments as of ``bootstrap``.

    ID and OOD samples are drawn anew with replacement, each side in its own number. The sorted values never change, so
    a replicate is new counts over them; no score is sorted again. The ID samples in a replicate follow from the seed
    alone, so the replicates of several OOD sets, for the same ID samples, may be averaged one by one: that bounds the
    mean over the sets.
    """
    if replicates < 1:
        raise ValueError(f"bounds need at least one bootstrap replicate, got {replicates}")
    # Freeing one large block makes glibc keep what is freed later; else each replicate waits for fresh zeroed pages,
    # which can take longer than its arithmetic.
    np.empty(3_000_000)
    places = np.arange(len(ranking.values))
    sides = [
        (np.repeat(places, counts), np.random.default_rng([seed, side])) for side, counts in enumerate(ranking[1:])
    ]

    def counts(owner: Counts, generator: np.random.Generator) -> Counts:
        return np.bincount(owner[generator.integers(len(owner), size=len(owner))], minlength=len(places))

    draws = [headline(Ranking(ranking.values, *(counts(*side) for side in sides)), rules) for _ in range(replicates)]
    return {metric: np.array([draw[metric] for draw in draws]) for metric in draws[0]}


def bounds(draws: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    """Return the values that leave as many of the (R,) replicates below as above, and ``confidence`` between them."""
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share in (0, 1), for example 0.95, got {confidence}")
    tail = (1 - confidence) / 2
    low, high = np.quantile(draws, (tail, 1 - tail))
    return float(low), float(high)
