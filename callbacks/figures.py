"""Figures of evaluations, one panel for each OOD set: ROC curves, histograms, metrics over thresholds and training."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from callbacks.metrics import rank
from callbacks.samples import Samples
from callbacks.thresholds import Points


def score_figures(
    samples: Samples,
    groups: Mapping[str, str],
    curves: Mapping[str, Mapping[str, Points]],
    taus: Mapping[str, float],
) -> dict[str, Figure]:
    """Draw all that the scores of an evaluation show, by name; ``curves`` as of ``thresholds.sweep``."""
    figures = {"roc": roc_figure(samples, groups)}
    figures |= {f"histogram_{name}": histogram_figure(samples, name) for name in samples.scores}
    return figures | {
        f"thresholds_{name}": thresholds_figure(sets, name, taus.get(name)) for name, sets in curves.items()
    }


def roc_figure(samples: Samples, groups: Mapping[str, str]) -> Figure:
    """Draw, for each OOD set, the share of ID accepted over the share of OOD accepted, one curve for each score."""
    known = samples.of("id")
    figure, panels = _panels(len(samples.ood_sets))
    for panel, ood_set in zip(panels, samples.ood_sets, strict=True):
        unknown = samples.of(ood_set)
        for name, values in known.scores.items():
            ranking = rank(values, unknown.scores[name], name=f"{name} on {ood_set}")
            accepted = [np.append(0, np.cumsum(counts)) / counts.sum() for counts in ranking[1:]]
            panel.plot(accepted[1], accepted[0], label=name, linewidth=1.2)
        panel.axhline(0.95, color="grey", linewidth=0.6, linestyle=":")
        panel.set(title=f"{ood_set} ({groups[ood_set]})", xlabel="OOD accepted", ylabel="ID accepted")
    panels[-1].legend(fontsize=7, loc="lower right")
    return figure


def histogram_figure(samples: Samples, name: str) -> Figure:
    """Draw the histogram of one score on the ID test images and on each OOD set, one panel for each set."""
    known = samples.of("id").scores[name]
    figure, panels = _panels(len(samples.ood_sets))
    for panel, ood_set in zip(panels, samples.ood_sets, strict=True):
        unknown = samples.of(ood_set).scores[name]
        low, high = _bulk(np.concatenate([known, unknown]))
        for scores, label, colour in ((known, "ID", "tab:blue"), (unknown, ood_set, "tab:orange")):
            panel.hist(
                scores.astype(np.float64).clip(low, high),  # an untrained network's may be nearly equal
                bins=50,
                range=(low, high),
                density=True,
                alpha=0.6,
                label=label,
                color=colour,
            )
        panel.set(title=ood_set, xlabel=f"{name} (higher = more OOD)", yticks=[])
        panel.legend(fontsize=7)
    return figure


def thresholds_figure(curves: Mapping[str, Points], name: str, tau: float | None) -> Figure:
    """Draw TPR, FPR and macro F1 over the thresholds of one score, one panel for each OOD set, and mark ``tau``."""
    figure, panels = _panels(len(curves))
    for panel, (ood_set, points) in zip(panels, curves.items(), strict=True):
        for key, label in (("tpr", "TPR"), ("fpr", "FPR"), ("macro_f1", "macro F1")):
            if key in points:  # without classes there is no F1
                panel.plot(points["threshold"], points[key], label=label, linewidth=1.2, drawstyle="steps-post")
        low, high = _bulk(points["threshold"])
        if tau is not None:
            panel.axvline(tau, color="black", linewidth=0.8, linestyle="--", label="95% of ID")
            low, high = min(low, tau), max(high, tau)
        margin = 0.03 * (high - low)
        panel.set(title=ood_set, xlabel=f"threshold of {name}", xlim=(low - margin, high + margin), ylim=(-0.03, 1.03))
    panels[-1].legend(fontsize=7)
    return figure


def save_figures(folder: Path, figures: Mapping[str, Figure]) -> dict[str, str]:
    """Write PNGs in the place of all that lies in the folder, and return their paths by name."""
    shutil.rmtree(folder, ignore_errors=True)  # of other scores, perhaps
    folder.mkdir()
    paths = {name: str(folder / f"{name}.png") for name in figures}
    for name, figure in figures.items():
        figure.savefig(paths[name], dpi=110)
    return paths


def stages_figure(results: Sequence[Mapping[str, Any]], metric: str) -> Figure:
    """Draw a metric over the epochs of one run's evaluated checkpoints, one curve for each score, and the ID accuracy.

    Args:
        results: of ``OODEvaluation``, in the order of their epochs, all with the same scores and OOD sets.
        metric: key of a row.
    """
    epochs = [stage["epoch"] for stage in results]
    rows = [{(row["ood_set"], row["score"]): row for row in stage["rows"]} for stage in results]
    groups = {row["ood_set"]: row["group"] for row in results[0]["rows"]}
    figure, (first, *panels) = _panels(1 + len(groups))
    if results[0]["id_accuracy"] is not None:
        first.plot(epochs, [stage["id_accuracy"] for stage in results], color="black", marker=".")
    first.set(title="ID accuracy", xlabel="epoch")
    for panel, (ood_set, group) in zip(panels, groups.items(), strict=True):
        for score in dict.fromkeys(row["score"] for row in results[0]["rows"]):
            values = [stage[ood_set, score][metric] for stage in rows]
            panel.plot(epochs, values, label=score, linewidth=1.2, marker=".")
        panel.set(title=f"{ood_set} ({group})", xlabel="epoch", ylabel=metric)
    panels[-1].legend(fontsize=7)
    return figure


def _panels(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.4 * columns, 3.0 * rows), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for unused in grid.flat[count:]:
        unused.set_axis_off()
    return figure, list(grid.flat[:count])


def _bulk(values: NDArray[np.floating]) -> tuple[float, float]:
    """Bound what is drawn of some scores: a few extremes must not hide the rest."""
    low, high = np.quantile(values[np.isfinite(values)], (0.005, 0.995)).tolist()
    return (low, high) if low < high else (low - 0.5, high + 0.5)
