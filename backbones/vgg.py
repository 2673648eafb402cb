"""VGG for small images: eight convolutions with batch-norm and two linear layers, without dropout.

After Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", ICLR 2015; widths
and taps are those of Dinari and Freifeld, "Variational- and Metric-based Deep Latent Space for Out-of-Distribution
Detection", UAI 2022.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.weights import load_weights


def conv_bn(in_channels: int, channels: int) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """Make a 3x3 convolution and its batch-norm."""
    return nn.Conv2d(in_channels, channels, 3, padding=1), nn.BatchNorm2d(channels)


class VGG(Backbone):
    """Eight convolutions in three resolutions, D = 1024; the last features come from linear layers and have no map.

    Stages end with a batch-norm: the ReLU of their last convolution opens the next stage.

    Args:
        num_classes: K.
        input_shape: (C, H, W) of the images; the linear layers are made for this size.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(1024, num_classes, input_shape, mean, std)
        channels, height, width = input_shape
        if min(height, width) < 8:
            raise ValueError(f"VGG halves images three times, {height}x{width} is smaller than 8x8")
        self.conv1 = nn.Sequential(*conv_bn(channels, 64), nn.ReLU())
        self.layer1 = nn.Sequential(*conv_bn(64, 128))
        self.layer2 = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), *conv_bn(128, 256), nn.ReLU(), *conv_bn(256, 256))
        repeated = [module for _ in range(3) for module in (nn.ReLU(), *conv_bn(256, 256))]
        self.layer3 = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2), *conv_bn(256, 256), *repeated)
        self.linear = nn.Sequential(
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(256 * (height // 8) * (width // 8), 1024),
            nn.ReLU(),
            nn.Linear(1024, 1024),
            nn.ReLU(),
        )
        self.fc = nn.Linear(1024, num_classes)
        if weights is not None:
            load_weights(self, weights)

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 64, H, W)."""
        return self.conv1(images)

    def finish(self, maps: Tensor) -> Tensor:
        """Map (B, 256, H / 4, W / 4) to (B, 1024)."""
        return self.linear(maps)
