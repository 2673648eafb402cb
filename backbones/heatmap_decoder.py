"""The decoder of heatmaps: a feature vector and a class to an image-sized map."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from backbones.weights import load_weights

FIRST = 4  # side of the map that the first block yields


class HeatmapDecoder(nn.Module):
    """Transposed convolutions from (B, D + K) to (B, C, S, S) in (-1, 1), S = 4, 8, 16, ... by the number of blocks.

    A linear map without activation, then one block for each of ``widths``, which end in batch-norm and ReLU: the first
    yields 4x4 maps, each further one doubles the side; then a 1x1 layer without bias, and tanh. Hornauer and
    Belagiannis, "Heatmap-based Out-of-Distribution Detection", WACV 2023.

    Attributes:
        shape: (C, S, S) of a heatmap.

    Args:
        num_features: D, of the penultimate features.
        num_classes: K.
        hidden: width that the linear map has.
        widths: channels of the blocks.
        channels: C.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
    """

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        hidden: int,
        widths: Sequence[int],
        channels: int = 3,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        if not widths or min(num_features, num_classes, hidden, channels, *widths) < 1:
            raise ValueError(
                "a decoder has at least one block, and at least 1 feature, class and channel everywhere; these are "
                f"num_features={num_features}, num_classes={num_classes}, hidden={hidden}, widths={list(widths)}, "
                f"channels={channels}"
            )
        self.num_features, self.num_classes = num_features, num_classes
        side = FIRST << (len(widths) - 1)
        self.shape = (channels, side, side)
        self.linear = nn.Linear(num_features + num_classes, hidden)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.ConvTranspose2d(before, width, 4, stride=2 if i else 1, padding=1 if i else 0, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
            )
            for i, (before, width) in enumerate(zip((hidden, *widths[:-1]), widths, strict=True))
        )
        self.last = nn.ConvTranspose2d(widths[-1], channels, 1, bias=False)
        self.sizes = [(width, FIRST << i, FIRST << i) for i, width in enumerate(widths)]  # of the blocks' maps
        if weights is not None:
            load_weights(self, weights)

    def check_maps(self, maps: Sequence[Tensor]) -> None:
        """Raise a ``ValueError`` where no block yields maps of the shape of one of these, (B, C, h, w)."""
        if misfits := [tuple(map_.shape[1:]) for map_ in maps if tuple(map_.shape[1:]) not in self.sizes]:
            raise ValueError(
                f"maps of shape {', '.join(map(str, misfits))} (C, h, w) cannot be added: the blocks of the decoder "
                f"yield {', '.join(map(str, self.sizes))}"
            )

    def forward(self, features: Tensor, classes: Tensor, maps: Sequence[Tensor] = ()) -> Tensor:
        """Decode.

        Args:
            features: (B, D).
            classes: (B,) int64.
            maps: any number of (B, C, h, w), each to be added behind the block that yields maps of this shape.

        Returns:
            Heatmaps (B, C, S, S).

        Raises:
            ValueError: no block yields a map of the shape of one of ``maps``.
        """
        self.check_maps(maps)
        one_hot = functional.one_hot(classes, self.num_classes).to(features)
        inputs = torch.cat([features, one_hot], 1).to(self.linear.weight.dtype)
        decoded = self.linear(inputs)[:, :, None, None]
        for block, size in zip(self.blocks, self.sizes, strict=True):
            decoded = block(decoded)
            for added in maps:
                if added.shape[1:] == size:
                    decoded = decoded + added.to(decoded)
        return self.last(decoded).tanh()
