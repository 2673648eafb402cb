"""Temperature and a small step that raises the confidence."""

from itertools import chain

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
        """Score (B, C, H, W) images; leaves no gradient behind and no mode changed.

        Raises:
            RuntimeError: the module cannot be differentiated with respect to its images.
        """
        if any(tensor.is_inference() for tensor in chain(module.parameters(), module.buffers())):
            raise RuntimeError(
                "ODIN needs the gradient of the images, but tensors of this module were made in torch.inference_mode; "
                "use torch.no_grad instead (inference_mode: false)"
            )
        with torch.inference_mode(False), torch.enable_grad():
            images = images.detach().clone().requires_grad_()
            confidence = self._tempered(module, images).log_softmax(1).max(1).values
            if not confidence.requires_grad:
                raise RuntimeError(
                    f"ODIN needs the gradient of the images, but {type(module).__name__} cuts it: "
                    "its forward must not run under torch.no_grad or detach"
                )
            (gradient,) = torch.autograd.grad(confidence.sum(), images)
        with torch.no_grad():
            return -self._tempered(module, images + self.epsilon * gradient.sign()).softmax(1).amax(1)

    def _tempered(self, module: nn.Module, images: Tensor) -> Tensor:
        return widen(module(images).logits) / self.temperature
