"""The settings of the latent space, written out here once more; each takes two steps on images that a test may have."""

import importlib
from inspect import signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from datamodules.protocols import find_protocol
from experiments.cli import OODCLI
from lightning_modules.losses.triplet_distancing import EuclideanDistance, TripletDistancingLoss
from lightning_modules.variational_metric import Margin, VariationalMetric

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"


class Published(NamedTuple):
    backbone: tuple
    latent: int
    epochs: int
    optimizer: str
    lr: float
    step: int
    final: float
    first_epoch: int
    balanced: tuple
    eval_batch: int
    autoencoder: str | None
    finetune: str | None = None


WRN = {"depth": 28, "widen_factor": 10, "dropout": 0.1}
PUBLISHED = {
    "cifar10_vgg": Published(("vgg.VGG", {}), 32, 500, "Adam", 1e-3, 100, 32.0, 10, (8, 8), 64, "cifar10_resnet18"),
    "cifar10_resnet18": Published(
        ("resnet.ResNet", {"depth": 18}), 32, 500, "SGD", 1e-2, 100, 32.0, 10, (10, 8), 400, "cifar10_resnet18"
    ),
    "cifar10_densenet": Published(
        ("densenet.DenseNet", {}), 32, 500, "SGD", 0.1, 100, 32.0, 30, (10, 8), 420, "cifar10_resnet18"
    ),
    "cifar10_wrn28_10": Published(
        ("wide_resnet.WideResNet", WRN), 32, 500, "SGD", 1e-3, 100, 32.0, 40, (10, 20), 640, None, "cifar10_wrn28_10"
    ),
    "cifar100_densenet": Published(
        *(("densenet.DenseNet", {}), 64, 200, "SGD", 1e-3, 64, 64.0, 40, (20, 20), 400, "cifar100_resnet50"),
        "cifar100_densenet_affine",
    ),
    "mnist": Published(("mnist_conv.MNISTConv", {}), 32, 500, "Adam", 1e-4, 100, 32.0, 1, (10, 16), 400, "mnist"),
}
OPEN = {"cifar10_known6": ("cifar10_resnet18", 6, (6, 8)), "cifar100_known50": ("cifar10_densenet", 50, (20, 8))}
EVALUATION = {"rules": "variational_metric", "scores": {}, "thresholds": True, "embedding": {"tap": "latent"}}
ARRAYS = {"mnist_arrays": "mnist"}


def read(name, method="variational_metric"):
    return yaml.safe_load((EXPERIMENTS / method / f"{name}.yaml").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_setting_is_the_published_one(name):
    published, recipe = PUBLISHED[name], read(name)
    assert recipe.keys() == {"model", "data", "trainer", "evaluation"}
    assert recipe["model"]["class_path"] == "lightning_modules.variational_metric.VariationalMetric"
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    network, options = published.backbone
    dataset = name.partition("_")[0]
    options = options | {"num_classes": 100 if dataset == "cifar100" else 10}
    if published.finetune:
        options["weights"] = f"run:classifier/{published.finetune}"
    assert model["backbone"] == {"class_path": f"backbones.{network}", "init_args": options}
    assert model.get("finetune") == (published.finetune and {"unfreeze_epoch": 20, "lr": 1e-2})
    assert model["latent_dim"] == published.latent
    assert model["margin"] == {"final": published.final, "first_epoch": published.first_epoch}
    rates = {"lr": published.lr}
    if published.optimizer == "SGD":
        rates |= {"momentum": 0.9, "nesterov": True, "weight_decay": 1e-4}
    assert model["optimizer"] == {"class_path": f"torch.optim.{published.optimizer}", "init_args": rates}
    schedule = {"step_size": published.step, "gamma": 0.1}
    assert model["lr_scheduler"] == {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": schedule}
    weights = model["autoencoder"]["init_args"]["weights"] if "autoencoder" in model else None
    assert weights == (published.autoencoder and f"run:autoencoder/{published.autoencoder}")
    classes, images = published.balanced
    given = {"protocol": "variational_metric", "augmentation": "protocol", "batch_size": published.eval_batch}
    given |= {"balanced": {"classes_per_batch": classes, "images_per_class": images}, "val_split": 0.05}
    if dataset == "mnist":
        assert recipe["data"]["class_path"] == "datamodules.public.MNIST"
        assert data == given | {"val_ood": "omniglot"}
    else:
        assert recipe["data"]["class_path"] == "datamodules.public.CIFAR"
        assert data == given | {"val_ood": "tiny_imagenet_resize", "version": int(dataset.removeprefix("cifar"))}
    assert recipe["trainer"] == {"max_epochs": published.epochs}
    assert recipe["evaluation"] == EVALUATION
    assert model.get("calibration") == ("id_val" if name == "cifar100_densenet" else None)  # 475 images, 664 features


def test_what_no_setting_says_is_as_published_or_as_ruled():
    def defaults(kind):
        return {name: parameter.default for name, parameter in signature(kind).parameters.items()}

    assert defaults(Margin)["jump"] == 1.0
    divergence = {"kl_weight": 0.1, "kl_epoch": 1, "kl_estimator": "analytic"}
    assert (divergence | {"lower_bound": 0.05, "calibration": "train"}).items() <= defaults(VariationalMetric).items()
    metric = TripletDistancingLoss()
    assert metric.triplet_margin == 0.1
    assert isinstance(metric.distance, EuclideanDistance)
    assert not metric.distance.normalize_embeddings


@pytest.mark.parametrize("name", PUBLISHED)
def test_autoencoder_is_trained_with_the_normalisation_of_the_setting(name):
    if (trained := PUBLISHED[name].autoencoder) is None:
        return
    data, own = read(trained, "autoencoder")["data"], read(name)["data"]
    assert data["class_path"] == own["class_path"]
    for option in ("version", "protocol", "val_split"):  # so the same images are held out of both
        assert data["init_args"].get(option) == own["init_args"].get(option)


@pytest.mark.parametrize("name", OPEN)
def test_an_open_set_keeps_the_first_classes(name):
    template, known, (classes, images) = OPEN[name]
    recipe, expected = read(name), read(template)
    model, data = expected["model"]["init_args"], expected["data"]["init_args"]
    del model["autoencoder"]  # it would have seen the other classes
    model["backbone"]["init_args"]["num_classes"] = data["known"] = known
    data |= {"ood": [], "val_ood": "unknown"}
    data["balanced"] = {"classes_per_batch": classes, "images_per_class": images}
    if name.startswith("cifar100"):
        data["version"], model["latent_dim"], model["margin"]["final"], data["batch_size"] = 100, 64, 64.0, 400
    assert recipe == expected


def test_arrays_differ_from_the_published_setting_in_where_images_lie():
    for method in ("variational_metric", "autoencoder"):
        arrays, published = read("mnist_arrays", method), read("mnist", method)
        known = find_protocol("variational_metric", "mnist")
        data = arrays.pop("data")["init_args"]
        assert (tuple(data["mean"]), tuple(data["std"])) == (known.mean, known.std)
        assert published.pop("data")["init_args"]["batch_size"] == data["batch_size"]
        if method == "variational_metric":
            assert data["augmentation"]["rotation"] == known.augmentation.rotation
            assert tuple(data["augmentation"]["resized_crop"]) == known.augmentation.resized_crop
            assert arrays["model"]["init_args"].pop("autoencoder")["init_args"] == {
                "weights": "run:autoencoder/mnist_arrays"
            }
            published["model"]["init_args"].pop("autoencoder")
        assert arrays == published


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[] if name == "mnist" else pytest.mark.slow) for name in (*PUBLISHED, *OPEN, *ARRAYS)],
)
def test_a_setting_takes_two_steps(name, tmp_path, checkpoints):
    recipe = read(name)
    model, data = recipe["model"]["init_args"], recipe["data"]["init_args"]
    num_classes, shape = model["backbone"]["init_args"]["num_classes"], (28, 28) if "mnist" in name else (32, 32, 3)
    labels = np.arange(12 * num_classes) % num_classes
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *shape), dtype=np.uint8)
    np.savez(tmp_path / "images.npz", images=images, labels=labels)
    model["backbone"]["init_args"].pop("weights", None)
    model.get("autoencoder", {"init_args": {}})["init_args"].pop("weights", None)
    constants = {option: [0.5] for option in ("mean", "std")}
    recipe["data"] = {
        "class_path": "datamodules.arrays.Arrays",
        "init_args": constants
        | {
            "train": str(tmp_path / "images.npz"),
            "test": str(tmp_path / "images.npz"),
            "ood": {"noise": {"path": str(tmp_path / "images.npz")}},
            "val_split": 0.2,
            "val_ood": "noise",
            "batch_size": 20,
            "balanced": {"classes_per_batch": min(5, data["balanced"]["classes_per_batch"]), "images_per_class": 2},
        },
    }
    (tmp_path / "variational_metric").mkdir()
    path = tmp_path / "variational_metric" / f"{name}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.fast_dev_run", "2"]
    cli = OODCLI(["fit", "--config", str(path), *quick, "--trainer.enable_model_summary", "false"])
    assert cli.trainer.global_step == 2
    (optimizer,) = cli.trainer.optimizers
    trained = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    assert all(parameter.isfinite().all() for parameter in trained)
    heads = {*cli.model.fc_mu.parameters(), *cli.model.fc_var.parameters()}
    taught = {parameter for parameter in trained if parameter in optimizer.state}
    assert heads <= taught
    assert (taught == trained) == ("finetune" not in model)
    assert trained.isdisjoint(() if cli.model.autoencoder is None else cli.model.autoencoder.parameters())
    (group,) = optimizer.param_groups
    assert group["lr"] == model.get("finetune", model["optimizer"]["init_args"])["lr"]
    assert cli.model.backbone.head.weight.grad is None


WIDTHS = {  # of 974, 1006 and 1792 numbers in the paper's, some are there twice: its third tap is the fourth
    "cifar10_vgg": 1696,
    "cifar10_resnet18": 992,
    "cifar10_densenet": 974 - 342,
    "cifar100_densenet": 1006 - 342,
    "cifar10_wrn28_10": 1792 - 640,
    "mnist": 832,
}


@pytest.mark.parametrize("name", WIDTHS)
def test_a_density_has_the_published_width(name):
    model = read(name)["model"]["init_args"]
    options = {key: value for key, value in model["backbone"]["init_args"].items() if key != "weights"}
    module, kind = model["backbone"]["class_path"].rsplit(".", 1)
    backbone = getattr(importlib.import_module(module), kind)(**options).eval()
    taps = set(model["density"]["taps"]) - {"latent"}
    with torch.no_grad():
        _, features = backbone.forward_intermediates(torch.zeros(1, *backbone.input_shape), taps)
    assert sum(features[tap].shape[1] for tap in taps) + model["latent_dim"] == WIDTHS[name]


@pytest.mark.parametrize(
    ("setting", "names"), [("digits", ["_official"]), ("cifar10_wrn28_10", ["_official", "_official_finetune"])]
)
def test_the_authors_departures_are_files_of_their_own(setting, names, capsys):
    files = [EXPERIMENTS / "variational_metric" / f"{stem}.yaml" for stem in (setting, *names)]
    with pytest.raises(SystemExit):
        OODCLI(["fit", *(word for file in files for word in ("--config", str(file))), "--print_config"])
    resolved = yaml.safe_load(capsys.readouterr().out)
    model = resolved["model"]["init_args"]
    assert model["metric"]["init_args"]["distance"]["init_args"] == {"normalize_embeddings": True}
    assert (model["kl_epoch"], model["kl_estimator"], model["calibration"]) == (0, "mc", "test")
    assert resolved["evaluation"]["tau_source"] == "test_known"
    assert model["margin"]["final"] == read(setting)["model"]["init_args"]["margin"]["final"]
    finetune = {"unfreeze_epoch": 22, "lr": 1e-2, "batch_norm": True}
    assert model["finetune"] == (finetune if "_official_finetune" in names else None)


@pytest.mark.parametrize("name", sorted({*PUBLISHED, *OPEN, *ARRAYS}))
def test_a_setting_is_read_by_the_command_line(name, capsys):
    with pytest.raises(SystemExit):
        OODCLI(["fit", "--config", str(EXPERIMENTS / "variational_metric" / f"{name}.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["class_path"].startswith("datamodules.")
