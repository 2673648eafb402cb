"""A latent space of points that trains in a moment, for the tests of the method."""

import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from backbones.autoencoders import Autoencoder
from backbones.backbone import Backbone
from lightning_modules.scores.class_density import ClassDensity
from lightning_modules.variational_metric import VariationalMetric

WIDTH, CLASSES, LATENT = 6, 3, 4
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Net(Backbone):
    """A hidden layer on the pixels, with batch-norm before its ReLU."""

    stages = ("layer1",)

    def __init__(self, classes=CLASSES, width=WIDTH, features=5):
        super().__init__(features, classes, (width, 1, 1))
        self.conv1, self.layer1 = nn.Conv2d(width, features, 1, bias=False), nn.BatchNorm2d(features)
        self.fc = nn.Linear(features, classes)

    def stem(self, images):
        return self.conv1(images)

    def finish(self, maps):
        return maps.relu()


class Squeeze(Autoencoder):
    """Half of the pixels are lost."""

    def __init__(self):
        super().__init__((WIDTH, 1, 1), WIDTH // 2)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, WIDTH // 2), nn.BatchNorm1d(WIDTH // 2))
        self.back = nn.Sequential(nn.Linear(WIDTH // 2, WIDTH), nn.Unflatten(1, (WIDTH, 1, 1)))

    def encode(self, images):
        return self.layers(images)

    def decode(self, latent):
        return self.back(latent)


class Alone(VariationalMetric):
    """Needs no trainer; its epoch is what a test says."""

    epoch, current_epoch = 0, property(lambda self: self.epoch)

    def all_gather(self, data, group=None, sync_grads=False):
        return data

    def log(self, *args, **kwargs):
        pass

    log_dict = log


def draw(number=240, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % CLASSES
    means = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    images = means[labels] + torch.randn(number, WIDTH, generator=generator)
    return images[..., None, None], labels, torch.arange(number)


def make(kind=VariationalMetric, backbone=Net, optimizer=None, taps=("layer1", "latent"), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9))
        module = kind(backbone(), ClassDensity(list(taps)), optimizer, **{"latent_dim": LATENT} | options)
    module.configure_model()
    return module


def train(module, epochs, steps=4, size=24, **options):
    batches = DataLoader([tuple(rows[i : i + size] for rows in draw()) for i in range(0, size * steps, size)], None)
    torch.manual_seed(0)
    options = {"max_epochs": epochs, "limit_val_batches": 0, "enable_checkpointing": False} | QUIET | options
    Trainer(**options).fit(module, batches, batches)
    return module


def state_of(module, prefix=""):
    return {name: value.clone() for name, value in module.state_dict().items() if name.startswith(prefix)}


def same(before, after):
    return all(torch.equal(value, after[name]) for name, value in before.items())
