"""The job of ``forwards`` and ``evaluation``: eight post-hoc scores of one network on six OOD sets."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from pytorch_lightning import Trainer
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from callbacks.evaluation import OODEvaluation
from datamodules.datamodule import OODDataModule
from datamodules.images import ArrayImages
from datamodules.sets import OODSet, Sets
from lightning_modules.classifier import Classifier
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import MSP, Energy, MaxLogit
from lightning_modules.scores.prototypes import KLMatching
from lightning_modules.scores.react import ReAct
from lightning_modules.scores.score import Score

CLASSES, BATCH, MEAN, STD = 10, 128, 0.5, 0.25
NEIGHBOUR, QUANTILE = 50, 0.95  # of kNN, of ReAct
# Images of each set of the CIFAR-10 protocol of OpenOOD 1.5, ID training images first.
SIZES = {
    "fit": 50_000,
    "id": 9_000,
    "cifar100": 9_000,
    "tin": 7_793,
    "mnist": 70_000,
    "svhn": 26_032,
    "texture": 5_640,
    "places365": 35_195,
}
CELLS = (8, 8, 7, 6, 4, 16, 2, 32)  # coarseness of each set's patterns, so that the scores differ between sets


def patterns(sizes: dict[str, int]) -> dict[str, Tensor]:
    """Draw uint8 (N, 3, 32, 32) images of random coloured cells, blurred into each other."""
    generator = torch.Generator().manual_seed(0)
    cells = (torch.rand(n, 3, side, side, generator=generator) for n, side in zip(sizes.values(), CELLS, strict=False))
    images = (F.interpolate(colours, size=32, mode="bilinear") for colours in cells)
    return {name: (255 * pixels).byte() for name, pixels in zip(sizes, images, strict=True)}


def normalize(images: Tensor) -> Tensor:
    """Turn uint8 images into what the network reads."""
    return (images.float() / 255 - MEAN) / STD


def labels_of(images: Tensor) -> Tensor:
    """Give ID images (N,) labels, the classes in turn."""
    return torch.arange(len(images)) % CLASSES


class Patterns(OODDataModule):
    """The images as a data module."""

    def __init__(self, images: dict[str, Tensor], **options: Any) -> None:
        super().__init__(**{"batch_size": BATCH, "mean": [MEAN], "std": [STD]} | options)
        self.images = images

    def load(self) -> Sets:
        known = {name: self.images[name] for name in ("fit", "id")}
        train, test = (ArrayImages(images, labels_of(images), name) for name, images in known.items())
        ood = {
            name: OODSet(ArrayImages(images, torch.zeros(len(images), dtype=torch.int64), name))
            for name, images in self.images.items()
            if name not in known
        }
        return Sets(train, test, ood, None, [str(label) for label in range(CLASSES)])


def settle(network: Backbone, images: Tensor) -> Backbone:
    """Set the statistics of batch-norm to those of the images, and switch to evaluation.

    Those of an untrained network are far from any: its features would all but coincide, and the covariance in the
    float32 of peers would be noise.
    """
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = None  # average over all batches
    network.train()
    with torch.no_grad():
        for batch in images.split(BATCH):
            network(normalize(batch))
    return network.eval()


def one_pass_scores() -> dict[str, Score]:
    """Make the eight scores, unfitted."""
    return {
        "msp": MSP(),
        "max_logit": MaxLogit(),
        "energy": Energy(),
        "kl_matching": KLMatching(),
        "mahalanobis": Mahalanobis(),
        "gmm": GMMEnergy(),
        "knn": KNN(NEIGHBOUR),
        "react": ReAct(QUANTILE),
    }


def run_ours(
    network: Backbone, images: dict[str, Tensor], more: dict[str, Score] | None = None, **options: Any
) -> OODEvaluation:
    """Fit and evaluate by way of ``Trainer.test``, as the command line does; no bootstrap, no figure, no file.

    Args:
        network: what is evaluated.
        images: what on.
        more: scores beside the eight.
        options: of the data module.
    """
    evaluation = OODEvaluation(one_pass_scores() | (more or {}), bootstrap=0, figures=False)
    module = Classifier(network, optimizer=torch.optim.SGD)
    with quiet():
        trainer = Trainer(
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            use_distributed_sampler=False,
            inference_mode=False,
            callbacks=[evaluation],
        )
        trainer.test(module, Patterns(images, **options), verbose=False)
    return evaluation


def run_bare(network: Backbone, images: dict[str, Tensor]) -> None:
    """Run the network once over the same batches and do nothing with what comes out: the physical limit."""
    with torch.inference_mode():
        for tensor in images.values():
            for batch in tensor.split(BATCH):
                network(normalize(batch))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence what Lightning says about devices, workers and what it uses of torch."""
    logger = logging.getLogger("pytorch_lightning")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            for expected in ("LeafSpec", "in eval mode", "does not have many workers"):
                warnings.filterwarnings("ignore", f".*{expected}")
            yield
    finally:
        logger.setLevel(level)


@contextmanager
def counted(network: Backbone) -> Iterator[list[int]]:
    """Collect the number of images of each forward pass, where they enter the first convolution."""
    seen: list[int] = []
    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    try:
        yield seen
    finally:
        hook.remove()
