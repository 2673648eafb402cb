"""Sets of images of one shape, in memory or on disk, read by rows."""

import copy
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.batch import Batch

Resize = Literal["squash", "crop", "pad"]
MODES = {1: "L", 3: "RGB"}
ROOT = Path(__file__).resolve().parent.parent


class ImageSet(Dataset[Batch], ABC):
    """Images of one shape with labels; ``images[rows]`` is a ``Batch`` whose ids are the rows.

    Attributes:
        shape: (C, H, W).
        labels: (N,) int64; -1 = not an ID image.
        source: where the images come from, for error messages.
    """

    shape: tuple[int, int, int]
    labels: Tensor
    source: str

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> Batch:
        return Batch(self.read(rows), self.labels[rows], rows)

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """Return the images of (B,) rows, uint8 (B, C, H, W); B may be 0."""

    @property
    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what the images are, without the labels."""

    def fingerprint(self) -> str:
        """SHA-256 of images (of a folder: names and file sizes), shape and labels."""
        return sha256(self.digest, str(self.shape), self.labels.numpy().tobytes())

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
        return self.images[rows]

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
        shape: (C, H, W), C being 3 (RGB) or 1 (grey): to what images are converted.
        resize: how files of another size are made to fit; ``None``: they are an error.
    """

    def __init__(
        self, root: Path, names: Sequence[str], labels: Tensor, shape: tuple[int, int, int], resize: Resize | None
    ) -> None:
        self.root, self.names, self.labels, self.shape, self.resize = root, names, labels, shape, resize
        self.source = str(root)

    def read(self, rows: Tensor) -> Tensor:
        """Decode the rows."""
        images = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        for image, row in zip(images, rows.tolist(), strict=True):
            pixels = read_image(self.root / self.names[row], self.shape, self.resize)
            image.copy_(torch.from_numpy(pixels).view(*self.shape[1:], -1).permute(2, 0, 1))
        return images

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the relative names, the file sizes and how they are resized."""
        return sha256(str(self.resize), *(f"{name}\0{(self.root / name).stat().st_size}\0" for name in self.names))


class Rows(ImageSet):
    """Some rows of a set, as a set of their own: ids count from 0."""

    def __init__(self, images: ImageSet, rows: Tensor) -> None:
        self.images, self.rows = images, rows
        self.shape, self.labels, self.source = images.shape, images.labels[rows], images.source

    def read(self, rows: Tensor) -> Tensor:
        """Read from the whole set."""
        return self.images.read(self.rows[rows])

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the whole set and the rows."""
        return sha256(self.images.digest, self.rows.numpy().tobytes())


class WithOutliers(ImageSet):
    """The set [ID; outliers]: outliers are labelled -1, and their ids continue after those of the ID images."""

    def __init__(self, known: ImageSet, outliers: ImageSet) -> None:
        self.known, self.outliers = known, outliers
        self.shape, self.source = known.shape, f"{known.source} with {outliers.source}"
        self.labels = torch.cat([known.labels, outliers.as_outliers().labels])

    def read(self, rows: Tensor) -> Tensor:
        """Read each row from the set it belongs to, keeping the order."""
        inside = rows < len(self.known)
        images = torch.empty((len(rows), *self.shape), dtype=torch.uint8)
        images[inside] = self.known.read(rows[inside])
        images[~inside] = self.outliers.read(rows[~inside] - len(self.known))
        return images

    @cached_property
    def digest(self) -> str:
        """SHA-256 of both sets."""
        return sha256(self.known.digest, self.outliers.digest)


def read_image(path: Path, shape: tuple[int, int, int], resize: Resize | None) -> np.ndarray:
    """Decode a file to uint8 (H, W, 3), or (H, W) for one channel; ``ValueError`` naming the file if that fails."""
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels are of mode {image.mode}, not 8 bits a channel")
            return np.array(fit_size(image.convert(MODES[shape[0]]), shape[1:], resize))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot use image {path}: {error}") from error


def fit_size(image: Image.Image, size: tuple[int, int], resize: Resize | None) -> Image.Image:
    """Bring an image to ``size`` (H, W).

    ``squash`` scales each side by itself; ``crop`` scales until the image covers the size and cuts out the centre;
    ``pad`` puts the unscaled image on a black ground, centred. Scaling is bilinear with antialiasing.
    """
    height, width = size
    if (image.height, image.width) == (height, width):
        return image
    if resize == "squash":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    if resize == "crop":
        if image.width * height >= image.height * width:
            covering = (image.width * height // image.height, height)
        else:
            covering = (width, image.height * width // image.width)
        left, top = round((covering[0] - width) / 2), round((covering[1] - height) / 2)
        scaled = image.resize(covering, Image.Resampling.BILINEAR)
        return scaled.crop((left, top, left + width, top + height))
    if resize == "pad" and image.height <= height and image.width <= width:
        ground = Image.new(image.mode, (width, height))
        ground.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return ground
    raise ValueError(
        f"it is {image.height}x{image.width} (HxW), {height}x{width} is wanted"
        + ("; padding cannot shrink it" if resize == "pad" else "; say how with resize: squash, crop or pad")
    )


def stratified_split(labels: Tensor, share: float, seed: int, classes: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Set aside a share of each class; return the rows that stay and those set aside, both in order."""
    aside = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels.numpy() == label)
        if not len(members):
            raise ValueError(f"there is no training image of class {name!r}: the classes are {', '.join(classes)}")
        count = round(len(members) * share)
        if not 0 < count < len(members):
            raise ValueError(
                f"a share of {share} would hold out {count} of the {len(members)} images of class {name!r}; "
                "both sides need at least one: change val_split"
            )
        aside.append(np.random.default_rng((seed, label)).permutation(members)[:count])
    held_out = np.zeros(len(labels), dtype=bool)
    held_out[np.concatenate(aside)] = True
    return torch.from_numpy(np.flatnonzero(~held_out)), torch.from_numpy(np.flatnonzero(held_out))


def anchored(path: str) -> Path:
    """Read a path of a configuration: relative ones count from the repository root, wherever the command runs."""
    return ROOT / path


def sha256(*parts: str | bytes | memoryview) -> str:
    """Hash parts one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()
