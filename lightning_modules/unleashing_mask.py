"""Unleashing Mask: a trained classifier forgets what it learned last, the atypical ID images.

With the cross-entropy C of a batch, the loss is |beta C - U| + U: a floor U above the loss of the trained network lets
gradients point uphill until the loss is back at a level that the network had in the middle of training, where scores
tell ID from OOD better than at its end. UM trains all weights. UMAP keeps them and trains which of them to use: scores
of a ``Subnetwork``. Zhu, Li, Yao, Liu, Xu and Han, "Unleashing Mask: Explore the Intrinsic Out-of-Distribution
Detection Capability", ICML 2023.
"""

import math
from typing import Any, Literal

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torchmetrics.classification import MulticlassAccuracy

from backbones.backbone import Backbone
from backbones.subnetwork import Subnetwork
from lightning_modules.distributed import mean_over_processes
from lightning_modules.evidence import Evidence, observe
from lightning_modules.losses.cross_entropy import cross_entropy
from lightning_modules.losses.loss_floor import loss_floor, resolve_floor
from lightning_modules.ood_module import Batch, Images, Labels, OODModule
from lightning_modules.scores.score import widen


class UnleashingMask(OODModule):
    """A trained network that goes on training above a floor of the loss, or a subnetwork of it that does.

    The floor acts on the mean of the whole batch, over all processes. Where gradients accumulate, a batch is what one
    step sees.

    With ``keep``, logits and features, which the scores read, are those of the subnetwork. While its weights are frozen
    the class of an image is still predicted by the whole network, statistics of batch-norm included: by the same
    numbers as before the training, in a pass of its own.

    Args:
        backbone: the trained network, with its ``weights``.
        optimizer: makes the optimiser from the parameters that learn.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
        floor: U, at least 0; 0 = none, plain training goes on. ``auto`` = beta times what ``estimate`` found.
        estimate: where ``auto`` reads it, ``run:unleashing_mask/<setting>[/<name>]``, a run of ``LossEstimate``.
        beta: weight of the cross-entropy, before the floor.
        keep: UMAP, the share of each layer's weights that the subnetwork uses; None = UM, all weights learn.
        freeze_weights: of UMAP, whether only the scores of the subnetwork learn; False = the weights, too.
    """

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        floor: float | Literal["auto"] = "auto",
        estimate: str | None = None,
        beta: float = 1.0,
        keep: float | None = None,
        freeze_weights: bool = True,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        if not 0 < beta < math.inf:
            raise ValueError(f"beta weighs the cross-entropy and must be above 0, not {beta}")
        if keep is None and not freeze_weights:
            raise ValueError("freeze_weights: false is about the weights of a subnetwork: it takes keep, as of 0.8")
        if keep == 1 and freeze_weights:
            raise ValueError("keep: 1.0 leaves nothing to learn, for the weights are frozen: UM is without keep")
        self.floor, self.beta = resolve_floor(floor, estimate, backbone, beta), beta
        self.subnetwork: Subnetwork | None = None
        self.predicts_whole = keep is not None and freeze_weights
        if keep is not None:
            self.subnetwork = Subnetwork(backbone, keep, torch.initial_seed())
            backbone.requires_grad_(not freeze_weights)
        if self.predicts_whole:
            self.extra_forwards, self.best_by = 1, "val/subnetwork_accuracy"
            self.subnetwork_accuracy = MulticlassAccuracy(self.num_classes, average="micro")

    @property
    def backbone_of_logits(self) -> Backbone:
        """The network that the scores see: with UMAP the subnetwork, by itself."""
        return self.backbone if self.subnetwork is None else self.subnetwork.extract(self.backbone)

    def on_train_start(self) -> None:
        """Say what the floor is."""
        super().on_train_start()
        rank_zero_info(f"floor {self.floor:.4g}")

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images, by the subnetwork where there is one."""
        if self.subnetwork is None:
            return observe(self.backbone, images, self.taps)
        logits, features = self.subnetwork(self.backbone, images, self.taps)
        return Evidence(logits, features, {}, None)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the cross-entropy of the batch, with its floor."""
        images, labels, _ = batch
        loss = self.beta * cross_entropy(widen(self(images).logits), labels)
        # of shares that are equally large, as those of training batches are
        level, outliers = mean_over_processes(torch.stack([loss.detach(), (labels < 0).any().to(loss)]))
        if outliers:
            raise ValueError("the batch holds outliers, this method is trained without: leave out outlier_feed")
        self.log_dict({"train/cross_entropy": level / self.beta, "train/scaled": level})
        self.log("train/loss", loss_floor(level, self.floor), prog_bar=True)
        return loss_floor(loss, self.floor, level)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Evidence:  # type: ignore[override]
        """Observe the images, and classify them by the whole network where the subnetwork does not."""
        evidence = self(batch[0])
        if not self.predicts_whole:
            return evidence
        return evidence._replace(predictions=self.backbone(batch[0]).argmax(1))

    predict_step = test_step

    def count_correct(self, evidence: Evidence, labels: Labels) -> None:
        """Count the images that are classified correctly, and those that the subnetwork by itself does."""
        super().count_correct(evidence, labels)
        known = labels >= 0
        if self.predicts_whole:
            if known.any():
                self.subnetwork_accuracy.update(evidence.logits[known], labels[known])
            self.log("val/subnetwork_accuracy", self.subnetwork_accuracy, on_epoch=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the floor, for a run goes on with the one that it began with, and what makes a mask of scores."""
        checkpoint |= {"floor": self.floor} | ({} if self.subnetwork is None else {"keep": self.subnetwork.keep})

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the floor of the run."""
        self.floor = checkpoint.get("floor", self.floor)  # a test of another method's checkpoint has none
