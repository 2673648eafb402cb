"""Outlier exposure: a classifier that is also told what not to recognise.

With the cross-entropy C of the ID images of a batch and a loss V of its auxiliary outliers, the loss is C + V. V is the
cross-entropy of outliers against the uniform distribution (OE), or hinges on the energies of both (energy-bounded).
With ``callbacks.outlier_selection.OutlierSelection`` the outliers of each epoch are those of a pool which look most
like ID images, and energy-bounded exposure becomes POEM. A floor U turns C into |C - U| + U (Unleashing Mask).

Hendrycks, Mazeika and Dietterich, "Deep Anomaly Detection with Outlier Exposure", ICLR 2019; Liu, Wang, Owens and Li,
"Energy-based Out-of-distribution Detection", NeurIPS 2020; Ming, Fan and Li, "POEM: Out-of-Distribution Detection with
Posterior Sampling", ICML 2022; Zhu et al., "Unleashing Mask", ICML 2023.
"""

from typing import Any, Literal

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from backbones.backbone import Backbone
from lightning_modules.distributed import mean_over_processes
from lightning_modules.evidence import Evidence, observe
from lightning_modules.losses.cross_entropy import cross_entropy
from lightning_modules.losses.loss_floor import loss_floor, resolve_floor
from lightning_modules.losses.outlier_exposure import OutlierLoss, UniformTarget
from lightning_modules.ood_module import Batch, Images, OODModule
from lightning_modules.scores.score import widen


class OutlierExposure(OODModule):
    """A network that learns from ID images and auxiliary outliers, which pass through it together.

    The floor acts on the mean cross-entropy of the whole batch, over all processes. Where gradients accumulate, a batch
    is what one step sees.

    Args:
        backbone: the network, usually trained, with its ``weights``.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
        outlier_loss: V; ``UniformTarget`` where not given.
        floor: U, of the cross-entropy alone, at least 0; 0 = none. ``auto`` = what ``estimate`` found.
        estimate: where ``auto`` reads it, ``run:unleashing_mask/<setting>[/<name>]``.
    """

    needs_outliers = True

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        outlier_loss: OutlierLoss | None = None,
        floor: float | Literal["auto"] = 0.0,
        estimate: str | None = None,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        self.outlier_loss = outlier_loss or UniformTarget()
        self.floor = resolve_floor(floor, estimate, backbone)

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images: logits (B, K), ``penultimate`` and the requested taps."""
        return observe(self.backbone, images, self.taps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the floored cross-entropy of the ID images and the loss of the outliers, added up."""
        images, labels, _ = batch
        logits = widen(self.backbone(images))
        loss, outlier_loss = cross_entropy(logits, labels), self.outlier_loss(logits, labels)
        level, outliers = mean_over_processes(torch.stack([loss, outlier_loss]).detach())
        self.log_dict({"train/cross_entropy": level, "train/outliers": outliers})
        self.log("train/loss", loss_floor(level, self.floor) + outliers, prog_bar=True)
        return loss_floor(loss, self.floor, level) + outlier_loss

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the floor: a run goes on with the one that it began with."""
        checkpoint["floor"] = self.floor

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take the floor of the run."""
        self.floor = checkpoint.get("floor", self.floor)  # a test of another method's checkpoint has none
