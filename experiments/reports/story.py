"""What a newcomer reads first: what was asked, how to read the numbers, and who won where."""

from typing import Any

from callbacks.tables import percent
from experiments.reports.comparison import Comparison, Entry

Words = list[tuple[str, str]]


def question(comparison: Comparison) -> str:
    """Say what the networks were trained on, and what they were then shown."""
    results = comparison.entries[0].runs[0].results
    data = results["configuration"].get("data") or {}
    name = data.get("class_path", "the ID data").rsplit(".", 1)[-1]
    version = (data.get("init_args") or {}).get("version")
    name += f"-{version}" if version else ""
    classes = results["num_classes"]
    learned = f"to tell {classes} classes of {name} apart" if classes else f"on images of {name}"
    if results["known"]:
        learned += f", the first {classes} of the data set"
    groups = {
        "near": "near ones, which resemble the training images",
        "far": "far ones, which do not",
    }
    shown = [
        f"{words} ({', '.join(members)})"
        for group, words in groups.items()
        if (members := [ood for ood, of in comparison.sets.items() if of == group])
    ]
    return (
        f"Networks were trained {learned}. Then they were shown images of none of these classes: {'; '.join(shown)}. "
        "Which method notices?"
    )


def readings(comparison: Comparison) -> Words:
    """Say how to read the two metrics."""
    rules = comparison.entries[0].runs[0].results["metric_rules"]
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
        ("FPR95", fpr95[rules["positive"]]),
    ]


def winners(comparison: Comparison) -> list[dict[str, Any]]:
    """Say, for near and far, which entry has the best AUROC, and which others cannot be told from it."""
    found = []
    for group in ("near", "far"):
        if group not in comparison.columns:
            continue
        marks = comparison.marks(group, "auroc")
        best = [entry for entry, mark in zip(comparison.entries, marks, strict=True) if mark == "best"]
        tied = [entry for entry, mark in zip(comparison.entries, marks, strict=True) if mark == "tied"]
        if not best:
            continue
        found.append(
            {
                "group": comparison.columns[group],
                "name": " and ".join(_call(entry) for entry in best),
                "auroc": percent(best[0].numbers[group], "auroc"),
                "fpr95": percent(best[0].numbers[group], "fpr95"),
                "tied": [_call(entry) for entry in tied],
                "honest": _without_outliers(comparison, group) if best[0].outliers != "none" else "",
            }
        )
    return found


def _without_outliers(comparison: Comparison, group: str) -> str:
    entries = [entry for entry in comparison.entries if entry.outliers == "none" and group in entry.numbers]
    if not entries:
        return ""
    best = max(entries, key=lambda entry: entry.numbers[group]["auroc"])
    return f"{_call(best)}, {percent(best.numbers[group], 'auroc')}"


def _call(entry: Entry) -> str:
    return f"{entry.label}, {entry.score}"

