"""The verb ``report``: run folders, compared."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from pytorch_lightning.utilities import rank_zero_only

from backbones.weights import CHECKPOINTS
from experiments.reports.comparison import compare
from experiments.reports.page import to_html
from experiments.reports.published import beside
from experiments.reports.runs import find_runs
from experiments.reports.texts import print_console, to_csv, to_latex, to_markdown
from experiments.reports.trial import read_runs


def report(args: Sequence[str]) -> None:
    """``report [FOLDER...]``: compare runs, as a page, Markdown, LaTeX and CSV; default: all below checkpoints."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments report", description=report.__doc__, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="*", type=Path, metavar="FOLDER", help="a run folder, or a folder of them")
    parser.add_argument("--output", type=Path, help="where the files go; default: report, below checkpoints")
    options = parser.parse_args(args)
    write_report(options.folders or [CHECKPOINTS], options.output)


@rank_zero_only
def write_report(folders: Sequence[Path], output: Path | None = None) -> None:
    """Compare the runs at or below some folders: write ``report.html``, ``.md``, ``.tex``, ``.csv``, print the table.

    Of several processes the first does so.

    Raises:
        ValueError: there is nothing to compare; it says why. Or, once all is written, a folder that holds no run.
    """
    found = {folder: find_runs(folder) for folder in folders}
    runs, problems = read_runs(list(dict.fromkeys(path for paths in found.values() for path in paths)))
    problems |= {folder: "there is no run here" for folder, paths in found.items() if not paths}
    comparisons, unfit = compare(runs)
    problems |= unfit
    if not comparisons:
        reasons = "\n".join(f"  {folder}: {problem}" for folder, problem in problems.items())
        raise ValueError(f"there is nothing to compare; make a run first, for example with make demo\n{reasons}")
    published = beside(comparisons)
    output = output or CHECKPOINTS / "report"
    output.mkdir(parents=True, exist_ok=True)
    texts = {
        "report.md": to_markdown(comparisons, published, problems),
        "report.tex": to_latex(comparisons),
        "report.csv": to_csv(comparisons),
        "report.html": to_html(comparisons, published, problems),
    }
    for name, text in texts.items():
        unfinished = output / f"{name}.part"
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(output / name)
    print_console(comparisons, published, problems)
    print(f"{output}: {', '.join(texts)}")
    if empty := [str(folder) for folder, paths in found.items() if not paths]:
        raise ValueError(f"there is no run at or below {', '.join(empty)}; the report is about the others")
