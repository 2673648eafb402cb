"""Comparisons on a console, as Markdown, as LaTeX; and all their numbers as CSV."""

import csv
import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from callbacks.results import HEADLINE, columns_of
from experiments.reports.comparison import Comparison
from experiments.reports.published import Beside
from experiments.reports.sheets import LEGEND, METRICS, OUTLIERS, Sheet, beside_sheet, notes, sheets


def print_console(comparisons: Sequence[Comparison], beside: Sequence[Beside], problems: Mapping[Path, str]) -> None:
    """Print all tables, and what is in none."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    say = {"highlight": False, "markup": False, "soft_wrap": True}
    for index, comparison in enumerate(comparisons, 1):
        for sheet in sheets(comparison):
            _print_sheet(console, sheet._replace(title=f"Table {index}: {sheet.title}"))
        for note in notes(comparison):
            console.print(note, **say)  # type: ignore[arg-type]
    console.print(LEGEND.format(tied="≈"), **say)  # type: ignore[arg-type]
    if beside:
        _print_sheet(console, beside_sheet(beside))
        for line in beside:
            console.print(f"{line.name}: {line.differences}", **say)  # type: ignore[arg-type]
    for folder, problem in problems.items():
        console.print(f"not in the tables: {folder}: {problem}", **say)  # type: ignore[arg-type]


def _print_sheet(console: Console, sheet: Sheet) -> None:
    table = Table(title=sheet.title)
    for i, heading in enumerate(sheet.header):
        table.add_column(
            escape(heading), justify="left" if i < sheet.names else "right", overflow="fold", no_wrap=i < 2
        )
    marked = {"best": "[bold]{}[/bold]", "tied": "≈ {}", "": "{}"}
    for row, first in zip(sheet.rows, _firsts(sheet), strict=True):
        cells = [marked[cell.mark].format(escape(cell.text)) for cell in row]
        table.add_row(cells[0] if first else "", *cells[1:])
    console.print(table)


def _firsts(sheet: Sheet) -> list[bool]:
    """Tell, for each row, whether it is the first of its method."""
    names = [row[0].text for row in sheet.rows]
    return [i == 0 or names[i - 1] != name for i, name in enumerate(names)]


def to_markdown(comparisons: Sequence[Comparison], beside: Sequence[Beside], problems: Mapping[Path, str]) -> str:
    """Write all tables, and what is in none, as Markdown."""
    parts = ["# Out-of-distribution detection: a comparison", LEGEND.format(tied="italic")]
    for index, comparison in enumerate(comparisons, 1):
        parts += [f"## Table {index}", *map(_markdown, notes(comparison))]
        for sheet in sheets(comparison):
            parts += [f"### {sheet.title}", _markdown_sheet(sheet)]
    if beside:
        parts += ["## Published and ours", _markdown_sheet(beside_sheet(beside))]
        parts += ["\n".join(f"- {_markdown(f'{line.name}: {line.differences} {line.source}')}" for line in beside)]
    if problems:
        listed = "\n".join(f"- {_markdown(f'{folder}: {problem}')}" for folder, problem in problems.items())
        parts += ["## Not in the tables", listed]
    return "\n\n".join(parts) + "\n"


def _markdown_sheet(sheet: Sheet) -> str:
    marked = {"best": "**{}**", "tied": "*{}*", "": "{}"}
    lines = [[_markdown(heading) for heading in sheet.header]]
    lines += [["---" if i < sheet.names else "---:" for i in range(len(sheet.header))]]
    lines += [[marked[cell.mark].format(_markdown(cell.text)) for cell in row] for row in sheet.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _markdown(text: str) -> str:
    return re.sub(r"([\\`*_{}<>|#\[\]])", r"\\\1", text.replace("\n", " "))


def to_latex(comparisons: Sequence[Comparison]) -> str:
    """Write all tables as LaTeX, to be put into a document by ``\\input``."""
    parts = ["% \\usepackage{booktabs,graphicx}"]
    for index, comparison in enumerate(comparisons, 1):
        *rules, times = notes(comparison)
        for sheet in sheets(comparison):
            said = (
                [*rules, LEGEND.format(tied="underlined")]
                if sheet.title in METRICS.values()
                else [*rules, times, OUTLIERS]
            )
            caption = _latex(" ".join([f"{sheet.title}.", *said]))
            parts.append(_latex_sheet(sheet, caption, f"tab:ood-{index}-{re.split('[, ]', sheet.title)[0].lower()}"))
    return "\n\n".join(parts) + "\n"


def _latex_sheet(sheet: Sheet, caption: str, label: str) -> str:
    marked = {"best": "\\textbf{{{}}}", "tied": "\\underline{{{}}}", "": "{}"}
    columns = "l" * sheet.names + "r" * (len(sheet.header) - sheet.names)
    lines: list[str] = []
    for row, first in zip(sheet.rows, _firsts(sheet), strict=True):
        if first and lines:
            lines.append("\\addlinespace")
        cells = []
        for cell in row:
            value, interval = re.fullmatch(r"(.*?)( ?\[.*\])?", cell.text, re.DOTALL).groups()  # type: ignore[union-attr]
            interval = f"\\,{{\\tiny {interval.strip()}}}" if interval else ""
            cells.append(marked[cell.mark].format(_latex(value)) + interval)
        lines.append(" & ".join([cells[0] if first else "", *cells[1:]]) + " \\\\")
    return "\n".join(
        [
            "\\begin{table}[tbp]",
            "\\centering",
            f"\\caption{{{caption}}}",
            f"\\label{{{label}}}",
            "\\medskip",
            "\\resizebox{\\ifdim\\width>\\linewidth\\linewidth\\else\\width\\fi}{!}{%",
            f"\\begin{{tabular}}{{{columns}}}",
            "\\toprule",
            " & ".join(map(_latex, sheet.header)) + " \\\\",
            "\\midrule",
            *lines,
            "\\bottomrule",
            "\\end{tabular}}",
            "\\end{table}",
        ]
    )


LATEX = {
    "\\": "\\textbackslash{}",
    "~": "\\textasciitilde{}",
    "^": "\\textasciicircum{}",
    "±": "$\\pm$",
    "†": "$\\dagger$",
}
LATEX |= {"≥": "$\\geq$", "–": "--", "<": "$<$", ">": "$>$", "|": "$|$"} | {sign: f"\\{sign}" for sign in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(LATEX.get(sign, sign) for sign in text.replace("\n", " "))


def to_csv(comparisons: Sequence[Comparison]) -> str:
    """Write a line for each table, setting, score and OOD set or mean over sets; metrics are fractions."""
    rows = [
        {"table": index, "experiment": entry.runs[0].results["experiment"], "method": entry.method}
        | {"score": entry.score, "outliers": entry.outliers, "seeds": len(entry.runs)}
        | {"ood_set": column, "group": comparison.sets.get(column) or column.removesuffix(" (mean)")}
        | {key: numbers[key] for metric in HEADLINE for key in _keys(metric) if key in numbers}
        | dict(entry.accuracy)
        | vars(entry.cost)
        | {"rule": comparison.rule}
        for index, comparison in enumerate(comparisons, 1)
        for entry in comparison.entries
        for column, numbers in entry.numbers.items()
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, columns_of(rows), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _keys(metric: str) -> list[str]:
    return [metric, *(f"{metric}_{end}" for end in ("std", "low", "high"))]
