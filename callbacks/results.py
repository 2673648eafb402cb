"""From per-image scores to rows of metrics, and the files of a result: ``results.json`` and ``results.csv``.

The schema is written down in ``checkpoints/README.md``.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from callbacks.bootstrap import bounds, redraw
from callbacks.metrics import (
    MetricRules,
    auroc,
    detection_accuracy,
    headline,
    macro_f1,
    narrow,
    rank,
    threshold_at_tpr,
)
from callbacks.samples import Samples
from callbacks.thresholds import join, operating_points

TauSource = Literal["id_val", "test_known"]
SCHEMA_VERSION = 1
HEADLINE = ("auroc", "aupr_in", "aupr_out", "fpr95")


def summarize(
    samples: Samples,
    groups: Mapping[str, str],
    rules: MetricRules,
    num_classes: int,
    replicates: int = 1000,
    confidence: float = 0.95,
    tau_source: TauSource = "id_val",
    oracle: bool = False,
) -> dict[str, Any]:
    """Compute every number of ``results.json`` that follows from the scores alone.

    Where an OOD set was drawn from repeatedly, its row holds the mean of each metric over the drawings and, of the
    headline ones, the sample standard deviation (over R - 1) as ``<metric>_std``. Its bounds are those of one drawing,
    averaged: a mean varies less than one drawing, so they are wide enough for it, and wider than they need be. The
    standard deviation is the effect of the choice of images alone and no substitute for them.

    Args:
        samples: the per-image table.
        groups: OOD set -> ``near`` or ``far``.
        rules: which reading of FPR95 and AUPR.
        num_classes: K, for the macro F1 over K+1 classes.
        replicates: bootstrap replicates behind each confidence bound; 0 = no bounds.
        confidence: share of replicates between the bounds.
        tau_source: the images of whose ID scores a threshold accepts 95%: ``id_val``, those held out of training;
            ``test_known``, the ID test images themselves, which is optimistic.
        oracle: whether rows hold ``oracle_f1`` too, the largest macro F1 of any threshold.

    Returns:
        ``metric_rules``, ``id_accuracy`` (None for a method without classes), ``thresholds`` (score -> smallest value
        that accepts 95% of the images of ``tau_source``, where there are any), ``rows`` (one for each score and OOD
        set) and ``means`` (unweighted, over the sets of a group; bounded where each set was drawn once). Fractions, not
        percent.
    """
    known = samples.of("id")
    correct = known.labels == known.predictions
    thresholds = _thresholds(samples, tau_source)
    rows = []
    redrawn: dict[tuple[str, str], dict[str, NDArray[np.float64]]] = {}  # of sets that were drawn once
    drawings = {ood_set: samples.drawings(ood_set) for ood_set in samples.ood_sets}
    for name in known.scores:
        for ood_set, drawn in drawings.items():
            row: dict[str, Any] = {"score": name, "ood_set": ood_set, "group": groups[ood_set]}
            row |= {"id_count": len(known.ids), "ood_count": len(drawn[0].ids)}
            measured = []
            for unknown in drawn:
                ranking = rank(known.scores[name], unknown.scores[name], name=f"{name} on {ood_set}")
                values = headline(ranking, rules)
                if replicates:
                    draws = redraw(ranking, rules, replicates)
                    values |= _bounded(draws, confidence)
                    if len(drawn) == 1:
                        redrawn[name, ood_set] = draws
                values["detection_accuracy"] = detection_accuracy(ranking)
                if correct.any():
                    among_correct = auroc(narrow(ranking, known.scores[name][correct]))
                    values |= {"cauroc": among_correct, "oscr": among_correct * float(correct.mean())}
                if name in thresholds:
                    values |= _at_threshold(known, unknown, name, thresholds[name], num_classes)
                if oracle and samples.classified:
                    values["oracle_f1"] = float(operating_points(known, unknown, name, num_classes)["macro_f1"].max())
                measured.append(values)
            rows.append(row | _over_drawings(measured))
    means: list[dict[str, Any]] = [
        {"score": name, "group": group, "sets": len(members)}
        | {metric: float(np.mean([row[metric] for row in members])) for metric in HEADLINE}
        | _bounds_of_mean([redrawn.get((name, row["ood_set"])) for row in members], confidence)
        for name in known.scores
        for group in ("near", "far")
        if (members := [row for row in rows if row["score"] == name and row["group"] == group])
    ]
    return {
        "metric_rules": {
            **asdict(rules),
            "bootstrap_replicates": replicates,
            "confidence": confidence,
            "tau_source": tau_source,
        },
        "id_accuracy": float(correct.mean()) if samples.classified else None,
        "thresholds": thresholds,
        "rows": rows,
        "means": means,
    }


def check_tau_source(tau_source: str) -> None:
    """Raise a ``ValueError`` that lists what there is."""
    if tau_source not in get_args(TauSource):
        raise ValueError(f"tau_source is {' or '.join(get_args(TauSource))}, not {tau_source!r}")


def _thresholds(samples: Samples, tau_source: TauSource) -> dict[str, float]:
    split = {"id_val": "calibration", "test_known": "id"}[tau_source]
    if split not in samples.splits:
        return {}
    scores = samples.of(split).scores
    quantiles = {name: threshold_at_tpr(scores[name], name=f"{name} on {split}") for name in scores}
    return {name: value for name, value in quantiles.items() if np.isfinite(value)}  # JSON has no infinity


def _at_threshold(known: Samples, unknown: Samples, name: str, tau: float, num_classes: int) -> dict[str, float]:
    """Return the share of ID that is accepted, the share of OOD that is rejected and, with classes, the macro F1."""
    values = {"tpr": float(np.mean(known.scores[name] <= tau)), "tnr": float(np.mean(unknown.scores[name] > tau))}
    if known.classified:
        values["macro_f1"] = macro_f1(*join(known, unknown, name), tau, num_classes)
    return values


def _bounded(draws: Mapping[str, NDArray[np.float64]], confidence: float) -> dict[str, float]:
    """Name the bounds of each metric, from its (R,) replicates."""
    pairs = {metric: bounds(values, confidence) for metric, values in draws.items()}
    return {f"{metric}_{side}": pair[i] for metric, pair in pairs.items() for i, side in enumerate(("low", "high"))}


def _bounds_of_mean(members: Sequence[Mapping[str, NDArray[np.float64]] | None], confidence: float) -> dict[str, float]:
    """Bound the mean over the sets of a group; not where one was drawn from repeatedly, or nothing was redrawn."""
    known = [draws for draws in members if draws is not None]
    if len(known) < len(members):
        return {}
    return _bounded({metric: np.mean([draws[metric] for draws in known], axis=0) for metric in known[0]}, confidence)


def _over_drawings(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Average what was measured on each drawing; a single one stays as it is."""
    if len(measured) == 1:
        return dict(measured[0])
    columns = {key: [values[key] for values in measured] for key in measured[0]}
    return (
        {"repeats": len(measured)}
        | {key: float(np.mean(values)) for key, values in columns.items()}
        | {f"{metric}_std": float(np.std(columns[metric], ddof=1)) for metric in HEADLINE}
    )


def write_results(folder: Path, results: Mapping[str, Any]) -> None:
    """Write ``results.json`` and, one line for each row, ``results.csv``."""
    write_json(folder / "results.json", {"schema_version": SCHEMA_VERSION, **results})
    write_csv(folder / "results.csv", results["rows"])


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write a line for each row, under all columns that any of them has."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns_of(rows))
        writer.writeheader()
        writer.writerows(rows)


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Name the columns that any of the rows has, in order."""
    return list(dict.fromkeys(column for row in rows for column in row))


def log_entries(results: Mapping[str, Any]) -> dict[str, float]:
    """Name headline metrics, as ``ood/<OOD set or group>/<score>/<metric>``, and ID accuracy for the loggers."""
    entries = [(row["ood_set"], row) for row in results["rows"]] + [(mean["group"], mean) for mean in results["means"]]
    numbers = {f"ood/{of}/{values['score']}/{metric}": values[metric] for of, values in entries for metric in HEADLINE}
    if results["id_accuracy"] is not None:
        numbers["test/accuracy"] = results["id_accuracy"]
        numbers["test/logit_accuracy"] = results["logit_accuracy"]
    return numbers


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a whole file or none: a kill in between leaves the old one."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file of ours; a damaged one is a ``ValueError`` that names it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(f"it holds a {type(content).__name__}, not an object")
        return content
    except ValueError as error:
        raise ValueError(f"{path} is damaged, no JSON of ours: {error}") from error


def read_results(folder: Path) -> dict[str, Any]:
    """Read the ``results.json`` of a run folder; one of another schema is a ``ValueError``."""
    path = folder / "results.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder} holds no results.json: evaluate the run first (test)")
    results = read_json(path)
    if results.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path} has schema {results.get('schema_version')}, this version reads {SCHEMA_VERSION}")
    return results
