"""Run folders as a report takes them in; what cannot be read is told, not fatal."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from callbacks.results import HEADLINE, read_results
from callbacks.run_record import read_run
from callbacks.tables import describe, setting_of

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


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], dict[Path, str]]:
    """Read finished, evaluated runs; and say, for each other folder, why it is none."""
    runs, problems = [], {}
    for folder in folders:
        try:
            runs.append(read_one(folder))
        except (ValueError, OSError) as error:
            problems[folder] = str(error)
    return runs, problems


def read_one(folder: Path) -> Run:
    """Read a run; ``ValueError`` or ``OSError`` where it is unfinished, not evaluated or damaged."""
    record = read_run(folder)
    status = record.get("status", "finished")  # a network that was given is evaluated without a record of training
    if status != "finished":
        raise ValueError(f"{folder} is not finished, its status is {status}")
    results = read_results(folder)
    try:
        _touch(results, record)
    except (KeyError, TypeError, AttributeError) as error:
        said = f"there is no {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"its results.json or run.json is damaged: {said}") from error
    return Run(folder, results, record)


def _touch(results: dict[str, Any], record: dict[str, Any]) -> None:
    """Read all that a report reads, so that what is missing is missed here."""
    describe(results)
    setting_of(results)
    for key in (
        "experiment",
        "name",
        "method",
        "seed",
        "id_accuracy",
        "outliers",
        "configuration",
        "num_classes",
        "weights_sha256",
    ):
        results[key]
    for row in results["rows"]:
        row["score"], row["group"], row["id_count"], row["ood_count"], results["splits"][row["ood_set"]]["fingerprint"]
    for row in results["means"]:
        row["score"], row["group"], row["sets"]
    for row in [*results["rows"], *results["means"]]:
        for metric in HEADLINE:
            row[metric] + 0.0
    if results["outliers"] is not None:
        "{size}{source}{feed}".format_map(results["outliers"])
    for file in {**record.get("weights", {}), **results.get("weights", {})}.values():
        file.get("source")
    for number in [record.get("seconds"), *results.get("milliseconds", {}).values()]:
        (number or 0) + 0.0


def _no_run(part: str) -> bool:
    return part in NO_RUNS or part.endswith(".replaced")
