"""The per-image table behind every result: ``scores.npz``."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SCORE, REPEATS = "score/", "repeats/"


@dataclass(frozen=True)
class Samples:
    """One row for each evaluated image, grouped by split, in the order of its ids within each split.

    ``scores.npz`` holds the same columns, scores under ``score/<name>``, repeats under ``repeats/<OOD set>``; nothing
    else is needed to compute every metric again.

    Attributes:
        splits: names of the splits: ``calibration`` (held-out ID training images, where there are any), ``id`` (ID test
            images), then the OOD sets.
        split: (N,) index into ``splits``.
        ids: (N,) row of the image within its split.
        labels: (N,) class of an ID image, -1 for an OOD image.
        predictions: (N,) predicted class; -1 throughout for a method without classes.
        scores: name -> (N,), higher = more OOD.
        repeats: OOD set -> (R, n) ids of the n images in each of its R drawings, which may overlap; only of sets that
            were drawn from more than once.
    """

    splits: tuple[str, ...]
    split: NDArray[np.int64]
    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    scores: dict[str, NDArray[np.floating]]
    repeats: dict[str, NDArray[np.int64]] = field(default_factory=dict)

    def of(self, split: str) -> "Samples":
        """Return the rows of one split."""
        if split not in self.splits:
            raise ValueError(f"no split {split!r} here; there are {', '.join(self.splits)}")
        return self._take(self.split == self.splits.index(split))

    def drawings(self, ood_set: str) -> list["Samples"]:
        """Return the rows of each drawing from an OOD set; all its rows, once, where there were not several."""
        rows = self.of(ood_set)
        if ood_set not in self.repeats:
            return [rows]
        return [rows._take(np.isin(rows.ids, ids)) for ids in self.repeats[ood_set]]

    @property
    def classified(self) -> bool:
        """Whether classes were predicted at all."""
        return bool((self.predictions >= 0).all())

    @property
    def ood_sets(self) -> tuple[str, ...]:
        """Names of the OOD sets."""
        return tuple(name for name in self.splits if name not in ("id", "calibration"))

    def save(self, path: Path) -> None:
        """Write ``scores.npz``."""
        columns = {"split": self.split, "ids": self.ids, "labels": self.labels, "predictions": self.predictions}
        columns |= {REPEATS + name: ids for name, ids in self.repeats.items()}
        scores = {SCORE + name: values for name, values in self.scores.items()}
        np.savez_compressed(path, allow_pickle=False, splits=np.array(self.splits), **columns, **scores)

    @classmethod
    def load(cls, path: Path) -> "Samples":
        """Read ``scores.npz``; a damaged file is a ``ValueError`` that names it."""
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                columns = {name: stored[name] for name in stored.files}
            scores, repeats = (
                {name.removeprefix(kind): columns.pop(name) for name in list(columns) if name.startswith(kind)}
                for kind in (SCORE, REPEATS)
            )
            splits = tuple(str(name) for name in columns.pop("splits"))
            samples = cls(splits=splits, scores=scores, repeats=repeats, **columns)
            samples._check()
        except Exception as error:  # of a damaged file, NumPy, zipfile, zlib and tokenize each raise their own
            raise ValueError(f"{path} is not a readable scores.npz: {error}") from error
        return samples

    def _check(self) -> None:
        """Raise a ``ValueError`` where columns cannot be what an evaluation wrote."""
        columns = {"split": self.split, "ids": self.ids, "labels": self.labels, "predictions": self.predictions}
        for name, least in (("split", 0), ("ids", 0), ("labels", -1), ("predictions", -1)):
            if not np.issubdtype(columns[name].dtype, np.integer) or columns[name].min(initial=0) < least:
                raise ValueError(f"{name} must be integers of at least {least}")
        if self.split.max(initial=0) >= len(self.splits):
            raise ValueError(f"split counts further than the {len(self.splits)} names of splits")
        for name, values in {**columns, **self.scores}.items():
            if values.shape != self.split.shape or self.split.ndim != 1:
                raise ValueError(f"{name} has the shape {values.shape}, split {self.split.shape}")
        for name, values in self.scores.items():
            if np.isnan(values).any():
                raise ValueError(f"{name} holds what is no number")

    def _take(self, rows: NDArray[np.bool_]) -> "Samples":
        return replace(
            self,
            split=self.split[rows],
            ids=self.ids[rows],
            labels=self.labels[rows],
            predictions=self.predictions[rows],
            scores={name: values[rows] for name, values in self.scores.items()},
        )
