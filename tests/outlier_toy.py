"""Batches of points with outliers among them, and networks that train on them in a moment."""

import torch
from latent_toy import CLASSES, QUIET, Net
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_modules.outlier_exposure import OutlierExposure

KNOWN, UNKNOWN, STEPS = 16, 8, 3  # ID rows and outliers of a batch; batches of an epoch


class Plain(Net):
    """Without batch-norm, which sees the images of its own process alone."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Tanh()


class Dropping(Net):
    """With dropout behind its batch-norm."""

    def __init__(self):
        super().__init__()
        self.layer1 = nn.Sequential(nn.BatchNorm2d(5), nn.Dropout(0.5))


def batches(steps=STEPS, seed=0):
    """Return mixed batches, ID rows first as in paired plans."""
    generator, number = torch.Generator().manual_seed(seed), KNOWN + UNKNOWN
    labels = torch.arange(number) % CLASSES
    labels[KNOWN:] = -1
    images = torch.randn(steps, number, 6, 1, 1, generator=generator)
    return [(images[i] + 2 * labels[:, None, None, None], labels, torch.arange(number)) for i in range(steps)]


def make(kind=OutlierExposure, backbone=Net, lr=0.1, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = backbone()
    options = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr, momentum=0.9)} | options
    return kind(network, **options)


def train(module, epochs=1, data=None, **options):
    """Fit, and return the trainer."""
    torch.manual_seed(0)
    options = {"max_epochs": epochs, "limit_val_batches": 0, "enable_checkpointing": False} | QUIET | options
    data = batches() if data is None else data
    trainer = Trainer(**options)
    trainer.fit(module, DataLoader(data, None), DataLoader(data, None))
    return trainer


def weights(module):
    return {name: value.detach().clone() for name, value in module.backbone.named_parameters()}
