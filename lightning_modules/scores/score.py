"""The contract that every score keeps."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence


def widen(tensor: Tensor) -> Tensor:
    """Return a half-precision tensor in float32, any wider one as it is.

    >>> widen(torch.ones(2, dtype=torch.bfloat16)).dtype, widen(torch.ones(2, dtype=torch.float64)).dtype
    (torch.float32, torch.float64)
    """
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def read_tap(evidence: Evidence, tap: str) -> Tensor:
    """Return the (B, D) features of one tap, in float32 or wider."""
    if tap not in evidence.features:
        raise ValueError(f"the evidence has no features {tap!r}, only {', '.join(sorted(evidence.features))}")
    return widen(evidence.features[tap])


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Multiply matrices in the type that they have: neither in half precision, by autocast, nor in TensorFloat-32.

    Distances, densities and the small steps of a chain would be rounded away.
    """
    # Not torch.get_float32_matmul_precision: it fails where the precision was set for one kind of device alone.
    backends = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    chosen = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, chosen, strict=True):
            backend.fp32_precision = precision


class Fitted(nn.Module, ABC):
    """What is fitted on the evidence of ID training images: scores, and other parts of a method.

    Its life: ``bind`` to a network, then for each of its ``passes`` over the ID training data any number of ``update``
    calls and one ``finalize``, then ``forward``. What fitting learns lives in buffers, so a saved one needs no training
    data. Buffers of data-dependent size are registered empty and take the stored size on load.

    Attributes:
        passes: how often it must see the ID training data: 0, 1, or more where it needs its own first-pass statistics.
    """

    passes: int = 0
    finished: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("finished", torch.tensor(0))

    @property
    def passes_left(self) -> int:
        """How often it must still see the ID training data."""
        return max(0, self.passes - int(self.finished))

    @property
    def fitted(self) -> bool:
        """Whether ``forward`` may be called."""
        return not self.passes_left

    @property
    def needs(self) -> str:
        """What it takes to fit it, in words."""
        return f"{self.passes} pass(es) over ID training data"

    def bind(self, backbone: Backbone | None) -> None:
        """Copy what is needed of the network's head; ``None`` for a method without a classifier."""

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Take in a batch of ID training data, labels (B,) in 0..K-1; B may be 0."""

    def finalize(self) -> None:
        """End one pass: reduce over processes and store the result in buffers."""
        self._finalize()
        self.finished += 1

    def _finalize(self) -> None:
        """Do a subclass's part of ``finalize``."""

    def __call__(self, *args: Any) -> Tensor:
        """Call ``forward``, after making sure that it is fitted."""
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted: it needs {self.needs}")
        with full_precision(self.finished.device):
            return super().__call__(*args)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        for name, buffer in self.named_buffers(recurse=False):
            stored = state_dict.get(prefix + name)
            if stored is not None and stored.shape != buffer.shape:
                setattr(self, name, buffer.new_empty(stored.shape))
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


class Score(Fitted):
    """Maps evidence to one number for each image; higher = more OOD.

    Attributes:
        taps: the features it reads, by name; the evaluation asks the network for them.
    """

    taps: frozenset[str] = frozenset()

    @abstractmethod
    def forward(self, *args: Any) -> Tensor:
        """Score (B,) images from their evidence."""


class InputScore(Score):
    """A score that runs the network again, on perturbed images: ``forward(module, images)``.

    A score with ``calibration_forwards`` goes on after its ``passes``: any number of ``calibrate`` calls on ID training
    images that were held out, never on test images, and one more ``finalize``.

    Attributes:
        forwards: extra forward passes for each image; what the evaluation reports as the score's cost.
        calibration_forwards: the same for each image that it is calibrated on; 0 = it is not calibrated.
    """

    forwards: int
    calibration_forwards: int = 0

    @property
    def fitted(self) -> bool:
        """Whether ``forward`` may be called."""
        return int(self.finished) >= self.passes + (self.calibration_forwards > 0)

    @property
    def needs(self) -> str:
        """What it takes to fit it, in words."""
        return super().needs + (", then calibration on held-out ID images" if self.calibration_forwards else "")

    def watch(self, module: nn.Module, images: Tensor) -> Tensor:
        """Copy images for gradients with respect to them, to be used under ``torch.enable_grad``.

        Raises:
            RuntimeError: a tensor of the module or the score was made in ``torch.inference_mode``.
            ValueError: the images are in half precision, in which steps of a thousandth vanish.
        """
        name = type(self).__name__
        if images.dtype in (torch.float16, torch.bfloat16):
            raise ValueError(
                f"{name} moves images by steps that {images.dtype} rounds away: evaluate in 32-true or bf16-mixed"
            )
        tensors = (*module.parameters(), *module.buffers(), *(x for x in self.buffers() if x.is_floating_point()))
        if any(tensor.is_inference() for tensor in tensors):
            raise RuntimeError(
                f"{name} needs the gradient of the images, but tensors of this module or score were made in "
                "torch.inference_mode; use torch.no_grad instead (inference_mode: false)"
            )
        return images.detach().clone().requires_grad_()

    def gradients(self, outputs: Tensor, images: Tensor) -> list[Tensor]:
        """Gradient of each of (T,) outputs with respect to the images; ``RuntimeError`` where the module cuts it."""
        if not outputs.requires_grad:
            raise RuntimeError(
                f"{type(self).__name__} needs the gradient of the images, but the module cuts it: its forward must not "
                "run under torch.no_grad or detach"
            )
        last = len(outputs) - 1
        return [torch.autograd.grad(output, images, retain_graph=i < last)[0] for i, output in enumerate(outputs)]

    def calibrate(self, module: nn.Module, images: Tensor, labels: Tensor) -> None:
        """Take in a batch of held-out ID images (B, C, H, W) with labels (B,); B may be 0."""

    @abstractmethod
    def forward(self, module: nn.Module, images: Tensor) -> Tensor:
        """Score (B, C, H, W) images with ``module``, whose forward yields evidence; gradients may be off outside."""
