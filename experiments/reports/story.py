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
        listed = f" ({', '.join(classes)})" if 0 < len(classes) <= 12 else ""
        unlabelled = list(dict.fromkeys(entry.label for entry in comparison.entries if not entry.accuracy))
        learned = f"on images of {count} classes of {name}{listed}"
        if any(entry.accuracy for entry in comparison.entries):
            learned = f"to tell {count} classes of {name} apart{listed}"
            learned += f"; without telling them apart: {', '.join(unlabelled)}" if unlabelled else ""
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
    """Say, for near and far, which entry has the best AUROC, and how far that can be trusted."""
    found = []
    for group, members in comparison.groups.items():
        column = mean_of(group)
        marked = list(zip(comparison.entries, comparison.marks(column, "auroc"), strict=True))
        best = [entry for entry, mark in marked if mark == "best"]
        if not best:
            continue
        numbers = best[0].numbers[column]
        absent = dict.fromkeys(entry.label for entry in comparison.entries if column not in entry.numbers)
        found.append(
            {
                "group": f"{group}: {'mean of ' if len(members) > 1 else ''}{', '.join(members)}",
                "name": _call(best),
                "auroc": percent(numbers, "auroc"),
                "fpr95": percent(numbers, "fpr95"),
                "verdict": _verdict(comparison, column, best, [entry for entry, mark in marked if mark == "tied"]),
                "honest": _without_outliers(comparison, column) if best[0].outliers != "none" else "",
                "absent": ", ".join(absent),
            }
        )
    return found


def _verdict(comparison: Comparison, column: str, best: Sequence[Entry], tied: Sequence[Entry]) -> str:
    """Say whether the best AUROC of a column is ahead of the others, as far as their intervals and FPR95 tell."""
    rivals = [e for e in comparison.entries if column in e.numbers and not e.untrained]
    if len({entry.method for entry in rivals}) == 1:
        alone = "There is no other method to compare it with."
        return alone if len(rivals) == 1 else f"{alone} It is the largest AUROC of its {len(rivals)} scores."
    numbers = best[0].numbers[column]
    if "auroc_std" not in numbers and "auroc_low" not in numbers:
        return "It is the largest AUROC. No interval was recorded: it may be chance."
    if len(best) > 1 or tied:
        return f"A tie: {f'the intervals meet those of {_call(tied)}' if tied else 'the numbers are the same'}."
    rates = comparison.marks(column, "fpr95")
    first = [entry for entry, mark in zip(comparison.entries, rates, strict=True) if mark]
    widths = [numbers[high] - numbers[low] for low, high in [("auroc_low", "auroc_high")] if low in numbers]
    if max([2 * numbers.get("auroc_std", 0.0), *widths]) > 0 and first == list(best):
        return "Ahead of all others by more than the intervals, in AUROC and in FPR95."
    lower = "" if best[0] in first else f" The lowest FPR95 is that of {_call(first)}."
    return f"It is the largest AUROC.{lower}"


def _without_outliers(comparison: Comparison, column: str) -> str:
    entries = [
        entry
        for entry in comparison.entries
        if entry.outliers == "none" and column in entry.numbers and not entry.untrained
    ]
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
