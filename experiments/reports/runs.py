"""Run folders as a report takes them in; what cannot be read is told, not fatal."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.results import HEADLINE, read_results
from callbacks.run_record import read_run

NO_RUNS = ("stages", "features", "fast_dev_run")  # folders below which other things lie


@dataclass(frozen=True)
class Run:
    """An evaluated run.

    Attributes:
        folder: where it lies.
        results: its ``results.json``.
        record: its ``run.json``; empty where nothing was trained.
    """

    folder: Path
    results: dict[str, Any]
    record: dict[str, Any]


def find_runs(folder: Path) -> list[Path]:
    """List the run folders at or below a folder, in order: those that hold ``results.json`` or ``run.json``."""
    found = {path.parent for name in ("results.json", "run.json") for path in folder.rglob(name)}
    return sorted(path for path in found if not any(map(_no_run, path.relative_to(folder).parts)))


def read_one(folder: Path) -> Run:
    """Read a run; ``ValueError`` or ``OSError`` where it is unfinished, not evaluated, or damaged."""
    record = read_run(folder)
    status = record.get("status", "finished")  # a network that was given is evaluated without a record of training
    if status != "finished":
        raise ValueError(f"{folder} is not finished, its status is {status}")
    return Run(folder, read_results(folder), record)


def check_numbers(run: Run) -> None:
    """Raise a ``ValueError`` where there are no rows, or what should be a number is none, or not finite."""
    if not run.results["rows"]:
        raise ValueError("it has no rows")
    for kind in ("rows", "means"):
        for row in run.results[kind]:
            _check(row, kind)
    for file in (run.results, run.record):
        _finite({key: value for key, value in file.items() if key != "configuration"}, "")


def _check(row: dict[str, Any], kind: str) -> None:
    if row["group"] not in ("near", "far"):
        raise ValueError(f"{kind}: {row['group']!r} is neither near nor far")
    for metric in HEADLINE:
        ends = [f"{metric}_{end}" for end in ("low", "high") if f"{metric}_{end}" in row]
        if len(ends) == 1:
            raise ValueError(f"{kind}: there is {ends[0]}, but not the other bound")
        for key in [metric, *ends, *[f"{metric}_std"] * (f"{metric}_std" in row)]:
            if isinstance(row[key], bool) or not isinstance(row[key], int | float):
                raise ValueError(f"{kind}: {key} is {row[key]!r}, no number")


def _finite(tree: Any, path: str) -> None:
    """Raise a ``ValueError`` where there is a NaN or an infinity, which we never write."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            _finite(value, f"{path}.{key}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            _finite(value, path)
    elif isinstance(tree, float) and not math.isfinite(tree):
        raise ValueError(f"{path} is {tree}, no finite number")


def _no_run(part: str) -> bool:
    return part in NO_RUNS or part.endswith(".replaced")
