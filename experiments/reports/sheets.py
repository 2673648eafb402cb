"""A comparison as sheets of text, for whatever is to be printed or written."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from callbacks.tables import percent
from experiments.reports.comparison import Comparison, Entry
from experiments.reports.published import Beside

METRICS = {"auroc": "AUROC, % (higher is better)", "fpr95": "FPR95, % (lower is better)"}
OUTLIERS = "† trained with outliers."
LEGEND = (
    "One seed: [bounds] of a bootstrap over the test images; several: mean ± standard deviation over the seeds. "
    "Best of a column: bold. Tied with it, for their intervals meet, over seeds or of the bootstrap: {tied}. "
) + OUTLIERS
UNKNOWN = "–"


class Cell(NamedTuple):
    """A text, and whether it is the ``best`` of its column, or ``tied`` with it."""

    text: str
    mark: str = ""


class Sheet(NamedTuple):
    """A table of text; the first ``names`` columns name the line, the others hold numbers."""

    title: str
    header: list[str]
    rows: list[list[Cell]]
    names: int = 2


def sheets(comparison: Comparison) -> list[Sheet]:
    """Lay out a comparison: a sheet for each metric, and one of accuracy and cost."""
    columns = comparison.columns
    found = []
    for metric, title in METRICS.items():
        marks = {column: comparison.marks(column, metric) for column in columns}
        rows = [
            [Cell(entry.label), Cell(entry.score)]
            + [Cell(number(entry, column, metric), marks[column][i]) for column in columns]
            for i, entry in enumerate(comparison.entries)
        ]
        found.append(Sheet(title, ["method", "score", *columns.values()], rows))
    header = ["method", "score", "outliers", "seeds", "ID accuracy, %"]
    header += ["parameters", "of these trained", "seconds to fit", "ms per image"]
    rows = [[Cell(entry.label), Cell(entry.score), *map(Cell, costs(entry))] for entry in comparison.entries]
    return [*found, Sheet("ID accuracy and cost", header, rows, names=3)]


def number(entry: Entry, column: str, metric: str) -> str:
    """Write a number of an entry in percent, with its interval."""
    return percent(entry.numbers[column], metric) if column in entry.numbers else UNKNOWN


def costs(entry: Entry) -> list[str]:
    """Write outliers, number of seeds, ID accuracy, parameters, trained parameters, seconds and milliseconds."""
    cost = entry.cost
    seconds = UNKNOWN if cost.seconds is None else f"{cost.seconds:,.1f}"
    return [
        entry.outliers,
        str(len(entry.runs)),
        percent(entry.accuracy, "id_accuracy") if entry.accuracy else "no classes",
        UNKNOWN if cost.parameters is None else f"{cost.parameters:,}",
        UNKNOWN if cost.trained is None else f"{cost.trained:,}",
        f"≥ {seconds}" if cost.at_least else seconds,
        UNKNOWN if cost.milliseconds is None else f"{cost.milliseconds:.3g}",
    ]


def notes(comparison: Comparison) -> list[str]:
    """Say what a reader of a table must know of it."""
    said = [comparison.apart, f"{comparison.rule}."]
    if comparison.partial:
        said.append(f"{UNKNOWN} in place of a mean: the method was not tested on all sets of the group.")
    if names := list(dict.fromkeys(entry.method for entry in comparison.entries if entry.untrained)):
        said.append(
            f"Nothing trained in {', '.join(names)}: the numbers are those of the network as it was, and not compared."
        )
    if shared := comparison.from_shared_weights:
        said.append(f"The seeds of {', '.join(shared)} start from the same weights, so ± leaves out how these vary.")
    machines = {
        machine for entry in comparison.entries for run in entry.runs for machine in hardware(run.results, run.record)
    }
    said.append(
        "Seconds to fit are those of the run alone, without the training of weights that it starts from; milliseconds "
        f"are those of network and score in a batch. Times were taken on: {', '.join(sorted(machines)) or 'unknown'}."
    )
    return [text for text in said if text]


def hardware(*records: Mapping[str, Any]) -> list[str]:
    """Name what computed, as the records of a run say."""
    return [record["hardware"] for record in records if record.get("hardware")]


def beside_sheet(beside: Sequence[Beside]) -> Sheet:
    """Lay out published numbers beside ours."""
    rows = [
        [Cell(line.name), Cell(line.ours), *(Cell(text) for pair in line.values.values() for text in pair)]
        for line in beside
    ]
    metrics = [heading for metric in beside[0].values for heading in (f"{metric}, published", "ours")]
    return Sheet("Published, mean (standard deviation), and ours, %", ["published as", "our run", *metrics], rows)
