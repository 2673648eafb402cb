"""Wide ResNets: residual networks of 6n + 4 layers that normalise and activate before they convolve.

Zagoruyko and Komodakis, "Wide Residual Networks", BMVC 2016. Three stages of n blocks have 16, 32 and 64 channels times
the widening factor; a stage ends without activation, which the last batch-norm and ReLU supply.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.weights import load_weights


class Block(nn.Module):
    """Two BN-ReLU-3x3 with dropout between them; a new width makes the shortcut a 1x1 convolution of BN-ReLU."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float, affine: bool) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels, affine=affine)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels, affine=affine)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut = None if channels == in_channels else nn.Conv2d(in_channels, channels, 1, stride, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride), sizes rounded up."""
        activated = F.relu(self.bn1(maps))
        residual = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(activated)))))
        return residual + (maps if self.shortcut is None else self.shortcut(activated))


class HeatmapBlock(nn.Module):
    """A block with biases, dropout before the second BN-ReLU, the stride behind it, and a shortcut of raw maps."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.dropout = nn.Dropout(dropout)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride, padding=1)
        self.shortcut = nn.Identity() if channels == in_channels else nn.Conv2d(in_channels, channels, 1, stride)

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, channels, H / stride, W / stride), sizes rounded up."""
        hidden = self.dropout(self.conv1(F.relu(self.bn1(maps))))
        return self.conv2(F.relu(self.bn2(hidden))) + self.shortcut(maps)


class PreActivationResNet(Backbone):
    """What the wide ResNets share.

    Args:
        depth: see ``WideResNet``, as for what is not listed here.
        block: builds a block from its channels before and behind, and its stride.
        bias: whether the first convolution has one.
        norm: builds the last batch-norm from its channels.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int,
        input_shape: tuple[int, int, int],
        mean: Sequence[float] | None,
        std: Sequence[float] | None,
        *,
        block: Callable[[int, int, int], nn.Module],
        bias: bool,
        norm: Callable[[int], nn.BatchNorm2d],
    ) -> None:
        blocks, rest = divmod(depth - 4, 6)
        if blocks < 1 or rest:
            raise ValueError(f"{type(self).__name__} has a depth of 6n + 4 (10, 16, 22, ...), not {depth}")
        width = 16 * widen_factor
        super().__init__(4 * width, num_classes, input_shape, mean, std)

        def stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
            first = block(in_channels, channels, stride)
            return nn.Sequential(first, *(block(channels, channels, 1) for _ in range(blocks - 1)))

        self.conv1 = nn.Conv2d(input_shape[0], 16, 3, padding=1, bias=bias)
        self.layer1 = stage(16, width, 1)
        self.layer2 = stage(width, 2 * width, 2)
        self.layer3 = stage(2 * width, 4 * width, 2)
        self.bn1 = norm(4 * width)
        self.fc = nn.Linear(4 * width, num_classes)

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 16, H, W), signed."""
        return self.conv1(images)

    def finish(self, maps: Tensor) -> Tensor:
        """Normalise and activate what the last stage yields."""
        return F.relu(self.bn1(maps))


class WideResNet(PreActivationResNet):
    """WRN-depth-widen_factor, D = 64 * widen_factor; the last map is a quarter of the image in height and width.

    Convolutions start as in He et al., ICCV 2015, normal with variance 2 / fan-in.

    Args:
        depth: number of weighted layers, 6n + 4.
        widen_factor: how many times the channels of a plain network.
        num_classes: K.
        input_shape: (C, H, W) of the images.
        dropout: probability that an activation between the two convolutions of a block is zero in training.
        affine: whether batch-norm has a learned scale and shift.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    def __init__(
        self,
        depth: int,
        widen_factor: int,
        num_classes: int,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        dropout: float = 0.0,
        affine: bool = True,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        block = partial(Block, dropout=dropout, affine=affine)
        norm = partial(nn.BatchNorm2d, affine=affine)
        super().__init__(depth, widen_factor, num_classes, input_shape, mean, std, block=block, bias=False, norm=norm)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        if weights is not None:
            load_weights(self, weights)


class HeatmapWideResNet(PreActivationResNet):
    """The wide ResNet of Hornauer and Belagiannis, WACV 2023; D and the size of the last map are as in ``WideResNet``.

    All convolutions have biases, the second of a block has the stride, a shortcut reads what enters the block before
    any activation, the last batch-norm has momentum 0.9, and PyTorch's initialisation stays: weights of ``WideResNet``
    do not fit, nor the other way round.

    Args:
        num_classes: K.
        depth: number of weighted layers, 6n + 4.
        widen_factor: how many times the channels of a plain network.
        input_shape: (C, H, W) of the images.
        dropout: probability that an output of a block's first convolution is zero in training.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    def __init__(
        self,
        num_classes: int,
        depth: int = 40,
        widen_factor: int = 2,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        dropout: float = 0.3,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        block = partial(HeatmapBlock, dropout=dropout)
        norm = partial(nn.BatchNorm2d, momentum=0.9)
        super().__init__(depth, widen_factor, num_classes, input_shape, mean, std, block=block, bias=True, norm=norm)
        if weights is not None:
            load_weights(self, weights)
