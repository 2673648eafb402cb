"""Pictures that occur in two sets, pixel for pixel: outliers that one trains on and then tests on, for example."""

from collections.abc import Mapping
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor

from datamodules.images import ImageSet


def image_hashes(images: ImageSet, chunk: int = 1024) -> Tensor:
    """Hash the bytes of each image as it is served, (N,) int64; ``chunk`` images are in memory at a time."""
    hashes = bytearray()
    for rows in torch.arange(len(images)).split(chunk):
        for pixels in images.read(rows).flatten(1).contiguous().numpy():
            hashes += blake2b(pixels, digest_size=8).digest()
    return torch.from_numpy(np.frombuffer(hashes, dtype=np.int64))


def count_duplicates(outliers: ImageSet, others: Mapping[str, ImageSet]) -> dict[str, int]:
    """Count the outliers that are pixel for pixel in other sets, by the names of those sets that have any of them.

    An outlier counts once for a set, however often it is there.
    """
    counts = {name: int(found.sum()) for name, found in find_duplicates(outliers, others).items()}
    return {name: count for name, count in counts.items() if count}


def find_duplicates(outliers: ImageSet, others: Mapping[str, ImageSet]) -> dict[str, Tensor]:
    """Say which of N outliers are pixel for pixel in other sets: name of the set -> (N,) bool.

    Equal hashes are only candidates: pixels decide.
    """
    if not others:
        return {}
    hashes = image_hashes(outliers)
    return {name: _find(outliers, hashes, images) for name, images in others.items()}


def _find(outliers: ImageSet, hashes: Tensor, images: ImageSet) -> Tensor:
    ordered, order = image_hashes(images).sort()
    candidate, end = (torch.searchsorted(ordered, hashes, right=right) for right in (False, True))
    found, rows = torch.zeros(len(outliers), dtype=torch.bool), (candidate < end).nonzero().flatten()
    while len(rows):  # once, unless hashes collide
        same = _same(outliers, rows, images, order[candidate[rows]])
        found[rows[same]] = True
        candidate[rows] += 1
        rows = rows[~same & (candidate[rows] < end[rows])]
    return found


def _same(first: ImageSet, first_rows: Tensor, second: ImageSet, second_rows: Tensor, chunk: int = 1024) -> Tensor:
    """Compare the pixels of pairs of images."""
    same = []
    for some, others in zip(first_rows.split(chunk), second_rows.split(chunk), strict=True):
        one, other = first.read(some), second.read(others)
        alike = one.dtype == other.dtype and one.shape == other.shape
        same.append((one == other).flatten(1).all(1) if alike else torch.zeros(len(some), dtype=torch.bool))
    return torch.cat(same)
