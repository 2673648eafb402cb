"""Unleashing Mask on two processes: gradients, statistics of scores, and the estimate, of one."""

import os

import forked
import mask_toy
import pytest
import torch
from mask_toy import QUIET, draw, make
from pytorch_lightning import Callback, Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.loss_estimate import LossEstimate

CASES = {"um": {}, "umap": {"keep": 0.8}, "umap with weights": {"keep": 0.8, "freeze_weights": False}}


class Gradients(Callback):
    def __init__(self):
        self.gradients, self.losses = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        named = pl_module.named_parameters()
        self.gradients.append({name: weight.grad.clone() for name, weight in named if weight.grad is not None})
        self.losses.append(float(trainer.callback_metrics["train/scaled"]))


def ordered(images, labels, ids):
    """Put the images of greatest loss into one process's share: the other's mean is below the floor."""
    losses = nn.functional.cross_entropy(network()(images), labels, reduction="none").detach()
    order = losses.argsort(descending=True)
    halves = torch.stack(order.chunk(2), 1).flatten()
    return images[halves].double(), labels[halves], ids[halves]


def network():
    """Without batch-norm, which sees the images of its own process alone; hardly trained."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return mask_toy.converge(mask_toy.Net(norm=lambda width: nn.Identity()), 8)


def level(rank=0, processes=1):
    """The mean loss of a share of the first batch, by the network as it comes."""
    images, labels, _ = mask_toy.batches(rank, processes, ordered)[0]
    return float(nn.functional.cross_entropy(network().double()(images), labels).detach())


def fit(case, rank=0, processes=1, change=ordered):
    own = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    watch = Gradients()
    torch.manual_seed(0)
    module = make(network(), floor=level() * (1 if case == "um" else 1.2), **CASES[case]).double()
    module.floor *= 0.98
    options = QUIET | own | {"callbacks": [watch], "precision": "64-true", "enable_checkpointing": False}
    data = mask_toy.loader(rank, processes, change)
    Trainer(max_epochs=2, limit_val_batches=0, use_distributed_sampler=False, **options).fit(module, data, data)
    return {"gradients": watch.gradients, "losses": watch.losses, "floor": module.floor}


def an_outlier(images, labels, ids):
    labels = labels.clone()
    labels[1] = -1  # of the second process
    return images.double(), labels, ids


def estimate(rank=0, processes=1):
    own = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    module = LossEstimate(network(), keep=0.8, masks=2)
    images, labels, ids = draw()
    parts = [tuple(rows[i : i + 60][rank::processes] for rows in (images, labels, ids)) for i in range(0, 201, 50)]
    data = DataLoader(parts, None)
    options = QUIET | own | {"max_epochs": 1, "enable_checkpointing": False, "limit_val_batches": 0}
    Trainer(use_distributed_sampler=False, **options).fit(module, data, data)
    return module.findings()["estimate"]


def train(folder):
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(fit(case, rank, 2), folder / f"{case}.{rank}")
    torch.save(estimate(rank, 2), folder / f"estimate.{rank}")
    try:
        fit("um", rank, 2, an_outlier)
    except ValueError as error:
        (folder / f"refused.{rank}").write_text(str(error))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask")
    codes = forked.run(train, folder, processes=2, log=folder / "log")
    assert codes == [0, 0], (folder / "log").read_text()[-3000:]
    return folder


def read(folder, name):
    return [torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in (0, 1)]


def test_the_processes_are_on_different_sides_of_the_floor():
    assert level(0, 2) > level() > level(1, 2)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_one_process(trained, case):
    alone = fit(case)
    signs = {loss > alone["floor"] for loss in alone["losses"]}
    assert signs == {True, False} or case != "um"
    for process in read(trained, case):
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-9)
        assert len(process["gradients"]) == len(alone["gradients"]) == 10
        for gradients, expected in zip(process["gradients"], alone["gradients"], strict=True):
            assert gradients.keys() == expected.keys()
            for name, value in expected.items():
                torch.testing.assert_close(gradients[name], value, rtol=1e-8, atol=1e-10)


def test_the_estimate_is_that_of_one_process(trained):
    alone = estimate()
    for process in read(trained, "estimate"):
        assert process.keys() == alone.keys()
        assert process["losses"] == pytest.approx(alone["losses"], rel=1e-6)
        assert process["images"] == alone["images"]


def test_an_outlier_on_one_process_is_refused_by_both(trained):
    for rank in (0, 1):
        assert "the batch holds outliers" in (trained / f"refused.{rank}").read_text()
