"""The nine published settings of HEAT, written out here once more; they train, and so do those for digits."""

import math
from inspect import Parameter, signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from backbones.residual_energy import ResidualEnergy
from callbacks.frozen_features import FrozenFeatures
from experiments.cli import OODCLI
from lightning_modules import heat
from lightning_modules.heat import HEAT
from lightning_modules.samplers.sgld import SGLD
from lightning_modules.scores.gmm import GMMEnergy

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"


class Published(NamedTuple):
    epochs: int
    batch: int
    accumulate: int
    layers: int
    prior_temperature: float
    proposal: str
    steps: int
    step_size: float
    noise: float
    regularization: float
    lr: float
    milestones: list
    gamma: float


PUBLISHED = {
    "cifar10_el": Published(20, 256, 1, 4, 1.0, "normal", 50, 0.1, 0.1, 0.1, 1e-5, [10], 0.1),
    "cifar100_el": Published(8, 256, 1, 4, 1.0, "normal", 200, 0.1, 0.01, 1.0, 1e-5, [10], 0.1),
    "imagenet_el": Published(8, 256, 10, 4, 500.0, "normal", 40, 1e3, 1e-3, 20.0, 1e-5, [1000], 0.9),
    "cifar10_gmm": Published(20, 1024, 1, 4, 1e3, "prior", 40, 1e-4, 5e-3, 10.0, 1e-5, [10], 0.1),
    "cifar100_gmm": Published(20, 1024, 1, 4, 1e3, "prior", 20, 2e-4, 1e-3, 20.0, 1e-5, [10], 0.1),
    "imagenet_gmm": Published(8, 256, 20, 6, 5e3, "prior_tempered", 10, 1e-7, 1e-4, 10.0, 1e-4, [1], 0.1),
    "cifar10_gmm_std": Published(20, 1024, 1, 4, 1e3, "prior", 1, 1e-4, 5e-3, 10.0, 1e-5, [10], 0.1),
    "cifar100_gmm_std": Published(20, 1024, 1, 4, 1e3, "prior", 20, 2e-4, 1e-3, 20.0, 1e-5, [10], 0.1),
    "imagenet_gmm_std": Published(8, 256, 20, 6, 5e3, "prior_tempered", 0, 1e-4, 1e-4, 40.0, 1e-4, [1], 0.1),
}
QUICK = ["cifar10_el", "cifar100_gmm_std", "digits_el"]
SLOW = sorted({*PUBLISHED, "digits_gmm", "digits_gmm_std"} - {*QUICK})


def read(name):
    return yaml.safe_load((EXPERIMENTS / "heat" / f"{name}.yaml").read_text())


def filled(kind, options):
    """The options as given, and the defaults of all others."""
    parameters = signature(kind).parameters.items()
    return {name: value.default for name, value in parameters if value.default is not Parameter.empty} | options


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_setting_is_the_published_one(name):
    published, recipe = PUBLISHED[name], read(name)
    dataset, _, kind = name.partition("_")
    imagenet = dataset == "imagenet"
    assert recipe.keys() == {"model", "data", "trainer", "evaluation"}
    assert recipe["model"]["class_path"] == "lightning_modules.heat.HEAT"
    model = filled(HEAT, recipe["model"]["init_args"])

    prior = model["prior"]
    if kind == "el":
        assert prior["class_path"] == "lightning_modules.scores.energy.FeatureEnergy"
        assert prior["init_args"] == {"score": "lightning_modules.scores.logits.Energy"}
    else:
        prior = prior if isinstance(prior, dict) else {"class_path": prior, "init_args": {}}
        assert prior["class_path"] == "lightning_modules.scores.gmm.GMMEnergy"
        tap = "std" if kind == "gmm_std" else "penultimate"
        assert filled(GMMEnergy, prior["init_args"]) == {"tap": tap, "normalize": True}
    assert filled(ResidualEnergy, model["residual"]) == {
        "num_features": 2048 if imagenet else 512,
        "hidden_dim": 1024,
        "hidden_layers": published.layers,
        "reduce_width": imagenet,
        "tie_hidden": True,
    }
    schedule = {"steps": published.steps, "step_size": published.step_size, "noise": published.noise}
    assert filled(SGLD, model["sgld"]) == schedule | {"end": 0.1, "relu": True}
    assert model["proposal"] == published.proposal
    assert model["conditional"] == (imagenet and kind != "el")
    assert (model["temperature"], model["prior_temperature"]) == (1.0, published.prior_temperature)
    assert (model["regularization"], model["data_noise"]) == (published.regularization, 1e-4)
    assert (model["include_starts"], model["chains"]) == (True, None)

    adam = {"lr": published.lr, "betas": [0.0, 0.999]}
    assert model["optimizer"] == {"class_path": "torch.optim.Adam", "init_args": adam}
    assert model["lr_scheduler"]["class_path"] == "torch.optim.lr_scheduler.MultiStepLR"
    assert model["lr_scheduler"]["init_args"] == {"milestones": published.milestones, "gamma": published.gamma}
    assert model["lr_interval"] == "epoch"
    callback = {"class_path": "callbacks.frozen_features.FrozenFeatures"}
    trainer = {"max_epochs": published.epochs} | ({"accumulate_grad_batches": published.accumulate} if imagenet else {})
    callback["init_args"] = {"dtype": "float16"} if imagenet else {"on_device": True}
    assert recipe["trainer"] == trainer | {"callbacks+": [callback]}
    assert recipe["evaluation"] == {"rules": "heat"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_setting_has_the_published_network_and_data(name):
    recipe = read(name)
    dataset, _, kind = name.partition("_")
    backbone, data = recipe["model"]["init_args"]["backbone"], recipe["data"]
    assert backbone["class_path"] == "backbones.resnet.ResNet"
    common = {"protocol": "heat", "batch_size": PUBLISHED[name].batch}
    if dataset == "imagenet":
        assert backbone["init_args"] == {
            "depth": 50,
            "num_classes": 1000,
            "input_shape": [3, 224, 224],
            "stem": "imagenet",
            "weights": "ResNet50_Weights.IMAGENET1K_V1",
        }
        limit = {} if kind == "el" else {"fit_limit": (1000 + 2) * 256}
        options = common | {"num_workers": 5} | limit
        assert data == {"class_path": "datamodules.public.ImageNet", "init_args": options}
    else:
        version = int(dataset.removeprefix("cifar"))
        weights = {"weights": f"heat/{dataset}_resnet34"}
        assert backbone["init_args"] == {"depth": 34, "num_classes": version} | weights
        assert data == {"class_path": "datamodules.public.CIFAR", "init_args": {"version": version} | common}


def shrink(recipe, folder):
    """Put noise in place of images, fewer and smaller ones, and random weights in place of trained ones."""
    backbone = recipe["model"]["init_args"]["backbone"]["init_args"]
    shape = {None: (1, 8, 8), 34: (3, 16, 16), 50: (3, 64, 64)}[backbone.get("depth")]
    if backbone.get("depth") == 34:
        backbone["depth"] = 18  # as wide
    classes = backbone["num_classes"] = min(backbone["num_classes"], 6)
    backbone |= {"input_shape": list(shape), "weights": None}
    channels, *size = shape
    number = 24 if "depth" in backbone else 240  # which is enough for 64 features
    images = np.random.default_rng(0).integers(0, 256, (number, *size, channels), dtype=np.uint8)
    file = str(folder / "images.npz")
    np.savez(file, images=images, labels=np.arange(number) % classes)
    data = {"train": file, "test": file, "batch_size": 6, "mean": [0.5], "std": [0.5]}
    recipe["data"] = {"class_path": "datamodules.arrays.Arrays", "init_args": data}
    if "accumulate_grad_batches" in recipe["trainer"]:
        recipe["trainer"]["accumulate_grad_batches"] = 2
    return recipe


def two_steps(recipe, folder):
    (folder / "heat").mkdir()
    (folder / "heat" / "small.yaml").write_text(yaml.safe_dump(recipe))
    batches = 2 * recipe["trainer"].get("accumulate_grad_batches", 1)
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    quick += ["--trainer.enable_model_summary", "false", "--trainer.fast_dev_run", str(batches)]
    return OODCLI(["fit", "--config", str(folder / "heat" / "small.yaml"), *quick])


@pytest.fixture
def singular(monkeypatch):
    """A few images leave the covariance of so many features singular: chains explode, and are let."""
    monkeypatch.setattr(heat, "FAR", math.inf)
    monkeypatch.setattr(heat, "EXPLODED", math.inf)


@pytest.mark.usefixtures("singular")
@pytest.mark.parametrize("name", [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_a_setting_takes_two_steps(name, checkpoints, tmp_path):
    cli = two_steps(shrink(read(name), tmp_path), tmp_path)
    assert cli.trainer.global_step == 2
    energy, (optimizer,) = cli.model.energy, cli.trainer.optimizers
    residual = list(energy.residual.parameters())
    assert {id(parameter) for group in optimizer.param_groups for parameter in group["params"]} == set(
        map(id, residual)
    )
    assert all(parameter.isfinite().all() and optimizer.state[parameter]["step"] == 2 for parameter in residual)
    assert not any(
        parameter.requires_grad for part in (cli.model.backbone, energy.prior) for parameter in part.parameters()
    )


@pytest.mark.usefixtures("singular")
def test_the_imagenet_path(checkpoints, tmp_path, monkeypatch):
    recipe = shrink(read("imagenet_gmm"), tmp_path)
    recipe["data"]["init_args"]["fit_limit"] = 20
    draws, gradients = [], []
    sample, gradient = GMMEnergy.sample, GMMEnergy.gradient

    def sampled(self, number, shares=None, temperature=None):
        classes, features = sample(self, number, shares, temperature)
        draws.append((shares, temperature, classes))
        return classes, features

    def descended(self, features, classes=None):
        gradients.append(classes)
        return gradient(self, features, classes)

    monkeypatch.setattr(GMMEnergy, "sample", sampled)
    monkeypatch.setattr(GMMEnergy, "gradient", descended)
    cli = two_steps(recipe, tmp_path)
    assert cli.trainer.global_step == 2

    (extractor,) = [callback for callback in cli.trainer.callbacks if isinstance(callback, FrozenFeatures)]
    stored = extractor.cache.open()
    assert {name: (values.shape, values.dtype) for name, values in stored.items()} == {
        "logits": ((24, 6), np.float16),
        "features.penultimate": ((24, 2048), np.float16),
    }
    assert all(isinstance(values, np.memmap) for values in stored.values())
    batch = cli.datamodule.sets["train"][torch.arange(24)]
    with torch.no_grad():
        seen = cli.model.encode((batch.images / 255 - 0.5) / 0.5).features["penultimate"]
    difference = np.linalg.norm(stored["features.penultimate"] - seen.numpy(), axis=1)
    assert (difference <= 1e-3 * np.linalg.norm(seen.numpy(), axis=1)).all()

    fitted = cli.model.energy.prior.log_prior.exp() * 20
    assert len(cli.datamodule.fit_rows) == 20
    torch.testing.assert_close(fitted, batch.labels[cli.datamodule.fit_rows].bincount(minlength=6).float())

    assert len(draws) == 4  # two batches a step
    temperatures = [temperature for _, temperature, _ in draws]
    assert len(set(temperatures)) == 4
    assert all(0 <= temperature <= 100 for temperature in temperatures)
    assert sum(shares for shares, _, _ in draws).equal(torch.full((6,), 4.0))  # an epoch sees each image once
    assert len(gradients) == 4 * 10
    assert all(classes.equal(draws[step // 10][2]) for step, classes in enumerate(gradients))
