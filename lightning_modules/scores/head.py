"""Scores that run the network's last linear layer on features of their own making."""

import torch
from torch import Tensor
from torch.nn import functional as F

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import Score, read_tap, widen


class HeadScore(Score):
    """A score that holds a copy of the head, so that altered features cost no second forward pass.

    Attributes:
        weight: W, (K, D), in float32 or wider.
        bias: b, (K,), zero where the head has none.
    """

    taps = frozenset({"penultimate"})
    weight: Tensor
    bias: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            self.register_buffer(name, torch.empty(0))

    def bind(self, backbone: Backbone | None) -> None:
        """Copy the head.

        Raises:
            ValueError: there is no classifier.
        """
        if backbone is None:
            name = type(self).__name__
            raise ValueError(f"{name} reads the head: it needs a method with a classifier, this one has none")
        weight, bias = backbone.head.weight.detach(), backbone.head.bias
        self.weight = widen(weight).clone()
        self.bias = widen(weight.new_zeros(len(weight)) if bias is None else bias.detach()).clone()

    def features(self, evidence: Evidence) -> Tensor:
        """Return the (B, D) features that the head reads, in its type."""
        if not self.weight.numel():
            raise RuntimeError(f"{type(self).__name__} holds no classifier yet: call bind first")
        return read_tap(evidence, "penultimate").to(self.weight.dtype)

    def logits(self, features: Tensor) -> Tensor:
        """Classify (B, D) features: (B, K)."""
        return F.linear(features, self.weight, self.bias)
