"""Sets of images of one shape, in memory or on disk, read by rows."""

import copy
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import Batch
from datamodules.fitting import Fit, read_image

ROOT = Path(__file__).resolve().parent.parent


class ImageSet(Dataset[Batch], ABC):
    """Images of one shape with labels; ``images[rows]`` is a ``Batch`` whose ids are the rows.

    Attributes:
        shape: (C, H, W).
        labels: (N,) int64; -1 = not an ID image.
        source: what the set is called in messages and records.
        origin: the collection that the pictures were taken from; sets of one origin may share pictures. Empty: unknown.
        final: whether images are used as they are, even in training; else they may be augmented.
        classes: names of the labels, where the set knows them.
    """

    shape: tuple[int, int, int]
    labels: Tensor
    source: str
    origin: str = ""
    final: bool = False
    classes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.read(rows), self.labels[rows], rows)

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """Return the images of (B,) rows, (B, C, H, W), uint8 or float32 with 1 for white; B may be 0."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what the images are, without the labels."""

    def fingerprint(self) -> str:
        """SHA-256 of images (of a folder: names and file sizes), shape and labels."""
        return sha256(self.digest, str(self.shape), self.labels.numpy().tobytes())

    def stamp(self) -> str | None:
        """SHA-256 of where the files are that images are decoded from, and when these changed; ``None``: none are."""
        return None

    def take(self, rows: Tensor) -> "ImageSet":
        """Return some rows as a set of their own, whose ids count from 0."""
        return Rows(self, rows)

    def as_outliers(self) -> "ImageSet":
        """Return the same images, labelled -1."""
        outliers = copy.copy(self)
        outliers.labels = torch.full_like(self.labels, -1)
        return outliers


class ArrayImages(ImageSet):
    """Images in memory: uint8 (N, C, H, W), and integer labels (N,)."""

    def __init__(self, images: Tensor, labels: Tensor, source: str) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4:
            raise ValueError(
                f"{source}: images must be uint8 of shape (N, C, H, W), these are {images.dtype} {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise ValueError(
                f"{source}: {len(images)} images need as many int64 labels, these are {labels.dtype} of shape "
                f"{tuple(labels.shape)}"
            )
        self.images, self.labels, self.source = images.contiguous(), labels, source
        self.shape = (images.shape[1], images.shape[2], images.shape[3])

    def read(self, rows: Tensor) -> Tensor:
        """Select the rows."""
        return self.images.index_select(0, rows)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the pixels."""
        return sha256(self.images.numpy().data)


class FolderImages(ImageSet):
    """Image files, decoded when they are asked for.

    Args:
        root: folder of the files.
        names: the files, relative to ``root``.
        labels: (N,) int64.
        fit: to what images are converted.
        invert: whether black and white are exchanged.
    """

    def __init__(self, root: Path, names: Sequence[str], labels: Tensor, fit: Fit, invert: bool = False) -> None:
        self.root, self.names, self.labels, self.fit, self.invert = root, names, labels, fit, invert
        self.shape, self.source = fit.shape, str(root)

    def read(self, rows: Tensor) -> Tensor:
        """Decode the rows."""
        images = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            pixels = read_image(self.root / self.names[row], self.fit)
            image.copy_(torch.from_numpy(pixels).view(*self.shape[1:], -1).permute(2, 0, 1))
        return 255 - images if self.invert else images

    def take(self, rows: Tensor) -> ImageSet:
        """Return some of the files: of the others it need not be known how large they are."""
        names = [self.names[row] for row in rows.tolist()]
        taken = FolderImages(self.root, names, self.labels[rows], self.fit, self.invert)
        taken.source, taken.origin, taken.final = self.source, self.origin, self.final
        return taken

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the relative names, the file sizes and how they are converted."""
        conversion = f"{self.fit.resize}{' inverted' * self.invert}"
        sizes = self._sizes_and_times[:, 0].tolist()
        return sha256(conversion, *(f"{name}\0{size}\0" for name, size in zip(self.names, sizes, strict=True)))

    def stamp(self) -> str:
        """SHA-256 of the folder and of when each file last changed."""
        return sha256(str(self.root.resolve()), self._sizes_and_times[:, 1].tobytes())

    @cached_property
    def _sizes_and_times(self) -> np.ndarray:
        stats = ((self.root / name).stat() for name in self.names)
        return np.fromiter(((stat.st_size, stat.st_mtime_ns) for stat in stats), np.dtype((np.int64, 2)))


class Rows(ImageSet):
    """Some rows of a set, as a set of their own: ids count from 0.

    Args:
        images: the whole set.
        rows: (N,) which.
        labels: of all images of the whole set, where they are not to be its own.
    """

    def __init__(self, images: ImageSet, rows: Tensor, labels: Tensor | None = None) -> None:
        self.images, self.rows = images, rows
        self.labels = (images.labels if labels is None else labels)[rows]
        self.shape, self.source, self.origin, self.final = images.shape, images.source, images.origin, images.final

    def read(self, rows: Tensor) -> Tensor:
        """Read from the whole set."""
        return self.images.read(self.rows[rows])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole set and the rows."""
        return sha256(self.images.digest, self.rows.numpy().tobytes())

    def stamp(self) -> str | None:
        """Return that of the whole set."""
        return self.images.stamp()


class WithOutliers(ImageSet):
    """The set [ID; outliers]: outliers are labelled -1, and their ids continue after those of the ID images."""

    def __init__(self, known: ImageSet, outliers: ImageSet) -> None:
        self.known, self.outliers = known, outliers
        self.shape, self.source = known.shape, f"{known.source} with {outliers.source}"
        self.labels = torch.cat([known.labels, outliers.as_outliers().labels])

    def read(self, rows: Tensor) -> Tensor:
        """Read each row from the set it belongs to, keeping the order."""
        inside = rows < len(self.known)
        parts = self.known.read(rows[inside]), self.outliers.read(rows[~inside] - len(self.known))
        both_bytes = all(part.dtype == torch.uint8 for part in parts)
        known, outliers = (part if both_bytes else to_float(part) for part in parts)
        images = torch.empty((len(rows), *self.shape), dtype=known.dtype)
        images[inside], images[~inside] = known, outliers
        return images

    @cached_property
    def digest(self) -> str:
        """SHA-256 of both sets."""
        return sha256(self.known.digest, self.outliers.digest)


def to_float(images: Tensor) -> Tensor:
    """Turn bytes into float32 in [0, 1]; images of floats stay as they are."""
    return images.float() / 255 if images.dtype == torch.uint8 else images


def anchored(path: str) -> Path:
    """Read a path of a configuration: relative ones count from the repository root, wherever the command runs."""
    return ROOT / path


def data_root(root: str | None = None) -> Path:
    """Locate the folder of all data: as given, else by the environment variable ``OOD_DATA``, else ``data``."""
    return anchored(root or os.environ.get("OOD_DATA", "data"))


def sha256(*parts: str | bytes | memoryview) -> str:
    """Hash parts one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
