"""Runs that may be compared become one table; what may not is a table of its own, with the reason in words."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from callbacks.results import HEADLINE
from callbacks.tables import aspects, describe, describe_outliers, over_seeds, setting_of
from experiments.reports.cost import Cost, cost_of
from experiments.reports.runs import Run

Numbers = Mapping[str, Any]  # the metrics of a row or a mean of results.json, with _std or _low and _high
LOWER_IS_BETTER = ("fpr95",)


@dataclass(frozen=True)
class Entry:
    """A line of a table: one score of one setting, over its seeds.

    Attributes:
        method: what the line is called: the class of the method and, where several settings have the same, which one.
        score: name of the score.
        outliers: the auxiliary outliers that training used, in words, or ``none``.
        numbers: column -> metrics; a column is an OOD set, or the mean over a group, where all its sets were tested.
        overall: metrics, mean over the OOD sets that were tested.
        accuracy: ``id_accuracy``, and over several seeds ``id_accuracy_std``; empty for a method without classes.
        cost: what it took.
        runs: one for each seed.
    """

    method: str
    score: str
    outliers: str
    numbers: Mapping[str, Numbers]
    overall: Numbers
    accuracy: Mapping[str, float]
    cost: Cost
    runs: tuple[Run, ...]

    @property
    def label(self) -> str:
        """The method, marked where its training has seen outliers."""
        return self.method if self.outliers == "none" else f"{self.method} †"

    @property
    def untrained(self) -> bool:
        """Whether its run trained nothing, and tested a network as it was: a diagnostic, not a contender."""
        return self.cost.trained == 0


@dataclass(frozen=True)
class Comparison:
    """Entries whose numbers may stand side by side.

    Attributes:
        rule: what holds for all of them, in words.
        apart: why they are not in the first table, in words; empty for that one.
        sets: OOD set -> ``near`` or ``far``.
        entries: one for each setting and score.
    """

    rule: str
    apart: str
    sets: Mapping[str, str]
    entries: tuple[Entry, ...]

    @property
    def groups(self) -> dict[str, list[str]]:
        """``near`` and ``far``, as far as there are any -> their sets."""
        found = {group: [name for name, of in self.sets.items() if of == group] for group in ("near", "far")}
        return {group: members for group, members in found.items() if members}

    @property
    def columns(self) -> dict[str, str]:
        """Column -> heading: for each group its mean, then its sets where there are several."""
        found = {}
        for group, members in self.groups.items():
            several = len(members) > 1
            found[mean_of(group)] = f"{group}: mean of {len(members)}" if several else f"{group}: {members[0]}"
            found |= {name: name for name in members if several}
        return found

    @property
    def settings(self) -> dict[str, list[Entry]]:
        """Method, as entries are called -> its entries."""
        return {
            name: [e for e in self.entries if e.method == name]
            for name in dict.fromkeys(e.method for e in self.entries)
        }

    @property
    def from_shared_weights(self) -> list[str]:
        """Methods of several seeds that all start from the same weights."""
        found = []
        for name, entries in self.settings.items():
            starts = [run.record.get("weights") for run in entries[0].runs]
            if len(starts) > 1 and starts[0] and all(start == starts[0] for start in starts):
                found.append(name)
        return found

    @property
    def partial(self) -> bool:
        """Whether an entry lacks a mean, having been tested on some of the sets only."""
        return any(mean_of(group) not in entry.numbers for entry in self.entries for group in self.groups)

    def marks(self, column: str, metric: str) -> list[str]:
        """Mark, for each entry, the ``best`` number of a column, and as ``tied`` those whose interval meets its own.

        Those that trained nothing have no marks.
        """
        sign = -1 if metric in LOWER_IS_BETTER else 1
        spans = [
            _span(entry.numbers[column], metric, sign) if column in entry.numbers and not entry.untrained else None
            for entry in self.entries
        ]
        best = max((span for span in spans if span is not None), key=lambda span: span[1], default=None)
        if best is None:
            return [""] * len(spans)
        return ["" if span is None or span[2] < best[0] else "best" if span[1] == best[1] else "tied" for span in spans]


def mean_of(group: str) -> str:
    """Name the column of the mean over a group."""
    return f"{group} (mean)"


def compare(runs: Sequence[Run]) -> tuple[list[Comparison], dict[Path, str]]:
    """Divide runs into tables, that of most runs first; and say, for each run that cannot be in any, why."""
    problems: dict[Path, str] = {}
    tables: list[list[Run]] = []
    for run in runs:
        earliest = next(other for other in runs if other is run or _repeats(run, other))
        if run is not earliest:
            problems[run.folder] = f"it repeats {earliest.folder}: the same setting, and the same seed or weights"
            continue
        table = next((table for table in tables if all(_comparable(run, other) for other in table)), None)
        if table is None:
            tables.append([run])
        else:
            table.append(run)
    comparisons: list[Comparison] = []
    first: list[Run] = []
    for members in sorted(tables, key=len, reverse=True):
        first = first or members
        comparison, unfit = _tabulate(members, first)
        problems |= unfit
        comparisons.append(comparison)
    return comparisons, problems


def _repeats(run: Run, other: Run) -> bool:
    """Whether two runs are no two seeds of a setting."""
    here, there = run.results, other.results
    same = any(here.get(key) is not None and here[key] == there.get(key) for key in ("seed", "weights_sha256"))
    return same and setting_of(here) == setting_of(there) and _comparable(run, other)


def _comparable(run: Run, other: Run) -> bool:
    if describe(run.results) != describe(other.results):
        return False
    if run.results["splits"]["id"]["fingerprint"] != other.results["splits"]["id"]["fingerprint"]:
        return False
    there = _images(other)
    return all(images == there.get(name, images) for name, images in _images(run).items())


def _images(run: Run) -> dict[str, tuple[Any, ...]]:
    """Say what images each OOD set has, and how it counts."""
    splits = run.results["splits"]
    return {
        row["ood_set"]: (splits[row["ood_set"]]["fingerprint"], row["group"], row["id_count"], row["ood_count"])
        for row in run.results["rows"]
    }


def _tabulate(members: Sequence[Run], first: Sequence[Run]) -> tuple[Comparison, dict[Path, str]]:
    sets = {row["ood_set"]: row["group"] for run in members for row in run.results["rows"]}
    settings: dict[str, list[Run]] = {}
    for run in members:
        settings.setdefault(setting_of(run.results), []).append(run)
    names = _names(list(settings.values()))
    entries: list[Entry] = []
    problems: dict[Path, str] = {}
    for name, all_seeds in zip(names, settings.values(), strict=True):
        seeds, odd = _alike(all_seeds)
        problems |= {
            run.folder: f"it has other scores or OOD sets than {seeds[0].folder}, of its setting" for run in odd
        }
        (joined,) = over_seeds([{**run.results, "means": _means(run)} for run in seeds])
        entries += [_entry(name, score, joined, seeds, sets) for score in _scores(joined)]
    counts = {row["ood_set"]: row["ood_count"] for run in members for row in run.results["rows"]}
    shown = ", ".join(f"{name} ({count:,} images)" for name, count in counts.items())
    rule = f"{describe(members[0].results)}; OOD sets: {shown}"
    return Comparison(rule, _apart(members, first), sets, tuple(entries)), problems


def _alike(seeds: Sequence[Run]) -> tuple[list[Run], list[Run]]:
    """Part the seeds of a setting: most of them, whose rows are about the same, and the others."""
    kinds: dict[Any, list[Run]] = {}
    for run in seeds:
        about = [[row[key] for key in ("score", "ood_set", "group")] for row in run.results["rows"]]
        over = [[row[key] for key in ("score", "group", "sets")] for row in run.results["means"]]
        kinds.setdefault(json.dumps([about, over]), []).append(run)
    most = max(kinds.values(), key=len)
    return most, [run for run in seeds if run not in most]


def _entry(method: str, score: str, joined: Mapping[str, Any], seeds: Sequence[Run], sets: Mapping[str, str]) -> Entry:
    numbers = {row["ood_set"]: row for row in joined["rows"] if row["score"] == score}
    means = {row["group"]: row for row in joined["means"] if row["score"] == score}
    overall = means.pop("all")
    for group, mean in means.items():
        members = [name for name, of in sets.items() if of == group]
        if mean["sets"] == len(members):  # the mean of a single set is that set, bounds and all
            numbers[mean_of(group)] = mean if len(members) > 1 else numbers[members[0]]
    accuracy = {key: value for key in ("id_accuracy", "id_accuracy_std") if (value := joined.get(key)) is not None}
    cost = cost_of(seeds, score)
    return Entry(method, score, describe_outliers(joined), numbers, overall, accuracy, cost, tuple(seeds))


def _means(run: Run) -> list[Numbers]:
    """Return the means of a run over near, far and all sets."""
    overall = []
    for score in _scores(run.results):
        rows = [row for row in run.results["rows"] if row["score"] == score]
        numbers = {metric: float(np.mean([row[metric] for row in rows])) for metric in HEADLINE}
        overall.append({"score": score, "group": "all", "sets": len(rows), **numbers})
    return [*run.results["means"], *overall]


def _names(settings: Sequence[Sequence[Run]]) -> list[str]:
    """Call each setting by its method or, where that is not enough, by its experiment too, or by the run's name."""
    runs = [seeds[0].results for seeds in settings]
    methods = [run["method"] for run in runs]
    longer = [f"{run['method']} ({run['experiment']})" for run in runs]
    longest = [f"{run['method']} ({run['experiment']}/{run['name']})" for run in runs]
    choices = zip(methods, longer, longest, strict=True)
    return [
        short if methods.count(short) == 1 else middle if longer.count(middle) == 1 else long
        for short, middle, long in choices
    ]


def _apart(members: Sequence[Run], first: Sequence[Run]) -> str:
    """Say what keeps a table apart from the first one."""
    if members is first:
        return ""
    here, there = aspects(members[0].results), aspects(first[0].results)
    differing = [name for name in here if here[name] != there[name]]
    if not differing:
        others = {name: images for run in first for name, images in _images(run).items()}
        images = {name: images for run in members for name, images in _images(run).items()}
        changed = [name for name, value in images.items() if others.get(name, value) != value]
        differing = [f"images or group of {', '.join(changed)}"]
    return f"Not in table 1, for it has another: {'; '.join(differing)}."


def _scores(results: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(row["score"] for row in results["rows"]))


def _span(numbers: Numbers, metric: str, sign: int) -> tuple[float, float, float]:
    """Return lower end, value and upper end, where more is better: as far as seeds or test images let it vary."""
    value, std = numbers[metric], numbers.get(f"{metric}_std", 0.0)
    bounds = [numbers[end] for end in (f"{metric}_low", f"{metric}_high") if end in numbers]
    ends = [sign * end for end in (value - std, value + std, *bounds)]
    return min(ends), sign * value, max(ends)
