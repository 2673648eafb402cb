import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from miniature import write_idx, write_mnist
from sklearn.metrics import roc_auc_score
from torch import nn
from torchmetrics import MeanMetric

from backbones import autoencoders
from datamodules.catalogue import ENTRIES
from experiments.__main__ import main
from lightning_modules.autoencoder import Autoencoder, reconstruction_error
from lightning_modules.evidence import Evidence

YAML = Path(__file__).resolve().parent.parent.parent / "experiments" / "autoencoder" / "mnist.yaml"


class Linear(autoencoders.Autoencoder):
    def __init__(self):
        super().__init__((1, 4, 4), 5)
        self.down, self.up = nn.Linear(16, 5), nn.Linear(5, 16)

    def encode(self, images):
        return self.down(images.flatten(1))

    def decode(self, latent):
        return self.up(latent).view(-1, 1, 4, 4)


@pytest.fixture
def module(monkeypatch):
    torch.manual_seed(0)
    module = Autoencoder(Linear(), optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2))
    module.logged = {}
    monkeypatch.setattr(module, "log", lambda name, value, **_: module.logged.update({name: value}))
    return module


def batch(labels):
    images = torch.randn(len(labels), 1, 4, 4, generator=torch.Generator().manual_seed(1))
    return images, torch.tensor(labels, dtype=torch.int64), torch.arange(len(labels))


def errors_of(module, images):
    """One float at a time."""
    with torch.no_grad():
        drawn = module.backbone(images).flatten(1).tolist()
    pairs = zip(drawn, images.flatten(1).tolist(), strict=True)
    return [sum((a - b) ** 2 for a, b in zip(*pair, strict=True)) / 16 for pair in pairs]


@pytest.mark.parametrize("size", [4, 0])
def test_evidence(module, size):
    images, *_ = batch([0] * size)
    evidence = module(images)
    assert isinstance(evidence, Evidence)
    assert evidence.logits.shape == (size, 0)
    assert torch.equal(evidence.features["penultimate"], module.backbone.encode(images))
    assert evidence.maps is None
    assert set(evidence.scores) == {"reconstruction"}
    assert evidence.scores["reconstruction"].tolist() == pytest.approx(errors_of(module, images))


def test_outliers_do_not_enter_the_loss(module):
    images, labels, ids = batch([2, -1, 0, -1])
    loss = module.training_step((images, labels, ids), 0)
    expected = errors_of(module, images)
    assert loss.item() == pytest.approx((expected[0] + expected[2]) / 2)
    images[1] = 1e6
    assert torch.equal(module.training_step((images, labels, ids), 0), loss)


@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_without_an_id_image_the_loss_is_zero_with_a_graph(module, labels):
    loss = module.training_step(batch(labels), 0)
    loss.backward()
    assert loss == 0
    assert all(not parameter.grad.any() for parameter in module.parameters())


def test_training_on_one_batch_lowers_its_error(module):
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = module.training_step(batch(range(8)), 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_validation_averages_over_images_not_over_batches(module):
    images, labels, ids = batch(range(7))
    for rows in (slice(0, 5), slice(5, 7), slice(7, 7)):
        module.validation_step((images[rows], labels[rows], ids[rows]), 0)
    assert isinstance(module.logged["val/loss"], MeanMetric)  # which Lightning reduces exactly
    assert module.val_loss.compute().item() == pytest.approx(sum(errors_of(module, images)) / 7)
    images[6] = torch.nan
    module.validation_step((images, labels, ids), 0)
    assert module.val_loss.compute().isnan()


def test_the_error_is_in_the_unit_of_the_pixels():
    error = reconstruction_error(torch.zeros(2, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]], [[[0.0, -3.0]]]]))
    assert error.tolist() == [2.5, 4.5]


@pytest.fixture
def arguments(tmp_path, monkeypatch, checkpoints):
    """Of the command line, for a MNIST of 40 training and 40 test images."""
    write_mnist(tmp_path / "mnist", count=40)
    for prefix in ("train", "t10k"):
        labels = np.arange(40, dtype=np.uint8) % 10
        write_idx(tmp_path / "mnist" / "MNIST" / "raw" / f"{prefix}-labels-idx1-ubyte", labels)
    for name in ("mnist", "mnist_train", "mnist_noise"):
        monkeypatch.setitem(ENTRIES, name, replace(ENTRIES[name], count=40))
    options = {
        "data.init_args.root": tmp_path,
        "data.init_args.ood": "[mnist_noise]",
        "data.init_args.batch_size": 10,
        "data.init_args.val_split": 0.25,
        "trainer.max_epochs": 1,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.accelerator": "cpu",
        "evaluation.bootstrap": 5,
    }
    return ["--config", str(YAML), *(str(word) for key, value in options.items() for word in (f"--{key}", value))]


def test_a_run_without_classes_from_fit_to_table(arguments, checkpoints, capsys):
    assert main(["run", *arguments, "--trainer.logger", "callbacks.loggers.MetricsCSV"]) == 0
    printed = capsys.readouterr().out
    assert "autoencoder/mnist/seed0: no classes, outliers: none" in printed
    folder = checkpoints / "autoencoder" / "mnist" / "seed0"
    results = json.loads((folder / "results.json").read_text())
    assert (results["checkpoint"], results["id_accuracy"], results["num_classes"]) == ("last.ckpt", None, 10)
    (row,) = results["rows"]
    assert (row["score"], row["ood_set"]) == ("reconstruction", "mnist_noise")
    assert not {"cauroc", "oscr", "macro_f1"} & set(row)
    assert set(results["thresholds"]) == {"reconstruction"}
    with np.load(folder / "scores.npz") as stored:
        split = stored["splits"][stored["split"]]
        rows = split != "calibration"
        assert set(stored["predictions"]) == {-1}
        assert row["auroc"] == pytest.approx(roc_auc_score(split[rows] != "id", stored["score/reconstruction"][rows]))
    header, *lines = (folder / "metrics.csv").read_text().splitlines()
    assert "val/loss" in header
    assert "val/accuracy" not in header
    assert lines
    assert main(["metrics", str(folder)]) == 0
    network = autoencoders.MNISTAutoencoder(weights=str(folder / "last.ckpt"))
    trained = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    assert torch.equal(network.decoder[0].weight, trained["backbone.decoder.0.weight"])


def test_features_can_be_scored_without_classes(arguments, checkpoints):
    knn = '{"class_path": "lightning_modules.scores.knn.KNN", "init_args": {"k": 3}}'
    quick = ["--trainer.logger", "false", "--evaluation.figures", "false", "--evaluation.scores.knn", knn]
    assert main(["run", *arguments, *quick]) == 0
    results = json.loads((checkpoints / "autoencoder" / "mnist" / "seed0" / "results.json").read_text())
    assert [row["score"] for row in results["rows"]] == ["reconstruction", "knn"]


@pytest.mark.parametrize(
    ("score", "message"),
    [
        ("logits.MSP", "mine reads class logits, Autoencoder has no classes"),
        ("logits.Energy", "mine reads class logits, Autoencoder has no classes"),
        ("odin.ODIN", "mine reads class logits, Autoencoder has no classes"),
        ("react.ReAct", "it needs a method with a classifier, this one has none"),
    ],
)
def test_scores_of_classifiers_are_refused_before_training(arguments, checkpoints, capsys, score, message):
    assert main(["run", *arguments, "--evaluation.scores.mine", f"lightning_modules.scores.{score}"]) == 2
    assert message in capsys.readouterr().err
    assert not list(checkpoints.rglob("*.ckpt"))


def test_features_whose_score_counts_classes_are_refused(arguments, checkpoints, capsys):
    mine = ["--evaluation.scores.mine", "lightning_modules.scores.gaussian.Mahalanobis"]
    assert main(["run", *arguments, "--trainer.logger", "false", *mine]) == 2
    assert "fitting mine on the ID training images: the score reads class logits" in capsys.readouterr().err


RESNET = '{"class_path": "backbones.autoencoders.ResNetAutoencoder", "init_args": {"depth": 18}}'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data.init_args.protocol", "null"], "nobody normalises: neither MNIST nor MNISTAutoencoder has mean"),
        (
            ["--model.init_args.backbone", RESNET],
            "ResNetAutoencoder reads images of shape (3, 32, 32) (C, H, W), MNIST serves (1, 28, 28)",
        ),
    ],
)
def test_data_that_do_not_fit_are_named(arguments, capsys, options, message):
    assert main(["run", *arguments, "--trainer.logger", "false", *options]) == 2
    assert message in capsys.readouterr().err
