"""OOD metrics: pure functions on one sort of the scores, and a torchmetrics object that only collects.

Higher score = more OOD. A threshold tau accepts as ID every score <= tau. All values are fractions, not percent.
"""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil, floor
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import ArrayLike, DTypeLike, NDArray
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Side = Literal["id", "ood"]
FprRule = Literal["first", "closest", "percentile"]
AuprRule = Literal["step", "trapezoid"]
Counts = NDArray[np.int64]


class Ranking(NamedTuple):
    """The sorted scores of an ID set and an OOD set; all that a rank-based metric reads.

    Attributes:
        values: (G,) distinct scores, ascending.
        id_counts: (G,) how many ID samples have each value; a value without any sample changes no metric.
        ood_counts: (G,) how many OOD samples have each value.
    """

    values: NDArray[np.float64]
    id_counts: Counts
    ood_counts: Counts


def rank(id_scores: ArrayLike | Tensor, ood_scores: ArrayLike | Tensor, *, name: str = "scores") -> Ranking:
    """Sort the (N,) ID scores and the (M,) OOD scores once for every metric.

    Infinite scores are extreme values like any other; ``name`` says in errors whose scores these are.

    Raises:
        ValueError: a side that is empty, not one-dimensional, or holds NaN.

    >>> rank([1.0, 2.0], [2.0, 3.0])
    Ranking(values=array([1., 2., 3.]), id_counts=array([1, 1, 0]), ood_counts=array([0, 1, 1]))
    """
    known, unknown = _scores(id_scores, f"{name}, ID"), _scores(ood_scores, f"{name}, OOD")
    values, counts = np.unique(np.concatenate([known, unknown]), return_counts=True)
    id_counts = _count(values, known)
    return Ranking(values, id_counts, counts - id_counts)


def narrow(ranking: Ranking, id_scores: ArrayLike | Tensor) -> Ranking:
    """Leave only these (N,) of the ID samples behind a ranking; their scores are not sorted among the OOD scores again.

    >>> narrow(rank([1.0, 2.0], [2.0, 3.0]), [2.0]).id_counts
    array([0, 1, 0])
    """
    return ranking._replace(id_counts=_count(ranking.values, _scores(id_scores, "the narrowed ID scores")))


def auroc(ranking: Ranking) -> float:
    """Return the probability that an OOD sample scores above an ID sample, ties counting one half (Mann-Whitney)."""
    known, unknown = ranking.id_counts, ranking.ood_counts
    twice_below = 2 * np.cumsum(known) - known
    return int((unknown * twice_below).sum()) / (2 * int(known.sum()) * int(unknown.sum()))


def aupr(ranking: Ranking, positive: Side = "id", rule: AuprRule = "step") -> float:
    """Return the area under precision over recall of one side.

    Args:
        ranking: the scores.
        positive: ``id``: low scores are retrieved first (AUPR-in); ``ood``: high scores (AUPR-out).
        rule: ``step``: average precision; ``trapezoid``: linear between neighbouring points, the first being recall 0
            at precision 1. They differ where scores are few or tied.
    """
    _check(rule, AuprRule, "the rule of AUPR")
    hits, misses = _retrieved(ranking, positive)
    retrieved = hits + misses
    precision = np.divide(hits, retrieved, out=np.ones(len(hits)), where=retrieved > 0)
    height = precision[1:] if rule == "step" else (precision[1:] + precision[:-1]) / 2
    return float(np.diff(hits) @ height / hits[-1])


def fpr_at_tpr(ranking: Ranking, tpr: float = 0.95, positive: Side = "id", rule: FprRule = "first") -> float:
    """Return the share of the negative side that passes where a share ``tpr`` of the positive side does.

    Counts are compared exactly, ``tpr`` being read as the decimal (or fraction) that was written.

    Args:
        ranking: the scores.
        tpr: share of the positive side, in (0, 1].
        positive: ``id``: share of OOD accepted where ID is; ``ood``: share of ID flagged where OOD is.
        rule: which threshold. ``first``: the strictest with a recall of at least ``tpr``. ``closest``: the recall
            nearest to ``tpr``, the larger of two equally near ones; among the thresholds of this recall the most
            permissive, but the strictest of recall 1, which would pass everything (Unleashing Mask). ``percentile``:
            the linearly interpolated percentile of the ID scores; OOD must lie strictly below (HEAT).

    >>> ranking = rank(range(100), [94, 95, 50, 200])
    >>> fpr_at_tpr(ranking), fpr_at_tpr(ranking, rule="closest"), fpr_at_tpr(ranking, positive="ood")
    (0.5, 0.5, 0.5)
    """
    _check(rule, FprRule, "the rule of FPR")
    share = _share(tpr)
    hits, misses = _retrieved(ranking, positive)
    if rule == "percentile":
        if positive != "id":
            raise ValueError("the percentile rule is defined on the ID scores: use positive='id', or another rule")
        return int(misses[_places_below_percentile(ranking.values, hits, share)]) / int(misses[-1])
    target = share * int(hits[-1])
    place = int(np.searchsorted(hits, ceil(target)))
    if rule == "closest":
        below, above = int(hits[place - 1]), int(hits[place])
        if target - below < above - target:
            place -= 1
        elif above < hits[-1]:
            place = int(np.searchsorted(hits, above, side="right")) - 1
    return int(misses[place]) / int(misses[-1])


def detection_accuracy(ranking: Ranking) -> float:
    """Return the largest balanced accuracy, (TPR + 1 - FPR) / 2, that any threshold reaches; at least 0.5."""
    hits, misses = _retrieved(ranking, "id")
    return float((hits / hits[-1] + 1 - misses / misses[-1]).max() / 2)


def threshold_at_tpr(id_scores: ArrayLike | Tensor, tpr: float = 0.95, *, name: str = "threshold") -> float:
    """Return the smallest tau that accepts at least a share ``tpr`` of the (N,) ID scores.

    >>> threshold_at_tpr(range(100))
    94.0
    """
    known = np.sort(_scores(id_scores, f"{name}, ID"))
    return float(known[ceil(_share(tpr) * len(known)) - 1])


def cauroc(id_scores: ArrayLike | Tensor, ood_scores: ArrayLike | Tensor, correct: ArrayLike | Tensor) -> float:
    """Return the AUROC of the correctly classified ID samples, ``correct`` (N,) of bool, against the OOD samples.

    Raises:
        ValueError: no sample is correct, or what ``rank`` refuses.
    """
    known, hits = _scores(id_scores, "CAUROC, ID"), _array(correct, np.bool_)
    if hits.shape != known.shape:
        raise ValueError(f"{len(known)} ID scores need as many entries of correct, got the shape {hits.shape}")
    if not hits.any():
        raise ValueError(f"none of {len(known)} ID samples is classified correctly: CAUROC and OSCR need at least one")
    return auroc(rank(known[hits], ood_scores, name="CAUROC"))


def oscr(id_scores: ArrayLike | Tensor, ood_scores: ArrayLike | Tensor, correct: ArrayLike | Tensor) -> float:
    """Return the area under CCR over FPR (Dhamija et al., 2018), by trapezoids; arguments and errors of ``cauroc``.

    CCR is the share of ID that is accepted and correct, FPR the share of OOD accepted. At every threshold CCR is the
    accuracy times the TPR among the correct samples, so the area is accuracy x CAUROC.
    """
    return cauroc(id_scores, ood_scores, correct) * float(_array(correct, np.bool_).mean())


def macro_f1(
    labels: ArrayLike | Tensor,
    predictions: ArrayLike | Tensor,
    scores: ArrayLike | Tensor,
    threshold: float,
    num_classes: int,
) -> float:
    """Return the unweighted mean F1 over K classes and ``unknown``; a class that never occurs counts as 0.

    Args:
        labels: (N,) in 0..K-1, or -1 = OOD.
        predictions: (N,) closed-set predictions in 0..K-1.
        scores: (N,); a sample with a score > ``threshold`` is predicted unknown.
        threshold: in the unit of the scores, see ``threshold_at_tpr``.
        num_classes: K.
    """
    unknown = _scores(scores, "macro F1") > threshold
    truth, guess = _array(labels, np.int64), _array(predictions, np.int64)
    for name, classes, lowest in (("labels", truth, -1), ("predictions", guess, 0)):
        if classes.shape != unknown.shape:
            raise ValueError(f"{len(unknown)} scores need as many {name}, got the shape {classes.shape}")
        if classes.min() < lowest or classes.max() >= num_classes:
            span = f"{classes.min()}..{classes.max()}"
            raise ValueError(f"{name} of {num_classes} classes lie in {lowest}..{num_classes - 1}, these in {span}")
    truth, guess = np.where(truth < 0, num_classes, truth), np.where(unknown, num_classes, guess)
    hits, *sizes = (np.bincount(c, minlength=num_classes + 1) for c in (truth[truth == guess], truth, guess))
    return float(np.mean(2 * hits / np.maximum(sum(sizes), 1)))


def _retrieved(ranking: Ranking, positive: Side) -> tuple[Counts, Counts]:
    """Count the positive and the negative samples that pass each of G + 1 thresholds, from nothing to everything."""
    _check(positive, Side, "the positive side")
    sides = ranking.id_counts, ranking.ood_counts
    if positive == "ood":
        sides = ranking.ood_counts[::-1], ranking.id_counts[::-1]
    hits, misses = (np.append(0, np.cumsum(counts)) for counts in sides)
    return hits, misses


def _count(values: NDArray[np.float64], scores: NDArray[np.float64]) -> Counts:
    """Count how many scores have each of the sorted values; all have one."""
    # a search for sorted scores goes on where the last one ended
    return np.bincount(np.searchsorted(values, np.sort(scores)), minlength=len(values))


def _places_below_percentile(values: NDArray[np.float64], hits: Counts, share: Fraction) -> int:
    """Count the distinct values strictly below the interpolated percentile of the samples behind ``hits``."""
    position = share * (int(hits[-1]) - 1)
    neighbours = [floor(position), ceil(position)]
    # infinities cannot be interpolated; half the range, so that a difference of two extremes does not overflow
    limit = np.finfo(np.float64).max / 2
    lower, upper = values[np.searchsorted(hits, neighbours, side="right") - 1].clip(-limit, limit)
    tau = lower + (upper - lower) * float(position % 1)
    return int(np.searchsorted(values.clip(-limit, limit), tau))


def _share(tpr: float) -> Fraction:
    """Read 0.95 as 19/20: the binary fraction nearby would be off by one sample at 20, 100 or 1000."""
    if not 0 < tpr <= 1:
        raise ValueError(f"tpr is a share in (0, 1], for example 0.95, got {tpr}")
    return Fraction(tpr).limit_denominator(1_000_000)


def _scores(scores: ArrayLike | Tensor, name: str) -> NDArray[np.float64]:
    values = _array(scores, np.float64)
    if values.ndim != 1 or not len(values):
        raise ValueError(f"{name}: scores have a shape (N,) with N > 0, got {values.shape}")
    if missing := int(np.isnan(values).sum()):
        raise ValueError(f"{name}: {missing} of {len(values)} scores are NaN")
    return values


def _array(values: ArrayLike | Tensor, dtype: DTypeLike) -> NDArray[Any]:
    """Convert to numpy; by way of float64, because numpy has no bfloat16."""
    if isinstance(values, Tensor):
        values = values.detach().cpu().double().numpy()
    return np.asarray(values).astype(dtype)


def _check(value: str, allowed: Any, what: str) -> None:
    if value not in get_args(allowed):
        raise ValueError(f"{what} is {' or '.join(get_args(allowed))}, not {value!r}")


@dataclass(frozen=True)
class MetricRules:
    """Which reading of FPR95 and AUPR a result follows; papers disagree, see ``fpr_at_tpr`` and ``aupr``."""

    positive: Side = "id"
    rule: FprRule = "first"
    aupr: AuprRule = "step"

    def __post_init__(self) -> None:
        headline(rank([0.0], [1.0]), self)  # a reading that does not exist fails here, not after the evaluation


def headline(ranking: Ranking, rules: MetricRules) -> dict[str, float]:
    """Return ``auroc``, ``aupr_in`` (ID positive), ``aupr_out`` (OOD positive) and ``fpr95``."""
    return {
        "auroc": auroc(ranking),
        "aupr_in": aupr(ranking, "id", rules.aupr),
        "aupr_out": aupr(ranking, "ood", rules.aupr),
        "fpr95": fpr_at_tpr(ranking, 0.95, rules.positive, rules.rule),
    }


PRESETS = {
    "default": MetricRules(),
    "heat": MetricRules("id", "percentile", "step"),
    "unleashing_mask": MetricRules("id", "closest", "step"),
    "heatmap": MetricRules("id", "first", "step"),
    "variational_metric": MetricRules("id", "first", "step"),
    "openood": MetricRules("ood", "first", "trapezoid"),
}


def metric_rules(preset: str) -> MetricRules:
    """Return the rules of one preset; an unknown name is a ``ValueError`` that lists the known ones."""
    if preset not in PRESETS:
        raise ValueError(f"no metric rules {preset!r}; there are {', '.join(PRESETS)}")
    return PRESETS[preset]


class OODMetrics(Metric):
    """Collects scores batch by batch and computes every metric at the end; the functions above do the work.

    Every process must update at least once, with B = 0 where it has no sample.

    Args:
        rules: which reading of FPR95 and AUPR.
    """

    is_differentiable = False
    full_state_update = False
    scores: list[Tensor]
    labels: list[Tensor]
    predictions: list[Tensor]

    def __init__(self, rules: MetricRules = PRESETS["default"]) -> None:
        super().__init__()
        self.rules = rules
        for state in ("scores", "labels", "predictions"):
            self.add_state(state, [], dist_reduce_fx="cat")

    def update(self, scores: Tensor, labels: Tensor, predictions: Tensor | None = None) -> None:
        """Take in (B,) scores, labels (class, or -1 = OOD) and predicted classes; all batches with them or none."""
        batch = {"scores": scores, "labels": labels}
        if predictions is not None:
            batch["predictions"] = predictions
        if any(rows.ndim != 1 or len(rows) != len(scores) for rows in batch.values()):
            shapes = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in batch.items())
            raise ValueError(f"scores, labels and predictions share one shape (B,), got {shapes}")
        if self.labels and bool(self.predictions) != (predictions is not None):
            raise ValueError("predictions came with some batches only: give them with every batch or with none")
        for name, rows in batch.items():
            getattr(self, name).append(rows.detach())

    def compute(self) -> dict[str, float]:
        """Return the headline metrics and ``detection_accuracy``; with predictions ``accuracy``, ``cauroc``, ``oscr``.

        CAUROC and OSCR are left out where no ID sample is classified correctly. One side missing is a ``ValueError``.
        """
        scores, labels = (_joined(state) for state in (self.scores, self.labels))
        if (labels < -1).any():
            raise ValueError(f"labels are classes, or -1 = OOD; the smallest here is {int(labels.min())}")
        known, unknown = scores[labels != -1], scores[labels == -1]
        ranking = rank(known, unknown)
        metrics = headline(ranking, self.rules) | {"detection_accuracy": detection_accuracy(ranking)}
        predictions = _joined(self.predictions)
        if len(predictions):
            correct = (predictions == labels)[labels != -1]
            metrics["accuracy"] = float(correct.double().mean())
            if correct.any():
                among_correct = auroc(narrow(ranking, known[correct]))
                metrics |= {"cauroc": among_correct, "oscr": among_correct * metrics["accuracy"]}
        return metrics


def _joined(state: Any) -> Tensor:
    """Concatenate a list state, which is a tensor already after a reduction over processes."""
    return dim_zero_cat(state) if len(state) else torch.empty(0)
