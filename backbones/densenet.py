"""DenseNet-BC: every layer reads the maps of all layers before it in its stage.

Huang et al., "Densely Connected Convolutional Networks", CVPR 2017. Three stages of n bottlenecks (B), each of which
appends ``growth_rate`` channels; between stages a transition thins the channels (C) and halves the map.
"""

from collections import OrderedDict
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.weights import load_weights


class Bottleneck(nn.Module):
    """BN-ReLU-1x1 to four times the growth rate, then BN-ReLU-3x3 to the growth rate; dropout behind both."""

    def __init__(self, in_channels: int, growth_rate: int, dropout: float, affine: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, affine=affine)
        self.conv1 = nn.Conv2d(in_channels, 4 * growth_rate, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth_rate, affine=affine)
        self.conv2 = nn.Conv2d(4 * growth_rate, growth_rate, 3, padding=1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C + growth_rate, H, W), the old channels first."""
        hidden = self.dropout(self.conv1(F.relu(self.bn1(maps))))
        added = self.dropout(self.conv2(F.relu(self.bn2(hidden))))
        return torch.cat([maps, added], 1)


class Transition(nn.Module):
    """BN-ReLU-1x1, dropout and a 2x2 average pool."""

    def __init__(self, in_channels: int, channels: int, dropout: float, affine: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, affine=affine)
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / 2, W / 2), sizes rounded down."""
        return F.avg_pool2d(self.dropout(self.conv1(F.relu(self.bn1(maps)))), 2)


class DenseNet(Backbone):
    """DenseNet-BC, D = 342 unless told otherwise; the last map is a quarter of the image in height and width.

    A transition belongs to the stage before it: the taps ``layer1`` and ``layer2`` have 108 and 150 channels,
    ``layer3`` 342, like ``penultimate``, which differs from it by batch-norm and ReLU. Convolutions start as in
    He et al., ICCV 2015, normal with variance 2 / fan-in.

    Args:
        num_classes: K.
        depth: number of weighted layers, 6n + 4 (some call this network with 100 "DenseNet-101").
        growth_rate: channels that a bottleneck adds.
        reduction: share of the channels that a transition keeps, rounded down.
        input_shape: (C, H, W) of the images.
        dropout: probability that an output of a convolution is zero in training; the first one is spared.
        affine: whether batch-norm has a learned scale and shift.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int,
        depth: int = 100,
        growth_rate: int = 12,
        reduction: float = 0.5,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        dropout: float = 0.0,
        affine: bool = True,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"DenseNet has a depth of 6n + 4 (10, 16, 22, ...), not {depth}")
        grown = blocks * growth_rate
        first = 2 * growth_rate
        second = int((first + grown) * reduction)
        third = int((second + grown) * reduction)
        super().__init__(third + grown, num_classes, input_shape, mean, std)
        bottleneck = partial(Bottleneck, growth_rate=growth_rate, dropout=dropout, affine=affine)
        transition = partial(Transition, dropout=dropout, affine=affine)

        def bottlenecks(channels: int) -> OrderedDict[str, nn.Module]:
            return OrderedDict((str(i), bottleneck(channels + i * growth_rate)) for i in range(blocks))

        self.conv1 = nn.Conv2d(input_shape[0], first, 3, padding=1, bias=False)
        self.layer1 = nn.Sequential(bottlenecks(first) | {"transition": transition(first + grown, second)})
        self.layer2 = nn.Sequential(bottlenecks(second) | {"transition": transition(second + grown, third)})
        self.layer3 = nn.Sequential(bottlenecks(third))
        self.bn1 = nn.BatchNorm2d(third + grown, affine=affine)
        self.fc = nn.Linear(third + grown, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if weights is not None:
            load_weights(self, weights)

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 2 * growth_rate, H, W), signed."""
        return self.conv1(images)

    def finish(self, maps: Tensor) -> Tensor:
        """Normalise and activate what the last stage yields."""
        return F.relu(self.bn1(maps))
