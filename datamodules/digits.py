"""The scanned digits of scikit-learn as an open-set problem; nothing to download."""

from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits, load_sample_image
from torch import Tensor

from datamodules.datamodule import OODDataModule, OODSet, Sets
from datamodules.images import ArrayImages, Rows, stratified_split

OOD_NAMES = ("held_out", "photograph", "noise")
NOISE_IMAGES = 500


class Digits(OODDataModule):
    """Some of the ten digits are ID, 60% of them for training; grey images of 8x8 pixels.

    OOD are the other digits (``held_out``, near), patches of a photograph (``photograph``, far) and uniform noise
    (``noise``, far). Patches of another photograph are auxiliary outliers.

    Args:
        known: the digits that are ID; their classes are numbered in ascending order.
        ood: which OOD sets to test on.
        kwargs: as for ``OODDataModule``.
    """

    def __init__(
        self, known: tuple[int, ...] = (0, 1, 2, 3, 4, 5), ood: tuple[str, ...] = OOD_NAMES, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.known, self.ood = sorted(set(known)), ood
        if not self.known or not set(self.known) < set(range(10)):
            raise ValueError(
                f"known must be some of the digits 0..9 but not all ten, for held_out needs others; got {tuple(known)}"
            )
        if unknown := sorted(set(ood) - set(OOD_NAMES)):
            raise ValueError(f"Digits has no OOD set {', '.join(unknown)}; it has: {', '.join(OOD_NAMES)}")

    def load(self) -> Sets:
        """Make all sets."""
        pixels, digits = load_digits(return_X_y=True)
        images = torch.from_numpy(np.rint(pixels.reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8))
        is_known = torch.from_numpy(np.isin(digits, self.known))
        labels = torch.from_numpy(np.searchsorted(self.known, digits))[is_known]
        classes = [str(digit) for digit in self.known]
        known = ArrayImages(images[is_known], labels, "digits")
        train, test = stratified_split(labels, 0.4, self.split_seed, classes)
        noise = np.random.default_rng(self.split_seed).integers(0, 256, (NOISE_IMAGES, 1, 8, 8), dtype=np.uint8)
        ood = {
            "held_out": OODSet(_unlabelled(images[~is_known], "held-out digits"), "near"),
            "photograph": OODSet(_unlabelled(cut_patches("china.jpg"), "china.jpg"), "far"),
            "noise": OODSet(_unlabelled(torch.from_numpy(noise), "noise"), "far"),
        }
        return Sets(
            train=Rows(known, train),
            test=Rows(known, test),
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
