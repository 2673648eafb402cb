"""Heatmap: what would have to change about an image for it to look like an ID image.

A decoder h sees the penultimate features of a frozen classifier and the class that it predicts. Added to an ID image x
it is to change nothing; added to an auxiliary outlier it is to turn it into the ID image of the same predicted class
that is nearest in feature space. With the target p, the loss is sum (1 + 5 |p|) (x + h - p)^2. The score is the mean
over positions of max over channels of |h|. Hornauer and Belagiannis, "Heatmap-based Out-of-Distribution Detection",
WACV 2023.
"""

from typing import Literal

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torchmetrics import MeanMetric

from backbones.backbone import Backbone
from backbones.heatmap_decoder import HeatmapDecoder
from lightning_modules.distributed import gather_rows
from lightning_modules.evidence import Evidence, TargetBatch, observe
from lightning_modules.losses.target_image import target_image_loss
from lightning_modules.ood_module import Batch, Images, OODModule
from lightning_modules.scores.score import Fitted, read_tap, widen

NO_PAIRS = (
    "Heatmap trains on pairs of images: add callbacks.frozen_features.FrozenFeatures and, behind it, "
    "callbacks.pairing.Pairing to trainer.callbacks+"
)


def heatmap_score(heatmaps: Tensor) -> Tensor:
    """Mean over positions of the largest absolute value over channels, (B, C, H, W) to (B,): 0 to 1, higher = more OOD.

    >>> heatmap_score(torch.tensor([0.2, -0.7, 0.1]).view(1, 3, 1, 1).expand(1, 3, 4, 4))
    tensor([0.7000])
    """
    return heatmaps.abs().amax(1).mean((1, 2))


class MinMax(Fitted):
    """Scales all features by one and the same map, so that those of the ID training images lie in [0, 1].

    With m the smallest value of all features, or 0, and M the largest, or 0: z to (z - m) / (M - m).

    Args:
        tap: whose values to look at.
    """

    passes = 1
    low: Tensor
    high: Tensor

    def __init__(self, tap: str) -> None:
        super().__init__()
        self.tap = tap
        self.register_buffer("low", torch.tensor(0.0))
        self.register_buffer("high", torch.tensor(0.0))

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Take in a batch of ID training data; B may be 0."""
        if len(labels):
            low, high = read_tap(evidence, self.tap).aminmax()
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)

    def _finalize(self) -> None:
        """Take the extremes of all processes.

        Raises:
            ValueError: there is no difference between them.
        """
        self.low, self.high = gather_rows(self.low[None]).amin(), gather_rows(self.high[None]).amax()
        if not self.high > self.low:
            raise ValueError(f"the features {self.tap} of all ID training images are 0: is the network trained?")

    def forward(self, values: Tensor) -> Tensor:
        """Scale values of any shape."""
        return (values - self.low) / (self.high - self.low)


def black_to_white(images: Tensor) -> Tensor:
    """Map bytes, or floats with 1 for white, to -1 for black and 1 for white."""
    return images.float() / 127.5 - 1 if images.dtype == torch.uint8 else 2 * images - 1


class Heatmap(OODModule):
    """A decoder that learns on what a frozen classifier saw, served by ``callbacks.pairing.Pairing``.

    Its score is ``heatmap``.

    Pixels go from -1 for black to 1 for white in the loss, whatever the classifier reads. The decoder learns from ID
    images and outliers in one batch, as its batch-norm wants; it needs no outliers to run, but without them it learns
    to say 0.

    Args:
        backbone: the trained classifier.
        decoder: h.
        optimizer: makes the optimiser from the parameters of the decoder.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
        feature_norm: how what enters the decoder is scaled: ``minmax``, by the extremes of the ID training images; or
            ``none``, as published decoders of one layer were trained in effect.
        fw_layers: what the decoder sees of the network: 1, the penultimate features; 2 to 4, also the maps of so many
            less one of the last stages. They cannot be cached, so the network then runs in every step.
    """

    frozen = ("backbone",)

    def __init__(
        self,
        backbone: Backbone,
        decoder: HeatmapDecoder,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        feature_norm: Literal["minmax", "none"] = "minmax",
        fw_layers: int = 1,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        if not 1 <= fw_layers <= 4:
            raise ValueError(f"fw_layers must be 1, 2, 3 or 4, got {fw_layers}")
        sides = {
            "num_features": (decoder.num_features, backbone.num_features),
            "num_classes": (decoder.num_classes, backbone.num_classes),
            "image shape": (decoder.shape, tuple(backbone.input_shape)),
        }
        if misfits := [f"{what} {mine}, not {its}" for what, (mine, its) in sides.items() if mine != its]:
            rule = ". One block makes images of 4x4, each further one doubles the side"
            raise ValueError(
                f"{type(decoder).__name__} does not fit {type(backbone).__name__}, it has {'; '.join(misfits)}"
                + (rule if decoder.shape != tuple(backbone.input_shape) else "")
            )
        if feature_norm == "minmax" and "origin" in vars(decoder):
            raise ValueError(
                "the weights of a decoder come without the scale of its features, and those of published ones hardly "
                "had one: set feature_norm to none"
            )
        self.decoder, self.fw_layers = decoder, fw_layers
        self.notes = {"feature_norm": feature_norm, "fw_layers": fw_layers}
        self.maps = [f"{stage}.map" for stage in backbone.stages[::-1][: fw_layers - 1]]
        if len(self.maps) < fw_layers - 1:
            raise ValueError(f"{type(backbone).__name__} has {len(backbone.stages)} stages, too few for {fw_layers=}")
        self.range_tap = "penultimate" if fw_layers == 1 else f"range_of_{fw_layers}"
        self.minmax = MinMax(self.range_tap) if feature_norm == "minmax" else None
        self.val_id, self.val_ood = MeanMetric(nan_strategy="disable"), MeanMetric(nan_strategy="disable")

    def configure_model(self) -> None:
        """Freeze the network, and refuse one whose maps fit no block of the decoder."""
        super().configure_model()
        if self.maps:
            with torch.no_grad():
                image = next(self.decoder.parameters()).new_zeros(1, *self.backbone.input_shape)
                self.decoder.check_maps(self._look(image)[1])

    def on_fit_start(self) -> None:
        """Refuse to train without pairs, before anything of an older run is lost."""
        if "pairing" not in self.notes:
            raise ValueError(NO_PAIRS)

    def encode(self, images: Images) -> Evidence:
        """Return logits, penultimate features and, where maps are forwarded, (B, 2) extremes of each image's values."""
        return self._look(images)[0]

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images; the score is ``heatmap``, ``maps`` are the heatmaps, signed, in (-1, 1)."""
        evidence, maps = self._look(images)
        if self.minmax is not None and not self.minmax.fitted:  # on the very images that it is fitted on
            return evidence
        heatmaps = widen(self.draw(evidence, maps))
        return evidence._replace(scores={"heatmap": heatmap_score(heatmaps)}, maps=heatmaps)

    def draw(self, evidence: Evidence, maps: list[Tensor]) -> Tensor:
        """Return heatmaps (B, C, H, W) from evidence and forwarded maps."""
        scale = self.minmax or torch.nn.Identity()
        features = scale(widen(evidence.features["penultimate"]))
        return self.decoder(features, evidence.logits.argmax(1), [scale(widen(map_)) for map_ in maps])

    def training_step(self, batch: Batch | TargetBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of images and targets."""
        if not isinstance(batch, TargetBatch):
            raise ValueError(NO_PAIRS)
        maps: list[Tensor] = []
        if self.maps:
            with torch.no_grad():
                maps = self._look(batch.inputs[0])[1]
        heatmaps = widen(self.draw(batch.seen.evidence, maps))
        images, targets = (black_to_white(pixels).to(heatmaps) for pixels in (batch.images, batch.targets))
        loss = target_image_loss(images + heatmaps, targets)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Average the score over held-out ID images and, to watch, over those labelled -1."""
        images, labels, _ = batch
        if self.minmax is not None and not self.minmax.fitted:
            raise ValueError("the scale of the features is not known: train the decoder, or set feature_norm to none")
        scores, known = self(images).scores["heatmap"], labels >= 0
        self.val_id.update(scores[known])  # a process's share may hold none
        self.val_ood.update(scores[~known])
        self.log("val/heatmap", self.val_id, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Log the mean score of images labelled -1 where there were any."""
        mean = self.val_ood.compute()
        self.val_ood.reset()
        if not mean.isnan():
            self.log("val/heatmap_ood", mean)

    def _look(self, images: Images) -> tuple[Evidence, list[Tensor]]:
        """Run the network once: its evidence, and the maps that are forwarded."""
        evidence = observe(self.backbone, images, {*self.taps, *self.maps})
        features, maps = dict(evidence.features), [evidence.features[name] for name in self.maps]
        for name in set(self.maps) - self.taps:
            del features[name]
        if maps:
            values = torch.cat([features["penultimate"], *(map_.flatten(1) for map_ in maps)], 1)
            features[self.range_tap] = torch.stack(values.aminmax(dim=1), 1)
        return evidence._replace(features=features), maps
