"""A data loader that knows how far it got."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from datamodules.plans import BatchPlan


class Loader(DataLoader[Any]):
    """Loads one planned batch at a time: ``dataset[rows]``, one index-select, no collation of single images.

    It can be saved and restored in the middle of an epoch: the order comes from the plan, and batches that were handed
    out before are skipped without loading them. Its length stays that of the whole epoch. It draws nothing from the
    global random state.

    Args:
        dataset: whatever maps a LongTensor of rows to a batch.
        sampler: the plan; the name is the one under which Lightning hands it on when it rebuilds loaders.
        kwargs: as for ``DataLoader``.
    """

    def __init__(self, dataset: Dataset[Any], sampler: BatchPlan, **kwargs: Any) -> None:
        if not isinstance(sampler, BatchPlan):
            raise ValueError(
                f"{type(sampler).__name__} is not a plan of total batches; if Lightning put it there, "
                "set Trainer(use_distributed_sampler=False): plans share batches among processes themselves"
            )
        own = {"batch_size": None, "pin_memory": torch.cuda.is_available(), "generator": torch.Generator()}
        super().__init__(dataset, sampler=sampler, **(kwargs | own))
        self._plan = sampler
        self._epoch, self._batches, self._resumes = 0, 0, False

    def state_dict(self) -> dict[str, int]:
        """Return the epoch and how many of its batches have been handed out."""
        return {"epoch": self._epoch, "batches": self._batches}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Make the next iteration continue there, if it is of the same epoch; another epoch starts at its beginning."""
        self._epoch, self._batches, self._resumes = state_dict["epoch"], state_dict["batches"], True

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        # A generator, so that nothing is planned before the first batch is asked for: on resume, Lightning makes the
        # iterator first and sets the epoch afterwards.
        first = self._batches if self._resumes and self._epoch == self._plan.epoch else 0
        self._epoch, self._batches, self._resumes = self._plan.epoch, first, False
        self._plan.first = first
        for batch in super().__iter__():
            self._batches += 1
            yield batch
        self._batches = 0
