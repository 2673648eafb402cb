"""Published numbers beside ours, and what is different in ours."""

import json

import pytest
import yaml
from report_toy import edit, gather

from experiments.__main__ import main
from experiments.cli import EXPERIMENTS
from experiments.reports.published import PUBLISHED, beside, departures


def test_published_numbers_stand_beside_the_runs_that_reproduce_them(write, checkpoints, capsys):
    write("outlier_exposure/cifar10_oe/seed0", model={"init_args": {"floor": 0}})
    write("outlier_exposure/cifar10_oe/floor", method="Floor", model={"init_args": {"floor": "auto"}})
    write("toy/a/seed0", method="Toy2")
    comparisons, _ = gather(checkpoints)
    lines = beside(comparisons)
    assert [(line.name, line.ours) for line in lines] == [
        ("OE", "outlier_exposure/cifar10_oe, energy"),
        ("OE+UM", "outlier_exposure/cifar10_oe, energy"),
    ]
    assert lines[0].values["FPR95"][0] == "13.80 (0.28)"
    assert "the metrics as default, the source as unleashing_mask" in lines[0].differences
    assert "data.class_path is datamodules.arrays.Arrays, not datamodules.public.CIFAR" in lines[0].differences
    assert main(["report"]) == 0
    assert "97.07 (0.01)" in capsys.readouterr().out
    for kind in ("html", "md"):
        assert "97.07 (0.01)" in (checkpoints / "report" / f"report.{kind}").read_text()


README_OF_THE_SOURCE = """
Energy 92.07 0.22 92.72 0.39 42.69 1.31 94.01 0.08
Energy+UM 93.73 0.36 94.27 0.60 33.29 1.70 92.80 0.47
OE 97.07 0.01 97.31 0.05 13.80 0.28 92.59 0.32
OE+UM 97.60 0.03 97.87 0.02 11.22 0.16 93.66 0.12
"""  # AUROC, AUPR, FPR95, ID accuracy; mean, standard deviation


def test_published_rows_are_those_of_the_source_for_experiments_that_exist():
    rows = [line.split() for line in README_OF_THE_SOURCE.strip().splitlines()]
    assert [row.name for row in PUBLISHED] == [name for name, *_ in rows]
    for row, (_, *numbers) in zip(PUBLISHED, rows, strict=True):
        assert all((EXPERIMENTS / f"{name}.yaml").is_file() for name in row.experiments)
        assert list(row.values) == ["auroc", "aupr_in", "fpr95", "id_accuracy"]
        percents = [f"{100 * number:.2f}" for pair in row.values.values() for number in pair]
        assert percents == numbers


@pytest.fixture
def cifar10_oe():
    """As a run of outlier exposure records its configuration; weights and seeds may be anyone's."""
    stated = yaml.safe_load((EXPERIMENTS / "outlier_exposure" / "cifar10_oe.yaml").read_text())
    stated["model"]["init_args"]["floor"] = 0.0
    stated["model"]["init_args"]["optimizer"]["init_args"]["nesterov"] = False
    stated["model"]["init_args"]["backbone"]["init_args"]["weights"] = "run:mine/seed3"
    return stated


def test_what_a_run_has_other_than_its_experiment_is_named(cifar10_oe):
    assert departures(cifar10_oe, "outlier_exposure/cifar10_oe") == []
    model, data = (cifar10_oe[part]["init_args"] for part in ("model", "data"))
    model["backbone"]["class_path"] = "backbones.resnet.ResNet"
    model["optimizer"]["init_args"]["lr"] = 0.5
    data["num_outliers"], data["subset"] = 7, {"fraction": 0.5}
    cifar10_oe["trainer"]["max_epochs"] = 2
    assert departures(cifar10_oe, "outlier_exposure/cifar10_oe") == [
        "model.backbone.class_path is backbones.resnet.ResNet, not backbones.densenet.DenseNet",
        "model.optimizer.lr is 0.5, not 0.01",
        "data.num_outliers is 7, not 50000",
        "trainer.max_epochs is 2, not 10",
        "data.subset is {'fraction': 0.5}",
    ]


@pytest.mark.parametrize(
    "limits", [{"limit_train_batches": 3}, {"limit_test_batches": 0.5}, {"overfit_batches": 1}, {"max_steps": 5}, {}]
)
def test_a_run_cut_short_stands_beside_nothing(write, checkpoints, cifar10_oe, limits):
    folder = write("outlier_exposure/cifar10_oe/seed0", model=cifar10_oe["model"], truncated=not limits)
    configuration = json.loads((folder / "results.json").read_text())["configuration"]
    edit(folder, configuration=configuration | {"trainer": limits})
    assert beside(gather(checkpoints)[0]) == []
