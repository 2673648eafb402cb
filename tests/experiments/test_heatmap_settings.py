"""The published settings of the heatmap decoder, written out here once more; each takes two steps."""

from inspect import Parameter, signature
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from backbones.heatmap_decoder import HeatmapDecoder
from callbacks.pairing import Pairing
from datamodules.outliers import OutlierPool
from datamodules.protocols import PROTOCOLS
from experiments.cli import OODCLI
from lightning_modules.heatmap import Heatmap
from lightning_modules.losses.target_image import WEIGHT

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
RESNET, WRN, TINY = [512, 256, 128, 64], [256, 128, 64, 32], [2048, 1024, 512, 256, 128]
CIFAR = {"outliers": "random_images", "num_outliers": 10_000}
TABLE = {  # D, K, C0, blocks; outliers; ID training images, steps of an epoch
    "cifar10_resnet18": (512, 10, 100, RESNET, CIFAR, 50_000, 300),
    "cifar100_resnet18": (512, 100, 512, RESNET, CIFAR, 50_000, 300),
    "cifar10_wrn40_2": (128, 10, 128, WRN, CIFAR, 50_000, 300),
    "cifar100_wrn40_2": (128, 100, 128, WRN, CIFAR, 50_000, 300),
    "tinyimagenet_resnet50": (
        2048,
        200,
        512,
        TINY,
        {"outliers": "places365_train", "num_outliers": 20_000},
        100_000,
        600,
    ),
}
OPTIMIZER = {"class_path": "torch.optim.Adam", "init_args": {"lr": 2e-4, "betas": [0.5, 0.999]}}
CALLBACKS = [
    {"class_path": "callbacks.frozen_features.FrozenFeatures"},
    {"class_path": "callbacks.pairing.Pairing"},
]


def read(method, name):
    return yaml.safe_load((EXPERIMENTS / method / f"{name}.yaml").read_text())


def defaults(kind):
    """The options that have a default, and what it is."""
    parameters = signature(kind).parameters.items()
    return {name: value.default for name, value in parameters if value.default is not Parameter.empty}


def test_defaults_are_the_published_numbers():
    common = {"lr_scheduler": None, "lr_interval": "epoch"}
    assert defaults(Heatmap) == common | {"feature_norm": "minmax", "fw_layers": 1}
    assert defaults(Pairing) == {"pairing": "nearest"}
    assert defaults(HeatmapDecoder) == {"channels": 3, "weights": None}
    assert WEIGHT == 5


@pytest.mark.parametrize("name", TABLE)
def test_a_setting_is_the_published_one(name):
    features, classes, hidden, widths, outliers, known, steps = TABLE[name]
    recipe, classifier = read("heatmap", name), read("classifier", name)
    assert recipe.keys() == {"model", "data", "trainer", "evaluation"}
    trained = classifier["model"]["init_args"]["backbone"]
    weights = {"weights": f"run:classifier/{name}"}  # the best on held-out images
    assert recipe["model"] == {
        "class_path": "lightning_modules.heatmap.Heatmap",
        "init_args": {
            "backbone": trained | {"init_args": trained["init_args"] | weights},
            "decoder": {"num_features": features, "num_classes": classes, "hidden": hidden, "widths": widths},
            "optimizer": OPTIMIZER,
        },
    }
    tiny = name.startswith("tiny")
    given = recipe["data"]["init_args"]
    assert OutlierPool(**given.pop("outliers")) == OutlierPool(outliers["outliers"])
    assert recipe["data"] == {
        "class_path": f"datamodules.public.{'TinyImageNet' if tiny else 'CIFAR'}",
        "init_args": ({} if tiny else {"version": classes})
        | {
            "protocol": "heatmap",
            "num_outliers": outliers["num_outliers"],
            "outlier_feed": "mixed",
            "batch_size": 200,
            "drop_last": False,
        },
    }
    assert -(-(known + given["num_outliers"]) // given["batch_size"]) == steps
    assert recipe["trainer"] == {"max_epochs": 150, "callbacks+": CALLBACKS}
    assert recipe["evaluation"] == {
        "rules": "heatmap",
        "scores": {
            "msp": "lightning_modules.scores.logits.MSP",
            "energy": "lightning_modules.scores.logits.Energy",
        },
    }


@pytest.mark.parametrize("data", ["cifar10", "cifar100", "tiny_imagenet"])
def test_the_protocol_tests_on_a_fifth_as_many_images_of_sets_that_are_no_outliers(data):
    rules = PROTOCOLS["heatmap", data]
    sets = {
        "cifar10": {"isun", "textures", "svhn", "places365", "lsun_crop", "lsun_resize"},
        "tiny_imagenet": {"textures", "inaturalist", "sun"},
    }
    assert set(rules.ood) == sets.get(data, sets["cifar10"])
    assert (rules.mean, rules.std) == ((0.5,), (0.5,))
    for number in (10_000, 9_999, 7):
        assert rules.ood_subset.resolve(number).count == max(1, number // 5)
    assert {"random_images", "places365_train"}.isdisjoint(rules.ood)


def test_the_digits_have_what_the_published_settings_have():
    recipe, classifier = read("heatmap", "digits"), read("classifier", "digits")
    assert recipe["model"]["init_args"]["backbone"]["init_args"]["weights"] == "run:classifier/digits"
    assert classifier["model"]["init_args"]["backbone"] == "../_backbones/digits_net.yaml"
    assert recipe["model"]["init_args"]["optimizer"]["init_args"]["betas"] == [0.5, 0.999]
    assert recipe["trainer"]["callbacks+"] == CALLBACKS
    assert recipe["data"]["init_args"]["outlier_feed"] == "mixed"
    assert recipe["data"]["init_args"]["mean"] == recipe["data"]["init_args"]["std"] == [0.5]


def shrink(recipe, folder):
    """Put noise in place of images, and an untrained network in place of the trained one."""
    backbone = recipe["model"]["init_args"]["backbone"]["init_args"]
    backbone["weights"] = None
    channels, height, width = backbone.get("input_shape", (3, 32, 32))
    random = np.random.default_rng(0)
    for name, number in (("train", backbone["num_classes"]), ("outliers", 9)):
        images = random.integers(0, 256, (number, height, width, channels), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(number))
    train = str(folder / "train.npz")
    kept = {key: recipe["data"]["init_args"][key] for key in ("outlier_feed", "drop_last")}
    files = {"train": train, "test": train, "outliers": {"path": str(folder / "outliers.npz")}, "num_outliers": 6}
    recipe["data"] = {
        "class_path": "datamodules.arrays.Arrays",
        "init_args": files | kept | {"batch_size": 6, "mean": [0.5], "std": [0.5]},
    }
    return recipe


@pytest.mark.parametrize(
    "name", [name if name == "cifar10_wrn40_2" else pytest.param(name, marks=pytest.mark.slow) for name in TABLE]
)
def test_a_setting_trains(name, checkpoints, tmp_path):
    path = tmp_path / "heatmap" / "small.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(shrink(read("heatmap", name), tmp_path)))
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.fast_dev_run", "2"]
    cli = OODCLI(["fit", "--config", str(path), *quick, "--trainer.enable_model_summary", "false"])
    assert cli.trainer.global_step == 2
    assert cli.datamodule.sizes["outliers"] == 6
    (optimizer,) = cli.trainer.optimizers
    assert set(optimizer.state) == set(cli.model.decoder.parameters())
    assert all(parameter.isfinite().all() for parameter in cli.model.parameters())
    assert not any(part.training for part in cli.model.backbone.modules())
    (pairing,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Pairing))
    assert len(pairing.partners) == 6
    assert cli.model.minmax.high > 0
    with torch.no_grad():
        evidence = cli.model.eval()(torch.zeros(2, *cli.model.backbone.input_shape))
    assert evidence.maps.shape == (2, *cli.model.backbone.input_shape)


def test_every_setting_is_tested():
    there = {path.stem for path in (EXPERIMENTS / "heatmap").glob("[!_]*.yaml")}
    assert there - {name for name in there if name.endswith("_fast")} == {*TABLE, "digits"}
