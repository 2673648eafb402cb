"""ResNet-20, -32, -44, -56 of He et al., CVPR 2016, section 4.2: 6n + 2 layers, shortcuts without parameters.

Three stages of n blocks with 16, 32 and 64 channels. Where a stage halves the map, the shortcut keeps every second
pixel and fills the new channels with zeros ("option A"). The state dict has the names of the widely used CIFAR-10
weights, whose networks read images normalised with ImageNet's constants.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.weights import load_weights

DEPTHS = (20, 32, 44, 56)


def option_a(maps: Tensor, channels: int, stride: int) -> Tensor:
    """Take every ``stride``-th pixel of (B, C, H, W), and centre the C channels among ``channels``, the rest zero."""
    added = channels - maps.shape[1]
    return F.pad(maps[:, :, ::stride, ::stride], (0, 0, 0, 0, added // 2, added - added // 2))


class Block(nn.Module):
    """Two 3x3 convolutions with batch-norm and the shortcut around them."""

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride), sizes rounded up."""
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(maps)))))
        return F.relu(residual + option_a(maps, self.channels, self.stride))


class ResNetOptionA(Backbone):
    """The small CIFAR ResNet, D = 64; the last map is a quarter of the image in height and width.

    Args:
        depth: number of weighted layers, 6n + 2.
        num_classes: K.
        input_shape: (C, H, W) of the images.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random (He et al., ICCV 2015).
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        depth: Literal[20, 32, 44, 56],
        num_classes: int,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if depth not in DEPTHS:
            raise ValueError(f"ResNetOptionA has the depths {', '.join(map(str, DEPTHS))}, not {depth}")
        super().__init__(64, num_classes, input_shape, mean, std)
        blocks = (depth - 2) // 6
        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, 1, blocks)
        self.layer2 = self._stage(16, 32, 2, blocks)
        self.layer3 = self._stage(32, 64, 2, blocks)
        self.linear = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        if weights is not None:
            load_weights(self, weights)

    @staticmethod
    def _stage(in_channels: int, channels: int, stride: int, blocks: int) -> nn.Sequential:
        first = Block(in_channels, channels, stride)
        return nn.Sequential(first, *(Block(channels, channels, 1) for _ in range(blocks - 1)))

    @property
    def head(self) -> nn.Linear:
        """The classifier ``linear``, weight (K, 64)."""
        return self.linear

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 16, H, W)."""
        return F.relu(self.bn1(self.conv1(images)))
