"""Autoencoder: an image that is drawn badly after passing a narrow vector is OOD.

Loss and score: ``mean((decode(encode(x)) - x)^2)`` over the values of an image, in the unit of the normalised pixels.
Dinari and Freifeld, "Variational- and Metric-based Deep Latent Space for Out-of-Distribution Detection", UAI 2022,
weigh a likelihood by such an error.
"""

from typing import Literal

from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from backbones import autoencoders
from lightning_modules.evidence import Evidence
from lightning_modules.ood_module import Batch, Images, OODModule


def reconstruction_error(reconstructions: Tensor, images: Tensor) -> Tensor:
    """Mean squared difference of each of (B, C, H, W) images: (B,).

    >>> import torch
    >>> reconstruction_error(torch.zeros(1, 1, 1, 2), torch.tensor([[[[1.0, 2.0]]]]))
    tensor([2.5000])
    """
    return (reconstructions - images).square().mean((1, 2, 3))


class Autoencoder(OODModule):
    """An autoencoder trained on ID images, without their labels.

    Args:
        backbone: the network.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
    """

    backbone: autoencoders.Autoencoder  # type: ignore[assignment]

    def __init__(
        self,
        backbone: autoencoders.Autoencoder,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        self.val_loss = MeanMetric(nan_strategy="disable")  # a diverged network is to show

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images.

        Returns:
            ``logits`` (B, 0), for there are no classes; ``penultimate``, the latent vector (B, L); the score
            ``reconstruction``.
        """
        latent = self.backbone.encode(images)
        scores = {"reconstruction": reconstruction_error(self.backbone.decode(latent), images)}
        return Evidence(latent[:, :0], {"penultimate": latent}, scores, None)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the mean error of the batch's ID images; 0 with a live graph where there are none."""
        images, labels, _ = batch
        errors, known = reconstruction_error(self.backbone(images), images), labels >= 0
        loss = errors[known].mean() if known.any() else errors.sum() * 0
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Average the error over the held-out ID images."""
        self.val_loss.update(self(batch[0]).scores["reconstruction"])
        self.log("val/loss", self.val_loss, on_epoch=True, prog_bar=True)
