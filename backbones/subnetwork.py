"""Subnetworks: which weights of a network are kept is decided by scores, its weights stay as they are.

Ramanujan et al., "What's Hidden in a Randomly Weighted Neural Network?", CVPR 2020, train such scores; so do Zhu et
al., "Unleashing Mask", ICML 2023, from a trained network.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from copy import deepcopy
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.conv import _ConvNd

from backbones.backbone import Backbone

STREAM = 0x6D61736B  # keeps scores apart from all else that is drawn from the same seed, the weights above all


def kept(numel: int, keep: float) -> int:
    """Count what is kept of ``numel`` weights: all but floor((1 - keep) numel), by the decimal number that is meant.

    >>> kept(20, 0.8), int((1 - 0.8) * 20)
    (16, 3)
    """
    return numel - math.floor((1 - Fraction(str(keep))) * numel)


def top_mask(scores: Tensor, keep: float) -> Tensor:
    """Mark the ``kept`` entries of largest |score| with 1, the others with 0; among equals, any.

    Args:
        scores: of any shape and memory format.
        keep: share to be kept, 0 to 1.

    Returns:
        In the shape and type of the scores.
    """
    magnitudes = scores.detach().abs().reshape(-1)
    dropped = magnitudes.numel() - kept(magnitudes.numel(), keep)
    mask = torch.ones_like(magnitudes)
    if dropped and magnitudes.device.type == "cpu" and magnitudes.dtype in (torch.float32, torch.float64):
        # two to five times faster than torch's selection on a CPU
        mask.numpy()[np.argpartition(magnitudes.numpy(), dropped - 1)[:dropped]] = 0
    elif dropped:
        mask[magnitudes.topk(dropped, largest=False, sorted=False).indices] = 0
    return mask.view(scores.shape)


class StraightThrough(torch.autograd.Function):
    """``top_mask`` whose gradient passes to |score| as if it were the mask, to entries of 0 and 1 alike."""

    @staticmethod
    def forward(context: Any, scores: Tensor, keep: float) -> Tensor:
        """Return the mask."""
        context.save_for_backward(scores)
        return top_mask(scores, keep)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        """Multiply by the sign of the scores."""
        (scores,) = context.saved_tensors
        return gradients[0] * scores.sign(), None


class Subnetwork(nn.Module):
    """Scores for every convolution and linear layer of a network, and statistics of batch-norm of its own.

    Of each of these weights W the share ``keep`` with the largest |score| is kept and the rest is 0, layer by layer;
    biases, and scale and shift of batch-norm, are those of the network. The network itself, its statistics included,
    does not change when the subnetwork runs, in whatever mode.

    Args:
        backbone: the network, which every call is given again; nothing of it is held here but a copy of its statistics.
        keep: share of the weights, above 0 and up to 1.
        seed: what the scores are drawn from, uniform within 1 / sqrt(fan-in); not as the weights are from the same.

    Raises:
        ValueError: no such share, or no weights to leave out.
    """

    def __init__(self, backbone: Backbone, keep: float, seed: int | Sequence[int]) -> None:
        super().__init__()
        if not 0 < keep <= 1:
            raise ValueError(f"keep is the share of the weights that stay, above 0 and up to 1, not {keep}")
        if not any(True for _ in maskable(backbone)):
            raise ValueError(f"{type(backbone).__name__} has neither a convolution nor a linear layer to mask")
        self.keep = keep
        entropy = np.random.SeedSequence((STREAM, *np.atleast_1d(seed)))
        generator = torch.Generator().manual_seed(int(entropy.generate_state(1)[0]))
        self.scores, self.statistics = nn.ParameterDict(), nn.Module()
        for name, weight in maskable(backbone):
            bound = weight[0].numel() ** -0.5
            scores = torch.empty(weight.shape).uniform_(-bound, bound, generator=generator)
            self.scores[_key(name)] = nn.Parameter(scores.to(weight))
        stored = backbone.state_dict().keys()
        for name, buffer in backbone.named_buffers():
            if name in stored:
                self.statistics.register_buffer(_key(name), buffer.clone())

    def tensors(self, backbone: Backbone) -> dict[str, Tensor]:
        """Return what replaces the network's own: name -> masked weight, or statistic."""
        masked = {
            name: weight * StraightThrough.apply(self.scores[_key(name)], self.keep)
            for name, weight in maskable(backbone)
        }
        own = dict(self.statistics.named_buffers())
        return masked | {name: own[_key(name)] for name, _ in backbone.named_buffers() if _key(name) in own}

    def forward(
        self, backbone: Backbone, images: Tensor, taps: Collection[str] = ()
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the subnetwork once over (B, C, H, W) images; return logits (B, K), and ``penultimate`` and the taps."""
        replaced = {f"backbone.{name}": tensor for name, tensor in self.tensors(backbone).items()}
        return functional_call(_Pass(backbone), replaced, (images, taps))

    @torch.no_grad()
    def extract(self, backbone: Backbone) -> Backbone:
        """Return a network by itself that computes the same: a copy with zeros for what is not kept."""
        network = deepcopy(backbone)
        network.load_state_dict(network.state_dict() | self.tensors(backbone))
        return network


def extract_state(state: Mapping[str, Tensor], keep: float) -> dict[str, Tensor]:
    """Return the state dict of a subnetwork by itself, out of that of a method that holds both.

    Args:
        state: with entries ``backbone.*`` of the network and ``subnetwork.*``.
        keep: of the subnetwork.
    """
    network = {name: values for name, values in state.items() if name.startswith("backbone.")}
    for name, values in state.items():
        kind, _, of = name.removeprefix("subnetwork.").partition(".")
        entry = f"backbone.{of.replace('/', '.')}"
        if kind == "scores":
            network[entry] = network[entry] * top_mask(values, keep)
        elif kind == "statistics":
            network[entry] = values
    return network


class _Pass(nn.Module):
    """What of a network is to be run, as one module."""

    def __init__(self, backbone: Backbone) -> None:
        super().__init__()
        self.backbone = backbone

    def forward(self, images: Tensor, taps: Collection[str]) -> tuple[Tensor, dict[str, Tensor]]:
        _, features = self.backbone.forward_intermediates(images, {"penultimate", *taps})
        return self.backbone.head(features["penultimate"]), features


def maskable(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name the weights of all convolutions and linear layers."""
    for name, module in network.named_modules():
        if isinstance(module, _ConvNd | nn.Linear):
            yield f"{name}.weight", module.weight


def _key(name: str) -> str:
    return name.replace(".", "/")  # a dot would mean a submodule
