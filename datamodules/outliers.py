"""Auxiliary outliers: which images of a set, and how they are cut."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from datamodules.augmentation import random_crop, random_flip
from datamodules.duplicates import find_duplicates
from datamodules.images import ImageSet, sha256


@dataclass(frozen=True)
class OutlierPool:
    """Auxiliary outliers for training.

    Attributes:
        name: a set of the catalogue, or one of ``own``.
        pool: only so many consecutive images, from a random start among those after the first 10,000, and on from the
            beginning where the set ends; as Unleashing Mask reads its outliers.
        crop_padding: instead of scaling, put so many zero pixels around each image and cut a window of the size of the
            ID images out of it at random, mirrored or not; the same window every time.
    """

    name: str
    pool: int | None = None
    crop_padding: int | None = None

    def __post_init__(self) -> None:
        for option, least in (("pool", 1), ("crop_padding", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ValueError(f"outliers: {option} must be at least {least}, got {value}")

    def choose(self, images: ImageSet, seed: int) -> ImageSet:
        """Take the pool, from a start that is drawn by ``seed``.

        Raises:
            ValueError: there are not so many images.
        """
        if self.pool is not None and self.pool > len(images):
            raise ValueError(f"outliers: pool={self.pool}, but {self.name} offers only {len(images)} images")
        if self.pool in (None, len(images)):
            return images
        return images.take(consecutive(len(images), self.pool, seed).sort().values)


def draw_outliers(
    outliers: ImageSet,
    known: Mapping[str, ImageSet],
    count: int | None,
    seed: int,
    decode: Callable[[ImageSet], ImageSet],
) -> tuple[ImageSet, dict[str, int]]:
    """Draw outliers that are none of the ID images, pixel for pixel.

    Only what is drawn is read, however large the set. Windows of larger images are not compared: they are no one's.

    Args:
        outliers: to draw from.
        known: sets of ID images, by name.
        count: how many; all that are no ID images where not given.
        seed: of the drawing.
        decode: makes images fast to read.

    Returns:
        The outliers, in the order of the set; and set of ID images -> how many that were drawn are among these, and
        were left out.

    Raises:
        ValueError: there are not so many.
    """
    length = len(outliers)
    wanted, known = length if count is None else count, {} if outliers.final else known
    order = torch.from_numpy(np.random.default_rng(seed).permutation(length))
    rows, looked_at, removed = order[:0], 0, dict.fromkeys(known, 0)
    while len(rows) < wanted and looked_at < length:
        drawn = order[looked_at : looked_at + wanted - len(rows)].sort().values
        looked_at += len(drawn)
        duplicate = torch.zeros(len(drawn), dtype=torch.bool)
        chosen = decode(outliers if len(drawn) == length else outliers.take(drawn)) if known else outliers
        for name, found in find_duplicates(chosen, known).items():
            removed[name] += int(found.sum())
            duplicate |= found
        rows = torch.cat([rows, drawn[~duplicate]])
    removed = {name: number for name, number in removed.items() if number}
    if len(rows) < (1 if count is None else count):
        others = "".join(f", {number} of them also images of {name}" for name, number in removed.items())
        asked = "no outliers are left" if count is None else f"num_outliers={count}, but only {len(rows)} are left"
        raise ValueError(f"{asked} of {outliers.source}, which has {length} images{others}")
    return outliers if len(rows) == length else outliers.take(rows.sort().values), removed


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
