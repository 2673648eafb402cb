"""Results as a table that a person reads."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table


def results_table(runs: Sequence[Mapping[str, Any]]) -> Table:
    """Lay out the rows of several ``results.json``: method x score, by OOD set; percent with confidence bounds."""
    rules = runs[0]["metric_rules"]
    table = Table(caption=describe_rules(rules), title="OOD detection, % (higher AUROC, lower FPR95 = better)")
    for column, justify in (("OOD set", "left"), ("method", "left"), ("score", "left")):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    for column in ("AUROC", "FPR95", "AUPR-in", "AUPR-out"):
        table.add_column(column, justify="right", no_wrap=True)
    sets = dict.fromkeys((row["ood_set"], row["group"]) for run in runs for row in run["rows"])
    for ood_set, group in sets:
        table.add_section()
        label = f"{ood_set} ({group})"
        for run in runs:
            for row in run["rows"]:
                if row["ood_set"] == ood_set:
                    cells = [_percent(row, metric) for metric in ("auroc", "fpr95")]
                    cells += [f"{100 * row[metric]:.1f}" for metric in ("aupr_in", "aupr_out")]
                    table.add_row(label, run["method"], row["score"], *cells)
                    label = ""
    return table


def print_results(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print the table of several runs and, for each, its ID accuracy and what outliers it trained with."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(results_table(runs))
    for run in runs:
        outliers = "none" if run["outliers"] is None else f"{run['outliers']['size']} images, {run['outliers']['feed']}"
        line = f"{run['experiment']}/{run['name']}: ID accuracy {100 * run['id_accuracy']:.2f}%, outliers: {outliers}"
        console.print(line + (", TRUNCATED evaluation" if run["truncated"] else ""), highlight=False, soft_wrap=True)


def describe_rules(rules: Mapping[str, Any]) -> str:
    """Say in words which reading of FPR95 and AUPR a result follows."""
    sides = {"id": "share of OOD accepted where 95% of ID is", "ood": "share of ID rejected where 95% of OOD is"}
    text = f"FPR95: {sides[rules['positive']]} ({rules['rule']}); AUPR: {rules['aupr']}"
    if rules["bootstrap_replicates"]:
        text += f"; [{100 * rules['confidence']:.0f}% bounds of {rules['bootstrap_replicates']} bootstrap replicates]"
    return text


def _percent(row: Mapping[str, Any], metric: str) -> str:
    value = f"{100 * row[metric]:.1f}"
    if f"{metric}_low" in row:
        value += f" [{100 * row[f'{metric}_low']:.1f}, {100 * row[f'{metric}_high']:.1f}]"
    return value
