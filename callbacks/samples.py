"""The per-image table behind every result: ``scores.npz``."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SCORE = "score/"


@dataclass(frozen=True)
class Samples:
    """One row for each evaluated image, grouped by split, in the order of its ids within each split.

    ``scores.npz`` holds the same columns, scores under ``score/<name>``; nothing else is needed to compute every
    metric again.

    Attributes:
        splits: names of the splits: ``calibration`` (held-out ID training images, where there are any), ``id`` (ID test
            images), then the OOD sets.
        split: (N,) index into ``splits``.
        ids: (N,) row of the image within its split.
        labels: (N,) class of an ID image, -1 for an OOD image.
        predictions: (N,) predicted class.
        scores: name -> (N,), higher = more OOD.
    """

    splits: tuple[str, ...]
    split: NDArray[np.int64]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    scores: dict[str, NDArray[np.floating]]

    def of(self, split: str) -> "Samples":
        """Return the rows of one split."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r} here; there are {', '.join(self.splits)}")
        rows = self.split == self.splits.index(split)
        scores = {name: values[rows] for name, values in self.scores.items()}
        return Samples(self.splits, self.split[rows], self.ids[rows], self.labels[rows], self.predictions[rows], scores)

    @property
    def ood_sets(self) -> tuple[str, ...]:
        """Names of the OOD sets."""
        return tuple(name for name in self.splits if name not in ("id", "calibration"))

    def save(self, path: Path) -> None:
        """Write ``scores.npz``."""
        scores = {SCORE + name: values for name, values in self.scores.items()}
        columns = {"split": self.split, "ids": self.ids, "labels": self.labels, "predictions": self.predictions}
        np.savez_compressed(path, allow_pickle=False, splits=np.array(self.splits), **columns, **scores)

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Read ``scores.npz``; a damaged file is a ``ValueError`` that names it."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                columns = {name: stored[name] for name in stored.files}
            scores = {name.removeprefix(SCORE): columns.pop(name) for name in list(columns) if name.startswith(SCORE)}
            return cls(splits=tuple(str(name) for name in columns.pop("splits")), scores=scores, **columns)
        except (zipfile.BadZipFile, EOFError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a readable scores.npz: {error}") from error
