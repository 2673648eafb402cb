"""The public data sets of the field as ID data, with OOD sets and outliers from the catalogue."""

import logging
from abc import ABC
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from datamodules import catalogue, readers
from datamodules.arrays import read_arrays
from datamodules.augmentation import Augmentation
from datamodules.datamodule import OODDataModule
from datamodules.fitting import Fit, Resize, fit_arrays
from datamodules.images import ArrayImages, ImageSet, anchored, data_root
from datamodules.outliers import OutlierPool, RandomWindows
from datamodules.packed import channels_first
from datamodules.protocols import ProtocolName, find_protocol
from datamodules.sets import Group, OODSet, Sets
from datamodules.splits import OODSubset

SCENES = {"Places", "SUN"}
log = logging.getLogger(__name__)


@dataclass
class OwnSet:
    """Images of the user's, whose labels are of no interest.

    Attributes:
        path: a folder of image files, at any depth; an ``.npz`` file as for ``Arrays``; or one ``.npy`` array, uint8
            (N, H, W, C), which may be larger than memory.
        group: near to the ID data or far from it.
        resize: as for ``Public``, of this set alone.
    """

    path: str
    group: Group = "far"
    resize: Resize | None = None


class Public(OODDataModule, ABC):
    """ID data that the catalogue knows.

    A protocol says which OOD sets there are, how they are brought to the size of the ID images, and how all are
    normalised; any of this can be said otherwise. Without one, what is not given is not done.

    Attributes:
        data: name of the ID data; the catalogue's ``<data>_train`` are the training images.
        test: name of the test images in the catalogue, where it is not ``data``.
        shape: (C, H, W) of all images.
        own_resize: how ID images are brought to it where neither the protocol nor ``resize`` says so.

    Args:
        protocol: whose experiments to follow.
        train: whether there are ID training images; without them nothing can be trained, nor a score fitted.
        root: folder of all data; else the environment variable ``OOD_DATA``, else ``data``.
        ood: names of OOD sets, in the catalogue or in ``own``.
        outliers: auxiliary outliers for training.
        own: sets of your own, by name.
        resize: how images of another size are brought to that of the ID images, see ``fit_size``.
        mean: as for ``OODDataModule``.
        std: as for ``OODDataModule``.
        augmentation: as for ``OODDataModule``; ``protocol``: that of the protocol's classifier training.
        ood_subset: as for ``OODDataModule``.
        kwargs: as for ``OODDataModule``.
    """

    data: str
    test: str = ""
    shape: tuple[int, int, int]
    own_resize: Resize | None = None

    def __init__(
        self,
        protocol: ProtocolName | None = None,
        train: bool = True,
        root: str | None = None,
        ood: list[str] | None = None,
        outliers: OutlierPool | None = None,
        own: dict[str, OwnSet] | None = None,
        resize: Resize | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augmentation: Augmentation | Literal["protocol"] | None = None,
        ood_subset: OODSubset | None = None,
        **kwargs: Any,
    ) -> None:
        self._protocol = None if protocol is None else find_protocol(protocol, self.data)
        if augmentation == "protocol":
            if self._protocol is None:
                raise ValueError("augmentation: protocol asks for that of the protocol, but no protocol is given")
            augmentation = self._protocol.augmentation
        departures = [name for name, value in (("resize", resize), ("mean", mean), ("std", std)) if value is not None]
        if self._protocol is not None:
            mean, std = (self._protocol.mean, self._protocol.std) if mean is None and std is None else (mean, std)
            ood = list(self._protocol.ood) if ood is None else ood
            ood_subset = ood_subset or self._protocol.ood_subset
        super().__init__(mean=mean, std=std, augmentation=augmentation, ood_subset=ood_subset, **kwargs)
        self.protocol, self.root = protocol, data_root(root)
        if protocol is not None and departures:
            self.protocol = f"{protocol}, but another {', '.join(departures)}"
        self.ood, self.outlier_pool, self.own, self.resize = ood or [], outliers, own or {}, resize
        self.train = train
        self._check_names()

    def _check_names(self) -> None:
        """Raise a ``ValueError`` where names of sets make no sense."""
        if clash := sorted(set(self.own) & set(catalogue.ENTRIES)):
            raise ValueError(f"own sets must have names of their own; the catalogue has {', '.join(clash)} too")
        pool = self.outlier_pool
        used = [*self.ood, *([pool.name] if pool is not None else [])]
        for name in used:
            if name not in self.own:
                catalogue.find(name)
        if unused := sorted(set(self.own) - set(used)):
            raise ValueError(f"own sets {', '.join(unused)} are used nowhere: name them in ood or outliers")
        if twice := sorted({name for name in self.ood if self.ood.count(name) > 1}):
            raise ValueError(f"OOD sets {', '.join(twice)} are named twice")
        known = {self.test or self.data, f"{self.data}_train"}
        known |= {f"openood_{self.data}_{split}_{self.data}" for split in ("train", "test")}
        if same := sorted(known & set(self.ood)):
            raise ValueError(f"{', '.join(same)} are the ID images themselves, they cannot be OOD")
        if pool is not None and self.outlier_feed is None and self.num_outliers != 0:
            raise ValueError("outliers are given, but not how they come into training: outlier_feed is paired or mixed")

    def load(self) -> Sets:
        """Read everything from below the root, and from your own files."""
        train, test = f"{self.data}_train", self.test or self.data
        if self._protocol is not None:
            train, test = self._protocol.train or train, self._protocol.test or test
        known = self._read(test)
        training = self._read(train) if self.train else None
        if training is not None and list(training.classes) != list(known.classes):
            unlike = sorted(set(training.classes) ^ set(known.classes))
            raise ValueError(f"{train} and {test} have different classes: only one of them has {', '.join(unlike)}")
        sets = Sets(
            train=training,
            test=known,
            ood={name: self._ood_set(name, known.origin) for name in self.ood},
            outliers=self._outliers(self.outlier_pool) if self.outlier_pool and self.outlier_feed else None,
            classes=list(known.classes),
        )
        if sets.outliers is not None:
            for name, ood in sets.ood.items():
                if {sets.outliers.origin, ood.images.origin} == SCENES:
                    log.warning("outliers and OOD set %s are different photographs of the same kinds of scenes", name)
        return sets

    def _ood_set(self, name: str, id_origin: str) -> OODSet:
        """Read an OOD set; one of the ID images' origin is near, others are as the catalogue says."""
        images = self._read(name)
        if name in self.own:
            return OODSet(images, self.own[name].group)
        is_near = self.data in catalogue.find(name).near or images.origin == id_origin
        return OODSet(images, "near" if is_near else "far")

    def _read(self, name: str, shape: tuple[int, int, int] | None = None) -> ImageSet:
        """Read a set of the catalogue or one of your own."""
        resize = self.resize or (
            self._protocol.resize_of.get(name, self._protocol.resize) if self._protocol else self.own_resize
        )
        fit = Fit(shape or self.shape, resize)
        if name not in self.own:
            return catalogue.read(name, self.root, fit)
        images = read_own(name, self.own[name], fit)
        for source, facts in catalogue.SOURCES.items():
            if Path(images.origin).is_relative_to((self.root / source).resolve()):
                images.origin = facts.origin
        return images

    def _outliers(self, chosen: OutlierPool) -> ImageSet:
        if chosen.crop_padding is None:
            return chosen.choose(self._read(chosen.name), self.split_seed)
        whole = None if chosen.name in self.own else catalogue.find(chosen.name).shape
        if whole is None:
            raise ValueError(
                f"outliers: crop_padding wants a set of the catalogue whose images have one size, as imagenet64; "
                f"{chosen.name} is none"
            )
        shape = (self.shape[0], *whole[1:])
        images = chosen.choose(self._read(chosen.name, shape), self.split_seed)
        return RandomWindows(images, self.shape[1], chosen.crop_padding, self.split_seed)


def read_own(name: str, own: OwnSet, fit: Fit) -> ImageSet:
    """Read a set of the user's."""
    path = anchored(own.path)
    fit = fit._replace(resize=own.resize or fit.resize)
    images: ImageSet
    if path.suffix == ".npz":
        pixels, _ = read_arrays(path)
        fitted = channels_first(fit_arrays(pixels, fit, str(path)))
        images = ArrayImages(fitted, torch.full((len(fitted),), -1), name)
    elif path.suffix == ".npy":
        images = readers.npy(path.parent, fit, path.name)
    else:
        images = readers.tree(path, fit)
    images.source, images.origin = name, str(path.resolve())
    return images


class CIFAR(Public):
    """CIFAR-10 or CIFAR-100, 32x32.

    Args:
        version: which of the two.
        kwargs: as for ``Public``.
    """

    shape = (3, 32, 32)

    def __init__(self, version: Literal[10, 100] = 10, **kwargs: Any) -> None:
        self.data = f"cifar{version}"
        super().__init__(**kwargs)


class MNIST(Public):
    """MNIST, grey, 28x28."""

    data, shape = "mnist", (1, 28, 28)


class TinyImageNet(Public):
    """Tiny ImageNet, 200 classes, 64x64; the labelled validation images are the test images."""

    data, test, shape = "tiny_imagenet", "tiny_imagenet_val", (3, 64, 64)


class ImageNet(Public):
    """ImageNet-1k at 224x224; its validation images are the test images."""

    data, shape, own_resize = "imagenet", (3, 224, 224), "imagenet"


class LSUN(Public):
    """The ten scene categories of LSUN; its validation images are the test images.

    Args:
        image_size: (H, W) to which images are brought.
        kwargs: as for ``Public``.
    """

    data, own_resize = "lsun", "crop"

    def __init__(self, image_size: tuple[int, int] = (256, 256), **kwargs: Any) -> None:
        self.shape = (3, *image_size)
        super().__init__(**kwargs)
