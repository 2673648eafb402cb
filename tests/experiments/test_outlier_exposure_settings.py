"""The published settings of outlier exposure, written out here once more; each form takes two steps of an iteration."""

import math
from inspect import Parameter, signature
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from callbacks.outlier_selection import OutlierSelection
from datamodules.outliers import OutlierPool
from experiments.cli import OODCLI
from lightning_modules.doe import DOE
from lightning_modules.losses.outlier_exposure import EnergyMargins, UniformTarget
from lightning_modules.outlier_exposure import OutlierExposure
from lightning_modules.samplers.thompson import ThompsonSampling

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
FORMS = ("oe", "energy", "poem", "doe")
MARGINS = "lightning_modules.losses.outlier_exposure.EnergyMargins"
SELECTION = {"class_path": "callbacks.outlier_selection.OutlierSelection"}
SCORES = {
    "msp": "lightning_modules.scores.logits.MSP",
    "energy": "lightning_modules.scores.logits.Energy",
    "odin": "lightning_modules.scores.odin.ODIN",
    "mahalanobis": {
        "class_path": "lightning_modules.scores.layered_mahalanobis.LayeredMahalanobis",
        "init_args": {"taps": ["stem", "layer1", "layer2", "penultimate"]},
    },
}
OWN = {  # what a form adds to the options of the model
    "oe": {},
    "energy": {"outlier_loss": MARGINS},
    "poem": {"outlier_loss": MARGINS},
    "doe": {},
}


def read(name):
    return yaml.safe_load((EXPERIMENTS / "outlier_exposure" / f"{name}.yaml").read_text())


def defaults(kind):
    """The options that have a default, and what it is."""
    parameters = signature(kind).parameters.items()
    return {name: value.default for name, value in parameters if value.default is not Parameter.empty}


def test_defaults_are_the_published_numbers():
    assert defaults(UniformTarget) == {"weight": 0.5}
    assert defaults(EnergyMargins) == {"m_in": -25.0, "m_out": -7.0, "weight": 0.1}
    common = {"lr_scheduler": None, "lr_interval": "epoch", "floor": 0.0, "estimate": None}
    assert defaults(OutlierExposure) == common | {"outlier_loss": None}
    strengths = (1e-1, 1e-2, 1e-3, 1e-4)
    assert defaults(DOE) == common | {"warmup": 5, "strengths": strengths, "direction": "official"}
    assert defaults(OutlierSelection) == {"count": None, "sampling": None, "remembered": 4}
    variances = {"prior_variance": 20.0, "noise_variance": 0.5, "covariance_scale": None}
    assert defaults(ThompsonSampling) == {"confidence": 3.9} | variances
    assert ThompsonSampling().covariance_scale == 20


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("version", [10, 100])
def test_a_setting_is_the_published_one(version, form):
    recipe = read(f"cifar{version}_{form}")
    assert recipe.keys() == {"model", "data", "trainer", "evaluation"}
    kind = "doe.DOE" if form == "doe" else "outlier_exposure.OutlierExposure"
    assert recipe["model"]["class_path"] == f"lightning_modules.{kind}"

    classifier = yaml.safe_load((EXPERIMENTS / "classifier" / f"cifar{version}_densenet.yaml").read_text())
    trained = classifier["model"]["init_args"]["backbone"]
    assert trained["init_args"]["affine"] is False
    backbone = {
        "class_path": "backbones.densenet.DenseNet",
        "init_args": trained["init_args"] | {"weights": f"run:classifier/cifar{version}_densenet@last"},
    }
    assert recipe["model"]["init_args"] == {
        "backbone": backbone,
        "optimizer": {
            "class_path": "torch.optim.SGD",
            "init_args": {"lr": 0.01, "momentum": 0.9, "weight_decay": 1e-4},
        },
        "lr_scheduler": {
            "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
            "init_args": {"T_max": 10},
        },
        **OWN[form],
    }
    pool = OutlierPool("imagenet64", pool=400_000, crop_padding=4)
    assert OutlierPool(**recipe["data"]["init_args"].pop("outliers")) == pool
    assert recipe["data"]["init_args"].pop("num_outliers", None) == (None if form == "poem" else 50_000)
    assert recipe["data"] == {
        "class_path": "datamodules.public.CIFAR",
        "init_args": {
            "version": version,
            "protocol": "unleashing_mask",
            "augmentation": "protocol",
            "outlier_feed": "paired",
            "batch_size": 256,
            "drop_last": False,
            "val_split": 0.02,
        },
    }
    assert recipe["trainer"] == {"max_epochs": 10} | ({"callbacks+": [SELECTION]} if form == "poem" else {})
    assert recipe["evaluation"] == {"rules": "unleashing_mask", "scores": SCORES}


def test_the_rate_of_the_last_epoch():
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.01)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx([0.005 * (1 + math.cos(math.pi * epoch / 10)) for epoch in range(10)], abs=1e-9)
    assert rates[9] == pytest.approx(2.447e-4, rel=1e-3)


def shrink(recipe, folder, pool=40):
    """Put noise in place of images, and a shallow DenseNet, or an untrained network, in place of the trained one."""
    backbone = recipe["model"]["init_args"]["backbone"]["init_args"]
    backbone |= {"weights": None, "num_classes": 6}
    shape = (8, 8, 1)
    if "dropout" in backbone:
        backbone |= {"depth": 10, "input_shape": [3, 16, 16]}
        shape = (16, 16, 3)
    random = np.random.default_rng(0)
    for name, number in (("train", 24), ("outliers", pool)):
        images = random.integers(0, 256, (number, *shape), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(number) % 6)
    given = recipe["data"]["init_args"]
    kept = {key: given[key] for key in ("outlier_feed", "drop_last") if key in given}
    constants = {} if "mean" in backbone else {"mean": [0.5], "std": [0.5]}
    train = str(folder / "train.npz")
    files = {"train": train, "test": train, "outliers": {"path": str(folder / "outliers.npz")}}
    recipe["data"] = {
        "class_path": "datamodules.arrays.Arrays",
        "init_args": files | {"batch_size": 8} | kept | constants,
    }
    for callback in recipe["trainer"].get("callbacks+", []):
        callback["init_args"] = {"count": 20}
    return recipe


ALL = [f"{data}_{form}" for data in ("cifar10", "cifar100", "digits") for form in FORMS]


@pytest.mark.parametrize(
    "name", [name if name.startswith("cifar10_") else pytest.param(name, marks=pytest.mark.slow) for name in ALL]
)
def test_a_setting_trains(name, checkpoints, tmp_path):
    recipe = shrink(read(name), tmp_path)
    (tmp_path / "outlier_exposure").mkdir()
    path = tmp_path / "outlier_exposure" / "small.yaml"
    path.write_text(yaml.safe_dump(recipe))
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.fast_dev_run", "2"]
    cli = OODCLI(["fit", "--config", str(path), *quick, "--trainer.enable_model_summary", "false"])
    assert cli.trainer.global_step == 2
    assert cli.model.floor == 0
    assert all(
        weight.isfinite().all() and weight in cli.trainer.optimizers[0].state for weight in cli.model.parameters()
    )
    chosen = [callback.chosen for callback in cli.trainer.callbacks if isinstance(callback, OutlierSelection)]
    assert [len(rows[0]) for rows in chosen] == ([20] if name.endswith("poem") else [])


def test_every_setting_is_tested():
    there = {path.stem for path in (EXPERIMENTS / "outlier_exposure").glob("[!_]*.yaml")}
    assert there == set(ALL)
