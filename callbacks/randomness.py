"""Randomness that survives a restart."""

from typing import Any

import numpy as np
import torch
from pytorch_lightning import Callback, LightningModule, Trainer


class SeedSteps(Callback):
    """Seed every training step from (seed, epoch, batch, rank).

    Lightning stores no generator state, so without this a resumed run draws other dropout masks, noise and proposals
    than an uninterrupted one. Orders and augmentations seed themselves in the data module.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Seed torch on every device."""
        entropy = (self.seed, trainer.current_epoch, batch_idx, trainer.global_rank)
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
