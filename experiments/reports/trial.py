"""Each run is laid out alone before it stands beside others, so that a damaged one is told and spoils no report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from callbacks.tables import over_seeds
from experiments.reports.comparison import compare
from experiments.reports.page import to_html
from experiments.reports.published import beside
from experiments.reports.runs import Run, check_numbers, read_one
from experiments.reports.texts import to_csv, to_latex, to_markdown


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], dict[Path, str]]:
    """Read finished, evaluated runs; and say, for each other folder, why it is none."""
    runs, problems = [], {}
    for folder in folders:
        try:
            run = read_one(folder)
            try:
                check_numbers(run)
                _try(run)
            except Exception as error:  # what a damaged file holds can fail anywhere, in any way
                said = f"there is no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"its results.json or run.json is damaged: {said}") from error
            runs.append(run)
        except (ValueError, OSError) as error:
            problems[folder] = str(error)
    return runs, problems


def _try(run: Run) -> None:
    """Write everything but the pictures, of the run and a copy of it; raise whatever that raises."""
    over_seeds([run.results, run.results])
    comparisons, _ = compare([run, replace(run)])
    published = beside(comparisons)
    to_markdown(comparisons, published, {})
    to_latex(comparisons)
    to_csv(comparisons)
    to_html(comparisons, published, {}, pictured=False)
