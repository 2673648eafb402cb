"""The sets of images that a data module is made of, and whether they go together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from datamodules.images import ImageSet, Rows
from datamodules.splits import Subset, draw_labels, open_set, relabel, stratified_split

Group = Literal["near", "far"]
UNKNOWN = "unknown"
RESERVED = ("train", "fit", "fit_2", "calibration", "id", "outliers")


@dataclass
class OODSet:
    """OOD test images, and whether they are near to the ID data or far from it."""

    images: ImageSet
    group: Group = "far"


@dataclass
class Sets:
    """What a data module is made of.

    Attributes:
        train: ID training images; ``None`` where nothing is trained or fitted.
        test: ID test images.
        ood: OOD test images by name.
        outliers: auxiliary outliers for training, disjoint from the OOD test images.
        classes: names of the ID classes 0..K-1.
    """

    train: ImageSet | None
    test: ImageSet
    ood: dict[str, OODSet]
    outliers: ImageSet | None
    classes: list[str]

    def check(self, remedy: str = "") -> None:
        """Raise a ``ValueError`` in words where the sets do not go together; ``remedy`` helps against other shapes."""
        if clash := sorted(set(self.ood) & set(RESERVED)):
            raise ValueError(f"an OOD set cannot be called {', '.join(clash)}: these names are taken")
        named = {"train": self.train, "test": self.test, "outliers": self.outliers}
        present = {name: images for name, images in named.items() if images is not None}
        present |= {f"ood {name}": ood.images for name, ood in self.ood.items()}
        for name, images in present.items():
            if images.shape != self.test.shape:
                raise ValueError(
                    f"set {name} ({images.source}) has images of shape {images.shape} (C, H, W), set test "
                    f"({self.test.source}) of {self.test.shape}: all must agree. {remedy}".rstrip()
                )
            if not len(images):
                raise ValueError(f"set {name} ({images.source}) has no images")
            images.read(torch.tensor([0]))  # what cannot be used is found before anything is trained
            if name in ("train", "test"):
                _check_labels(images, len(self.classes))
        if self.outliers is not None:
            self._check_outliers(self.outliers)

    def _check_outliers(self, outliers: ImageSet) -> None:
        if outliers.source == self.test.source:
            raise ValueError(f"the outliers are the ID test images ({outliers.source}): take others")
        for name, ood in self.ood.items():
            if outliers.origin and outliers.origin == ood.images.origin:
                raise ValueError(
                    f"the outliers ({outliers.source}) and the OOD set {name} are both taken from {outliers.origin}: "
                    f"who trains on the one must not test on the other; leave out {name}, or take other outliers"
                )

    def subset(self, subset: Subset, seed: int) -> "Sets":
        """Keep a share of the training images, and some of the classes."""
        sets = self
        if subset.num_labels is not None:
            sets = sets.keep(draw_labels(self.classes, subset.num_labels, seed))
        if subset.fraction == 1:
            return sets
        if sets.train is None:
            raise ValueError(f"a fraction of {subset.fraction} of the ID training images: there are none")
        _, kept = stratified_split(sets.train.labels, subset.fraction, seed, sets.classes, "the fraction")
        return replace(sets, train=Rows(sets.train, kept))

    def open(self, known: int) -> "Sets":
        """Keep the first classes; the test images of the others become the OOD set ``unknown``, which is near."""
        if UNKNOWN in self.ood:
            raise ValueError(f"with known={known}, {UNKNOWN} is the OOD set of the other classes: rename yours")
        kept = open_set(self.classes, known)
        others, _ = relabel(self.test.labels, range(known, len(self.classes)))
        unknown = {UNKNOWN: OODSet(Rows(self.test, others), "near")}
        return replace(self.keep(kept), ood=unknown | self.ood)

    def keep(self, kept: Sequence[int]) -> "Sets":
        """Keep the ID images of some classes, numbered anew."""
        train, test = (
            Rows(images, *relabel(images.labels, kept)) if images is not None else None
            for images in (self.train, self.test)
        )
        assert test is not None
        return replace(self, train=train, test=test, classes=[self.classes[label] for label in kept])


def _check_labels(images: ImageSet, num_classes: int) -> None:
    wrong = ((images.labels < 0) | (images.labels >= num_classes)).nonzero().flatten()
    if len(wrong):
        row = int(wrong[0])
        raise ValueError(
            f"{images.source}: label {int(images.labels[row])} in row {row} is not one of the {num_classes} classes "
            f"0..{num_classes - 1}"
        )
