"""Fitting the scores and other parts of a method that are fitted, on cached evidence."""

from functools import partial

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from callbacks.cached_evidence import CachedEvidence
from callbacks.processes import together
from lightning_modules.evidence import EvidenceBatch
from lightning_modules.ood_module import OODModule
from lightning_modules.scores.score import Fitted

ROWS = 1024  # of a batch, over all processes


def fit_parts(trainer: Trainer, module: OODModule, evidence: CachedEvidence, rows: Tensor) -> None:
    """Bind each part of the module that is fitted, and fit it unless a checkpoint has; all processes share the rows.

    Args:
        trainer: knows the processes and the device.
        module: whose parts, and whose backbone they are bound to.
        evidence: of the training images.
        rows: (n,) which of them are ID images to fit on.
    """

    def load(batch: Tensor) -> EvidenceBatch:
        # Dealt out as loaders do, on which samples of rows rely; the last share may be empty.
        return trainer.strategy.batch_to_device(evidence[batch[trainer.global_rank :: trainer.world_size]])

    for name, part in module.named_children():
        if not isinstance(part, Fitted):
            continue
        together(trainer, partial(part.bind, module.backbone_of_logits))
        if part.fitted:
            continue
        while not part.fitted:
            for batch in rows.split(ROWS):
                observed, labels, _ = together(trainer, partial(load, batch))
                with torch.no_grad():
                    together(trainer, partial(part.update, observed, labels))
            together(trainer, part.finalize)
        rank_zero_info(f"fitted {name} on {len(rows):,} ID training images")
