"""Auxiliary outliers: which images of a set, and how they are cut."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from datamodules.augmentation import random_crop, random_flip
from datamodules.images import ImageSet, Rows, sha256
from datamodules.splits import draw


@dataclass(frozen=True)
class OutlierPool:
    """Auxiliary outliers for training, drawn by ``split_seed``.

    Attributes:
        name: a set of the catalogue, or one of ``own``.
        pool: only so many consecutive images, from a random start among those after the first 10,000, and on from the
            beginning where the set ends; as Unleashing Mask reads its outliers.
        limit: draw so many of these.
        crop_padding: instead of scaling, put so many zero pixels around each image and cut a window of the size of the
            ID images out of it at random, mirrored or not; the same window every time.
    """

    name: str
    pool: int | None = None
    limit: int | None = None
    crop_padding: int | None = None

    def __post_init__(self) -> None:
        for option, least in (("pool", 1), ("limit", 1), ("crop_padding", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"outliers: {option} must be at least {least}, got {value}")

    def choose(self, images: ImageSet, seed: int) -> ImageSet:
        """Take the pool, and draw from it.

        Raises:
            ValueError: there are not so many images.
        """
        rows = torch.arange(len(images))
        for option in ("pool", "limit"):
            count = getattr(self, option)
            if count is None:
                continue
            if count > len(rows):
                raise ValueError(f"outliers: {option}={count}, but {self.name} offers only {len(rows)} images")
            rows = consecutive(len(images), count, seed) if option == "pool" else rows[draw(len(rows), count, seed)]
        return images if len(rows) == len(images) else Rows(images, rows.sort().values)


def consecutive(length: int, count: int, seed: int, skipped: int = 10_000) -> Tensor:
    """Choose consecutive rows, in a circle, from a random start after the first ``skipped`` (of a long enough set)."""
    start = int(np.random.default_rng(seed).integers(skipped if length > skipped else 0, length))
    return (start + torch.arange(count)) % length


class RandomWindows(ImageSet):
    """Windows at random places of larger images, mirrored or not: each row always the same, in training too.

    Args:
        images: the whole images.
        size: side of the window.
        padding: zero pixels around the whole images.
        seed: what place and mirroring of a row are drawn from, beside the row.
    """

    final = True

    def __init__(self, images: ImageSet, size: int, padding: int, seed: int) -> None:
        self.images, self.size, self.padding, self.seed = images, size, padding, seed
        self.labels, self.source, self.origin = images.labels, images.source, images.origin
        self.shape = (images.shape[0], size, size)

    def read(self, rows: Tensor) -> Tensor:
        """Read the whole images and cut."""
        windows = random_crop(self.images.read(rows), self.padding, rows, self.seed, 0, self.size)
        return random_flip(windows, rows, self.seed, 0)

    def stamp(self) -> str | None:
        """Return that of the whole images."""
        return self.images.stamp()

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole images and of how they are cut."""
        return sha256(self.images.digest, f"{self.size} {self.padding} {self.seed}")
