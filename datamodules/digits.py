"""The scanned digits of scikit-learn as an open-set problem; nothing to download."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from datamodules.datamodule import OODDataModule
from datamodules.images import ArrayImages, Rows
from datamodules.sets import OODSet, Sets
from datamodules.splits import stratified_split

OOD_NAMES = ("photograph", "noise")
NOISE_IMAGES = 500


class Digits(OODDataModule):
    """The first of the ten digits are ID, 60% of the scans for training; grey images of 8x8 pixels.

    OOD are the other digits (``unknown``, near), patches of a photograph (``photograph``, far) and uniform noise
    (``noise``, far). Patches of another photograph are auxiliary outliers.

    Args:
        known: as for ``OODDataModule``.
        ood: which OOD sets to test on, beside the other digits.
        kwargs: as for ``OODDataModule``.
    """

    def __init__(self, known: int | None = 6, ood: tuple[str, ...] = OOD_NAMES, **kwargs: Any) -> None:
        super().__init__(known=known, **kwargs)
        self.ood = ood
        if missing := sorted(set(ood) - set(OOD_NAMES)):
            raise ValueError(f"Digits has no OOD set {', '.join(missing)}; it has: {', '.join(OOD_NAMES)}")

    def load(self) -> Sets:
        """Make all sets."""
        pixels, digits = load_digits(return_X_y=True)
        images = torch.from_numpy(np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))
        labels = torch.from_numpy(digits)
        classes = [str(digit) for digit in range(10)]
        scans = ArrayImages(images, labels, "digits")
        train, test = stratified_split(labels, 0.4, self.split_seed, classes)
        noise = np.random.default_rng(self.split_seed).integers(0, 256, (NOISE_IMAGES, 1, 8, 8), dtype=np.uint8)
        ood = {
            "photograph": OODSet(_unlabelled(cut_patches("china.jpg"), "china.jpg")),
            "noise": OODSet(_unlabelled(torch.from_numpy(noise), "noise")),
        }
        return Sets(
            train=Rows(scans, train),
            test=Rows(scans, test),
            ood={name: ood[name] for name in self.ood},
            outliers=_unlabelled(cut_patches("flower.jpg"), "flower.jpg"),
            classes=classes,
        )


def cut_patches(name: str, size: int = 8, shrink: int = 3) -> Tensor:
    """Cut one of scikit-learn's photographs, grey and shrunken, into patches side by side: uint8 (N, 1, size, size).

    Shrinking leaves patches with the edges of things in them; at full size most are flat.
    """
    photograph = Image.fromarray(load_sample_image(name)).convert("L").reduce(shrink)
    patches = torch.from_numpy(np.array(photograph)).unfold(0, size, size).unfold(1, size, size)
    return patches.reshape(-1, 1, size, size)


def _unlabelled(images: Tensor, source: str) -> ArrayImages:
    return ArrayImages(images, torch.full((len(images),), -1), source)
