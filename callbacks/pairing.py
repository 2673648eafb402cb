"""Training on pairs of an image and what it is to become: an ID image itself, an outlier the nearest ID image."""

import tempfile
import time
import zipfile
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from callbacks.cached_evidence import FEATURE, LOGITS, CachedEvidence, DeviceEvidence
from callbacks.frozen_features import FrozenFeatures
from callbacks.nearest import nearest_of_class
from callbacks.processes import together
from datamodules.datamodule import OODDataModule
from datamodules.images import ImageSet
from datamodules.plans import permutation
from lightning_modules.evidence import TargetBatch
from lightning_modules.ood_module import OODModule

ROWS = 8192  # of logits, read at a time
STREAM = 1_000_000  # of random numbers; orders of training rows take the first ones


class Pairing(Callback):
    """Serves ``TargetBatch``: cached evidence, images, and the target of each.

    The target of an outlier is the ID training image that the network predicts to be of the same class and whose
    penultimate features are nearest; where there is none of this class, the nearest of all. Predictions count on both
    sides, not labels. Pairs belong to the feature cache and lie in its folder: the first process finds them, once for
    the same weights, images and outliers.

    Attributes:
        partners: (M,) row of the ID training image that each outlier is to become; known from the start of training on.

    Args:
        pairing: ``nearest``, or ``shuffled``: the same ID images, dealt out to the outliers at random, by the seed of
            the data, to see what the choice is worth.
    """

    partners: Tensor

    def __init__(self, pairing: Literal["nearest", "shuffled"] = "nearest") -> None:
        self.pairing = pairing

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let results state which pairs there were.

        Raises:
            ValueError: there is another one of this kind.
        """
        module: OODModule = pl_module  # type: ignore[assignment]
        if sum(isinstance(callback, Pairing) for callback in trainer.callbacks) > 1:  # type: ignore[attr-defined]
            raise ValueError(
                "there are two callbacks.pairing.Pairing: to change the last callback of a YAML say "
                "--trainer.callbacks.init_args.pairing shuffled"
            )
        module.notes["pairing"] = self.pairing

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find the pairs and let the data module serve them.

        Raises:
            ValueError: the features are not cached, or not before this.
        """
        data: OODDataModule = trainer.datamodule  # type: ignore[attr-defined]
        before = trainer.callbacks[: trainer.callbacks.index(self)]  # type: ignore[attr-defined]
        features = next((callback for callback in before if isinstance(callback, FrozenFeatures)), None)
        if features is None:
            raise ValueError(
                "pairs are found among cached features: list callbacks.frozen_features.FrozenFeatures before "
                "callbacks.pairing.Pairing in trainer.callbacks+"
            )
        images, known = data.training_rows(), data.sizes["train"]
        self.partners = self._pair(trainer, pl_module, CachedEvidence(features.cache, images.labels), known)
        if not len(self.partners):
            rank_zero_warn("there are no outliers to pair: training sees ID images alone")
        if self.pairing == "shuffled":
            self.partners = self.partners[permutation(len(self.partners), data.seed, 0, STREAM)]
        data.serve(TargetRows(features.rows, images, known, self.partners))

    def _pair(self, trainer: Trainer, module: LightningModule, evidence: CachedEvidence, known: int) -> Tensor:
        """Return the pairs; the first process finds them where they do not lie in the folder of the cache."""
        path = evidence.cache.folder / "nearest.npz"
        outliers = len(evidence) - known

        def find() -> None:
            if not trainer.is_global_zero or read_partners(path, outliers, known) is not None:
                return
            started = time.perf_counter()
            classes = [evidence.column(LOGITS, rows).argmax(1) for rows in torch.arange(len(evidence)).split(ROWS)]
            features = partial(evidence.column, f"{FEATURE}penultimate")
            device = None if module.device.type == "mps" else module.device  # it knows no float64
            partners = nearest_of_class(features, torch.cat(classes), known, device=device)
            write_partners(path, partners)
            seconds = time.perf_counter() - started
            rank_zero_info(f"paired {outliers:,} outliers with {known:,} ID images in {seconds:.1f} s")

        together(trainer, find)
        partners = together(trainer, lambda: read_partners(path, outliers, known))
        assert partners is not None
        return partners


def write_partners(path: Path, partners: Tensor) -> None:
    """Write pairs, whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
        np.savez(file, partners=partners.numpy())
    Path(file.name).replace(path)


def read_partners(path: Path, outliers: int, known: int) -> Tensor | None:
    """Read pairs; None where there are none, or the file is damaged."""
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:  # it has a checksum
            partners = torch.from_numpy(archive["partners"])
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile):
        return None  # one bit can ask for a compression that zipfile does not know, a RuntimeError
    fits = partners.dtype == torch.int64 and partners.shape == (outliers,)
    return partners if fits and bool(((partners >= 0) & (partners < known)).all()) else None


class TargetRows(Dataset[TargetBatch]):
    """``rows[ids]`` is a ``TargetBatch``; each image is read once.

    Args:
        evidence: of the training images.
        images: ID images, then outliers.
        known: how many are ID.
        partners: (M,) row of each outlier's target.
    """

    def __init__(
        self, evidence: CachedEvidence | DeviceEvidence, images: ImageSet, known: int, partners: Tensor
    ) -> None:
        self.evidence, self.images, self.known, self.partners = evidence, images, known, partners

    def __len__(self) -> int:
        return len(self.evidence)

    def __getitem__(self, rows: Tensor) -> TargetBatch:
        batch, outlier = self.images[rows], rows >= self.known
        targets = batch.images.clone()
        targets[outlier] = self.images.read(self.partners[rows[outlier] - self.known])
        return TargetBatch(self.evidence[rows], batch, batch.images, targets)  # type: ignore[arg-type]
