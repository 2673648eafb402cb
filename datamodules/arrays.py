"""Images from ``.npz`` files of arrays."""

import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from datamodules.datamodule import OODDataModule
from datamodules.fitting import MODES, Fit, Resize, fit_arrays
from datamodules.images import ArrayImages, anchored
from datamodules.sets import Group, OODSet, Sets


@dataclass
class ArraySet:
    """An ``.npz`` file, and how its images are made to fit the ID images.

    Attributes:
        path: holds ``images``, uint8 (N, H, W, C) with 1 or 3 channels or (N, H, W), and for ID images integer
            ``labels``.
        group: near to the ID data or far from it; of OOD sets only.
        limit: take the first so many rows.
        resize: ``squash`` both sides, ``crop`` the centre after scaling the shorter side, or ``pad`` with zeros, to the
            size of the ID images.
        channels: convert to 1 (grey) or 3 channels; grey becomes three equal ones.
    """

    path: str
    group: Group = "far"
    limit: int | None = None
    resize: Resize | None = None
    channels: Literal[1, 3] | None = None


class Arrays(OODDataModule):
    """Images that lie in ``.npz`` files, read into memory.

    Args:
        test: ID test images.
        train: ID training images.
        ood: OOD test images by name.
        outliers: auxiliary outliers for training.
        num_classes: K; where not given, one more than the greatest ID label.
        kwargs: as for ``OODDataModule``.
    """

    remedy = "Where that is meant, set `resize` (squash, crop or pad) or `channels` (1 or 3) of the set."

    def __init__(
        self,
        test: str | ArraySet,
        train: str | ArraySet | None = None,
        ood: dict[str, ArraySet] | None = None,
        outliers: ArraySet | None = None,
        num_classes: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.files: dict[str, str | ArraySet | None] = {"train": train, "test": test, "outliers": outliers}
        self.ood, self.given_classes = ood or {}, num_classes

    def load(self) -> Sets:
        """Read and convert the files; the size of the training images, or else of the test images, is that of all."""
        known: dict[str, ArrayImages] = {}
        size: tuple[int, int] | None = None
        for name in ("train", "test"):
            file = self.files[name]
            if file is not None:
                known[name] = load_arrays(ArraySet(file) if isinstance(file, str) else file, size, labelled=True)
                size = known[name].shape[1:]
        outliers = self.files["outliers"]
        count = self.given_classes or 1 + max(int(images.labels.max()) for images in known.values())
        return Sets(
            train=known.get("train"),
            test=known["test"],
            ood={name: OODSet(load_arrays(ood, size), ood.group) for name, ood in self.ood.items()},
            outliers=load_arrays(outliers, size) if isinstance(outliers, ArraySet) else None,
            classes=[str(label) for label in range(count)],
        )


def load_arrays(source: ArraySet, size: tuple[int, int] | None = None, labelled: bool = False) -> ArrayImages:
    """Read a set and bring it to ``size`` (H, W) if its options say how; without ``size`` it keeps its own.

    Images without labels are labelled -1, unless they must be ``labelled``.
    """
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"{source.path}: limit must be at least 1, got {source.limit}")
    if source.resize is not None and size is None:
        raise ValueError(f"{source.path} itself says how large ID images are: resize={source.resize} has no aim there")
    images, labels = read_arrays(anchored(source.path))
    if labels is None and labelled:
        raise ValueError(f"{source.path}: ID images need `labels`, an integer array with one value for each image")
    images = images[: source.limit]
    labels = np.full(len(images), -1) if labels is None else labels[: source.limit]
    channels = source.channels or images.shape[3]
    if channels not in MODES:
        raise ValueError(f"{source.path}: channels must be 1 (grey) or 3 (colour), got {channels}")
    height, width = size if size is not None and source.resize is not None else images.shape[1:3]
    images = fit_arrays(images, Fit((channels, height, width), source.resize), source.path)
    arrays = ArrayImages(torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels), source.path)
    arrays.origin = str(anchored(source.path).resolve())
    return arrays


def read_arrays(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Read uint8 (N, H, W, C) images and, where there are any, int64 (N,) labels.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read, or holds something else; the message names the file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {path} (a relative path counts from the repository root)")
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("images", "labels") if name in file.files}
            keys = ", ".join(file.files)
    except (OSError, ValueError, EOFError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path} cannot be read as an .npz file of plain arrays: {error}") from error
    if "images" not in arrays:
        raise ValueError(f"{path}: no array `images`; it holds: {keys}")
    images, labels = arrays["images"], arrays.get("labels")
    if images.dtype != np.uint8:
        raise ValueError(f"{path}: images must be uint8 (0..255), these are {images.dtype}")
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[3] not in MODES or not images.size:
        raise ValueError(
            f"{path}: images must be (N, H, W, C) with C = 1 or 3, or (N, H, W), N > 0; these are "
            f"{arrays['images'].shape}"
        )
    if labels is None:
        return images, None
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: {len(images)} images, but labels of shape {labels.shape}; one for each is wanted")
    if labels.dtype.kind not in "iu":
        row = int(np.argmax(labels != np.floor(labels))) if labels.dtype.kind == "f" else 0
        raise ValueError(f"{path}: labels must be integers, these are {labels.dtype}, row {row} has {labels[row]}")
    return images, labels.astype(np.int64)
