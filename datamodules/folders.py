"""Images that lie as files in folders."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from datamodules.datamodule import OODDataModule
from datamodules.fitting import Fit, Resize
from datamodules.images import FolderImages, anchored
from datamodules.sets import Group, OODSet, Sets


@dataclass
class FolderSet:
    """A folder of images, searched to any depth, in the order of their names.

    Attributes:
        path: the folder.
        group: near to the ID data or far from it; of OOD sets only.
        limit: take the first so many images.
        resize: as for ``Folders``, of this set alone; where not given, that of ``Folders`` holds.
    """

    path: str
    group: Group = "far"
    limit: int | None = None
    resize: Resize | None = None


class Folders(OODDataModule):
    """Image files; ID folders have one sub-folder for each class, all others may have any structure.

    Args:
        test: folder of ID test images.
        image_size: (H, W) of the images served.
        train: folder of ID training images, with the same classes.
        ood: OOD test images by name.
        outliers: auxiliary outliers for training.
        resize: ``squash`` both sides, ``crop`` the centre after scaling the shorter side, or another of
            ``fit_size``; where not given, an image of another size is an error.
        channels: 3: all are made RGB; 1: all are made grey.
        kwargs: as for ``OODDataModule``.
    """

    def __init__(
        self,
        test: str,
        image_size: tuple[int, int],
        train: str | None = None,
        ood: dict[str, FolderSet] | None = None,
        outliers: FolderSet | None = None,
        resize: Resize | None = None,
        channels: Literal[1, 3] = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (colour), got {channels}")
        self.train, self.test, self.ood, self.outliers = train, test, ood or {}, outliers
        self.fit = Fit((channels, *image_size), resize)

    def load(self) -> Sets:
        """List the files; they are decoded when they are served."""
        classes = find_classes(anchored(self.test))
        if self.train is not None and (trained := find_classes(anchored(self.train))) != classes:
            raise ValueError(
                f"training and test folders must have the same classes; only in {self.train}: "
                f"{_listed(set(trained) - set(classes))}; only in {self.test}: {_listed(set(classes) - set(trained))}"
            )
        return Sets(
            train=self._labelled(self.train, classes) if self.train is not None else None,
            test=self._labelled(self.test, classes),
            ood={name: OODSet(read_folder(ood, self.fit), ood.group) for name, ood in self.ood.items()},
            outliers=read_folder(self.outliers, self.fit) if self.outliers is not None else None,
            classes=classes,
        )

    def _labelled(self, path: str, classes: list[str]) -> FolderImages:
        return FolderImages(anchored(path), *label_images(anchored(path), classes), self.fit)


def read_folder(source: FolderSet, fit: Fit) -> FolderImages:
    """List the images of a folder, without labels; where the set says how to resize, that holds."""
    if source.limit is not None and source.limit < 1:
        raise ValueError(f"{source.path}: limit must be at least 1, got {source.limit}")
    root = anchored(source.path)
    names = find_images(root)[: source.limit]
    fit = fit._replace(resize=source.resize or fit.resize)
    images = FolderImages(root, names, torch.full((len(names),), -1), fit)
    images.origin = str(root.resolve())
    return images


def find_classes(root: Path) -> list[str]:
    """Name the visible sub-folders, sorted."""
    _check_folder(root)
    classes = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
    if not classes:
        raise ValueError(f"folder {root} has no sub-folders; ID images lie in one sub-folder for each class")
    return classes


def label_images(root: Path, classes: Sequence[str]) -> tuple[list[str], Tensor]:
    """List the image files of the sub-folders named ``classes``, and (N,) labels: which of these each lies in."""
    members = [find_images(root / name) for name in classes]
    names = [f"{name}/{file}" for name, files in zip(classes, members, strict=True) for file in files]
    return names, torch.repeat_interleave(torch.tensor([len(files) for files in members]))


def find_images(root: Path) -> list[str]:
    """List the image files below a folder, relative to it; hidden files and folders are left out.

    They are sorted folder by folder: ``a/z.png`` comes before ``a-b/a.png``, although "-" comes before "/".

    Raises:
        FileNotFoundError: there is no such folder, or one of the files is a link to nothing.
        PermissionError: a folder may not be read.
        ValueError: there is no image.
    """
    _check_folder(root)
    found = []
    for folder, folders, files in os.walk(root, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths = (Path(folder, name) for name in files if not name.startswith("."))
        found += [path for path in paths if path.suffix.lower() in IMG_EXTENSIONS]
    if not found:
        raise ValueError(f"no image below folder {root}: looked for files that end in {', '.join(IMG_EXTENSIONS)}")
    if broken := [path for path in found if not path.exists()]:
        raise FileNotFoundError(f"image {broken[0]} is a link to a file that does not exist")
    relative = sorted((path.relative_to(root) for path in found), key=lambda path: path.parts)
    return [path.as_posix() for path in relative]


def _refuse(error: OSError) -> NoReturn:
    raise error


def _check_folder(root: Path) -> None:
    if not root.is_dir():
        raise FileNotFoundError(f"no folder {root} (a relative path counts from the repository root)")


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
