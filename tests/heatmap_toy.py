"""Heatmaps in a moment: a network of pixels, images with known neighbours, and the decoder by its published names."""

import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.nn import functional

from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from backbones.heatmap_decoder import HeatmapDecoder
from callbacks.frozen_features import FrozenFeatures
from callbacks.pairing import Pairing
from datamodules.datamodule import OODDataModule
from datamodules.images import ArrayImages
from datamodules.sets import OODSet, Sets
from lightning_modules.heatmap import Heatmap

CLASSES, KNOWN, OUTLIERS, BATCH = 5, 90, 40, 16
FEATURES = 64
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Pixels(Backbone):
    """Its features are the pixels; the class is where the largest of the first ones is."""

    def __init__(self):
        super().__init__(FEATURES, CLASSES, (1, 8, 8))
        self.fc = nn.Linear(FEATURES, CLASSES)
        with torch.no_grad():
            self.fc.weight.copy_(torch.eye(CLASSES, FEATURES))
            self.fc.bias.zero_()

    def stem(self, images):
        return images.flatten(1)


def planted(outliers=OUTLIERS):
    """Make bytes whose first pixels say the class, by a difference of one: ID images, outliers, and their classes.

    Both classes are interleaved along the rows, no ID image is of the last class, some ID images are there twice, and
    outliers are ID images with noise, most of another class.
    """
    generator = torch.Generator().manual_seed(0)
    known = torch.randint(0, 256, (KNOWN, FEATURES), dtype=torch.uint8, generator=generator)
    known[60:] = known[:30]
    classes = torch.arange(KNOWN) * 7 % (CLASSES - 1)
    classes[60:] = classes[:30]
    copied = torch.randint(0, KNOWN, (outliers,), generator=generator)
    noise = torch.randint(-9, 10, (outliers, FEATURES), generator=generator)
    unknown = (known[copied] + noise).clamp(0, 255).to(torch.uint8)
    theirs = torch.arange(outliers) * 3 % CLASSES
    for images, labels in ((known, classes), (unknown, theirs)):
        images[:, :CLASSES] = 8
        images[torch.arange(len(images)), labels] = 9
    return known.view(-1, 1, 8, 8), unknown.view(-1, 1, 8, 8), classes, theirs


class Planted(OODDataModule):
    """Labels are not what the network predicts."""

    def __init__(self, **options):
        defaults = {"outlier_feed": "mixed", "drop_last": False, "eval_batch_size": 32, "mean": [0.5], "std": [0.5]}
        super().__init__(**{"batch_size": BATCH} | defaults | options)

    def load(self):
        known, unknown, classes, theirs = planted()
        labels = torch.where(torch.arange(KNOWN) % 9 > 0, (classes + 1) % (CLASSES - 1), CLASSES - 1)
        train = ArrayImages(known, labels, "train")
        test = ArrayImages(known[:30].flip(3), classes[:30], "test")
        ood = {"far": OODSet(ArrayImages(unknown.flip(3), theirs, "far"))}
        return Sets(train, test, ood, ArrayImages(unknown, theirs, "outliers"), list("abcde"))


class Watched(Heatmap):
    """Keeps what it trains on, and the losses."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches, self.losses = [], []

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.batches.append(batch)
        self.losses.append(loss.item())
        return loss


def adam(parameters):
    return torch.optim.Adam(parameters, 2e-4, betas=(0.5, 0.999))


def digits_net():
    """Return a network whose statistics are not those of a fresh one."""
    with torch.random.fork_rng():
        torch.manual_seed(4)
        network = DigitsNet(num_classes=CLASSES)
        for _ in range(3):
            network(torch.randn(20, 1, 8, 8))
    return network.eval()


def scaled(module, low=-0.5, high=2.0):
    """Say what the features are scaled by, as if it was fitted."""
    if module.minmax is not None:
        state = {"low": torch.tensor(low), "high": torch.tensor(high), "finished": torch.tensor(1)}
        module.minmax.load_state_dict(state)
    return module


def small_decoder(num_classes=CLASSES, features=FEATURES, channels=1, widths=(16, 8)):
    return HeatmapDecoder(features, num_classes, 12, widths, channels)


def make(backbone=None, decoder=None, **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone = backbone or Pixels()
        decoder = decoder or small_decoder(backbone.num_classes)
    return Watched(backbone, decoder, **{"optimizer": adam} | options)


def fit(folder, module=None, data=None, pairing="nearest", on_device=False, callbacks=(), epochs=1, **options):
    """Train on pairs; return module, data and the pairing."""
    module, data = module or make(), data or Planted()
    pairs = Pairing(pairing)
    watched = [FrozenFeatures(folder=str(folder), on_device=on_device), pairs, *callbacks]
    quiet = {"enable_checkpointing": False, "num_sanity_val_steps": 0, "max_epochs": epochs} | QUIET
    torch.manual_seed(0)
    Trainer(callbacks=watched, **quiet | options).fit(module, data)
    return module, data, pairs


def liven(decoder):
    """Give a decoder weights and statistics as training might: a fresh one says nearly 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        decoder.linear.weight.normal_(0, 0.3, generator=generator)
        for module in decoder.modules():
            if isinstance(module, nn.ConvTranspose2d):
                module.weight.normal_(0, (4 * module.in_channels) ** -0.5, generator=generator)
            if isinstance(module, nn.BatchNorm2d):
                for values in (module.weight, module.running_var):
                    values.uniform_(0.5, 1.5, generator=generator)
                for values in (module.bias, module.running_mean):
                    values.normal_(0, 0.3, generator=generator)
        decoder.last.weight.mul_(2)
    return decoder


def published(decoder):
    """Name a decoder's state as in the authors' files."""
    blocks = len(decoder.blocks)
    names = {"linear": "fc1", "last": f"conv_block{blocks + 1}.0"}
    names |= {f"blocks.{i}": f"conv_block{i + 1}" for i in range(blocks)}
    state = {}
    for name, value in decoder.state_dict().items():
        module = next(ours for ours in names if name.startswith(f"{ours}."))
        state[names[module] + name.removeprefix(module)] = value
    return state


def decode(state, features, classes, num_classes, training=False, added=None):
    """Run the decoder with a published state dict; ``added``: number of the block -> the map added behind it."""
    one_hot = (classes[:, None] == torch.arange(num_classes)).to(features.dtype)
    maps = torch.cat([features, one_hot], 1) @ state["fc1.weight"].T + state["fc1.bias"]
    maps = maps[:, :, None, None]
    blocks = sum(name.endswith("running_mean") for name in state)
    for block in range(1, blocks + 1):
        name, first = f"conv_block{block}", block == 1
        maps = functional.conv_transpose2d(
            maps, state[f"{name}.0.weight"], stride=1 if first else 2, padding=0 if first else 1
        )
        mean, variance = (state[f"{name}.1.running_{part}"].clone() for part in ("mean", "var"))
        maps = functional.batch_norm(
            maps, mean, variance, state[f"{name}.1.weight"], state[f"{name}.1.bias"], training
        ).relu()
        if added and block in added:
            maps = maps + added[block]
    return torch.tanh(functional.conv_transpose2d(maps, state[f"conv_block{blocks + 1}.0.weight"]))
