"""Which checkpoints a run leaves beside the best one, and what epoch they are of."""

from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Does not write the step again that it was resumed from: in mid-accumulation that would lose the gradients."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Remember what Lightning keeps out of the callback's state."""
        super().on_train_start(trainer, pl_module)
        # the end of an epoch is always worth a checkpoint, also where nothing was optimised
        begins = trainer.ckpt_path is None and not self._every_n_train_steps
        self._last_global_step_saved = -1 if begins else trainer.global_step

    def on_train_batch_end(self, trainer: Trainer, *args: Any, **kwargs: Any) -> None:
        """Leave an epoch's last step to the end of the epoch: resumed from before that, Lightning would skip it."""
        if not trainer.is_last_batch:
            super().on_train_batch_end(trainer, *args, **kwargs)


class FirstCheckpoint(Callback):
    """Keeps what a run starts from.

    Args:
        path: of the checkpoint.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, once."""
        if not trainer.strategy.broadcast(self.path.is_file()):
            trainer.save_checkpoint(self.path, weights_only=False)


def epoch_of(checkpoint: Path | str) -> int:
    """Return the epoch, counted from 0, at whose end a checkpoint was written; -1 before the first step."""
    content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return int(content["epoch"]) if content["global_step"] else -1
