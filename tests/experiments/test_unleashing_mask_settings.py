"""The settings of Unleashing Mask and of its estimates, written out here once more; they train on noise, too."""

import json
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml

from backbones.weights import file_sha256
from callbacks.evaluation import OODEvaluation
from callbacks.forgetting import Forgetting
from experiments.cli import OODCLI
from lightning_modules.loss_estimate import LossEstimate, summarize
from lightning_modules.unleashing_mask import UnleashingMask

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"


class Published(NamedTuple):
    classifier: str  # whose last checkpoint is where it starts
    estimate: str
    keep: float | None
    lr: float
    epochs: int
    batch: int
    kept_every: int


PUBLISHED = {
    "cifar10_densenet_um": Published("cifar10_densenet", "estimate_cifar10", None, 0.1, 100, 256, 1),
    "cifar100_densenet_um": Published("cifar100_densenet", "estimate_cifar100", None, 0.1, 100, 256, 1),
    "cifar10_densenet_umap": Published("cifar10_densenet", "estimate_cifar10", 0.8, 0.1, 100, 256, 5),
    "cifar100_densenet_umap": Published("cifar100_densenet", "estimate_cifar100", 0.8, 0.1, 100, 256, 1),
}
OURS = {  # of networks and data that the authors publish no setting for
    "cifar10_wrn40_4_um": Published("cifar10_wrn40_4", "estimate_cifar10_wrn40_4", None, 0.1, 100, 256, 5),
    "cifar100_wrn40_4_um": Published("cifar100_wrn40_4", "estimate_cifar100_wrn40_4", None, 0.1, 100, 256, 5),
    "cifar10_wrn40_4_umap": Published("cifar10_wrn40_4", "estimate_cifar10_wrn40_4", 0.8, 0.1, 100, 256, 5),
    "cifar100_wrn40_4_umap": Published("cifar100_wrn40_4", "estimate_cifar100_wrn40_4", 0.8, 0.1, 100, 256, 5),
    "digits_um": Published("digits", "estimate_digits", None, 0.1, 30, 64, 3),
    "digits_umap": Published("digits", "estimate_digits", 0.8, 0.1, 30, 64, 3),
}
SETTINGS = PUBLISHED | OURS
ESTIMATES = {setting.estimate: setting.classifier for setting in SETTINGS.values()}
QUICK = ["cifar10_densenet_umap", "estimate_digits"]

ON_IMAGES = {"input_shape": (3, 32, 32), "mean": [125.3, 123.0, 113.9], "std": [63.0, 62.1, 66.7]}  # of 255
SHARED = ON_IMAGES | {"dropout": 0.3, "affine": False}
NETWORKS = {
    "densenet": ("backbones.densenet.DenseNet", {"depth": 100, "growth_rate": 12, "reduction": 0.5} | SHARED),
    "wrn40_4": ("backbones.wide_resnet.WideResNet", {"depth": 40, "widen_factor": 4} | SHARED),
    "": ("backbones.digits_net.DigitsNet", {"num_classes": 6, "input_shape": (1, 8, 8), "mean": None, "std": None}),
}
DATA = {  # what all have in common, most of it by default
    **{"seed": 0, "split_seed": 0, "known": None, "subset": None, "ood_subset": None, "fit_limit": None},
    **{
        "outlier_feed": None,
        "outlier_ratio": 1.0,
        "num_outliers": None,
        "balanced": None,
        "val_ood": None,
        "eval_batch_size": None,
    },
    **{"augmentation": None, "mean": None, "std": None, "num_workers": 0},
}
ON_PUBLIC = {"protocol": "unleashing_mask", "train": True, "outliers": None, "own": None, "resize": None, "root": None}
ON_CIFAR = DATA | ON_PUBLIC | {"augmentation": "protocol", "drop_last": False, "val_split": 0.02, "ood": None}
ON_DIGITS = DATA | {"known": 6, "ood": ("photograph", "noise"), "val_split": 0.15, "mean": [0.5], "std": [0.5]}
EVALUATION = {"rules": "unleashing_mask", "bootstrap": 1000, "figures": True, "tau_source": "id_val"}
EVALUATION |= {"thresholds": False, "embedding": None, "heatmaps": None, "folder": None, "subfolder": ""}
SCORES = {
    "msp": ("logits.MSP", {}),
    "energy": ("logits.Energy", {"temperature": 1.0}),
    "odin": ("odin.ODIN", {"temperature": 1000.0, "epsilon": 0.0014}),
}
MAGNITUDES = (0.0, 0.01, 0.005, 0.002, 0.0014, 0.001, 0.0005)
LAYERS = {"densenet": ["stem", "layer1", "layer2", "penultimate"], "wrn40_4": ["stem", "layer1", "layer2", "layer3"]}


def read(name, method="unleashing_mask"):
    """The setting, with the files in place that it names for its parts."""
    path = EXPERIMENTS / method / f"{name}.yaml"
    recipe = yaml.safe_load(path.read_text())
    for part, key in ((recipe, "data"), (recipe["model"]["init_args"], "backbone")):
        if isinstance(part[key], str):
            part[key] = yaml.safe_load((path.parent / part[key]).read_text())
    return recipe


def filled(kind, options):
    """The options as given, and the defaults of all others, also of those that a class hands on to the one above."""
    defaults = {}
    for each in kind.__mro__:
        parameters = signature(each.__init__).parameters if "__init__" in vars(each) else {}
        given = {name: value.default for name, value in parameters.items() if value.default is not Parameter.empty}
        defaults = given | defaults
        if parameters and "kwargs" not in parameters:
            break
    return defaults | options


def resolved(entry):
    """The class that a YAML names, as (path, all its options)."""
    entry = {"class_path": entry} if isinstance(entry, str) else entry
    assert entry.keys() <= {"class_path", "init_args"}
    module, _, name = entry["class_path"].rpartition(".")
    return entry["class_path"], filled(getattr(import_module(module), name), entry.get("init_args", {}))


def check_start(backbone, data, classifier):
    """It starts from the last checkpoint of the classifier, in the same network, and on the same images."""
    dataset, _, network = classifier.partition("_")
    kind, options = resolved(backbone)
    assert options.pop("weights") == f"run:classifier/{classifier}@last"
    for key in ("mean", "std"):
        options[key] = options[key] and [round(255 * value, 1) for value in options[key]]
    classes = {"num_classes": int(dataset.removeprefix("cifar"))} if network else {}
    assert (kind, options) == (NETWORKS[network][0], NETWORKS[network][1] | classes)

    trained = read(classifier, "classifier")
    assert resolved(trained["model"]["init_args"]["backbone"]) == resolved(
        backbone | {"init_args": {key: value for key, value in backbone["init_args"].items() if key != "weights"}}
    )
    differing = {"batch_size", "drop_last"}
    (kind, options), (kind_trained, trained) = resolved(data), resolved(trained["data"])
    assert kind == kind_trained
    assert {key for key in options if options[key] != trained[key]} <= differing


def check_data(data, classifier, batch, drop_last):
    dataset = classifier.partition("_")[0]
    kind, options = resolved(data)
    if dataset == "digits":
        expected = ("datamodules.digits.Digits", ON_DIGITS | {"drop_last": drop_last})
    else:
        expected = ("datamodules.public.CIFAR", ON_CIFAR | {"version": int(dataset.removeprefix("cifar"))})
    assert (kind, options) == (expected[0], expected[1] | {"batch_size": batch})


def check_evaluation(recipe, classifier):
    network = classifier.partition("_")[2]
    if not network:
        assert "evaluation" not in recipe  # the scores and rules of every experiment
        return
    evaluation = filled(OODEvaluation, recipe["evaluation"])
    scores = {name: resolved(score) for name, score in evaluation.pop("scores").items()}
    assert evaluation == EVALUATION
    layered = {"taps": LAYERS[network], "magnitudes": MAGNITUDES, "noise": 0.05}
    expected = {**SCORES, "mahalanobis": ("layered_mahalanobis.LayeredMahalanobis", layered)}
    assert scores == {name: (f"lightning_modules.scores.{kind}", options) for name, (kind, options) in expected.items()}


def test_every_setting_is_here():
    found = {path.stem for path in (EXPERIMENTS / "unleashing_mask").glob("*.yaml")}
    assert found == {*SETTINGS, *ESTIMATES}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_the_published_one(name):
    setting, recipe = SETTINGS[name], read(name)
    digits = name.startswith("digits")
    parts = {"model", "data", "trainer", "keep_every_n_epochs"}
    assert recipe.keys() == (parts if digits else parts | {"evaluation"})
    assert recipe["model"]["class_path"] == "lightning_modules.unleashing_mask.UnleashingMask"
    model = filled(UnleashingMask, recipe["model"]["init_args"])
    check_start(model.pop("backbone"), recipe["data"], setting.classifier)
    check_data(recipe["data"], setting.classifier, setting.batch, drop_last=digits)
    check_evaluation(recipe, setting.classifier)

    kind, sgd = resolved(model.pop("optimizer"))
    assert kind == "torch.optim.SGD"
    assert not {key for key in ("dampening", "nesterov", "maximize") if sgd[key]}
    assert (sgd["lr"], sgd["momentum"], sgd["weight_decay"]) == (setting.lr, 0.9, 1e-4)
    kind, schedule = resolved(model.pop("lr_scheduler"))
    assert kind == "torch.optim.lr_scheduler.CosineAnnealingLR"
    assert (schedule["T_max"], schedule["eta_min"]) == (setting.epochs, 0)
    floor = {"floor": "auto", "estimate": f"run:unleashing_mask/{setting.estimate}", "beta": 1.0}
    assert model == floor | {"keep": setting.keep, "freeze_weights": True, "lr_interval": "epoch"}

    callbacks = recipe["trainer"].pop("callbacks+")
    assert callbacks == [{"class_path": f"{Forgetting.__module__}.Forgetting"}]
    logging = {"log_every_n_steps": 8} if digits else {}
    assert recipe["trainer"] == {"max_epochs": setting.epochs} | logging
    assert recipe["keep_every_n_epochs"] == setting.kept_every


@pytest.mark.parametrize("name", ESTIMATES)
def test_an_estimate_is_the_published_one_over_three_masks(name):
    classifier, recipe = ESTIMATES[name], read(name)
    digits = classifier == "digits"
    parts = {"model", "data", "trainer"}
    assert recipe.keys() == (parts if digits else parts | {"evaluation"})
    assert recipe["model"]["class_path"] == "lightning_modules.loss_estimate.LossEstimate"
    model = filled(LossEstimate, recipe["model"]["init_args"])
    check_start(model.pop("backbone"), recipe["data"], classifier)
    check_data(recipe["data"], classifier, 64 if digits else 512, drop_last=False)  # each image once
    check_evaluation(recipe, classifier)
    assert model == {"keep": 0.965, "masks": 3, "mask_seed": 0}
    logging = {"log_every_n_steps": 9} if digits else {}
    assert recipe["trainer"] == {"max_epochs": 1, "limit_val_batches": 0} | logging


def marked(names):
    return [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in names]


@pytest.mark.parametrize("name", marked([*SETTINGS, *ESTIMATES]))
def test_a_setting_is_read_by_the_command_line(name, capsys):
    with pytest.raises(SystemExit):
        OODCLI(["fit", "--config", str(EXPERIMENTS / "unleashing_mask" / f"{name}.yaml"), "--print_config"])
    assert yaml.safe_load(capsys.readouterr().out)["data"]["class_path"].startswith("datamodules.")


# Runs


def shrink(recipe, classifier, folder):
    """Put noise in place of images and few layers in place of many, and start from a random network, in a run of it."""
    backbone, data = recipe["model"]["init_args"]["backbone"], recipe["data"]["init_args"]
    options = backbone["init_args"]
    if "widen_factor" in options:
        options |= {"depth": 10, "widen_factor": 1}
    elif options["num_classes"] > 6:
        options["depth"] = 10
    module, _, name = backbone["class_path"].rpartition(".")
    network = getattr(import_module(module), name)(**options | {"weights": None})
    start = folder / "checkpoints" / "classifier" / classifier / "seed0" / "last.ckpt"
    start.parent.mkdir(parents=True)
    torch.save(network.state_dict(), start)

    channels, *size = network.input_shape
    labels = np.arange(6 * network.num_classes) % network.num_classes
    images = np.random.default_rng(0).integers(0, 256, (len(labels), *size, channels), dtype=np.uint8)
    np.savez(folder / "images.npz", images=images, labels=labels)
    file = str(folder / "images.npz")
    kept = {key: data[key] for key in ("mean", "std", "drop_last") if key in data}
    data = {"train": file, "test": file, "batch_size": 4, "val_split": 0.5} | kept
    recipe["data"] = {"class_path": "datamodules.arrays.Arrays", "init_args": data}
    return network, start


def two_batches(recipe, name, folder):
    path = folder / "unleashing_mask" / f"{name}.yaml"
    path.parent.mkdir()
    path.write_text(yaml.safe_dump(recipe))
    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.fast_dev_run", "2"]
    return OODCLI(["fit", "--config", str(path), *quick, "--trainer.enable_model_summary", "false"])


def same(state, other):
    return all(torch.equal(value, other[name]) for name, value in state.items())


@pytest.mark.parametrize("name", marked(SETTINGS))
def test_a_setting_takes_two_steps(name, tmp_path, checkpoints):
    setting, recipe = SETTINGS[name], read(name)
    network, start = shrink(recipe, setting.classifier, tmp_path)
    estimate = checkpoints / "unleashing_mask" / setting.estimate / "seed0" / "estimate.json"
    estimate.parent.mkdir(parents=True)
    of = {"source": f"run:classifier/{setting.classifier}@last", "sha256": file_sha256(start)}
    found = summarize(torch.tensor([[1.0, 4.0, 4.0]] * 4))  # losses, correct predictions, images, of each network
    estimate.write_text(json.dumps(found | {"weights": of}))

    cli = two_batches(recipe, name, tmp_path)
    assert cli.trainer.global_step == 2
    assert cli.model.floor == 0.25
    (optimizer,), (schedule,) = cli.trainer.optimizers, cli.trainer.lr_scheduler_configs
    assert type(optimizer) is torch.optim.SGD
    assert type(schedule.scheduler) is torch.optim.lr_scheduler.CosineAnnealingLR
    learned = list((cli.model.backbone if setting.keep is None else cli.model.subnetwork).parameters())
    assert {id(each) for group in optimizer.param_groups for each in group["params"]} == set(map(id, learned))
    assert all(each.isfinite().all() and each in optimizer.state for each in learned)
    assert same(network.state_dict(), cli.model.backbone.state_dict()) == (setting.keep is not None)
    written = checkpoints / "unleashing_mask" / name / "fast_dev_run"
    assert (written / "epochs" / "first.ckpt").is_file()
    summary = json.loads((written / "forgotten" / "summary.json").read_text())
    assert summary["images"] == 3 * network.num_classes


@pytest.mark.parametrize("name", marked(ESTIMATES))
def test_an_estimate_of_two_batches(name, tmp_path, checkpoints):
    recipe = read(name)
    network, start = shrink(recipe, ESTIMATES[name], tmp_path)
    cli = two_batches(recipe, name, tmp_path)
    assert cli.trainer.global_step == 0
    assert same(network.state_dict(), cli.model.backbone.state_dict())
    found = json.loads((checkpoints / "unleashing_mask" / name / "fast_dev_run" / "estimate.json").read_text())
    assert (found["images"], len(found["losses"]), found["keep"]) == (8, 3, 0.965)
    assert found["floor"] == pytest.approx(np.mean(found["losses"]))
    assert len({*found["losses"], found["whole"]["loss"]}) == 4
    assert found["weights"]["sha256"] == file_sha256(start)


def test_learning_rates_are_the_published_ones():
    recipe = yaml.safe_load((EXPERIMENTS / "unleashing_mask" / "cifar10_densenet_um.yaml").read_text())["model"][
        "init_args"
    ]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], **recipe["optimizer"]["init_args"])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, **recipe["lr_scheduler"]["init_args"])
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    expected = [(1 + np.cos(np.pi * epoch / 100)) / 2 * 0.1 for epoch in range(100)]
    np.testing.assert_allclose(rates, expected, rtol=0, atol=1e-9)
    assert (rates[0], round(rates[50], 9), round(rates[99], 7)) == (0.1, 0.05, 2.47e-5)
