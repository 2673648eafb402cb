"""Temperature and a small step that raises the confidence."""

import torch
from torch import Tensor, nn

from lightning_modules.scores.score import InputScore, widen


class ODIN(InputScore):
    """Tempered confidence -max softmax(f(x') / T) at x' = x + eps sign(grad_x log max softmax(f(x) / T)).

    Higher = more OOD: the step raises the confidence of ID images more. Liang, Li and Srikant, "Enhancing The
    Reliability of Out-of-distribution Image Detection in Neural Networks", ICLR 2018.

    Args:
        temperature: T > 0.
        epsilon: length of the step in each pixel, in the unit of the images that the module reads.
    """

    forwards = 2

    def __init__(self, temperature: float = 1000.0, epsilon: float = 0.0014) -> None:
        super().__init__()
        if temperature <= 0:
            raise ValueError(f"the temperature of ODIN must be positive, not {temperature}")
        self.temperature, self.epsilon = temperature, epsilon

    def forward(self, module: nn.Module, images: Tensor) -> Tensor:
        """Score (B, C, H, W) images; leaves no gradient behind and no mode changed."""
        with torch.inference_mode(False), torch.enable_grad():
            watched = self.watch(module, images)
            confidence = self._tempered(module, watched).log_softmax(1).max(1).values
            (gradient,) = self.gradients(confidence.sum()[None], watched)
        with torch.no_grad():
            return -self._tempered(module, images + self.epsilon * gradient.sign()).softmax(1).amax(1)

    def _tempered(self, module: nn.Module, images: Tensor) -> Tensor:
        return widen(module(images).logits) / self.temperature
