"""Fitting the scores that a method is made of, on cached evidence."""

import torch
from pytorch_lightning import Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from callbacks.cached_evidence import CachedEvidence
from lightning_modules.ood_module import OODModule
from lightning_modules.scores.score import Score

ROWS = 1024  # of a batch


def fit_scores(trainer: Trainer, module: OODModule, evidence: CachedEvidence, rows: Tensor) -> None:
    """Fit each score that is a part of the module and is not fitted yet, as after a resume; all processes share.

    Args:
        trainer: knows the device.
        module: whose scores, and whose backbone they are bound to.
        evidence: of the training images.
        rows: (n,) which of them are ID images to fit on.
    """
    batches = rows.split(ROWS)[trainer.global_rank :: trainer.world_size]
    for name, score in module.named_children():
        if not isinstance(score, Score) or score.fitted:
            continue
        score.bind(module.backbone if module.num_classes else None)
        score.to(module.device)
        while not score.fitted:
            with torch.no_grad():
                for batch in batches:
                    observed, labels, _ = trainer.strategy.batch_to_device(evidence[batch])
                    score.update(observed, labels)
                score.finalize()
        rank_zero_info(f"fitted {name} on {len(rows):,} ID training images")
