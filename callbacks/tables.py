"""Results as a table that a person reads."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from callbacks.results import HEADLINE


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
                    cells = [_percent(row, metric) for metric in ("auroc", "fpr95")]
                    cells += [f"{100 * row[metric]:.1f}" for metric in ("aupr_in", "aupr_out")]
                    cells += [_percent(row, "macro_f1") if "macro_f1" in row else ""] * with_f1
                    method = run["method"] if methods.count(run["method"]) == 1 else f"{run['method']} {run['name']}"
                    table.add_row(label, method, row["score"], *cells)
                    label = ""
    return table


def over_seeds(runs: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Join runs of one setting, which differ in their seed: metrics become mean and ``_std`` (over n - 1).

    This takes the place of what a run says of repeated drawings from an OOD set.
    """
    joined: list[Mapping[str, Any]] = []
    for setting in dict.fromkeys(map(setting_of, runs)):
        members = [run for run in runs if setting_of(run) == setting]
        experiment = members[0]["experiment"]
        if len(members) == 1:
            joined += members
            continue
        rows = []
        for same in zip(*(run["rows"] for run in members), strict=True):
            if len({(row["score"], row["ood_set"]) for row in same}) > 1:
                raise ValueError(f"the runs of {experiment} have different scores or OOD sets, they cannot be averaged")
            row = {key: same[0][key] for key in ("score", "ood_set", "group")}
            for metric in [*HEADLINE, *["macro_f1"] * all("macro_f1" in row for row in same)]:
                values = [row[metric] for row in same]
                row |= {metric: float(np.mean(values)), f"{metric}_std": float(np.std(values, ddof=1))}
            rows.append(row)
        joined.append({**members[0], "rows": rows})
    return joined


def setting_of(run: Mapping[str, Any]) -> str:
    """Return what runs that differ in their seed alone have in common: experiment, model and data.

    The weights that a network starts from may be of a seed of their own, and where data lie is no setting.
    """
    configuration = run["configuration"]
    parts = [_without(configuration.get(part), ("weights", "root", "num_workers")) for part in ("model", "data")]
    return json.dumps([run["experiment"], *parts], sort_keys=True)


def _without(tree: Any, keys: Sequence[str]) -> Any:
    if isinstance(tree, dict):
        return {key: _without(value, keys) for key, value in tree.items() if key not in keys}
    return tree


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
        outliers = "none"
        if run["outliers"] is not None:
            outliers = "{size} images of {source}, {feed}".format_map(run["outliers"])
            for name, count in (run["outliers"]["duplicates"] or {}).items():
                outliers += f" ({count} of them also in {name})"
            for name, count in run["outliers"].get("removed", {}).items():
                outliers += f" ({count} left out, which are also in {name})"
        accuracy = "no classes" if run["id_accuracy"] is None else f"ID accuracy {100 * run['id_accuracy']:.2f}%"
        if run.get("logit_accuracy") != run["id_accuracy"] and "logit_accuracy" in run:
            accuracy += f" ({100 * run['logit_accuracy']:.2f}% by the logits that the scores read)"
        line = f"{run['experiment']}/{run['name']}: {accuracy}, outliers: {outliers}"
        line += ", TRUNCATED evaluation" if run["truncated"] else ""
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def describe(run: Mapping[str, Any]) -> str:
    """Say in words what must be the same where numbers are compared: the data, and the reading of the metrics."""
    images = run["splits"]["id"]
    parts = [
        f"{images['size']:,} ID test images ({images['fingerprint'][:6]})",
        run["protocol"] and f"protocol: {run['protocol']}",
        run["known"] and f"open set: the first {run['known']} classes are ID",
        run["subset"]["num_labels"] and f"{run['subset']['num_labels']} of the classes",
        run["subset"]["fraction"] < 1 and f"{100 * run['subset']['fraction']:g}% of the ID training images",
        describe_subset(run["ood_subset"]),
        describe_rules(run["metric_rules"]),
    ]
    return "; ".join(filter(None, parts))


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


def _percent(row: Mapping[str, Any], metric: str) -> str:
    value = f"{100 * row[metric]:.1f}"
    if f"{metric}_std" in row:
        return f"{value} ± {100 * row[f'{metric}_std']:.1f}"
    if f"{metric}_low" in row:
        value += f" [{100 * row[f'{metric}_low']:.1f}, {100 * row[f'{metric}_high']:.1f}]"
    return value
