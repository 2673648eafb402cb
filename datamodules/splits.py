"""Which rows of a set are used for what: open-set splits, low-data subsets, held-out images, subsets of OOD sets."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Subset:
    """Less ID data than there is, drawn by ``split_seed``.

    Attributes:
        fraction: share of the training images of each class; the test images stay.
        num_labels: so many of the classes, in training and test alike, numbered anew in their order; the others are
            left out altogether.
    """

    fraction: float = 1.0
    num_labels: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ValueError(f"fraction is a share of the training images, 0 < fraction <= 1, got {self.fraction}")


@dataclass(frozen=True)
class OODSubset:
    """Which images of each OOD set are tested on; a smaller set is used whole.

    Attributes:
        rule: ``all``; the ``first`` so many in the order of the set; or so many drawn at ``random``.
        count: how many.
        repeats: of random drawings, over which results are averaged.
        id_per_ood: instead of a count, so many ID test images for each OOD image.
    """

    rule: Literal["all", "first", "random"] = "all"
    count: int | None = None
    repeats: int = 1
    id_per_ood: int | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.count, self.id_per_ood) if value is not None]
        if len(given) != (self.rule != "all") or any(value < 1 for value in given):
            wanted = "neither count nor id_per_ood" if self.rule == "all" else "a count or id_per_ood of at least 1"
            got = f"count={self.count}, id_per_ood={self.id_per_ood}"
            raise ValueError(f"ood_subset: rule {self.rule!r} takes {wanted}, got {got}")
        if self.repeats < 1 or (self.repeats > 1 and self.rule != "random"):
            raise ValueError(f"ood_subset: repeats={self.repeats} with rule {self.rule!r}; only 'random' repeats")

    def resolve(self, id_count: int) -> "OODSubset":
        """Turn ``id_per_ood`` into a count, for so many ID test images."""
        if self.id_per_ood is None:
            return self
        return OODSubset(self.rule, max(1, id_count // self.id_per_ood), self.repeats)

    def draw(self, length: int, seed: int) -> list[Tensor]:
        """Choose rows of a set, in order, for each repeat; the sets of the repeats may overlap."""
        if self.count is None or self.count >= length:
            return [torch.arange(length)]
        if self.rule == "first":
            return [torch.arange(self.count)]
        return [draw(length, self.count, (seed, repeat)) for repeat in range(self.repeats)]


def draw(length: int, count: int, seed: int | Sequence[int]) -> Tensor:
    """Draw rows without replacement, in order."""
    return torch.from_numpy(np.sort(np.random.default_rng(seed).choice(length, count, replace=False)))


def draw_labels(classes: Sequence[str], count: int, seed: int) -> list[int]:
    """Draw classes without replacement, in order."""
    if not 1 < count <= len(classes):
        raise ValueError(f"num_labels must be in 2..{len(classes)}, for there are so many classes; got {count}")
    return draw(len(classes), count, seed).tolist()


def open_set(classes: Sequence[str], known: int) -> list[int]:
    """Return the first classes, which are ID; the others are unknown."""
    if not 0 < known < len(classes):
        raise ValueError(
            f"known={known}: so many of the {len(classes)} classes are ID and the others unknown; it must be in "
            f"1..{len(classes) - 1}"
        )
    return list(range(known))


def relabel(labels: Tensor, kept: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the rows of the kept classes, and labels of all rows in which those classes are numbered 0, 1, ...

    All other labels become -1.
    """
    table = torch.full((int(labels.max()) + 2 if len(labels) else 1,), -1)  # the last place is that of label -1
    for number, label in enumerate(kept):
        if label < len(table) - 1:
            table[label] = number
    renumbered = table[labels]
    return (renumbered >= 0).nonzero().flatten(), renumbered


def stratified_split(
    labels: Tensor, share: float, seed: int, classes: Sequence[str], option: str = "val_split"
) -> tuple[Tensor, Tensor]:
    """Set aside a share of each class; return the rows that stay and those set aside, both in order.

    Raises:
        ValueError: a class would be left with nothing on one side; ``option`` is named as what to change.
    """
    aside = []
    for label, name in enumerate(classes):
        members = np.flatnonzero(labels.numpy() == label)
        if not len(members):
            raise ValueError(f"there is no training image of class {name!r}: the classes are {', '.join(classes)}")
        count = round(len(members) * share)
        if not 0 < count < len(members):
            raise ValueError(
                f"a share of {share} is {count} of the {len(members)} images of class {name!r}; "
                f"there must be some on both sides: change {option}"
            )
        aside.append(np.random.default_rng((seed, label)).permutation(members)[:count])
    set_aside = np.zeros(len(labels), dtype=bool)
    set_aside[np.concatenate(aside)] = True
    return torch.from_numpy(np.flatnonzero(~set_aside)), torch.from_numpy(np.flatnonzero(set_aside))
