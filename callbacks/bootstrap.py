"""Confidence bounds of the headline metrics."""

import numpy as np

from callbacks.metrics import Counts, MetricRules, Ranking, headline


def bootstrap(
    ranking: Ranking, rules: MetricRules, replicates: int = 1000, confidence: float = 0.95, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """Bound each headline metric by the percentile bootstrap (Efron, 1979).

    ID and OOD samples are drawn anew with replacement, each side in its own number. The sorted values never change, so
    a replicate is new counts over them; no score is sorted again.

    Args:
        ranking: the scores.
        rules: the same as for the point values.
        replicates: how many resampled sets stand behind the bounds.
        confidence: share of the replicates between the bounds, in (0, 1).
        seed: equal seeds give equal bounds.

    Returns:
        metric -> (low, high), as fractions.
    """
    if replicates < 1:
        raise ValueError(f"bounds need at least one bootstrap replicate, got {replicates}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is a share in (0, 1), for example 0.95, got {confidence}")
    # Freeing one large block makes glibc keep what is freed later; else each replicate waits for fresh zeroed pages,
    # which can take longer than its arithmetic.
    np.empty(3_000_000)
    generator = np.random.default_rng(seed)
    places = np.arange(len(ranking.values))
    owners = [np.repeat(places, counts) for counts in (ranking.id_counts, ranking.ood_counts)]

    def redraw(owner: Counts) -> Counts:
        return np.bincount(owner[generator.integers(len(owner), size=len(owner))], minlength=len(places))

    draws = [headline(Ranking(ranking.values, *map(redraw, owners)), rules) for _ in range(replicates)]
    tail = (1 - confidence) / 2
    bounds = {metric: np.quantile([draw[metric] for draw in draws], (tail, 1 - tail)) for metric in draws[0]}
    return {metric: (float(low), float(high)) for metric, (low, high) in bounds.items()}
