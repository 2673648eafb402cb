"""Training rows that come from a feature cache: whole batches at a time, from mapped files or from the device."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np
import torch
from pytorch_lightning import Trainer
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.feature_cache import FeatureCache
from lightning_modules.evidence import Evidence, EvidenceBatch

LOGITS, FEATURE = "logits", "features."  # names of arrays: logits, features.<tap>


def to_columns(evidence: Evidence) -> dict[str, Tensor]:
    """Name the arrays that are cached of some evidence: the logits, and the features of each tap.

    Raises:
        ValueError: there is more than these, or a tap is not (B, D).
    """
    if evidence.scores or evidence.maps is not None:
        raise ValueError("only logits and features are cached: leave scores and maps out of what `encode` returns")
    for tap, values in evidence.features.items():
        if values.ndim != 2:
            raise ValueError(f"features are cached as (B, D), those of {tap} are {tuple(values.shape)}")
    return {LOGITS: evidence.logits} | {FEATURE + tap: values for tap, values in evidence.features.items()}


def to_batch(columns: Mapping[str, Tensor], labels: Tensor, ids: Tensor) -> EvidenceBatch:
    """Put rows of these arrays together again."""
    features = {name.removeprefix(FEATURE): values for name, values in columns.items() if name != LOGITS}
    return EvidenceBatch(Evidence(columns[LOGITS], features, {}, None), labels, ids)


class CachedEvidence(Dataset[EvidenceBatch]):
    """``rows[ids]`` is an ``EvidenceBatch`` in float32, copied out of the memory-mapped files of a cache.

    Args:
        cache: of evidence.
        labels: (N,) int64, of its rows.
    """

    def __init__(self, cache: FeatureCache, labels: Tensor) -> None:
        self.cache, self.labels = cache, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> EvidenceBatch:
        return to_batch(self.columns(rows), self.labels[rows], rows)

    def columns(self, rows: Tensor) -> dict[str, Tensor]:
        """Return rows of each array."""
        return {name: self.column(name, rows) for name in self._mapped}

    def column(self, name: str, rows: Tensor) -> Tensor:
        """Return rows of one array."""
        # `take` copies row by row; indexing goes element by element, in torch many times slower
        return torch.from_numpy(self._mapped[name].take(rows.numpy(), 0)).float()

    @cached_property
    def _mapped(self) -> dict[str, np.ndarray]:
        return {name: np.asarray(array) for name, array in self.cache.open().items()}

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle the whole arrays; a worker process maps the files again.
        return {name: value for name, value in vars(self).items() if name != "_mapped"}


class DeviceEvidence(Dataset["Lookup"]):
    """As ``CachedEvidence``, with all arrays on the device, where a batch is looked up when it is moved there.

    So the loader handles row numbers alone, and has nothing to copy or to pin.

    Args:
        rows: where the arrays come from.
        trainer: knows the device and the precision.
    """

    def __init__(self, rows: CachedEvidence, trainer: Trainer) -> None:
        cache, device = rows.cache, trainer.strategy.root_device
        self.labels = rows.labels.to(device)
        self._convert = trainer.precision_plugin.convert_input
        self._arrays = {
            name: torch.empty(array.shape, dtype=getattr(torch, array.dtype.name), device=device)
            for name, array in cache.arrays.items()
        }
        for chunk in range(len(cache.checksums)):
            for name, values in cache.read(chunk).items():
                self._arrays[name][cache.rows(chunk).to(device)] = torch.from_numpy(values).to(device)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor) -> "Lookup":
        return Lookup(self, rows)

    def look_up(self, rows: Tensor) -> EvidenceBatch:
        """Return the batch of (B,) rows, which are on the device."""
        columns = {name: array[rows].float() for name, array in self._arrays.items()}
        # Lightning converts to the trainer's precision before the transfer, when there is nothing to convert yet.
        return self._convert(to_batch(columns, self.labels[rows], rows))


class Lookup:
    """A batch of ``DeviceEvidence`` before it is looked up."""

    def __init__(self, evidence: DeviceEvidence, rows: Tensor) -> None:
        self.evidence, self.rows = evidence, rows

    def to(self, device: torch.device) -> EvidenceBatch:
        """Look it up; Lightning calls this to move a batch."""
        return self.evidence.look_up(self.rows.to(device))
