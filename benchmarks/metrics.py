"""All metrics of one ID and one OOD set over one sort of their scores, and their bootstrapped bounds.

Metrics as OpenOOD reads them: AUROC, AUPR of either side by trapezoids, FPR95 with OOD positive; with the predicted
classes also accuracy, CAUROC, OSCR and detection accuracy, of which pytorch-ood lacks two and has AUTC instead. The
limit sorts the scores and does nothing with them. With bounds, it adds up the counts of both sides in each replicate.
The peers have no bounds: theirs redraw the scores and compute the first four metrics anew, few times, then multiplied.
"""

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from sklearn.metrics import auc, precision_recall_curve, roc_auc_score, roc_curve
from torch import Tensor

from benchmarks.measure import COLUMNS, has_peer, interleave, print_table, timing_rows
from callbacks.bootstrap import bootstrap
from callbacks.metrics import PRESETS, OODMetrics, rank

RULES = PRESETS["openood"]
FEW = 10  # replicates of the peers
SECONDS = 3.0  # what all metrics with their bounds may take
NO_TARGETS = {"pytorch-ood": None, "scikit-learn": None}

Measure = Callable[..., dict[str, float]]  # of scores (N,), labels (N,) with -1 = OOD, and perhaps predictions (N,)


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    measures: dict[str, Measure] = {"ours": with_ours, "scikit-learn": with_sklearn}
    if has_peer():
        measures["pytorch-ood"] = with_pytorch_ood
    rows = time_metrics(measures, quick) + time_bounds(measures, quick)
    print("  same values: each metric that both sides have, and its bounds for the same draws")
    print_table(COLUMNS, rows)


def time_metrics(measures: dict[str, Measure], quick: bool) -> list[tuple[str, ...]]:
    """Measure each side on as many scores as the protocol of CIFAR-10 has test images."""
    drawn = draw(90, 1_510) if quick else draw(9_000, 151_000)
    contenders = {name: partial(measure, *drawn) for name, measure in measures.items()}
    for name, call in contenders.items():
        compare(contenders["ours"](), call(), name)
    seconds = interleave({"limit": partial(np.sort, drawn[0].numpy()), **contenders}, 2 if quick else 9)
    return timing_rows(f"{len(drawn[0])} scores", seconds, 2, NO_TARGETS, judge=not quick)


def time_bounds(measures: dict[str, Measure], quick: bool) -> list[tuple[str, ...]]:
    """Measure all metrics and the bounds of the first four on the largest of the OOD sets."""
    drawn, replicates = (draw(90, 700), FEW) if quick else (draw(9_000, 70_000), 1000)
    scores, labels, _ = drawn
    ranking = rank(scores[labels >= 0], scores[labels < 0])
    sums = np.empty_like(ranking.id_counts)

    def limit() -> None:
        for _ in range(replicates):
            for counts in (ranking.id_counts, ranking.ood_counts):
                np.cumsum(counts, out=sums)

    def ours() -> None:
        with_ours(*drawn)
        bootstrap(rank(scores[labels >= 0], scores[labels < 0]), RULES, replicates)

    peers = {name: partial(redrawn, measure, scores, labels) for name, measure in measures.items() if name != "ours"}
    for name, call in peers.items():
        compare(bootstrap(ranking, RULES, FEW), call(), f"bounds, {name}")
    seconds = interleave({"limit": limit, "ours": ours, **peers}, 2 if quick else 9)
    for name in peers:
        seconds[name] = [each * replicates / FEW for each in seconds[name]]
    case = f"{len(scores)} scores, {replicates} replicates"
    first, *others = timing_rows(case, seconds, float("inf"), NO_TARGETS, judge=False)
    verdict = "not judged" if quick else "met" if statistics.median(seconds["ours"]) <= SECONDS else "MISSED"
    return [(*first[:4], f"<= {SECONDS:g} s: {verdict}", *first[5:]), *others]


def draw(known: int, unknown: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draw float64 scores, labels and predictions (N,) of a network that is right in 95% of the ID images."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(known + unknown).masked_fill(torch.arange(known + unknown) >= known, -1)
    scores = torch.randn(len(labels), generator=generator, dtype=torch.float64) + (labels < 0)
    return scores, labels, labels + (torch.rand(len(labels), generator=generator) > 0.95)


def with_ours(scores: Tensor, labels: Tensor, predictions: Tensor) -> dict[str, float]:
    """Compute all eight metrics."""
    metrics = OODMetrics(RULES)
    metrics.update(scores, labels, predictions)
    return metrics.compute()


def with_sklearn(scores: Tensor, labels: Tensor, predictions: Tensor | None = None) -> dict[str, float]:
    """Compute the first four, with predictions all eight."""
    values, is_ood = scores.numpy(), (labels < 0).numpy()
    fpr, tpr, _ = roc_curve(is_ood, values, drop_intermediate=False)
    found = {"auroc": auc(fpr, tpr), "fpr95": fpr[np.argmax(tpr >= 0.95)]}
    for name, positive, signed in (("aupr_in", ~is_ood, -values), ("aupr_out", is_ood, values)):
        precision, recall, _ = precision_recall_curve(positive, signed)
        found[name] = auc(recall, precision)
    if predictions is not None:
        right = (predictions == labels).numpy()
        accuracy, kept = right[~is_ood].mean(), right | is_ood
        cauroc = roc_auc_score(is_ood[kept], values[kept])
        found |= {"detection_accuracy": (1 + tpr - fpr).max() / 2, "accuracy": accuracy}
        found |= {"cauroc": cauroc, "oscr": accuracy * cauroc}
    return found


def with_pytorch_ood(scores: Tensor, labels: Tensor, predictions: Tensor | None = None) -> dict[str, float]:
    """Compute the first four, with predictions what it has of the others."""
    from pytorch_ood.metrics import OODMetrics as Metrics
    from pytorch_ood.metrics.functional import oscr_score

    found = Metrics().update(scores, labels, predictions).compute()
    names = {"auroc": "AUROC", "aupr_in": "AUPR-IN", "aupr_out": "AUPR-OUT", "fpr95": "FPR95TPR", "accuracy": "ACC"}
    known = {name: found[key] for name, key in names.items() if key in found}
    return known if predictions is None else known | {"oscr": oscr_score(scores, predictions, labels)}


def redrawn(measure: Measure, scores: Tensor, labels: Tensor) -> dict[str, tuple[float, float]]:
    """Bootstrap by redrawing the scores themselves, with the random numbers that ours starts from."""
    sides = [
        (scores[rows].sort().values, np.random.default_rng([0, side]))
        for side, rows in enumerate((labels >= 0, labels < 0))
    ]
    draws = []
    for _ in range(FEW):
        places = [torch.from_numpy(generator.integers(len(side), size=len(side))) for side, generator in sides]
        drawn = torch.cat([side[place] for (side, _), place in zip(sides, places, strict=True)])
        draws.append(measure(drawn, labels))  # ID comes first there, too
    bounds = {name: np.quantile([values[name] for values in draws], (0.025, 0.975)) for name in draws[0]}
    return {name: (low, high) for name, (low, high) in bounds.items()}


def compare(ours: dict[str, Any], theirs: dict[str, Any], who: str) -> None:
    """Raise an ``AssertionError`` where a metric that both have differs."""
    for name in ours.keys() & theirs.keys():
        np.testing.assert_allclose(theirs[name], ours[name], rtol=1e-9, err_msg=f"{who}: {name}")
