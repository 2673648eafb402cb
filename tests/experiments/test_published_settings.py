"""The recipes say what the papers' methods say of their training, written out here once more."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
PLATEAU = ("ReduceLROnPlateau", {"monitor": "val/accuracy", "mode": "max", "factor": 0.1, "patience": 10})
HEATMAP = {"lr": 0.1, "momentum": 0.9, "weight_decay": 5e-4}
MASK = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
CUSTOMARY = {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4}
IN_NETWORK = {"mean": [125.3, 123.0, 113.9], "std": [63.0, 62.1, 66.7]}  # of 255


class Recipe(NamedTuple):
    network: tuple[str, dict[str, Any]]
    sgd: dict[str, Any]
    schedule: tuple[str, dict[str, Any]]
    epochs: int
    data: dict[str, Any]
    keep: int | None = None


def heatmap(network, version=10, epochs=100, batch_size=200):
    data = {"protocol": "heatmap", "augmentation": "protocol", "batch_size": batch_size, "drop_last": False}
    data |= {"val_split": 0.01} | ({"version": version} if version else {})
    return Recipe(network, HEATMAP, PLATEAU, epochs, data)


def unleashing_mask(name, version, **options):
    data = {"version": version, "protocol": "unleashing_mask", "augmentation": "protocol", "batch_size": 256}
    data |= {"drop_last": False, "val_split": 0.02}
    network = (name, {"num_classes": version, "dropout": 0.3, "affine": False, **IN_NETWORK, **options})
    return Recipe(network, MASK, ("CosineAnnealingLR", {"T_max": 100}), 100, data, keep=5)


def latent_space(name, version, **options):
    data = {"version": version, "protocol": "variational_metric", "augmentation": "protocol", "batch_size": 128}
    network = (name, {"num_classes": version, **options})
    return Recipe(network, CUSTOMARY, ("CosineAnnealingLR", {"T_max": 200}), 200, data | {"val_split": 0.05})


def heat(version):
    data = {"version": version, "protocol": "heat", "batch_size": 128, "val_split": 0.0}
    data["augmentation"] = {"resized_crop": [0.08, 1.0], "flip": True}
    schedule = ("MultiStepLR", {"milestones": [100, 150], "gamma": 0.1})
    return Recipe(("ResNet", {"depth": 34, "num_classes": version}), CUSTOMARY, schedule, 200, data)


RECIPES = {
    "tinyimagenet_resnet50": heatmap(
        ("ResNet", {"depth": 50, "num_classes": 200, "input_shape": [3, 64, 64], "stem": "pooled"}), None, 200, 128
    ),
    "cifar100_densenet_affine": latent_space("DenseNet", 100),
    "cifar10_wrn28_10": latent_space("WideResNet", 10, depth=28, widen_factor=10, dropout=0.1),
}
for classes in (10, 100):
    RECIPES[f"cifar{classes}_resnet34"] = heat(classes)
    RECIPES[f"cifar{classes}_resnet18"] = heatmap(("ResNet", {"depth": 18, "num_classes": classes}), classes)
    RECIPES[f"cifar{classes}_wrn40_2"] = heatmap(("HeatmapWideResNet", {"num_classes": classes}), classes)
    RECIPES[f"cifar{classes}_densenet"] = unleashing_mask("DenseNet", classes)
    RECIPES[f"cifar{classes}_wrn40_4"] = unleashing_mask("WideResNet", classes, depth=40, widen_factor=4)


def name_and_options(entry):
    return entry["class_path"].rpartition(".")[2], entry["init_args"]


def test_every_recipe_of_a_paper_is_here():
    found = {path.stem for path in (EXPERIMENTS / "classifier").glob("*.yaml")}
    ours = {name for name in found if name.endswith("_fast")} | {"digits"}
    assert found - ours == set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_the_settings_of_its_paper(name):
    recipe, yaml_ = RECIPES[name], yaml.safe_load((EXPERIMENTS / "classifier" / f"{name}.yaml").read_text())
    settings = yaml_["model"]["init_args"]
    network, options = name_and_options(settings["backbone"])
    for key in ("mean", "std"):
        if key in options:
            options[key] = [round(255 * value, 1) for value in options[key]]
    assert (network, options) == recipe.network
    assert name_and_options(settings["optimizer"]) == ("SGD", recipe.sgd)
    assert name_and_options(settings["lr_scheduler"]) == recipe.schedule
    assert settings.get("lr_interval", "epoch") == "epoch"
    assert yaml_["trainer"] == {"max_epochs": recipe.epochs}
    assert yaml_["data"]["init_args"] == recipe.data
    assert yaml_.get("keep_every_n_epochs") == recipe.keep


@pytest.mark.parametrize(
    ("name", "network", "data"),
    [
        ("mnist", "backbones.autoencoders.MNISTAutoencoder", {}),
        ("cifar10_resnet18", ("ResNetAutoencoder", {"depth": 18}), {"version": 10}),
        ("cifar100_resnet50", ("ResNetAutoencoder", {"depth": 50}), {"version": 100}),
    ],
)
def test_an_autoencoder_has_the_settings_of_its_paper(name, network, data):
    yaml_ = yaml.safe_load((EXPERIMENTS / "autoencoder" / f"{name}.yaml").read_text())
    settings = yaml_["model"]["init_args"]
    backbone = settings["backbone"]
    assert (backbone if isinstance(backbone, str) else name_and_options(backbone)) == network
    assert name_and_options(settings["optimizer"]) == ("Adam", {"lr": 1e-4})
    expected = {"protocol": "variational_metric", "batch_size": 256, "val_split": 0.05}
    assert yaml_["data"]["init_args"] == expected | data
    assert yaml_["trainer"] == {"max_epochs": 100}
