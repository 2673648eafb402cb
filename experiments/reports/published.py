"""Published numbers that were read at their source, beside ours. What was not read there has no place here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from callbacks.tables import percent
from experiments.reports.comparison import Comparison, Entry


@dataclass(frozen=True)
class Published:
    """A published row, and which of our runs it may stand beside.

    Attributes:
        name: what the source calls it.
        experiments: ours that do the same.
        score: the score that is compared.
        floor: whether it trains with a floor under the loss.
        values: metric -> mean and standard deviation, as fractions; ours is the mean over all OOD sets of a run.
        rules: preset of the metrics that the source follows.
        source: where the numbers stand.
        differences: what of the source's protocol is not ours, or not known.
    """

    name: str
    experiments: tuple[str, ...]
    score: str
    floor: bool
    values: Mapping[str, tuple[float, float]]
    rules: str
    source: str
    differences: str


@dataclass(frozen=True)
class Beside:
    """A published row beside ours, in percent.

    Attributes:
        name: what the source calls it.
        ours: our run and score.
        values: title of a metric -> the published number and ours.
        differences: between the two, in words.
        source: of the published number.
    """

    name: str
    ours: str
    values: Mapping[str, tuple[str, str]]
    differences: str
    source: str


UNLEASHING_MASK: dict[str, Any] = {
    "rules": "unleashing_mask",
    "source": "README of github.com/ZFancy/Unleashing-Mask, table of CIFAR-10 with DenseNet.",
    "score": "energy",
}
COMMON = (
    "The published mean is over OOD sets that the README does not list, ours over those of the run. Their code selects "
    "nothing on held-out images and holds none out; ours holds out 2% of the training images. "
)
NO_SCORE = "The README does not say which score the row used; ours is the energy, which their configurations enable."
TITLES = {"auroc": "AUROC", "aupr_in": "AUPR-in", "fpr95": "FPR95", "id_accuracy": "ID accuracy"}


def _row(auroc: Any, aupr_in: Any, fpr95: Any, id_accuracy: Any) -> dict[str, tuple[float, float]]:
    values = {"auroc": auroc, "aupr_in": aupr_in, "fpr95": fpr95, "id_accuracy": id_accuracy}
    return {metric: (mean / 100, std / 100) for metric, (mean, std) in values.items()}


PUBLISHED = (
    Published(
        name="Energy",
        experiments=("unleashing_mask/estimate_cifar10", "classifier/cifar10_densenet"),
        floor=False,
        values=_row((92.07, 0.22), (92.72, 0.39), (42.69, 1.31), (94.01, 0.08)),
        differences=COMMON
        + "The run of the classifier tests the checkpoint that is best on held-out images, that of the "
        "estimate the last one.",
        **UNLEASHING_MASK,
    ),
    Published(
        name="Energy+UM",
        experiments=("unleashing_mask/cifar10_densenet_um",),
        floor=True,
        values=_row((93.73, 0.36), (94.27, 0.60), (33.29, 1.70), (92.80, 0.47)),
        differences=COMMON + "Their floor is one mask's estimate or chosen by hand, ours the mean of three masks.",
        **UNLEASHING_MASK,
    ),
    Published(
        name="OE",
        experiments=("outlier_exposure/cifar10_oe",),
        floor=False,
        values=_row((97.07, 0.01), (97.31, 0.05), (13.80, 0.28), (92.59, 0.32)),
        differences=COMMON + NO_SCORE,
        **UNLEASHING_MASK,
    ),
    Published(
        name="OE+UM",
        experiments=("outlier_exposure/cifar10_oe",),
        floor=True,
        values=_row((97.60, 0.03), (97.87, 0.02), (11.22, 0.16), (93.66, 0.12)),
        differences=COMMON + NO_SCORE,
        **UNLEASHING_MASK,
    ),
)


def beside(comparisons: Sequence[Comparison]) -> list[Beside]:
    """Put our entries beside the published rows that they reproduce."""
    return [
        _beside(row, entry)
        for row in PUBLISHED
        for table in comparisons
        for entry in table.entries
        if _same(row, entry)
    ]


def _same(row: Published, entry: Entry) -> bool:
    results = entry.runs[0].results
    model = (results["configuration"].get("model") or {}).get("init_args") or {}
    floor = bool(model.get("floor"))
    return results["experiment"] in row.experiments and entry.score == row.score and floor == row.floor


def _beside(row: Published, entry: Entry) -> Beside:
    ours = {**entry.overall, **entry.accuracy}
    values = {
        TITLES[metric]: (f"{100 * mean:.2f} ({100 * std:.2f})", percent(ours, metric) if metric in ours else "–")
        for metric, (mean, std) in row.values.items()
    }
    results, said = entry.runs[0].results, row.differences
    rows = [r for r in results["rows"] if r["score"] == entry.score]
    said += (
        f" Ours: {len(entry.runs)} seed{'s' * (len(entry.runs) > 1)}; OOD sets {', '.join(r['ood_set'] for r in rows)}."
    )
    if results["metric_rules"]["preset"] != row.rules:
        said += f" Ours reads the metrics as {results['metric_rules']['preset']}, the source as {row.rules}."
    if results["truncated"]:
        said += " Ours did not test all images."
    return Beside(row.name, f"{results['experiment']}, {entry.score}", values, said, row.source)
