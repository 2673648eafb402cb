"""Every public set of images: where it comes from, where it lies, how it is read, what it is near to.

A *source* is what one ``make data-<source>`` brings into the folder of that name below the root of all data. An *entry*
is a set of images in such a folder, under the name that YAML files use. A new set is a line in each table.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torchvision import datasets

from datamodules import readers
from datamodules.download import Download
from datamodules.fitting import Fit
from datamodules.images import ImageSet, Rows
from datamodules.readers import Reader

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Source:
    """What is fetched in one go.

    Attributes:
        get: files to download; or a function that downloads into the folder it is given; or, where it cannot be had by
            a program, what to do by hand; ``None``: nothing is needed.
        licence: terms of use, as far as the source states any.
        origin: the collection that the pictures were taken from; sets of one origin may share pictures.
    """

    get: tuple[Download, ...] | Callable[[Path], object] | str | None
    licence: str
    origin: str


@dataclass(frozen=True)
class Entry:
    """A set of images.

    Attributes:
        source: name in ``SOURCES``, and of the folder.
        read: makes the set from that folder.
        count: how many images there must be; ``None`` where nobody knows.
        near: names of the ID data that it is near to; it is far from all others.
        shape: (C, H, W) of the images as they are, where all have one.
        origin: as for ``Source``, where a source holds pictures of several.
        first: the set is only the first so many of the images.
    """

    source: str
    read: Reader
    count: int | None
    near: tuple[str, ...] = ()
    shape: Shape | None = None
    origin: str = ""
    first: int | None = None


UNSTATED = "none stated; research use by custom"
TINY_IMAGES = "80 Million Tiny Images"


def _dropbox(key: str, md5: str | None = None) -> tuple[Download, ...]:
    """Locate an archive of the ODIN authors (Liang et al., ICLR 2018)."""
    return (Download(f"https://www.dropbox.com/s/raw/{key}.tar.gz", md5 and f"md5:{md5}"),)


def _curated(name: str) -> tuple[Download, ...]:
    """Locate a set of Huang and Li (CVPR 2021), cleaned of ImageNet's classes."""
    return (Download(f"http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/{name}.tar.gz"),)


def _lsun(split: str) -> tuple[Download, ...]:
    """Locate the databases of the ten scene categories; those of the training images are some 170 GB."""
    names = readers.LSUN_CATEGORIES
    return tuple(Download(f"http://dl.yf.io/lsun/scenes/{name}_{split}_lmdb.zip") for name in names)


SOURCES = {
    "cifar10": Source(partial(datasets.CIFAR10, download=True), UNSTATED, TINY_IMAGES),
    "cifar100": Source(partial(datasets.CIFAR100, download=True), UNSTATED, TINY_IMAGES),
    "mnist": Source(partial(datasets.MNIST, download=True), "CC BY-SA 3.0", "MNIST"),
    "fashion_mnist": Source(partial(datasets.FashionMNIST, download=True), "MIT", "Fashion-MNIST"),
    "kmnist": Source(partial(datasets.KMNIST, download=True), "CC BY-SA 4.0", "KMNIST"),
    "omniglot": Source(partial(datasets.Omniglot, background=False, download=True), "MIT", "Omniglot"),
    "svhn": Source(partial(datasets.SVHN, split="test", download=True), "non-commercial use", "SVHN"),
    "textures": Source(partial(datasets.DTD, download=True), "research use", "DTD"),
    "places365": Source(
        partial(datasets.Places365, split="val", small=True, download=True), "non-commercial research", "Places"
    ),
    "places365_train": Source(
        partial(datasets.Places365, split="train-standard", small=True, download=True),
        "non-commercial research",
        "Places",
    ),
    "tiny_imagenet": Source(
        (Download("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "md5:90528d7ca1a48142e341f4ef8d21d0de"),),
        "ImageNet's: non-commercial research",
        "ImageNet",
    ),
    "tiny_imagenet_crop": Source(
        _dropbox("avgm2u562itwpkl/Imagenet", "7c0827e4246c3718a5ee076e999e52e5"), UNSTATED, "ImageNet"
    ),
    "tiny_imagenet_resize": Source(
        _dropbox("kp3my3412u5k9rl/Imagenet_resize", "0f9ff11d45babf2eff5fe12281d1ac31"), UNSTATED, "ImageNet"
    ),
    "lsun": Source(_lsun("val"), "research use", "LSUN"),
    "lsun_train": Source(_lsun("train"), "research use", "LSUN"),
    "lsun_crop": Source(_dropbox("fhtsw1m3qxlwj6h/LSUN", "458a0a0ab8e5f1cb4516d7400568e460"), UNSTATED, "LSUN"),
    "lsun_resize": Source(
        _dropbox("moqh2wh8696c3yl/LSUN_resize", "278b7b31c8cb7e804a1465a8ce03a2dc"), UNSTATED, "LSUN"
    ),
    "isun": Source(_dropbox("ssz7qxfqae0cca5/iSUN"), UNSTATED, "SUN"),
    "inaturalist": Source(_curated("iNaturalist"), "non-commercial; of each photograph, its author's", "iNaturalist"),
    "sun": Source(_curated("SUN"), UNSTATED, "SUN"),
    "places": Source(_curated("Places"), "non-commercial research", "Places"),
    "imagenet": Source(
        "register at https://image-net.org, download ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar and "
        "ILSVRC2012_devkit_t12.tar.gz into the folder imagenet, and call torchvision.datasets.ImageNet(folder, "
        "split='train'), then with split='val': it verifies and unpacks. What counts is train/<wnid>/*.JPEG and "
        "val/<wnid>/*.JPEG",
        "non-commercial research, after registration",
        "ImageNet",
    ),
    "imagenet64": Source(
        "register at https://image-net.org and download the downsampled ImageNet, 64x64, training set, as pickles (npz "
        "is another format): put train_data_batch_1 ... train_data_batch_10 into the folder imagenet64. At first "
        "use they are written once more, as images.npy: another 16 GB",
        "non-commercial research, after registration",
        "ImageNet",
    ),
    "random_images": Source(
        (
            Download(
                "https://people.eecs.berkeley.edu/~hendrycks/300K_random_images.npy",
                "md5:64ca64357de98351f28454274a112dc3",
            ),
        ),
        "none stated; from the withdrawn 80 Million Tiny Images, cleaned of CIFAR, Places and LSUN classes",
        "300K Random Images",
    ),
    "tiny_images": Source(
        "its authors withdrew 80 Million Tiny Images, for offensive content, and nobody should fetch copies. Who holds "
        "100,000 of them from before puts the image files into the folder tiny_images; `random_images` and "
        "`imagenet64` are the usual substitutes",
        "withdrawn",
        TINY_IMAGES,
    ),
    "openood": Source(
        "get OpenOOD v1.5's benchmark_imglist.zip and its images_classic archives with the download script "
        "of https://github.com/Jingkang50/OpenOOD, so that the folder openood holds benchmark_imglist/ and "
        "images_classic/",
        "of each set its own",
        "",
    ),
    "generated": Source(None, "free", ""),
}

CIFARS = ("cifar10", "cifar100")
SMALL: Shape = (3, 32, 32)
GREY: Shape = (1, 28, 28)
TINY = "tiny-imagenet-200"


def _small(source: str, count: int = 10_000, near: tuple[str, ...] = (), shape: Shape | None = SMALL) -> Entry:
    return Entry(source, readers.tree, count, near, shape)


def _openood(cifar: str) -> dict[str, Entry]:
    """List the sets of OpenOOD v1.5 for one ID set, as its files name them."""
    sets = {  # count, where known; origin
        "train_" + cifar: (50_000, TINY_IMAGES),
        "test_cifar10": (9_000, TINY_IMAGES),
        "test_cifar100": (9_000, TINY_IMAGES),
        "test_tin": (7_793 if cifar == "cifar10" else 6_526, "ImageNet"),
        "test_mnist": (70_000, "MNIST"),
        "test_svhn": (26_032, "SVHN"),
        "test_texture": (5_640, "DTD"),
        "test_places365": (35_195 if cifar == "cifar10" else None, "Places"),
    }
    return {
        f"openood_{cifar}_{name}": Entry(
            "openood",
            partial(readers.listed, listing=f"benchmark_imglist/{cifar}/{name}.txt", root="images_classic"),
            count,
            near=(cifar,) if origin in (TINY_IMAGES, "ImageNet") else (),
            origin=origin,
        )
        for name, (count, origin) in sets.items()
    }


ENTRIES = {
    # ID data, whose test images are OOD for others
    "cifar10": Entry("cifar10", partial(readers.cifar, version=10, train=False), 10_000, ("cifar100",), SMALL),
    "cifar10_train": Entry("cifar10", partial(readers.cifar, version=10, train=True), 50_000, ("cifar100",), SMALL),
    "cifar100": Entry("cifar100", partial(readers.cifar, version=100, train=False), 10_000, ("cifar10",), SMALL),
    "cifar100_train": Entry("cifar100", partial(readers.cifar, version=100, train=True), 50_000, ("cifar10",), SMALL),
    "mnist": Entry("mnist", partial(readers.mnist, name="MNIST", train=False), 10_000, (), GREY),
    "mnist_train": Entry("mnist", partial(readers.mnist, name="MNIST", train=True), 60_000, (), GREY),
    "tiny_imagenet_val": Entry("tiny_imagenet", readers.tiny_imagenet_val, 10_000, CIFARS, (3, 64, 64)),
    "tiny_imagenet_train": Entry(
        "tiny_imagenet",
        partial(readers.tree, below=f"{TINY}/train", labelled=True),
        100_000,
        CIFARS,
        (3, 64, 64),
    ),
    "imagenet": Entry("imagenet", partial(readers.tree, below="val", labelled=True), 50_000, ("tiny_imagenet",)),
    "imagenet_train": Entry(
        "imagenet", partial(readers.tree, below="train", labelled=True), 1_281_167, ("tiny_imagenet",)
    ),
    "lsun": Entry("lsun", partial(readers.lsun, split="val"), 3_000),
    "lsun_train": Entry("lsun_train", partial(readers.lsun, split="train"), 9_895_373),
    # OOD test images
    "tiny_imagenet": Entry("tiny_imagenet", partial(readers.tree, below=f"{TINY}/test"), 10_000, CIFARS, (3, 64, 64)),
    "tiny_imagenet_crop": _small("tiny_imagenet_crop", near=CIFARS, shape=None),
    "tiny_imagenet_resize": _small("tiny_imagenet_resize", near=CIFARS),
    "svhn": Entry("svhn", readers.svhn, 26_032, (), SMALL),
    "textures": Entry("textures", partial(readers.tree, below="dtd/dtd/images"), 5_640),
    "textures_test": Entry("textures", readers.textures_test, 1_880),
    "places365": Entry("places365", partial(readers.tree, below="val_256"), 36_500, ("lsun",), (3, 256, 256)),
    "lsun_crop": _small("lsun_crop", shape=None),
    "lsun_resize": _small("lsun_resize"),
    "isun": _small("isun", 8_925),
    "inaturalist": Entry("inaturalist", readers.tree, 10_000),
    "sun": Entry("sun", readers.tree, 10_000, ("lsun",)),
    "places": Entry("places", readers.tree, 10_000, ("lsun",)),
    "fashion_mnist": Entry(
        "fashion_mnist", partial(readers.mnist, name="FashionMNIST", train=False), 10_000, ("mnist",), GREY
    ),
    "kmnist": Entry("kmnist", partial(readers.mnist, name="KMNIST", train=False), 10_000, ("mnist",), GREY),
    "omniglot": Entry(
        "omniglot",
        partial(readers.tree, below="omniglot-py/images_evaluation", invert=True),
        13_180,
        ("mnist",),
        (1, 105, 105),
        first=10_000,
    ),
    "mnist_noise": Entry("mnist", readers.mnist_noise, 10_000, ("mnist",), GREY),
    "noise": Entry("generated", partial(readers.noise, count=10_000), 10_000),
    **_openood("cifar10"),
    **_openood("cifar100"),
    # auxiliary outliers
    "imagenet64": Entry("imagenet64", readers.downsampled_imagenet, 1_281_167, CIFARS, (3, 64, 64)),
    "random_images": Entry("random_images", partial(readers.npy, file="300K_random_images.npy"), 300_000, (), SMALL),
    "tiny_images": _small("tiny_images", 100_000, CIFARS),
    "places365_train": Entry(
        "places365_train", partial(readers.tree, below="data_256_standard"), 1_803_460, ("lsun",), (3, 256, 256)
    ),
}


def find(name: str) -> Entry:
    """Look up an entry; an unknown name is a ``ValueError`` that lists the known ones."""
    if name not in ENTRIES:
        raise ValueError(f"no set of images is called {name!r}; known are: {', '.join(sorted(ENTRIES))}")
    return ENTRIES[name]


def read(name: str, root: Path, fit: Fit) -> ImageSet:
    """Make the set of an entry from what lies below the root of all data.

    Raises:
        FileNotFoundError: its folder is not there; the message says how to get it.
        ValueError: it is incomplete or damaged.
    """
    entry = find(name)
    source, folder = SOURCES[entry.source], root / entry.source
    if source.get is not None and not os.path.lexists(folder):
        raise FileNotFoundError(f"{name} is wanted, but there is no folder {folder}: {how_to_get(entry.source)}")
    try:
        images = entry.read(folder, fit)
    except FileNotFoundError as error:
        raise ValueError(f"{name} is not all there: {error}; {way_out(entry.source, folder)}") from error
    if entry.count not in (None, len(images)):
        held = f"{folder} holds {len(images):,}"
        raise ValueError(f"{name} has {entry.count:,} images, {held}; {way_out(entry.source, folder)}")
    if entry.first is not None:
        images = Rows(images, torch.arange(min(entry.first, len(images))))
    images.source, images.origin = name, entry.origin or source.origin or name
    return images


def how_to_get(source: str) -> str:
    """Say in one sentence how to get a source."""
    get = SOURCES[source].get
    return get if isinstance(get, str) else f"`make data-{source}` downloads it"


def way_out(source: str, folder: Path) -> str:
    """Say in one sentence what helps where a source is incomplete."""
    if isinstance(SOURCES[source].get, str):
        return f"complete {folder}"
    return f"remove {folder}, then `make data-{source}` downloads it anew"
