"""Which rows make which batch, the same on any number of processes.

A plan lays out total batches, from (seed, epoch) alone; rank r of W takes rows ``r::W`` of each. So all ranks have
equally many batches, and W processes together see the batches of one.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

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
        for size in self.sizes if self.even else ():
            if size % world_size:
                raise ValueError(
                    f"{size} rows of each training batch cannot be shared evenly by {world_size} processes: "
                    f"choose a total batch size (ID and outlier rows alike) that {world_size} divides"
                )
        batches = list(zip(*self.parts(), strict=True))[self.first :]
        return (torch.cat([rows[rank::world_size] for rows in batch]) for batch in batches)


class Plan(BatchPlan):
    """One set, in order or shuffled.

    Args:
        length: rows of the set.
        batch_size: rows of a total batch.
        seed: what the order is drawn from, beside the epoch.
        shuffle: whether each epoch has its own random order.
        drop_last: drop what does not fill a batch, as in training; otherwise the last batch is smaller, and may be
            empty on a rank.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, shuffle: bool = False, drop_last: bool = False
    ) -> None:
        super().__init__()
        _check_fills(length, batch_size, drop_last)
        self.length, self.seed, self.shuffle, self.even = length, seed, shuffle, drop_last
        self.sizes = (batch_size,)

    def __len__(self) -> int:
        return self.length // self.sizes[0] if self.even else -(-self.length // self.sizes[0])

    def parts(self) -> list[Sequence[Tensor]]:
        """Lay out the epoch in one part."""
        order = permutation(self.length, self.seed, self.epoch, 0) if self.shuffle else torch.arange(self.length)
        return [order.split(self.sizes[0])[: len(self)]]


class PairedPlan(BatchPlan):
    """Training on [ID; outliers]: each total batch has both in a fixed proportion, ID rows first.

    An epoch is one pass over the ID rows. Outliers are drawn without replacement, and reshuffled when used up.

    Args:
        length: ID rows, which come first in the set.
        outliers: outlier rows, which follow.
        batch_size: ID rows of a total batch.
        ratio: outlier rows for each ID row; their number in a batch is rounded.
        seed: what the order is drawn from, beside the epoch.
    """

    even = True

    def __init__(self, length: int, outliers: int, batch_size: int, ratio: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        _check_fills(length, batch_size, drop_last=True)
        self.sizes = (batch_size, round(batch_size * ratio))
        if outliers < 1 or self.sizes[1] < 1:
            raise ValueError(
                f"paired batches need outliers: the set has {outliers}, and {batch_size} ID rows at a ratio of {ratio} "
                f"call for {self.sizes[1]} in each batch"
            )
        self.length, self.outliers, self.seed = length, outliers, seed

    def __len__(self) -> int:
        return self.length // self.sizes[0]

    def parts(self) -> list[Sequence[Tensor]]:
        """Lay out the epoch in two parts."""
        known = permutation(self.length, self.seed, self.epoch, 0)
        needed = len(self) * self.sizes[1]
        rounds = range(1, 1 + -(-needed // self.outliers))
        outliers = torch.cat([permutation(self.outliers, self.seed, self.epoch, stream) for stream in rounds])
        return [known.split(self.sizes[0])[: len(self)], (self.length + outliers[:needed]).split(self.sizes[1])]


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


def _check_fills(length: int, batch_size: int, drop_last: bool) -> None:
    if batch_size < 1:
        raise ValueError(f"a batch needs at least one row, got batch size {batch_size}")
    if length < (batch_size if drop_last else 1):
        raise ValueError(
            f"a set of {length} rows does not fill one batch of {batch_size}: take a smaller batch or more data"
        )
