"""The latent space on two processes: the training, statistics and errors of one."""

import os
from pathlib import Path

import forked
import pytest
import torch
from latent_toy import QUIET, Net, draw, make, state_of
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.variational_metric import Finetune, Margin

STEPS, SIZE = 3, 24  # of an epoch; rows of a total batch
CASES = {
    "analytic": {"kl_epoch": 0},
    "mc": {"kl_estimator": "mc"},
    "finetune": {"finetune": Finetune(1, 0.02)},
}


class Plain(Net):
    """Without batch-norm, which sees the images of its own process alone."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Tanh()


class Gradients(Callback):
    def __init__(self):
        self.gradients = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.gradients.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})


def loader(rank, processes, change=None):
    batches = []
    for start in range(0, STEPS * SIZE, SIZE):
        images, labels, ids = (rows[start : start + SIZE] for rows in draw())
        labels = labels.where(ids % 5 != 0, 0)  # classes that are not equally frequent
        if change is not None:
            images, labels = change(images.clone(), labels.clone())
        batches.append(tuple(part[rank::processes] for part in (images.double(), labels, ids)))
    return DataLoader(batches, None)


def unknown(images, labels):
    return images, labels.where(torch.arange(SIZE) % 4 != 1, -1)


def fit(case, rank=0, processes=1, change=None, backbone=Plain):
    """Train with noise that is a function of the row; return state, gradients and what was logged."""
    original, torch.randn_like = torch.randn_like, lambda tensor: (9 * tensor.detach()).sin()
    kind = "ddp_find_unused_parameters_true" if "finetune" in CASES[case] else "ddp"
    own = {"strategy": kind, "devices": processes} if processes > 1 else {}
    watch, module = Gradients(), make(backbone=backbone, margin=Margin(first_epoch=1), **CASES[case]).double()
    options = QUIET | own | {"callbacks": [watch], "precision": "64-true", "enable_checkpointing": False}
    try:
        trainer = Trainer(max_epochs=3, **options, use_distributed_sampler=False)
        trainer.fit(module, loader(rank, processes, change), loader(rank, processes, unknown))
    finally:
        torch.randn_like = original
    logged = {key: float(value) for key, value in trainer.callback_metrics.items() if key.startswith("val/")}
    return {"state": state_of(module), "gradients": watch.gradients, "logged": logged}


def not_finite(images, labels):
    images[3, 2] = torch.nan  # of the second process
    return images, labels


def an_outlier(images, labels):
    labels[3] = -1
    return images, labels


REFUSED = {
    not_finite: "1 of 24 embeddings are not finite: the training has diverged",
    an_outlier: "this method is trained without outliers: leave out outlier_feed",
}


def train(folder):
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(fit(case, rank, 2), folder / f"{case}.{rank}")
    torch.save(fit("finetune", rank, 2, backbone=Net), folder / f"batch-norm.{rank}")
    for change in REFUSED:
        try:
            fit("analytic", rank, 2, change)
        except ValueError as error:
            (folder / f"{change.__name__}.{rank}").write_text(str(error))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    codes = forked.run(train, folder, processes=2, log=folder / "log")
    assert codes == [0, 0], (folder / "log").read_text()[-3000:]
    return folder


def read(folder: Path, name):
    return [torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in (0, 1)]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(trained, case):
    alone = fit(case)
    for process in read(trained, case):
        assert len(process["gradients"]) == len(alone["gradients"]) == 3 * STEPS
        for gradients, expected in zip(process["gradients"], alone["gradients"], strict=True):
            assert gradients.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(gradients[name], value, rtol=1e-8, atol=1e-10)
        for name, value in alone["state"].items():
            torch.testing.assert_close(process["state"][name], value, rtol=1e-8, atol=1e-8)
    assert alone["state"]["statistics.course"].shape == (3, 6)
    assert alone["state"]["statistics.means"].abs().min() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_validation_is_that_of_one_process(trained, case):
    expected = fit(case)["logged"]
    assert expected.keys() == {"val/accuracy", "val/known_accepted", "val/unknown_rejected", "val/open_f1"}
    for process in read(trained, case):
        assert process["logged"] == pytest.approx(expected, abs=1e-6)


def test_a_backbone_that_joins_later_stays_the_same_on_both(trained):
    first, second = read(trained, "batch-norm")
    backbone = [name for name in first["state"] if name.startswith("backbone.") and "running" not in name]
    start = state_of(make().double())
    for name, value in first["state"].items():
        if "running" not in name:  # a process's own until the next forward pass
            assert torch.equal(second["state"][name], value), name
    for name in ("conv1.weight", "layer1.weight", "layer1.bias"):
        assert f"backbone.{name}" in backbone
        assert not torch.equal(first["state"][f"backbone.{name}"], start[f"backbone.{name}"])
    learns = ["backbone.conv1.weight" in gradients for gradients in first["gradients"]]
    assert learns == STEPS * [False] + 2 * STEPS * [True]


@pytest.mark.parametrize("change", REFUSED, ids=lambda change: change.__name__)
def test_what_one_process_must_refuse_both_do(trained, change):
    for rank in (0, 1):
        assert (trained / f"{change.__name__}.{rank}").read_text() == REFUSED[change]
