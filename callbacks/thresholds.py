"""What every threshold of a score accepts and rejects: TPR, FPR and the macro F1 over K+1 classes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from callbacks.metrics import rank
from callbacks.samples import Samples

Column = NDArray[np.float64]
Points = dict[str, Column]  # threshold, ascending; tpr, fpr; macro_f1 where classes are predicted; each (T,)


def operating_points(known: Samples, unknown: Samples, name: str, num_classes: int, tau: float | None = None) -> Points:
    """Measure one score on ID and OOD images at each of its distinct values, and at ``tau``.

    A threshold accepts as ID every score that is not above it. One sort; memory grows with the images, not with K.

    Returns:
        ``threshold``, ascending, infinite where a score is; ``tpr`` and ``fpr``, the shares of ID and of OOD images
        that are accepted; with predicted classes ``macro_f1`` over K+1 classes, as ``metrics.macro_f1``.
    """
    ranking = rank(known.scores[name], unknown.scores[name], name=name)
    thresholds = ranking.values if tau is None else np.union1d(ranking.values, [tau])
    accepted_id, accepted_ood = (np.append(0, np.cumsum(counts)) for counts in ranking[1:])
    count_id, count_ood = accepted_id[-1], accepted_ood[-1]
    columns = {"tpr": accepted_id / count_id, "fpr": accepted_ood / count_ood}
    if known.classified:
        rejected = count_id + count_ood - accepted_id - accepted_ood
        of_unknown = 2 * (count_ood - accepted_ood) / (rejected + count_ood)
        of_classes = np.append(0, _summed_f1(known, unknown, name, ranking.values, num_classes))
        columns["macro_f1"] = (of_classes + of_unknown) / (num_classes + 1)
    places = np.searchsorted(ranking.values, thresholds, side="right")  # how many of the values are accepted
    return {"threshold": thresholds} | {key: column[places] for key, column in columns.items()}


def join(known: Samples, unknown: Samples, name: str) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Concatenate labels, predictions and one score of ID and OOD images."""
    parts = [(rows.labels, rows.predictions, rows.scores[name]) for rows in (known, unknown)]
    labels, predictions, scores = (np.concatenate(pair) for pair in zip(*parts, strict=True))
    return labels, predictions, scores


def thin(points: Points, count: int, tau: float | None = None) -> Points:
    """Keep about ``count`` points, evenly by rank, and in any case ``tau`` and the best F1."""
    rows = np.linspace(0, len(points["threshold"]) - 1, count).round().astype(int)
    if tau is not None:
        rows = np.append(rows, np.searchsorted(points["threshold"], tau))
    if "macro_f1" in points:
        rows = np.append(rows, points["macro_f1"].argmax())
    rows = np.unique(rows)
    return {key: column[rows] for key, column in points.items()}


def sweep(
    samples: Samples, taus: Mapping[str, float], num_classes: int, count: int = 200
) -> dict[str, dict[str, Points]]:
    """Measure every score on every OOD set at about ``count`` thresholds: score -> OOD set -> points.

    A set that was drawn from repeatedly counts with all its images.
    """
    known = samples.of("id")
    unknown = {ood_set: samples.of(ood_set) for ood_set in samples.ood_sets}
    return {
        name: {
            ood_set: thin(operating_points(known, images, name, num_classes, tau), count, tau)
            for ood_set, images in unknown.items()
        }
        for name, tau in ((name, taus.get(name)) for name in known.scores)
    }


def as_rows(curves: Mapping[str, Mapping[str, Points]]) -> list[dict[str, Any]]:
    """Lay out a sweep as the rows of ``thresholds.csv``."""
    return [
        {"score": name, "ood_set": ood_set} | dict(zip(points, values, strict=True))
        for name, sets in curves.items()
        for ood_set, points in sets.items()
        for values in zip(*(column.tolist() for column in points.values()), strict=True)
    ]


def _summed_f1(known: Samples, unknown: Samples, name: str, values: Column, num_classes: int) -> Column:
    """Sum the F1 of the K classes where all scores up to each of the values are accepted.

    An image that is accepted changes the F1 of its predicted class alone; the changes are added up in order of score.
    """
    labels, predictions, scores = join(known, unknown, name)
    order = np.lexsort((scores, predictions))
    guess, right = predictions[order], (labels == predictions)[order]
    first = np.searchsorted(guess, np.arange(num_classes))[guess]
    accepted = np.arange(1, len(guess) + 1) - first
    hits = np.cumsum(right) - np.append(0, np.cumsum(right))[first]
    f1 = 2 * hits / (accepted + np.bincount(known.labels, minlength=num_classes)[guess])
    change = np.where(accepted == 1, f1, np.diff(f1, prepend=0))
    return np.cumsum(np.bincount(np.searchsorted(values, scores[order]), change, len(values)))
