"""Sets of images that lie in few large files, NumPy arrays or LMDBs, and stay there; and how others become such."""

import fcntl
import io
import logging
import math
import os
from abc import ABC
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch.utils.data import DataLoader

from datamodules.fitting import MODES, Fit, fit_arrays, read_image
from datamodules.images import ImageSet, sha256

logger = logging.getLogger(__name__)

SAMPLE = 1000
CHUNK = 256  # images decoded at a time


class _Mapped(ImageSet, ABC):
    """One ``.npy`` array, mapped into memory: only the rows asked for are read."""

    path: Path

    @cached_property
    def _mapped(self) -> np.ndarray:
        if not self.path.is_file():
            raise FileNotFoundError(f"no file {self.path}")
        try:
            return np.lib.format.open_memmap(self.path, mode="r")
        except (ValueError, EOFError) as error:
            raise ValueError(f"{self.path} cannot be read as an .npy array: {error}") from error

    def __getstate__(self) -> dict[str, Any]:
        # NumPy would pickle the whole array; whoever receives the set maps the file again.
        return {name: value for name, value in vars(self).items() if name != "_mapped"}


class MappedImages(_Mapped):
    """One ``.npy`` array, uint8 (N, H, W, C), mapped into memory: only the rows asked for are read and converted.

    Args:
        path: the file.
        fit: to what rows are converted.
        labels: (N,) int64; -1 where not given.
    """

    def __init__(self, path: Path, fit: Fit, labels: Tensor | None = None) -> None:
        self.path, self.fit = path, fit
        self.shape, self.source = fit.shape, str(path)
        found = self._mapped
        if found.dtype != np.uint8 or found.ndim != 4 or found.shape[3] not in MODES:
            raise ValueError(
                f"{path}: images must be uint8 (N, H, W, C), C = 1 or 3; these are {found.dtype} {found.shape}"
            )
        self.labels = torch.full((len(self._mapped),), -1) if labels is None else labels
        if len(self.labels) != len(self._mapped):
            raise ValueError(f"{path} holds {len(self._mapped)} images, but there are {len(self.labels)} labels")
        fit_arrays(self._mapped[:1], fit, self.source)  # all have one size: if it does not fit, it is said now

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

    def stamp(self) -> str:
        """SHA-256 of the folders and of when each database last changed."""
        times = ((path / "data.mdb").stat().st_mtime_ns for path in self.paths)
        return sha256(*(f"{path.resolve()}\0{time}\0" for path, time in zip(self.paths, times, strict=True)))


class PackedImages(_Mapped):
    """What ``pack`` made of a set: its images as one ``.npy`` array, uint8 (N, C, H, W).

    It is the same data, so it has the fingerprint of the set.

    Raises:
        ValueError: the file is not the array of this set, or not all of it.
    """

    def __init__(self, path: Path, images: ImageSet) -> None:
        self.path, self._digest = path, images.digest
        for attribute in ImageSet.__annotations__:
            setattr(self, attribute, getattr(images, attribute))
        header = _header(images)
        with path.open("rb") as file:
            begins_right = file.read(len(header)) == header
            size = file.seek(0, os.SEEK_END)
        if not begins_right or size != len(header) + len(images) * math.prod(self.shape):
            raise ValueError(f"{path} is not the whole array of {images.source}, uint8 {(len(images), *self.shape)}")

    def read(self, rows: Tensor) -> Tensor:
        """Copy the rows out of the file."""
        return torch.from_numpy(self._mapped[rows.numpy()])

    @property
    def digest(self) -> str:
        """SHA-256 of what the images were decoded from."""
        return self._digest


def pack(images: ImageSet, folder: Path, num_workers: int = 0) -> ImageSet:
    """Decode images into one array on disk, unless that is done already, and map it into memory.

    The array appears in ``folder`` when it is complete. Its name tells what the images are, where their files are, and
    when these changed; one of another size than it must have is made anew. Processes that ask at once wait for the
    first of them.

    Raises:
        OSError: the folder cannot be written.
        ValueError: an image is damaged; the message names it.
    """
    path = folder / f"{sha256(images.digest, str(images.shape), str(images.stamp()))}.npy"
    if (packed := _open_packed(path, images)) is not None:
        return packed
    folder.mkdir(parents=True, exist_ok=True)
    with path.with_suffix(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.info("waiting for another process that decodes %s", images.source)
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone when the file is closed, or the process dead
        if (packed := _open_packed(path, images)) is None:
            if path.exists():
                logger.warning("%s is damaged and made anew", path)
            _decode(images, path, num_workers)
            packed = PackedImages(path, images)
    return packed


def _open_packed(path: Path, images: ImageSet) -> PackedImages | None:
    try:
        return PackedImages(path, images)
    except (FileNotFoundError, ValueError):
        return None


def _header(images: ImageSet) -> bytes:
    """Return how the ``.npy`` file of the decoded images begins."""
    header = io.BytesIO()
    shape = (len(images), *images.shape)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return header.getvalue()


def _decode(images: ImageSet, path: Path, num_workers: int) -> None:
    """Write all images as one array, in place when complete."""
    logger.info("decoding the %s images of %s, this once, into %s", f"{len(images):,}", images.source, path)
    chunks = torch.arange(len(images)).split(CHUNK)
    generator = torch.Generator()  # the global one must not tell whether images were decoded
    loader = DataLoader(images, batch_size=None, sampler=chunks, num_workers=num_workers, generator=generator)
    console = Console(stderr=True)
    unfinished = path.with_suffix(".part")
    try:
        with unfinished.open("wb") as file:
            file.write(_header(images))
            for batch in track(loader, images.source, console=console, disable=not console.is_terminal):
                file.write(batch.images.numpy().data)
            file.flush()
            os.fsync(file.fileno())  # or after a power cut the name might be there without the content
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


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
