"""Classifier: cross-entropy training of a backbone, the baseline and the pre-training of the other methods.

Loss: ``-log softmax(logits)[label]``, averaged over the ID images of the batch. OOD scores are post-hoc: any of
``lightning_modules.scores`` on the trained network.
"""

from typing import Literal

from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence, observe
from lightning_modules.losses.cross_entropy import cross_entropy
from lightning_modules.ood_module import Batch, Images, OODModule


class Classifier(OODModule):
    """A network trained with cross-entropy and selected by its accuracy on held-out ID images.

    Args:
        backbone: the network; with ``weights`` it starts from them.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
        label_smoothing: share of the target that is spread over all classes.
    """

    selection = "best"

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        self.label_smoothing = label_smoothing

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images: logits (B, K), ``penultimate`` and the requested taps."""
        return observe(self.backbone, images, self.taps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean cross-entropy of the batch's ID images."""
        images, labels, _ = batch
        loss = cross_entropy(self.backbone(images), labels, self.label_smoothing)
        self.log("train/loss", loss, prog_bar=True)
        return loss
