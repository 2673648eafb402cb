"""Arrays on disk that are costly to make: written chunk by chunk, verified when they are opened."""

import io
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from callbacks.results import read_json, write_json
from datamodules.images import sha256

VERSION = 1  # of the files and of what their rows mean; others are never read
CHUNK = 1024  # rows


class FeatureCache:
    """N rows of several arrays in a folder of their own.

    Each array is an ``.npy`` file, and ``checksums.npy`` has a number for each chunk of rows, over all arrays. A chunk
    whose number does not fit counts as missing. So a kill, a power cut, a file that was cut short or deleted, or a
    flipped bit cost the chunks they hit; nothing has to be written in a certain order. Several processes may write,
    each its own chunks.

    The name of the folder is a hash of all that the rows depend on, and ``meta.json`` states that in clear.

    Attributes:
        folder: where the files lie.
        nbytes: size of the arrays.

    Args:
        root: where the folder lies.
        identity: what the rows depend on, as JSON holds it.
        length: N.
        widths: array -> D, for float arrays (N, D).
        dtype: of the arrays.
        chunk: rows that are written and verified together.
    """

    def __init__(
        self,
        root: Path,
        identity: Mapping[str, Any],
        length: int,
        widths: Mapping[str, int],
        dtype: str = "float32",
        chunk: int = CHUNK,
    ) -> None:
        widths = dict(sorted(widths.items()))  # checksums go through the arrays in this order
        layout = {"version": VERSION, "length": length, "widths": widths, "dtype": dtype, "chunk": chunk}
        text = json.dumps({**identity, **layout}, sort_keys=True)
        self.meta: dict[str, Any] = json.loads(text)
        self.folder = root / sha256(text)[:16]
        self.length, self.chunk = length, chunk
        self.arrays = {
            name: ArrayFile(self.folder / f"{name}.npy", (length, width), np.dtype(dtype))
            for name, width in widths.items()
        }
        self.nbytes = sum(array.nbytes for array in self.arrays.values())
        self.checksums = ArrayFile(self.folder / "checksums.npy", (-(-length // chunk),), np.dtype(np.uint64))

    def prepare(self) -> None:
        """Lay out what is not there; what is there stays.

        Raises:
            ValueError: the folder holds something else than its name says.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / "meta.json"
        try:
            found = read_json(path)
        except (FileNotFoundError, ValueError):  # damaged: the name of the folder says the same
            write_json(path, self.meta)
            found = self.meta
        if found != self.meta:
            changed = [key for key in {**found, **self.meta} if found.get(key) != self.meta.get(key)]
            raise ValueError(
                f"{path} is not about what is wanted, though the name of its folder is: {', '.join(changed)} differ; "
                "remove the folder, and it is made anew"
            )
        for array in (*self.arrays.values(), self.checksums):
            array.lay_out()

    def missing(self) -> list[int]:
        """List the chunks that are not there or damaged; this reads all that is there, a chunk at a time."""
        stored = self.checksums.read(0, len(self.checksums)).tolist()
        return [
            chunk for chunk, number in enumerate(stored) if not number or number != checksum(self.read(chunk).values())
        ]

    def rows(self, chunk: int) -> Tensor:
        """Return which rows a chunk holds, int64."""
        return torch.arange(chunk * self.chunk, min((chunk + 1) * self.chunk, self.length))

    def read(self, chunk: int) -> dict[str, np.ndarray]:
        """Read a chunk of each array, whatever it holds."""
        rows = self.rows(chunk)
        return {name: array.read(int(rows[0]), len(rows)) for name, array in self.arrays.items()}

    def write(self, chunk: int, arrays: Mapping[str, np.ndarray]) -> None:
        """Write a chunk of each array, (rows, D), and its checksum."""
        for name, array in self.arrays.items():
            expected = (len(self.rows(chunk)), *array.shape[1:])
            if arrays[name].shape != expected or arrays[name].dtype != array.dtype:
                found = f"{arrays[name].dtype} {arrays[name].shape}"
                raise ValueError(f"chunk {chunk} of {array.path} is {array.dtype} {expected}, not {found}")
            array.write(chunk * self.chunk, arrays[name])
        number = checksum(arrays[name] for name in self.arrays)
        self.checksums.write(chunk, np.array([number], dtype=np.uint64))

    def open(self) -> dict[str, np.ndarray]:
        """Map the arrays into memory, to be read only."""
        return {name: array.map() for name, array in self.arrays.items()}


@dataclass(frozen=True)
class ArrayFile:
    """A NumPy array in a file, of known shape; read and written without being held.

    Attributes:
        path: the ``.npy`` file.
        shape: (N, ...).
        dtype: of the elements.
    """

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def nbytes(self) -> int:
        """Size of the elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @cached_property
    def header(self) -> bytes:
        """How the file begins."""
        header = io.BytesIO()
        descr = np.lib.format.dtype_to_descr(self.dtype)
        np.lib.format.write_array_header_1_0(header, {"descr": descr, "fortran_order": False, "shape": self.shape})
        return header.getvalue()

    def lay_out(self) -> None:
        """Make the file, or give it the header and the size it should have; new elements are 0 and take no space."""
        with self.path.open("r+b" if self.path.exists() else "w+b") as file:
            if file.read(len(self.header)) != self.header:
                file.seek(0)
                file.write(self.header)
            if file.seek(0, os.SEEK_END) != len(self.header) + self.nbytes:
                file.truncate(len(self.header) + self.nbytes)

    def read(self, first: int, count: int) -> np.ndarray:
        """Read so many rows from the first on."""
        elements = count * math.prod(self.shape[1:])
        return np.fromfile(self.path, self.dtype, elements, offset=self._offset(first)).reshape(-1, *self.shape[1:])

    def write(self, first: int, rows: np.ndarray) -> None:
        """Write rows from the first on.

        By system calls: a full disk is an ``OSError`` here, while a memory map would end the process.
        """
        with self.path.open("r+b") as file:
            file.seek(self._offset(first))
            file.write(np.ascontiguousarray(rows).data)

    def map(self) -> np.ndarray:
        """Map the array into memory, to be read only."""
        return np.memmap(self.path, self.dtype, "r", len(self.header), self.shape)

    def _offset(self, row: int) -> int:
        return len(self.header) + row * math.prod(self.shape[1:]) * self.dtype.itemsize


def checksum(arrays: Iterable[np.ndarray]) -> int:
    """Return the CRC-32 of arrays one after the other, with a bit above it: it is never 0."""
    crc = 0
    for array in arrays:
        crc = zlib.crc32(np.ascontiguousarray(array).data, crc)
    return 1 << 32 | crc
