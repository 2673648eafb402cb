"""Loggers that a run folder needs beside Lightning's own."""

import csv
import warnings
from pathlib import Path

from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter


class MetricsCSV(CSVLogger):
    """Writes ``metrics.csv`` into the run folder and continues one that is there: Lightning's own deletes it.

    Args:
        save_dir: the run folder; None = given by the command line.
    """

    def __init__(self, save_dir: str | None = None) -> None:
        super().__init__(save_dir or ".", name="", version="")

    def forget(self, step: int) -> None:
        """Drop the rows from ``step`` on: a run that continues there writes them again."""
        writer = self.experiment
        writer.metrics = [row for row in writer.metrics if int(row["step"]) < step]

    @property
    def experiment(self) -> ExperimentWriter:
        """The writer, holding the rows of an earlier start of the same run."""
        if self._experiment is None:
            path = Path(self.log_dir) / ExperimentWriter.NAME_METRICS_FILE
            rows: list[dict[str, str]] = []
            if path.is_file():
                with path.open(newline="", encoding="utf-8") as file:
                    rows = list(csv.DictReader(file))
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Experiment logs directory .* exists and is not empty")
                writer = super().experiment
            writer.metrics = rows
        return super().experiment
