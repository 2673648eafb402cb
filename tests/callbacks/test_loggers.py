import csv

from callbacks.loggers import MetricsCSV


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_second_logger_continues_the_file_of_the_first(tmp_path):
    first = MetricsCSV(str(tmp_path))
    first.log_metrics({"train/loss": 1.5}, step=3)
    first.save()
    second = MetricsCSV(str(tmp_path))
    second.log_metrics({"val/accuracy": 0.5}, step=4)
    second.save()
    assert rows(tmp_path) == [
        {"step": "3", "train/loss": "1.5", "val/accuracy": ""},
        {"step": "4", "train/loss": "", "val/accuracy": "0.5"},
    ]


def test_a_logger_that_logs_nothing_loses_nothing(tmp_path):
    first = MetricsCSV(str(tmp_path))
    first.log_metrics({"train/loss": 1.5}, step=3)
    first.save()
    second = MetricsCSV(str(tmp_path))
    second.experiment  # noqa: B018
    second.finalize("success")
    assert [row["train/loss"] for row in rows(tmp_path)] == ["1.5"]
