"""Sets of images that lie in few large files, NumPy arrays or LMDBs, and stay there."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from torch import Tensor

from datamodules.fitting import MODES, Fit, fit_arrays, read_image
from datamodules.images import ImageSet, sha256

SAMPLE = 1000


class MappedImages(ImageSet):
    """One ``.npy`` array, uint8 (N, H, W, C), mapped into memory: only the rows asked for are read.

    Args:
        path: the file.
        fit: to what rows are converted.
        labels: (N,) int64; -1 where not given.
    """

    def __init__(self, path: Path, fit: Fit, labels: Tensor | None = None) -> None:
        self.path, self.fit = path, fit
        self.shape, self.source = fit.shape, str(path)
        self.labels = torch.full((len(self._mapped),), -1) if labels is None else labels
        if len(self.labels) != len(self._mapped):
            raise ValueError(f"{path} holds {len(self._mapped)} images, but there are {len(self.labels)} labels")
        fit_arrays(self._mapped[:1], fit, self.source)  # all have one size: if it does not fit, it is said now

    @cached_property
    def _mapped(self) -> np.ndarray:
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}")
        try:
            images = np.lib.format.open_memmap(self.path, mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.path} cannot be read as an .npy array: {error}") from error
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] not in MODES:
            raise ValueError(
                f"{self.path}: images must be uint8 (N, H, W, C), C = 1 or 3; these are {images.dtype} {images.shape}"
            )
        return images

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle the whole array; whoever receives the set maps the file again.
        return {name: value for name, value in vars(self).items() if name != "_mapped"}

    def read(self, rows: Tensor) -> Tensor:
        """Copy the rows out of the file."""
        return channels_first(fit_arrays(self._mapped[rows.numpy()], self.fit, self.source))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the array's shape, of up to 1,000 rows spread evenly over it, and how they are converted."""
        sample = np.linspace(0, len(self) - 1, min(len(self), SAMPLE)).astype(int)
        return sha256(f"{self.fit.resize}{self._mapped.shape}", self._mapped[sample].tobytes())


class LMDBImages(ImageSet):
    """Encoded image files that are the values of LMDBs, in the order of the databases and of their keys.

    A database is open while it is read and no longer, which takes some 50 microseconds: nothing has to survive a fork
    or a pickle, and two sets may share one.

    Args:
        paths: folders of the databases.
        fit: to what images are converted.
        source: what the set is called.
    """

    def __init__(self, paths: Sequence[Path], fit: Fit, source: str) -> None:
        self.paths, self.fit, self.shape, self.source = paths, fit, fit.shape, source
        listings = [list_values(path) for path in paths]
        # arrays, because a million bytes objects would be copied into each worker as soon as it counts references
        self.keys, self.sizes = (np.concatenate(parts) for parts in zip(*listings, strict=True))
        counts = [len(keys) for keys, _ in listings]
        self.ends = np.cumsum(counts)
        self.labels = torch.repeat_interleave(torch.tensor(counts))

    def read(self, rows: Tensor) -> Tensor:
        """Decode the rows."""
        channels, height, width = self.shape
        images = np.empty((len(rows), height, width, channels), dtype=np.uint8)
        keys = self.keys[rows.numpy()]
        databases = np.searchsorted(self.ends, rows.numpy(), side="right")
        for database in np.unique(databases):
            path = self.paths[database]
            with reading(path) as transaction:
                for place in np.flatnonzero(databases == database):
                    key = bytes(keys[place])
                    name = f"{key.decode(errors='replace')} in {path}"
                    if (value := transaction.get(key)) is None:
                        raise ValueError(f"there is no {name} any more")
                    images[place] = read_image(io.BytesIO(value), self.fit, name).reshape(height, width, channels)
        return channels_first(images)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the keys, the sizes of the values and how they are converted."""
        return sha256(str(self.fit.resize), self.keys.tobytes(), self.sizes.tobytes())


def channels_first(images: np.ndarray) -> Tensor:
    """Turn (N, H, W, C) into a contiguous (N, C, H, W) tensor."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()


@contextmanager
def reading(path: Path) -> Iterator[lmdb.Transaction]:
    """Open an LMDB, whose values are memory views that end with it; an error names the folder."""
    if not (path / "data.mdb").is_file():
        raise FileNotFoundError(f"no database {path / 'data.mdb'}")
    try:
        with lmdb.open(str(path), readonly=True, lock=False) as database, database.begin(buffers=True) as transaction:
            yield transaction
    except lmdb.Error as error:
        raise ValueError(f"{path} cannot be read as an LMDB: {error}") from error


def list_values(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the keys of an LMDB, in its order, and the sizes of the values in bytes."""
    with reading(path) as transaction:
        listing = [(bytes(key), len(value)) for key, value in transaction.cursor()]
    return np.array([key for key, _ in listing], dtype=np.bytes_), np.array([size for _, size in listing], dtype=int)
