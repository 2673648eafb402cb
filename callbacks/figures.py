"""Figures of evaluations, one panel for each OOD set: ROC curves, score histograms, metrics over training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from callbacks.metrics import rank
from callbacks.samples import Samples


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
        values = np.concatenate([known, unknown])
        # a few extremes must not hide the rest
        low, high = np.quantile(values[np.isfinite(values)], (0.005, 0.995))
        if low == high:
            low, high = low - 0.5, high + 0.5
        for scores, label, colour in ((known, "ID", "tab:blue"), (unknown, ood_set, "tab:orange")):
            panel.hist(
                scores.clip(low, high),
                bins=50,
                range=(float(low), float(high)),
                density=True,
                alpha=0.6,
                label=label,
                color=colour,
            )
        panel.set(title=ood_set, xlabel=f"{name} (higher = more OOD)", yticks=[])
        panel.legend(fontsize=7)
    return figure


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
