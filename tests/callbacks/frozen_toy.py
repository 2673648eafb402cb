"""A method on a frozen network, data for it, and ways to break its extraction."""

import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import yaml
from torch import nn
from torch.nn import functional

from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from datamodules.datamodule import OODDataModule
from datamodules.images import ArrayImages
from datamodules.sets import OODSet, Sets
from lightning_modules.evidence import EvidenceBatch, observe
from lightning_modules.ood_module import OODModule

TRAIN, OUTLIERS = 2500, 700  # 3 chunks, and 1 more with the outliers


class Net(DigitsNet):
    def __init__(self):
        random = torch.random.get_rng_state()
        torch.manual_seed(0)
        super().__init__(num_classes=3)
        torch.random.set_rng_state(random)


class Toy(OODModule):
    """A linear classifier, with dropout, on frozen features."""

    frozen = ("backbone",)

    def __init__(self, backbone: Backbone | None = None, cached: Sequence[str] = ("penultimate", "layer2")):
        super().__init__(backbone or Net(), lambda parameters: torch.optim.SGD(parameters, 0.1, 0.9))
        self.cached = cached
        self.classifier = nn.Linear(64, 3)
        nn.init.zeros_(self.classifier.weight)
        nn.init.zeros_(self.classifier.bias)
        self.seen, self.batches = [], []

    def encode(self, images):
        assert not torch.is_grad_enabled()
        self.seen.append(len(images))
        if log := os.environ.get("TOY_LOG"):  # what several processes encode
            with open(log, "a") as file:
                file.write(f"{len(images)}\n")
        if len(self.seen) == int(os.environ.get("TOY_KILL_AT", "-1")):
            os.kill(os.getpid(), signal.SIGKILL)
        if len(self.seen) == 4 and (wanted := os.environ.get("TOY_WAIT_FOR")):
            while not Path(wanted).exists():
                time.sleep(0.05)
        if os.environ.get("TOY_FAIL_RANK") == str(self.global_rank) and len(self.seen) == 3:
            raise ValueError("this rank cannot go on")
        return observe(self.backbone, images, self.cached)

    def forward(self, images):
        evidence = observe(self.backbone, images)
        return evidence._replace(logits=self.classifier(evidence.features["penultimate"]))

    def training_step(self, batch, batch_idx):
        self.batches.append(batch)
        evidence = batch.evidence if isinstance(batch, EvidenceBatch) else observe(self.backbone, batch.images)
        labels = batch[-2]
        logits = self.classifier(functional.dropout(evidence.features["penultimate"], 0.3))
        return functional.cross_entropy(logits[labels >= 0], labels[labels >= 0])


class Pixels(OODDataModule):
    def __init__(
        self,
        train: int = TRAIN,
        batch_size: int = 100,
        eval_batch_size: int = 256,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.25,),
        **kwargs,
    ):
        super().__init__(batch_size, eval_batch_size=eval_batch_size, mean=mean, std=std, **kwargs)
        self.train = train

    def load(self):
        def images(length, seed):
            generator = torch.Generator().manual_seed(seed)
            pixels = torch.randint(0, 256, (length, 1, 8, 8), dtype=torch.uint8, generator=generator)
            return ArrayImages(pixels, torch.arange(length) % 3, str(seed))

        return Sets(
            images(self.train, 0), images(30, 1), {"far": OODSet(images(20, 2))}, images(OUTLIERS, 3), list("abc")
        )


def experiment(folder, devices=1, **data):
    """Write the YAML of an experiment."""
    config = {
        "model": {"class_path": "frozen_toy.Toy"},
        "data": {"class_path": "frozen_toy.Pixels", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "devices": devices,
            "strategy": "ddp" if devices > 1 else "auto",
            "max_epochs": 2,
            "logger": False,
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "callbacks.frozen_features.FrozenFeatures"}],
        },
        "evaluation": {"figures": False},
    }
    path = folder / "toy.yaml"
    path.write_text(yaml.safe_dump(config))
    return path
