"""A trained classifier of points that trains in a moment, for the tests of Unleashing Mask."""

import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from backbones.backbone import Backbone
from lightning_modules.losses.cross_entropy import cross_entropy
from lightning_modules.unleashing_mask import UnleashingMask

WIDTH, CLASSES, ROWS, SIZE = 6, 3, 240, 48
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Net(Backbone):
    """Two hidden layers with batch-norm, unless told otherwise."""

    stages = ("layer1", "layer2")

    def __init__(self, norm=nn.BatchNorm2d):
        super().__init__(24, CLASSES, (WIDTH, 1, 1))
        self.conv1, self.layer1 = nn.Conv2d(WIDTH, 24, 1), nn.Sequential(norm(24), nn.ReLU())
        self.layer2 = nn.Sequential(nn.Conv2d(24, 24, 1), norm(24), nn.ReLU())
        self.fc = nn.Linear(24, CLASSES)

    def stem(self, images):
        return self.conv1(images)


def draw():
    """Points of three classes that overlap: some are atypical."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(ROWS) % CLASSES
    means = 1.2 * torch.randn(CLASSES, WIDTH, generator=generator)
    images = means[labels] + torch.randn(ROWS, WIDTH, generator=generator)
    return images[..., None, None], labels, torch.arange(ROWS)


def batches(rank=0, processes=1, change=None):
    parts = [tuple(rows[start : start + SIZE] for rows in draw()) for start in range(0, ROWS, SIZE)]
    if change is not None:
        parts = [change(*part) for part in parts]
    return [tuple(rows[rank::processes] for rows in part) for part in parts]


def loader(rank=0, processes=1, change=None):
    return DataLoader(batches(rank, processes, change), None)


def converge(network, steps=400):
    """Train until hardly any loss is left."""
    images, labels, _ = draw()
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval()


def trained(norm=nn.BatchNorm2d):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return converge(Net(norm))


def make(network, lr=0.05, **options):
    def sgd(parameters):
        return torch.optim.SGD(parameters, lr, momentum=0.9, weight_decay=1e-4)

    module = UnleashingMask(network, sgd, **{"floor": 0.15} | options)
    module.configure_model()
    return module


def fit(module, epochs=1, data=None, **options):
    options = {"max_epochs": epochs, "limit_val_batches": 0, "enable_checkpointing": False} | QUIET | options
    data = loader() if data is None else data
    trainer = Trainer(**options)
    trainer.fit(module, data, data)
    return trainer


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}
