"""From the batches that each process has scored to one table of images."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from callbacks.samples import Samples
from lightning_modules.distributed import gather_rows
from lightning_modules.scores.score import widen

Row = tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]  # ids, labels, predictions, name -> score; each (B,)


def gather_samples(
    rows: Mapping[str, Sequence[Row]], sizes: Mapping[str, int], drawings: Mapping[str, Sequence[Tensor]]
) -> Samples:
    """Join the rows of all processes: each id exactly once, in order.

    Args:
        rows: split -> its batches on this process.
        sizes: split -> number of images, those included that ``limit_test_batches`` leaves out.
        drawings: OOD set -> ids of the images in each of its drawings.

    Raises:
        RuntimeError: an id occurs twice.
    """
    parts: list[dict[str, np.ndarray]] = []
    repeats: dict[str, np.ndarray] = {}
    for index, (split, batches) in enumerate(rows.items()):
        ids, labels, predictions, scores = zip(*batches, strict=True)
        named = {name: widen(torch.cat([batch[name] for batch in scores])) for name in scores[0]}
        stacked = {"ids": torch.cat(ids), "labels": torch.cat(labels), "predictions": torch.cat(predictions)} | named
        columns = {name: gather_rows(values).cpu().numpy() for name, values in stacked.items()}
        order = np.argsort(columns["ids"], kind="stable")
        columns = {name: values[order] for name, values in columns.items()}
        if (np.diff(columns["ids"]) <= 0).any():
            raise RuntimeError(f"an image of {split} was evaluated twice: its sampler repeats ids")
        parts.append(columns | {"split": np.full(len(order), index)})
        drawn = drawings.get(split, [])
        if len(drawn) > 1 and len(order) == sizes[split]:  # limit_test_batches would cut into each drawing
            repeats[split] = torch.stack(list(drawn)).numpy()
    merged = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    keys = {name: merged.pop(name) for name in ("split", "ids", "labels", "predictions")}
    return Samples(tuple(rows), scores=merged, repeats=repeats, **keys)
