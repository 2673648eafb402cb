"""Batches of cached features, shuffled, over the bare copy of their rows.

Ours takes rows out of memory-mapped files, which lie in the page cache here; the peer collates rows of tensors, one by
one. Both serve features, logits, labels and ids. The limit copies rows of features and logits from memory into memory
that is there already, in one thread: where others use the machine, torch's threads wait for each other.
"""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from benchmarks.images import Pass, drain, print_rates, sample_loader, table, worker_counts
from benchmarks.job import CLASSES
from benchmarks.measure import interleave, print_table
from callbacks.cached_evidence import CachedEvidence, to_columns
from callbacks.feature_cache import FeatureCache
from datamodules.loader import Loader
from datamodules.plans import Plan
from lightning_modules.evidence import Evidence, EvidenceBatch


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    number, width, size = (256, 16, 64) if quick else (50_000, 512, 1024)
    generator = torch.Generator().manual_seed(0)
    features, logits = (torch.randn(number, columns, generator=generator) for columns in (width, CLASSES))
    ids = torch.arange(number)
    rows = (features, logits, ids % CLASSES, ids)
    batches = number // size
    print(f"  N={number} rows of {width} features and {CLASSES} logits, float32, batches of {size}")
    with TemporaryDirectory() as folder:
        passes: dict[str, Iterable[tuple[Tensor, ...]]] = {
            "ours": Pass(Loader(cached(rows, Path(folder)), Plan(number, size, shuffle=True, drop_last=True)), unpack)
        }
        for workers in worker_counts():
            passes[f"TensorDataset, workers={workers}"] = sample_loader(TensorDataset(*rows), size, batches, workers)
        for each in passes.values():
            compare(each, rows)
        contenders = {"limit": bare(features, logits, size), **passes}
        seconds = interleave({who: partial(drain, each) for who, each in contenders.items()}, 1 if quick else 9)
    print("  same values: every row that is served, to the bit, and none twice")
    print_rates(seconds, batches, "batches")
    print_table(*table(f"{batches} batches", seconds, None, judge=not quick))


def cached(rows: tuple[Tensor, ...], folder: Path) -> CachedEvidence:
    """Write features and logits into a cache."""
    features, logits, labels, _ = rows
    columns = to_columns(Evidence(logits, {"penultimate": features}, {}, None))
    widths = {name: values.shape[1] for name, values in columns.items()}
    cache = FeatureCache(folder, {"images": "none"}, len(labels), widths)
    cache.prepare()
    for chunk in cache.missing():
        cache.write(chunk, {name: values[cache.rows(chunk)].numpy() for name, values in columns.items()})
    return CachedEvidence(cache, labels)


def unpack(batch: EvidenceBatch) -> tuple[Tensor, ...]:
    """Put a batch of ours as the peer has it."""
    return batch.evidence.features["penultimate"], batch.evidence.logits, batch.labels, batch.ids


def bare(features: Tensor, logits: Tensor, size: int) -> Pass:
    """Serve shuffled rows, in an order that is known before and always in the same memory."""
    order = torch.randperm(len(features), generator=torch.Generator().manual_seed(0))
    copied = [(values.numpy(), np.empty((size, values.shape[1]), np.float32)) for values in (features, logits)]

    def move(rows: Tensor) -> list[np.ndarray]:
        # any mode but the default, which would fill a buffer first
        return [values.take(rows.numpy(), 0, out, mode="clip") for values, out in copied]

    return Pass(order.split(size), move, len(order) // size)


def compare(batches: Iterable[tuple[Tensor, ...]], rows: tuple[Tensor, ...]) -> None:
    """Raise an ``AssertionError`` where a batch differs from the rows that its ids name, or a row comes twice."""
    served = []
    for batch in batches:
        for values, whole in zip(batch, rows, strict=True):
            torch.testing.assert_close(values, whole[batch[-1]], rtol=0, atol=0)
        served.append(batch[-1])
    ids = torch.cat(served)
    if len(ids.unique()) < len(ids):
        raise AssertionError(f"{len(ids)} rows were served, but only {len(ids.unique())} different ones")
