"""Results as a table that a person reads."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from callbacks.results import HEADLINE

# What of the trainer makes a setting another one; the rest is how and where it ran.
TRAINING = (
    "max_epochs",
    "max_steps",
    "max_time",
    "limit_train_batches",
    "limit_val_batches",
    "overfit_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "precision",
    "callbacks",
)
SEED = re.compile(r"(^|/)seed\d+(?=$|[@/.])|_s(eed)?\d+(?=$|[@.])")
SEEDED = ("run:", "openood/")  # what names one of several trainings; elsewhere _s12 may be a size


def results_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out the rows of several ``results.json``: method x score, by OOD set; percent with confidence bounds.

    The first run speaks for all about data and metrics.
    """
    table = Table(caption=describe(runs[0]), title="OOD detection, % (higher AUROC, lower FPR95 = better)")
    for column, justify in (("OOD set", "left"), ("method", "left"), ("score", "left")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    with_f1 = any("macro_f1" in row for run in runs for row in run["rows"])
    for column in ("AUROC", "FPR95", "AUPR-in", "AUPR-out", *["F1"] * with_f1):
        table.add_column(column, justify="right", no_wrap=True)
    sets = dict.fromkeys((row["ood_set"], row["group"]) for run in runs for row in run["rows"])
    methods = [run["method"] for run in runs]
    for ood_set, group in sets:
        table.add_section()
        label = f"{ood_set} ({group})"
        for run in runs:
            for row in run["rows"]:
                if (row["ood_set"], row["group"]) == (ood_set, group):
                    cells = [percent(row, metric) for metric in ("auroc", "fpr95")]
                    cells += [f"{100 * row[metric]:.1f}" for metric in ("aupr_in", "aupr_out")]
                    cells += [percent(row, "macro_f1") if "macro_f1" in row else ""] * with_f1
                    method = run["method"] if methods.count(run["method"]) == 1 else f"{run['method']} {run['name']}"
                    table.add_row(label, method, row["score"], *cells)
                    label = ""
    return table


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Join runs of one setting, which differ in their seed: metrics become mean and ``_std`` (over n - 1).

    This takes the place of what a run says of repeated drawings from an OOD set. Bounds of one seed are averaged.
    """
    joined: list[Mapping[str, Any]] = []
    for setting in dict.fromkeys(map(setting_of, runs)):
        members = [run for run in runs if setting_of(run) == setting]
        if len(members) == 1:
            joined += members
            continue
        try:
            rows = _averaged([run["rows"] for run in members], ("score", "ood_set", "group"))
            means = _averaged([run["means"] for run in members], ("score", "group", "sets"))
        except ValueError as error:
            raise ValueError(
                f"the runs of {members[0]['experiment']} have different scores or OOD sets, they cannot be averaged"
            ) from error
        accuracy = {}
        if all(run["id_accuracy"] is not None for run in members):
            accuracy = _mean_and_std("id_accuracy", [run["id_accuracy"] for run in members])
        joined.append({**members[0], "rows": rows, "means": means, **accuracy})
    return joined


def _averaged(runs: Sequence[Sequence[Mapping[str, Any]]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """Average the rows of several runs, one by one; ``ValueError`` where they are not about the same."""
    averaged = []
    for same in zip(*runs, strict=True):
        row = {key: same[0][key] for key in keys}
        if any(row[key] != other[key] for other in same for key in keys):
            raise ValueError("rows about something else")
        for metric in [*HEADLINE, *["macro_f1"] * all("macro_f1" in other for other in same)]:
            row |= _mean_and_std(metric, [other[metric] for other in same])
            for end in (f"{metric}_low", f"{metric}_high"):
                if all(end in other for other in same):
                    row[end] = float(np.mean([other[end] for other in same]))
        averaged.append(row)
    return averaged


def _mean_and_std(name: str, values: Sequence[float]) -> dict[str, float]:
    return {name: float(np.mean(values)), f"{name}_std": float(np.std(values, ddof=1))}


def setting_of(run: Mapping[str, Any]) -> str:
    """Return what runs that differ in their seed alone have in common: experiment, model, data, training and scores.

    Data are the images themselves too: those of training, and outliers. The run that a network starts from may be of a
    seed of its own, and where data lie is no setting.
    """
    configuration = run["configuration"]
    trainer, evaluation = (configuration.get(part) or {} for part in ("trainer", "evaluation"))
    parts = [
        configuration.get("model"),
        configuration.get("data"),
        {key: trainer.get(key) for key in TRAINING},
        evaluation.get("scores"),
    ]
    images = [(run["splits"].get("train") or {}).get("fingerprint"), (run["outliers"] or {}).get("fingerprint")]
    checkpoint = (run.get("checkpoint") or "").partition(".")[0]
    return json.dumps([run["experiment"], images, checkpoint, *map(_without_seed, parts)], sort_keys=True)


def _without_seed(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _without_seed(value) for key, value in tree.items() if key not in ("root", "num_workers")}
    if isinstance(tree, list):
        return [_without_seed(value) for value in tree]
    return SEED.sub("", tree) if isinstance(tree, str) and tree.startswith(SEEDED) else tree


def print_results(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print a table for each protocol, OOD subset and reading of the metrics; for each run, ID accuracy and outliers.

    Several runs of one experiment become one row: mean and standard deviation over their seeds.
    """
    console = Console()
    if not console.is_terminal:
        console = Console(width=130)
    for description in dict.fromkeys(map(describe, runs)):
        console.print(results_table(over_seeds([run for run in runs if describe(run) == description])))
    for run in runs:
        outliers = describe_outliers(run)
        if run["outliers"] is not None:
            for name, count in (run["outliers"]["duplicates"] or {}).items():
                outliers += f" ({count} of them also in {name})"
            for name, count in run["outliers"].get("removed", {}).items():
                outliers += f" ({count} left out, which are also in {name})"
        accuracy = "no classes" if run["id_accuracy"] is None else f"ID accuracy {100 * run['id_accuracy']:.2f}%"
        if run.get("logit_accuracy") != run["id_accuracy"] and "logit_accuracy" in run:
            accuracy += f" ({100 * run['logit_accuracy']:.2f}% by the logits that the scores read)"
        line = f"{run['experiment']}/{run['name']}: {accuracy}, outliers: {outliers}"
        line += "".join(f", {name} {value}" for name, value in run.get("notes", {}).items())
        line += ", TRUNCATED evaluation" if run["truncated"] else ""
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe_outliers(run: Mapping[str, Any]) -> str:
    """Say in words which auxiliary outliers training used, or ``none``."""
    return "none" if run["outliers"] is None else "{size:,} images of {source}, {feed}".format_map(run["outliers"])


def describe(run: Mapping[str, Any]) -> str:
    """Say in words what must be the same where numbers are compared: the data, and the reading of the metrics."""
    return "; ".join(filter(None, aspects(run).values()))


def aspects(run: Mapping[str, Any]) -> dict[str, str]:
    """Name what must be the same where numbers are compared, each in words; empty where it is as usual."""
    images, known, subset = run["splits"]["id"], run["known"], run["subset"]
    classes = [
        f"open set: the first {known} classes are ID" if known else "",
        f"{subset['num_labels']} of the classes" if subset["num_labels"] else "",
    ]
    return {
        "ID test images": f"{images['size']:,} ID test images ({images['fingerprint'][:6]})",
        "protocol": f"protocol: {run['protocol']}" if run["protocol"] else "",
        "classes": "; ".join(filter(None, classes)),
        "share of the ID training images": f"{100 * subset['fraction']:g}% of the ID training images"
        if subset["fraction"] < 1
        else "",
        "choice of OOD images": describe_subset(run["ood_subset"]),
        "number of images tested": "TRUNCATED: not all images were tested" if run["truncated"] else "",
        "reading of the metrics": describe_rules(run["metric_rules"]),
    }


def describe_subset(subset: Mapping[str, Any]) -> str:
    """Say in words which images of each OOD set a result is about; nothing where it is about all.

    >>> describe_subset({"rule": "first", "count": 2000, "repeats": 1})
    'OOD: first 2,000 of each set'
    """
    if subset["rule"] == "all":
        return ""
    if subset["rule"] == "first":
        return f"OOD: first {subset['count']:,} of each set"
    if subset["repeats"] == 1:
        return f"OOD: a random draw of {subset['count']:,} of each set"
    draws = f"{subset['repeats']} random draws of {subset['count']:,}"
    return f"OOD: {draws} of each larger set (± over the draws, or over the seeds where there are several)"


def describe_rules(rules: Mapping[str, Any]) -> str:
    """Say in words which reading of FPR95 and AUPR a result follows, and where the threshold of its F1 comes from."""
    sides = {"id": "share of OOD accepted where 95% of ID is", "ood": "share of ID rejected where 95% of OOD is"}
    accepted = {"id_val": "held-out ID training images", "test_known": "ID test images"}
    tau_source = rules.get("tau_source", "id_val")  # results of before there was a choice have none
    text = f"FPR95: {sides[rules['positive']]} ({rules['rule']}); AUPR: {rules['aupr']}"
    text += f"; F1: macro over K+1 classes, where 95% of {accepted[tau_source]} are accepted"
    if rules["bootstrap_replicates"]:
        text += f"; [{100 * rules['confidence']:.0f}% bounds of {rules['bootstrap_replicates']} bootstrap replicates]"
    return text


def percent(row: Mapping[str, Any], metric: str) -> str:
    """Write a metric of a row in percent, with its standard deviation or its bounds where it has any.

    >>> percent({"auroc": 0.9, "auroc_low": 0.885, "auroc_high": 0.912}, "auroc")
    '90.0 [88.5, 91.2]'
    """
    value = f"{100 * row[metric]:.1f}"
    if f"{metric}_std" in row:
        return f"{value} ± {100 * row[f'{metric}_std']:.1f}"
    if f"{metric}_low" in row:
        value += f" [{100 * row[f'{metric}_low']:.1f}, {100 * row[f'{metric}_high']:.1f}]"
    return value
