"""DigitsNet: a network that learns 8x8 scans of digits in seconds on a CPU."""

from collections.abc import Sequence

from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.weights import load_weights


def conv_bn_relu(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Chain a 3x3 convolution, batch-norm and ReLU."""
    convolution = nn.Conv2d(in_channels, channels, 3, stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(channels), nn.ReLU())


class DigitsNet(Backbone):
    """Four convolutions, D = 64; the last map is half of the image in height and width.

    Args:
        num_classes: K.
        input_shape: (C, H, W) of the images.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, int, int] = (1, 8, 8),
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(64, num_classes, input_shape, mean, std)
        self.conv1 = conv_bn_relu(input_shape[0], 16, stride=1)
        self.layer1 = conv_bn_relu(16, 32, stride=1)
        self.layer2 = conv_bn_relu(32, 64, stride=2)
        self.layer3 = conv_bn_relu(64, 64, stride=1)
        self.fc = nn.Linear(64, num_classes)
        if weights is not None:
            load_weights(self, weights)

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 16, H, W)."""
        return self.conv1(images)
