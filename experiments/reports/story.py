"""What a newcomer reads first: what was asked, how to read the numbers, and who won where."""

import inspect
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from callbacks.tables import percent
from experiments.reports.comparison import Comparison, Entry, mean_of

Words = list[tuple[str, str]]


def question(comparison: Comparison, classes: Sequence[str]) -> str:
    """Say what the networks were trained on, and what they were then shown; ``classes`` may be unknown, and empty."""
    results = comparison.entries[0].runs[0].results
    data = results["configuration"].get("data") or {}
    name = data.get("class_path", "the ID data").rsplit(".", 1)[-1]
    version = (data.get("init_args") or {}).get("version")
    name += f"-{version}" if version else ""
    count, learned = results["num_classes"], f"on images of {name}"
    if count:
        learned = f"to tell {count} classes of {name} apart"
        learned += f" ({', '.join(classes)})" if 0 < len(classes) <= 12 else ""
    groups = {
        "near": "near ones, which resemble the training images",
        "far": "far ones, which do not",
    }
    shown = [f"{groups[group]} ({', '.join(map(_explain, members))})" for group, members in comparison.groups.items()]
    return (
        f"Networks were trained {learned}. Then they were shown images of none of these classes: {'; '.join(shown)}. "
        "Which method notices?"
    )


def _explain(ood_set: str) -> str:
    return "unknown: the classes that were left out" if ood_set == "unknown" else ood_set


def readings(comparisons: Sequence[Comparison]) -> Words:
    """Say how to read the two metrics."""
    sides = {comparison.entries[0].runs[0].results["metric_rules"]["positive"] for comparison in comparisons}
    fpr95 = {
        "id": "The share of OOD images that pass as known where the threshold lets 95% of the known images pass. "
        "0% is perfect; lower is better.",
        "ood": "The share of known images that are rejected where the threshold rejects 95% of the OOD images. "
        "0% is perfect; lower is better.",
    }
    return [
        (
            "AUROC",
            "The chance that an OOD image gets a higher score than a known (ID) one. 50% is guessing, 100% is perfect; "
            "higher is better.",
        ),
        ("FPR95", " Or, as the tables say: ".join(fpr95[side] for side in sorted(sides))),
    ]


def glossary(comparisons: Sequence[Comparison]) -> Words:
    """Say what methods and scores are, in the first words of their documentation; what has none is left out."""
    paths: dict[str, Any] = {}
    for entry in (entry for comparison in comparisons for entry in comparison.entries):
        configuration = entry.runs[0].results["configuration"]
        paths[entry.runs[0].results["method"]] = (configuration.get("model") or {}).get("class_path")
        score = ((configuration.get("evaluation") or {}).get("scores") or {}).get(entry.score)
        paths[entry.score] = score.get("class_path") if isinstance(score, dict) else score
    return [(name, words) for name, path in paths.items() if path and (words := _documentation(path))]


def _documentation(path: str) -> str:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):  # a user's own class may not be at hand
        return ""
    return (inspect.getdoc(found) or "").split("\n\n")[0].replace("\n", " ").replace("``", "")


def winners(comparison: Comparison) -> list[dict[str, Any]]:
    """Say, for near and far, which entry has the best AUROC, and which others cannot be told from it."""
    found = []
    for group, members in comparison.groups.items():
        column = mean_of(group)
        marked = list(zip(comparison.entries, comparison.marks(column, "auroc"), strict=True))
        best = [entry for entry, mark in marked if mark == "best"]
        if not best:
            continue
        numbers = best[0].numbers[column]
        found.append(
            {
                "group": f"{group}: {'mean of ' if len(members) > 1 else ''}{', '.join(members)}",
                "name": _call(best),
                "auroc": percent(numbers, "auroc"),
                "fpr95": percent(numbers, "fpr95"),
                "tied": _call([entry for entry, mark in marked if mark == "tied"]),
                "sure": "auroc_std" in numbers or "auroc_low" in numbers,
                "honest": _without_outliers(comparison, column) if best[0].outliers != "none" else "",
            }
        )
    return found


def _without_outliers(comparison: Comparison, column: str) -> str:
    entries = [entry for entry in comparison.entries if entry.outliers == "none" and column in entry.numbers]
    if not entries:
        return ""
    best = max(entries, key=lambda entry: entry.numbers[column]["auroc"])
    return f"{_call([best])}, {percent(best.numbers[column], 'auroc')}"


def _call(entries: Sequence[Entry]) -> str:
    """Name methods with their scores."""
    scores: dict[str, list[str]] = {}
    for entry in entries:
        scores.setdefault(entry.label, []).append(entry.score)
    return ", ".join(f"{method} ({', '.join(names)})" for method, names in scores.items())
