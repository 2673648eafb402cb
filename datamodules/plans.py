"""Which rows make which batch, the same on any number of processes.

A plan lays out total batches, from (seed, epoch) alone; rank r of W takes rows ``r::W`` of each. So all ranks have
equally many batches, and W processes together see the batches of one. Balanced batches alone are not divided: there,
rank r takes the batches ``r::W``, which are smaller for it.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler


def rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def permutation(length: int, seed: int, epoch: int, stream: int) -> Tensor:
    """Permute 0..length-1, as a pure function of the arguments."""
    return torch.from_numpy(np.random.default_rng((seed, epoch, stream)).permutation(length))


class BatchPlan(Sampler[Tensor], ABC):
    """Yields this process's rows of each total batch, as LongTensors.

    Attributes:
        sizes: rows of each part of a whole batch; every rank takes its share of each part.
        even: whether all ranks must get equally many rows, as training with averaged gradients needs.
        epoch: what the order is drawn from, beside the seed.
        first: index of the batch that iterations start with.
    """

    sizes: tuple[int, ...]
    even: bool

    def __init__(self) -> None:
        self.epoch = 0
        self.first = 0

    @abstractmethod
    def __len__(self) -> int:
        """Count the batches of an epoch, the same on every rank."""

    @abstractmethod
    def parts(self) -> list[Sequence[Tensor]]:
        """Lay out the epoch: for each part, the rows of each total batch."""

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch comes next; Lightning calls this."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[Tensor]:
        rank, world_size = rank_and_world_size()
        parts = self.parts()
        for size in sorted({len(rows) for part in parts for rows in part}, reverse=True) if self.even else ():
            if size % world_size:
                raise ValueError(
                    f"{size} rows of a training batch cannot be shared evenly by {world_size} processes: choose a "
                    f"total batch size (ID and outlier rows alike) that {world_size} divides, and drop an incomplete "
                    "last batch"
                )
        batches = list(zip(*parts, strict=True))[self.first :]
        return (torch.cat([rows[rank::world_size] for rows in batch]) for batch in batches)


class Plan(BatchPlan):
    """One set, in order or shuffled.

    Args:
        length: rows of the set.
        batch_size: rows of a total batch.
        seed: what the order is drawn from, beside the epoch.
        shuffle: whether each epoch has its own random order.
        drop_last: drop what does not fill a batch; otherwise the last batch is smaller, and may be empty on a rank.
        even: whether all ranks must get equally many rows, as in training; so they do where ``drop_last``.
    """

    def __init__(
        self,
        length: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = False,
        drop_last: bool = False,
        even: bool = False,
    ) -> None:
        super().__init__()
        _check_fills(length, batch_size, drop_last)
        self.length, self.seed, self.shuffle, self.drop_last = length, seed, shuffle, drop_last
        self.even, self.sizes = even or drop_last, (batch_size,)

    def __len__(self) -> int:
        return self.length // self.sizes[0] if self.drop_last else -(-self.length // self.sizes[0])

    def parts(self) -> list[Sequence[Tensor]]:
        """Lay out the epoch in one part."""
        order = permutation(self.length, self.seed, self.epoch, 0) if self.shuffle else torch.arange(self.length)
        return [order.split(self.sizes[0])[: len(self)]]


class PairedPlan(BatchPlan):
    """Training on [ID; outliers]: each total batch has both in a fixed proportion, ID rows first.

    An epoch is one pass over the ID rows. Outliers are drawn without replacement, and reshuffled when used up.

    Attributes:
        chosen: (M,) which of the outliers are drawn, counted from 0: all, unless somebody chooses before an epoch.

    Args:
        length: ID rows, which come first in the set.
        outliers: outlier rows, which follow.
        batch_size: ID rows of a total batch.
        ratio: outlier rows for each ID row; their number in a batch is rounded.
        seed: what the order is drawn from, beside the epoch.
        drop_last: drop the ID rows that do not fill a batch; otherwise the last batch is smaller.
    """

    even = True

    def __init__(
        self,
        length: int,
        outliers: int,
        batch_size: int,
        ratio: float = 1.0,
        seed: int = 0,
        drop_last: bool = True,
    ) -> None:
        super().__init__()
        _check_fills(length, batch_size, drop_last)
        self.sizes = (batch_size, round(batch_size * ratio))
        if outliers < 1 or self.sizes[1] < 1:
            raise ValueError(
                f"paired batches need outliers: the set has {outliers}, and {batch_size} ID rows at a ratio of {ratio} "
                f"call for {self.sizes[1]} in each batch"
            )
        self.length, self.ratio, self.seed, self.drop_last = length, ratio, seed, drop_last
        self.chosen = torch.arange(outliers)

    def __len__(self) -> int:
        return self.length // self.sizes[0] if self.drop_last else -(-self.length // self.sizes[0])

    def parts(self) -> list[Sequence[Tensor]]:
        """Lay out the epoch in two parts."""
        known = permutation(self.length, self.seed, self.epoch, 0).split(self.sizes[0])[: len(self)]
        counts = [round(len(rows) * self.ratio) for rows in known]
        rounds = range(1, 1 + -(-sum(counts) // len(self.chosen)))
        places = torch.cat([permutation(len(self.chosen), self.seed, self.epoch, stream) for stream in rounds])
        return [known, (self.length + self.chosen[places[: sum(counts)]]).split(counts)]


@dataclass(frozen=True)
class Balanced:
    """Training batches that hold equally many images of each of some classes.

    Attributes:
        classes_per_batch: how many classes, drawn anew for each batch; on several devices, for that of each.
        images_per_class: how many images of each, over all devices together.
    """

    classes_per_batch: int
    images_per_class: int

    def plan(self, labels: Tensor, seed: int) -> "BalancedPlan":
        """Lay out batches of rows with (N,) labels, for as many processes as there are."""
        _, world_size = rank_and_world_size()
        share, rest = divmod(self.images_per_class, world_size)
        if rest or (world_size > 1 and share < 2):
            raise ValueError(
                f"images_per_class is over all devices together: {self.images_per_class} cannot be shared by "
                f"{world_size} of them, each of which takes equally many and at least 2"
            )
        return BalancedPlan(labels, self.classes_per_batch, share, seed)


class BalancedPlan(BatchPlan):
    """Batches of equally many rows of each of some classes, as tuples of embeddings need them.

    Each batch draws its classes uniformly without replacement, and goes on through a shuffled list of each; the list
    is reshuffled and begun again where fewer rows than a batch takes would remain. So classes are seen equally often
    on average, not in each epoch.

    A process takes whole batches: rank r of W takes batches ``r::W``, all ranks equally many, and a step of the
    optimiser sees W balanced batches, which ``Balanced.plan`` therefore makes smaller. A row may be in batches of
    several ranks.

    Args:
        labels: (N,) class of each row.
        classes_per_batch: classes in a batch, at least 2.
        images_per_class: rows of each of these, at least 2.
        seed: what the order is drawn from, beside the epoch.
    """

    even = False

    def __init__(self, labels: Tensor, classes_per_batch: int, images_per_class: int, seed: int = 0) -> None:
        super().__init__()
        self.classes_per_batch, self.images_per_class, self.seed = classes_per_batch, images_per_class, seed
        self.sizes = (classes_per_batch * images_per_class,)
        classes, counts = np.unique(labels.numpy(), return_counts=True)
        if len(classes) and classes[0] < 0:
            raise ValueError(
                f"balanced batches need rows of classes 0, 1, ...; {counts[0]} have the label {classes[0]}"
            )
        if not 2 <= classes_per_batch <= len(classes):
            raise ValueError(
                f"classes_per_batch must be in 2..{len(classes)}, the number of classes, got {classes_per_batch}"
            )
        if not 2 <= images_per_class <= counts.min():
            raise ValueError(
                f"images_per_class must be in 2..{counts.min()}, the images of the smallest class "
                f"({classes[counts.argmin()]}), got {images_per_class}"
            )
        self.length = len(labels)
        self.total = (self.length - 1) // self.sizes[0]  # the authors' loop leaves out a last batch that just fits
        self.members = np.split(np.argsort(labels.numpy(), kind="stable"), counts.cumsum()[:-1])

    def __len__(self) -> int:
        _, world_size = rank_and_world_size()
        if self.total < world_size:
            raise ValueError(
                f"{self.length} rows make {self.total} balanced batches of {self.sizes[0]}, and {world_size} "
                "processes need at least one each: take smaller batches or more data"
            )
        return self.total // world_size

    def parts(self) -> list[Sequence[Tensor]]:
        """Lay out the epoch of all processes in one part."""
        random = np.random.default_rng((self.seed, self.epoch))
        everyone = np.tile(np.arange(len(self.members)), (self.total, 1))
        drawn = random.permuted(everyone, axis=1)[:, : self.classes_per_batch]
        rows = np.empty((*drawn.shape, self.images_per_class), dtype=np.int64)
        for label, members in enumerate(self.members):
            places = drawn == label
            rows[places] = _take_turns(members, int(places.sum()), self.images_per_class, random)
        return [torch.from_numpy(rows).flatten(1).unbind()]

    def __iter__(self) -> Iterator[Tensor]:
        rank, world_size = rank_and_world_size()
        (batches,) = self.parts()
        return iter(batches[rank::world_size][self.first : len(self)])


class GivenPlan(BatchPlan):
    """Batches of rows that somebody else chose, all of them on this process."""

    even = False
    sizes = ()

    def __init__(self, batches: Sequence[Tensor]) -> None:
        super().__init__()
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def parts(self) -> list[Sequence[Tensor]]:
        """Return the batches, as one part."""
        return [self.batches]

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.batches[self.first :])


def _take_turns(rows: np.ndarray, turns: int, size: int, random: np.random.Generator) -> np.ndarray:
    """Take ``size`` rows at a time, (turns, size), from a shuffled list; from a new one where that is used up."""
    per_list = len(rows) // size
    lists = random.permuted(np.tile(rows, (-(-turns // per_list), 1)), axis=1)
    return lists[:, : per_list * size].reshape(-1, size)[:turns]


def _check_fills(length: int, batch_size: int, drop_last: bool) -> None:
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one row, got batch size {batch_size}")
    if length < (batch_size if drop_last else 1):
        raise ValueError(
            f"a set of {length} rows does not fill one batch of {batch_size}: take a smaller batch or more data"
        )
