"""Readers of public data sets: each makes a set of images from the folder of its source, whose layout it knows.

Files that are missing are a ``FileNotFoundError``, damaged ones a ``ValueError``; both name the file.
"""

import re
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.datasets.mnist import read_image_file, read_label_file
from torchvision.datasets.utils import check_integrity

from datamodules.fitting import Fit, fit_arrays
from datamodules.folders import find_classes, find_images, label_images
from datamodules.imagenet64 import join_batches
from datamodules.images import ArrayImages, FolderImages, ImageSet, sha256
from datamodules.packed import LMDBImages, MappedImages, channels_first

Reader = Callable[[Path, Fit], ImageSet]
T = TypeVar("T")

DIGITS = [str(digit) for digit in range(10)]
LSUN_CATEGORIES = (
    "bedroom",
    "bridge",
    "church_outdoor",
    "classroom",
    "conference_room",
    "dining_room",
    "kitchen",
    "living_room",
    "restaurant",
    "tower",
)
NOISE_SEED = 0


def cifar(folder: Path, fit: Fit, version: Literal[10, 100], train: bool) -> ArrayImages:
    """Read CIFAR-10 or CIFAR-100 (fine labels) from the Python pickles."""
    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[version]
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    sums = {folder / kind.base_folder / name: md5 for name, md5 in files}
    images = _verified(lambda: kind(folder, train=train), sums)
    return _in_memory(images.data, images.targets, images.classes, fit, folder / kind.base_folder)


def mnist(folder: Path, fit: Fit, name: Literal["MNIST", "FashionMNIST", "KMNIST"], train: bool) -> ArrayImages:
    """Read MNIST or a set of its form from unpacked idx files."""
    prefix = folder / name / "raw" / ("train" if train else "t10k")
    pixels = _idx(Path(f"{prefix}-images-idx3-ubyte"), read_image_file)
    labels = _idx(Path(f"{prefix}-labels-idx1-ubyte"), read_label_file)
    classes = DIGITS if name == "MNIST" else getattr(datasets, name).classes
    return _in_memory(pixels.numpy()[..., None], labels, classes, fit, prefix)


def svhn(folder: Path, fit: Fit) -> ArrayImages:
    """Read the cropped digits of SVHN's test split."""
    _, name, md5 = datasets.SVHN.split_list["test"]
    images = _verified(lambda: datasets.SVHN(folder, split="test"), {folder / name: md5})
    return _in_memory(images.data.transpose(0, 2, 3, 1), images.labels, DIGITS, fit, folder / name)


def tree(
    folder: Path,
    fit: Fit,
    below: str = ".",
    labelled: bool = False,
    invert: bool = False,
) -> FolderImages:
    """Read image files below a folder, at any depth, in the order of their names.

    Args:
        folder: where the source lies.
        fit: to what images are converted.
        below: the folder in it.
        labelled: each sub-folder is a class.
        invert: whether black and white are exchanged.
    """
    root = folder / below
    classes = find_classes(root) if labelled else []
    if labelled:
        names, labels = label_images(root, classes)
    else:
        names = find_images(root)
        labels = torch.full((len(names),), -1)
    images = FolderImages(root, names, labels, fit, invert)
    images.classes = classes
    return images


def textures_test(folder: Path, fit: Fit) -> FolderImages:
    """Read the test split of DTD's first partition."""
    listing = folder / "dtd/dtd/labels/test1.txt"
    return _listed(folder / "dtd/dtd/images", [name for (name,) in _lines(listing, "(.+)")], None, fit, listing)


def tiny_imagenet_val(folder: Path, fit: Fit) -> FolderImages:
    """Read the validation images of Tiny ImageNet; their labels are those of the training images."""
    root = folder / "tiny-imagenet-200"
    classes = find_classes(root / "train")
    listing = root / "val/val_annotations.txt"
    lines = _lines(listing, r"([^\t]+)\t([^\t]+)(?:\t.*)?")
    if unknown := sorted({wnid for _, wnid in lines} - set(classes)):
        raise ValueError(f"{listing} has images of {unknown[0]}, of which {root / 'train'} has none")
    labels = torch.tensor([classes.index(wnid) for _, wnid in lines])
    images = _listed(root / "val/images", [name for name, _ in lines], labels, fit, listing)
    images.classes = classes
    return images


def listed(folder: Path, fit: Fit, listing: str, root: str) -> FolderImages:
    """Read the images that a list of OpenOOD v1.5 names, in its order.

    Classes are called after the folders that their images lie in, where these are as many; else by number.

    Args:
        folder: where the source lies.
        fit: to what images are converted.
        listing: text file in it; a line holds a path, a blank and a label, -1 for OOD.
        root: folder in it that the paths count from.
    """
    lines = _lines(folder / listing, r"(.+?)\s+(-1|\d+)")
    labels = torch.tensor([int(label) for _, label in lines])
    images = _listed(folder / root, [name for name, _ in lines], labels, fit, folder / listing)
    numbers = list(range(int(labels.max()) + 1))
    folders = sorted({(int(label), Path(name).parent.name) for name, label in lines if label != "-1"})
    named = [label for label, _ in folders] == numbers and len({name for _, name in folders}) == len(numbers)
    images.classes = [name for _, name in folders] if named else [str(number) for number in numbers]
    return images


def lsun(folder: Path, fit: Fit, split: Literal["train", "val"]) -> LMDBImages:
    """Read the ten scene categories of LSUN, which are the labels.

    The first look at a split goes through all of it once: LMDB's Python binding touches each value that it passes.
    """
    images = LMDBImages([folder / f"{name}_{split}_lmdb" for name in LSUN_CATEGORIES], fit, str(folder))
    images.classes = LSUN_CATEGORIES
    return images


def downsampled_imagenet(folder: Path, fit: Fit) -> MappedImages:
    """Read ImageNet's training images at 64x64 from pickles; classes are called by the numbers 1..1000 in these.

    At first use they are written once more, as ``images.npy``, and mapped into memory from then on.
    """
    path, labels = join_batches(folder)
    images = MappedImages(path, fit, labels)
    images.classes = [str(number) for number in range(1, 1001)]
    return images


def npy(folder: Path, fit: Fit, file: str) -> MappedImages:
    """Map one ``.npy`` array of images, uint8 (N, H, W, C), into memory."""
    return MappedImages(folder / file, fit)


def mnist_noise(folder: Path, fit: Fit) -> "Noise":
    """Read MNIST's test images and add noise, U[0, 1) on the scale of the network's input."""
    images = mnist(folder, fit, "MNIST", train=False)
    return Noise(fit.shape, len(images), images)


def noise(folder: Path, fit: Fit, count: int) -> "Noise":
    """Make images that are nothing but noise, U[0, 1) on the scale of the network's input; no folder is needed."""
    return Noise(fit.shape, count)


class Noise(ImageSet):
    """Uniform noise over 0..1 as the network sees it, whose input is (image - 0.5) / 0.5: images get half of that.

    The noise of a row depends on nothing but the row. Images are float32 and are not clipped.

    Args:
        shape: (C, H, W).
        count: how many images.
        ground: images of that shape that the noise is added to; where not given, it is added to an input of zeros.
    """

    def __init__(self, shape: tuple[int, int, int], count: int, ground: ImageSet | None = None) -> None:
        self.shape, self.ground = shape, ground
        self.labels = torch.full((count,), -1)
        self.source = f"{ground.source} with noise" if ground is not None else "noise"

    def read(self, rows: Tensor) -> Tensor:
        """Draw the noise of the rows."""
        drawn = np.empty((len(rows), *self.shape), dtype=np.float32)
        for image, row in zip(drawn, rows.tolist(), strict=True):
            np.random.default_rng((NOISE_SEED, row)).random(dtype=np.float32, out=image)
        ground = 0.5 if self.ground is None else self.ground.read(rows) / 255
        return ground + torch.from_numpy(drawn) / 2

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the seed and of the images under the noise."""
        return sha256(f"noise {NOISE_SEED}", self.ground.digest if self.ground is not None else "")


def _verified(load: Callable[[], T], sums: dict[Path, str]) -> T:
    """Let torchvision load files whose MD5 sums it knows; where it refuses, say which is missing or damaged."""
    try:
        return load()
    except RuntimeError as error:
        for path, md5 in sums.items():
            if not path.is_file():
                raise FileNotFoundError(f"no file {path}") from error
            if not check_integrity(path, md5):
                raise ValueError(f"{path} is damaged: its MD5 sum is not {md5}") from error
        raise


def _idx(path: Path, read: Callable[[str], Tensor]) -> Tensor:
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    try:
        return read(str(path))
    except (ValueError, RuntimeError, AssertionError, LookupError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def _in_memory(
    pixels: np.ndarray, labels: Sequence[int] | np.ndarray | Tensor, classes: Sequence[str], fit: Fit, source: Path
) -> ArrayImages:
    """Bring (N, H, W, C) pixels to shape, all of them."""
    fitted = channels_first(fit_arrays(pixels, fit, str(source)))
    images = ArrayImages(fitted, torch.as_tensor(labels), str(source))
    images.classes = classes
    return images


def _lines(path: Path, pattern: str) -> list[tuple[str, ...]]:
    """Match each line of a list of images that is not blank; return the groups."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    groups = []
    for number, line in enumerate(path.read_text("utf-8", "replace").splitlines(), 1):
        match = re.fullmatch(pattern, line.strip())
        if match is None and line.strip():
            raise ValueError(f"{path}, line {number} does not name an image as it should: {line!r}")
        if match is not None:
            groups.append(match.groups())
    if not groups:
        raise ValueError(f"{path} names no image")
    return groups


def _listed(root: Path, names: Sequence[str], labels: Tensor | None, fit: Fit, listing: Path) -> FolderImages:
    """Make a set of the files that a list names, all of which must be there."""
    if missing := [root / name for name in names if not (root / name).is_file()]:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} images that {listing} names are missing, {missing[0]} first"
        )
    return FolderImages(root, names, torch.full((len(names),), -1) if labels is None else labels, fit)
