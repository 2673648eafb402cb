"""The training images of the downsampled ImageNet (Chrabaszcz et al., 2017) at 64x64: from pickles to one array."""

import fcntl
import pickle
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

BATCH = "train_data_batch_"
CHUNK = 4096
ARRAYS_NEED = {
    ("numpy", "dtype"),
    ("numpy", "ndarray"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy._core.numeric", "_frombuffer"),  # protocol 5
    ("_codecs", "encode"),  # bytes in protocols 0 to 2
}


def join_batches(folder: Path) -> tuple[Path, Tensor]:
    """Write the batch files of the downsampled ImageNet as one array, unless that is done already.

    ``images.npy`` and ``labels.npz`` appear in the folder when they are complete. Processes that ask at once wait for
    the first of them.

    Returns:
        The file of the images, uint8 (N, 64, 64, 3), and their labels 0..999.

    Raises:
        FileNotFoundError: there is no batch file, or the numbers have a gap.
        ValueError: a file is damaged; the message names it.
    """
    batches = find_batches(folder)
    labels = _joined_labels(folder, batches)
    if labels is None:
        if not batches:
            raise FileNotFoundError(f"no file {folder / BATCH}1")
        with (folder / "images.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # gone when the file is closed, or the process dead
            labels = _joined_labels(folder, batches)
            if labels is None:
                labels = _join(folder, batches)
    return folder / "images.npy", torch.from_numpy(labels)


def find_batches(folder: Path) -> list[Path]:
    """List the batch files, numbered from 1 without a gap; there may be none."""
    numbers = [path.name.removeprefix(BATCH) for path in folder.glob(f"{BATCH}*")]
    last = max((int(number) for number in numbers if number.isdecimal()), default=0)
    batches = [folder / f"{BATCH}{number}" for number in range(1, last + 1)]
    for path in batches:
        if not path.is_file():
            raise FileNotFoundError(f"no file {path}, though there is {batches[-1].name}")
    return batches


def _identify(batches: Sequence[Path]) -> np.ndarray:
    """Return the size of each file and a checksum of its first bytes, which hold the first images."""
    facts = []
    for path in batches:
        with path.open("rb") as file:
            facts.append((path.stat().st_size, zlib.crc32(file.read(2**16))))
    return np.array(facts)


def _joined_labels(folder: Path, batches: Sequence[Path]) -> np.ndarray | None:
    """Return the labels, if the array is there and made from these batch files; from any, if there are none."""
    path = folder / "labels.npz"
    if not path.is_file() or not (folder / "images.npy").is_file():
        return None
    try:
        with np.load(path) as file:
            current = not batches or np.array_equal(file["batches"], _identify(batches))
            return file["labels"] if current else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is damaged; delete it, and it is made again: {error}") from error


def _join(folder: Path, batches: Sequence[Path]) -> np.ndarray:
    with TemporaryDirectory(dir=folder, prefix="unfinished-") as name:
        scratch = Path(name)
        with (scratch / "images.npy").open("wb") as file:
            _write_header(file, 0)
            labels = np.concatenate([_append(file, path) for path in batches])
            file.seek(0)
            _write_header(file, len(labels))
        np.savez(scratch / "labels.npz", labels=labels, batches=_identify(batches))
        (scratch / "images.npy").replace(folder / "images.npy")
        (scratch / "labels.npz").replace(folder / "labels.npz")  # last: it says that all is there
    return labels


def _write_header(file: BinaryIO, count: int) -> None:
    # NumPy pads the header so that the count may grow in place.
    header = {"descr": "|u1", "fortran_order": False, "shape": (count, 64, 64, 3)}
    np.lib.format.write_array_header_1_0(file, header)


def _append(file: BinaryIO, path: Path) -> np.ndarray:
    """Append the images of one batch file, which is no longer in memory afterwards; return its labels."""
    images, labels = read_batch(path)
    for first in range(0, len(images), CHUNK):
        file.write(np.ascontiguousarray(images[first : first + CHUNK]).data)
    return labels


def read_batch(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Read images, uint8 (N, 64, 64, 3), and labels 0..999 from a pickled dict of ``data`` and ``labels`` 1..1000."""
    try:
        with path.open("rb") as file:
            batch = ArrayUnpickler(file, encoding="bytes").load()
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as a pickle of plain arrays: {error}") from error
    if not isinstance(batch, dict):
        raise ValueError(f"{path} must hold a dict of data and labels, it holds {type(batch).__name__}")
    data, labels = (np.asarray(batch.get(name, batch.get(name.encode(), ()))) for name in ("data", "labels"))
    if data.dtype != np.uint8 or data.ndim != 2 or data.shape[1] != 3 * 64 * 64:
        raise ValueError(f"{path}: data must be uint8 of shape (N, 12288), it is {data.dtype} {data.shape}")
    if labels.shape != data.shape[:1] or labels.dtype.kind not in "iu" or not ((labels > 0) & (labels <= 1000)).all():
        raise ValueError(f"{path}: labels must be {len(data)} integers 1..1000, they are {labels.dtype} {labels.shape}")
    return data.reshape(-1, 3, 64, 64).transpose(0, 2, 3, 1), labels.astype(np.int64) - 1


class ArrayUnpickler(pickle.Unpickler):
    """Reads NumPy arrays in plain containers; refuses whatever else a pickle asks for, because that may be any code."""

    def find_class(self, module: str, name: str) -> Any:
        """Look up what arrays need, under the module names of NumPy 1 and 2."""
        place = (module.replace("numpy.core.", "numpy._core."), name)
        if place not in ARRAYS_NEED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs; it is not to be trusted")
        return super().find_class(*place)
