"""ResNet: torchvision's network, with its own stem or one that keeps the resolution of small images.

He et al., "Deep Residual Learning for Image Recognition", CVPR 2016. The state dict has torchvision's names, whatever
the stem.
"""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import resnet18, resnet34, resnet50

from backbones.backbone import Backbone
from backbones.weights import load_weights

STEMS = ("cifar", "pooled", "imagenet")
BUILDERS = {18: resnet18, 34: resnet34, 50: resnet50}


class ResNet(Backbone):
    """ResNet-18, -34 (D = 512) or -50 (D = 2048).

    Args:
        depth: number of weighted layers.
        num_classes: K.
        input_shape: (C, H, W) of the images.
        stem: ``cifar``, a 3x3 convolution of stride 1: 32x32 images end as 4x4 maps; ``pooled``, the same and a 2x2
            max-pool: so do 64x64 images; ``imagenet``, a 7x7 convolution of stride 2 and a 3x3 max-pool of stride 2:
            224x224 images end as 7x7 maps.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.
    """

    stages = ("layer1", "layer2", "layer3", "layer4")

    def __init__(
        self,
        depth: Literal[18, 34, 50],
        num_classes: int,
        input_shape: tuple[int, int, int] = (3, 32, 32),
        stem: Literal["cifar", "pooled", "imagenet"] = "cifar",
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if depth not in BUILDERS:
            raise ValueError(f"ResNet has the depths {', '.join(map(str, BUILDERS))}, not {depth}")
        if stem not in STEMS:
            raise ValueError(f"ResNet has the stems {', '.join(STEMS)}, not {stem}")
        network = BUILDERS[depth](num_classes=num_classes)
        super().__init__(network.fc.in_features, num_classes, input_shape, mean, std)
        kernel, stride = (7, 2) if stem == "imagenet" else (3, 1)
        self.conv1 = nn.Conv2d(input_shape[0], 64, kernel, stride, padding=kernel // 2, bias=False)
        nn.init.kaiming_normal_(self.conv1.weight, mode="fan_out", nonlinearity="relu")  # as torchvision's own stem
        self.bn1 = network.bn1
        self.maxpool = {"cifar": nn.Identity(), "pooled": nn.MaxPool2d(2), "imagenet": network.maxpool}[stem]
        self.layer1, self.layer2 = network.layer1, network.layer2
        self.layer3, self.layer4 = network.layer3, network.layer4
        self.fc = network.fc
        if weights is not None:
            load_weights(self, weights)

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, 64, h, w), which ``stem`` leaves at full, half or a quarter of the resolution."""
        return self.maxpool(F.relu(self.bn1(self.conv1(images))))
