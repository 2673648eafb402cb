"""MNISTConv: five convolutions and a linear layer for grey 28x28 images.

The encoder of Dinari and Freifeld, "Variational- and Metric-based Deep Latent Space for Out-of-Distribution
Detection", UAI 2022, for MNIST.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.weights import load_weights

WIDTH = 100


class MNISTConv(Backbone):
    """3x3 convolutions of 100 channels in three resolutions, D = 500; the last features are linear and have no map.

    Stages end behind the second convolution, before its ReLU; behind the first max-pool; and behind the third
    convolution and its ReLU.

    Args:
        num_classes: K.
        input_shape: (C, H, W) of the images; the linear layer is made for this size.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    stages = ("layer1", "layer2", "layer3")

    def __init__(
        self,
        num_classes: int,
        input_shape: tuple[int, int, int] = (1, 28, 28),
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__(500, num_classes, input_shape, mean, std)
        channels, height, width = input_shape
        if min(height, width) < 8:
            raise ValueError(f"MNISTConv halves images three times, {height}x{width} is smaller than 8x8")
        self.conv1 = nn.Sequential(nn.Conv2d(channels, WIDTH, 3, padding=1), nn.ReLU())
        self.layer1 = nn.Conv2d(WIDTH, WIDTH, 3, padding=1)
        self.layer2 = nn.Sequential(nn.ReLU(), nn.MaxPool2d(2))
        self.layer3 = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU())
        self.layer4 = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.layer5 = nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
        self.linear = nn.Linear(WIDTH * (height // 8) * (width // 8), 500)
        self.fc = nn.Linear(500, num_classes)
        if weights is not None:
            load_weights(self, weights)

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 100, H, W)."""
        return self.conv1(images)

    def finish(self, maps: Tensor) -> Tensor:
        """Map (B, 100, H / 2, W / 2) to (B, 500), without an activation at the end."""
        return self.linear(self.layer5(self.layer4(maps)).flatten(1))
