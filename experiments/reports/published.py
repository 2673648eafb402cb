"""Published numbers that were read at their source, beside ours. What was not read there has no place here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from callbacks.tables import TRAINING, percent
from experiments.cli import EXPERIMENTS
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
LIMITS = ("limit_train_batches", "limit_test_batches", "max_time")
FREE = ("weights", "estimate", "floor")  # of which seed, or whose; rows with and without a floor are told apart
UNSAID = ("known", "subset", "ood_subset", "num_outliers", "ood")  # data, where the YAML has all
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
    fits = results["experiment"] in row.experiments and entry.score == row.score and floor == row.floor
    return fits and not _limited(entry)


def _limited(entry: Entry) -> bool:
    """Whether a run of an entry was cut short in training or testing, so that its numbers stand beside nothing."""
    for run in entry.runs:
        trainer = run.results["configuration"].get("trainer") or {}
        if run.results["truncated"] or any(trainer.get(key) is not None for key in LIMITS):
            return True
        if trainer.get("overfit_batches") or trainer.get("max_steps", -1) != -1:
            return True
    return False


def departures(configuration: Mapping[str, Any], experiment: str) -> list[str]:
    """List, in words, where a run left the YAML of its experiment: in the model, the data and the length of training.

    What the YAML leaves to the defaults of a class is not looked at, but for the choices of ``UNSAID``.
    """
    stated = yaml.safe_load((EXPERIMENTS / f"{experiment}.yaml").read_text(encoding="utf-8"))
    wanted = {**_leaves(stated["model"], "model"), **_leaves(stated["data"], "data")}
    wanted |= _leaves({key: stated["trainer"][key] for key in TRAINING if key in stated["trainer"]}, "trainer")
    wanted = {key: value for key, value in wanted.items() if key.rpartition(".")[2] not in FREE}
    ours = {
        key: value
        for part in ("model", "data", "trainer")
        for key, value in _leaves(configuration.get(part) or {}, part).items()
    }
    options = (configuration.get("data") or {}).get("init_args") or {}
    unsaid = [key for key in UNSAID if options.get(key) and key not in stated["data"]["init_args"]]
    return [
        *(
            f"{key} is {ours.get(key)}, not {value}"
            for key, value in wanted.items()
            if not _agree(ours.get(key), value)
        ),
        *(f"data.{key} is {options[key]}" for key in unsaid),
    ]


def _leaves(tree: Any, path: str) -> dict[str, Any]:
    """Flatten a configuration: path -> value, where ``init_args`` go without saying."""
    if not isinstance(tree, dict) or not tree:
        return {path: tree}
    found: dict[str, Any] = {}
    for key, value in tree.items():
        found |= _leaves(value, path if key == "init_args" else f"{path}.{key}")
    return found


def _agree(ours: Any, stated: Any) -> bool:
    """Whether two values are the same, written as a text (1.0e-4) or as a number."""
    try:
        return float(ours) == float(stated)
    except (TypeError, ValueError):
        return bool(ours == stated)


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
    if changed := departures(results["configuration"], results["experiment"]):
        said += f" Ours is not the experiment as it stands: {'; '.join(changed)}."
    return Beside(row.name, f"{results['experiment']}, {entry.score}", values, said, row.source)
