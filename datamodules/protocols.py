"""What each paper does with its data: which OOD sets, brought to size how, normalised with what.

They differ from each other on purpose: numbers compare only within one protocol.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from datamodules.augmentation import Augmentation
from datamodules.fitting import Resize
from datamodules.splits import OODSubset

ProtocolName = Literal["heat", "unleashing_mask", "heatmap", "variational_metric", "openood"]
Constants = tuple[float, ...]


@dataclass(frozen=True)
class Protocol:
    """One paper's treatment of one ID data set.

    Attributes:
        ood: the OOD test sets, named as in the catalogue.
        resize: how images of another size are brought to that of the ID images; ``None``: no such image is expected.
        mean: normalisation; ``None`` where the network does it.
        std: see ``mean``.
        augmentation: of the classifier that the paper trains; none where it starts from one, as HEAT on CIFAR does.
        ood_subset: which images of each OOD set are tested on.
        resize_of: sets that are brought to size in another way.
        train: ID training images in the catalogue, where they are not those of the data module.
        test: see ``train``.
    """

    ood: tuple[str, ...]
    resize: Resize | None
    mean: Constants | None
    std: Constants | None
    augmentation: Augmentation = field(default_factory=Augmentation)
    ood_subset: OODSubset = field(default_factory=OODSubset)
    resize_of: Mapping[str, Resize] = field(default_factory=dict)
    train: str | None = None
    test: str | None = None


CIFAR10 = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
CIFAR100 = (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_BY_KUANGLIU = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # std of images averaged, not of all pixels
HALF = (0.5,), (0.5,)
BY_NETWORK = None, None

CROP_AND_FLIP = Augmentation(crop_padding=4, flip=True)
ONE_FIFTH = OODSubset("first", id_per_ood=5)
OPENOOD_FAR = ("mnist", "svhn", "texture", "places365")


def _cifar(cifar: str) -> dict[tuple[ProtocolName, str], Protocol]:
    other = "cifar100" if cifar == "cifar10" else "cifar10"
    lists = f"openood_{cifar}"
    return {
        ("heat", cifar): Protocol(
            (other, "tiny_imagenet", "lsun", "places365", "textures_test", "svhn"),
            "squash",
            *(CIFAR10 if cifar == "cifar10" else CIFAR100),
        ),
        ("unleashing_mask", cifar): Protocol(
            (other, "svhn", "textures", "lsun_crop", "places", "sun", "inaturalist"),
            "squash",
            *BY_NETWORK,
            CROP_AND_FLIP,
            # its authors load the 36x36 images of this archive as they are; a frame of zeros around them would be seen
            resize_of={"lsun_crop": "window"},
        ),
        ("heatmap", cifar): Protocol(
            ("isun", "textures", "svhn", "places365", "lsun_crop", "lsun_resize"),
            "crop",
            *HALF,
            CROP_AND_FLIP,
            ONE_FIFTH,
        ),
        ("variational_metric", cifar): Protocol(
            ("tiny_imagenet_crop", "tiny_imagenet_resize", "lsun_crop", "lsun_resize"),
            "window",
            *CIFAR_BY_KUANGLIU,
            CROP_AND_FLIP,
        ),
        ("openood", cifar): Protocol(
            tuple(f"{lists}_test_{name}" for name in (other, "tin", *OPENOOD_FAR)),
            "crop",
            *(CIFAR10 if cifar == "cifar10" else CIFAR100),
            CROP_AND_FLIP,
            train=f"{lists}_train_{cifar}",
            test=f"{lists}_test_{cifar}",
        ),
    }


PROTOCOLS: dict[tuple[ProtocolName, str], Protocol] = {
    **_cifar("cifar10"),
    **_cifar("cifar100"),
    ("heat", "imagenet"): Protocol(
        ("inaturalist", "sun", "places", "textures"), "imagenet", *IMAGENET, Augmentation(flip=True)
    ),
    ("heatmap", "tiny_imagenet"): Protocol(
        ("textures", "inaturalist", "sun"),
        "squash",
        *HALF,
        Augmentation(resized_crop=(0.08, 1.0), flip=True),
        ONE_FIFTH,
    ),
    ("variational_metric", "mnist"): Protocol(
        ("omniglot", "mnist_noise", "noise"),
        "squash",
        *HALF,
        Augmentation(rotation=10.0, resized_crop=(0.95, 1.0)),
    ),
}


def find_protocol(name: ProtocolName, data: str) -> Protocol:
    """Look up how a protocol treats an ID data set; ``ValueError`` where it does not know it."""
    if (name, data) not in PROTOCOLS:
        treated = ", ".join(known for protocol, known in PROTOCOLS if protocol == name)
        raise ValueError(f"protocol {name} says nothing about {data}; it treats: {treated}")
    return PROTOCOLS[name, data]
