"""What one pass over an image yields."""

from collections.abc import Collection
from typing import NamedTuple

from torch import Tensor

from backbones.backbone import Backbone


class Evidence(NamedTuple):
    """All that the scores may read of a batch of B images.

    Attributes:
        logits: (B, K) class scores: logits, or class log-likelihoods where a method has no classifier; K = 0 where it
            has no classes.
        features: tap -> (B, D_tap); ``penultimate`` always, others on request.
        scores: the method's own OOD scores, (B,), higher = more OOD; may be empty.
        maps: (B, C, H, W), what would have to be added to each image, from -1 for black to 1 for white, for it to look
            like an ID image (heatmaps); else None.
        predictions: (B,) classes that the method predicts, where these are not the largest logits; else None.
    """

    logits: Tensor
    features: dict[str, Tensor]
    scores: dict[str, Tensor]
    maps: Tensor | None
    predictions: Tensor | None = None


class EvidenceBatch(NamedTuple):
    """A training batch of what a frozen network saw, instead of images.

    Attributes:
        evidence: of B images.
        labels: (B,) int64; -1 = outlier.
        ids: (B,) int64, the row of each image among the training images.
    """

    evidence: Evidence
    labels: Tensor
    ids: Tensor


class TargetBatch(NamedTuple):
    """A training batch of images and of what each is to become, beside what a frozen network saw of the images.

    Attributes:
        seen: the evidence of B images, their labels and ids.
        inputs: the batch of these images as the network reads them: normalised, labels, ids.
        images: (B, C, H, W), uint8, or float with 1 for white.
        targets: (B, C, H, W), as ``images``: of an ID image the very same, of an outlier an ID image.
    """

    seen: EvidenceBatch
    inputs: tuple[Tensor, Tensor, Tensor]
    images: Tensor
    targets: Tensor


def need_cached(batch: object, method: str) -> EvidenceBatch:
    """Return a training batch that holds evidence, and raise a ``ValueError`` in words where it holds images."""
    if isinstance(batch, TargetBatch):
        raise ValueError(f"{method} trains on cached features alone: leave callbacks.pairing.Pairing out")
    if not isinstance(batch, EvidenceBatch):
        raise ValueError(
            f"{method} trains on cached features, this batch holds images: add "
            "callbacks.frozen_features.FrozenFeatures to trainer.callbacks+"
        )
    return batch


def observe(backbone: Backbone, images: Tensor, taps: Collection[str] = ()) -> Evidence:
    """Run a classifier once over (B, C, H, W) images: logits, the penultimate features, and the other ``taps``."""
    _, features = backbone.forward_intermediates(images, {"penultimate", *taps})
    return Evidence(backbone.head(features["penultimate"]), features, {}, None)
