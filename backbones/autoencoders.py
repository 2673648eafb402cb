"""Autoencoders: networks that squeeze an image into a vector and draw it again.

Both are those of Dinari and Freifeld, "Variational- and Metric-based Deep Latent Space for Out-of-Distribution
Detection", UAI 2022, which weighs likelihoods by what the autoencoder fails to draw.
"""

from abc import ABC, abstractmethod
from collections import OrderedDict
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

from backbones.mnist_conv import MNISTConv
from backbones.resnet import ResNet
from backbones.weights import load_weights

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}


class Autoencoder(nn.Module, ABC):
    """The contract that every autoencoder keeps.

    Args:
        input_shape: (C, H, W) of the images it accepts and draws; anything else is an error in words.
        latent_dim: L, the width of the vector between encoder and decoder.
    """

    def __init__(self, input_shape: tuple[int, int, int], latent_dim: int) -> None:
        super().__init__()
        self.input_shape, self.latent_dim = input_shape, latent_dim

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W), normalised as in training, to (B, L)."""

    @abstractmethod
    def decode(self, latent: Tensor) -> Tensor:
        """Map (B, L) to (B, C, H, W), in the unit of the images."""

    def forward(self, images: Tensor) -> Tensor:
        """Reconstruct (B, C, H, W) images."""
        if tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"{type(self).__name__} reads images of shape {self.input_shape} (C, H, W), "
                f"these are {tuple(images.shape[1:])}"
            )
        return self.decode(self.encode(images))


class ResNetAutoencoder(Autoencoder):
    """ResNet-18 or -50 and its mirror image, for 32x32 colour images.

    The decoder begins with 4x4 maps; each of its first three stages doubles them by repeating pixels. Its output is
    not squashed.

    Args:
        depth: of the encoder; the decoder has as many blocks.
        latent_dim: L.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
    """

    def __init__(self, depth: Literal[18, 50], latent_dim: int = 256, weights: str | None = None) -> None:
        if depth not in BLOCKS:
            raise ValueError(f"ResNetAutoencoder has the depths {', '.join(map(str, BLOCKS))}, not {depth}")
        super().__init__((3, 32, 32), latent_dim)
        self.encoder = ResNet(depth, latent_dim, self.input_shape)  # its classifier yields the latent vector
        width = self.encoder.num_features
        expansion = width // 512
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        layers["linear"] = nn.Linear(latent_dim, width * 4 * 4)
        layers["unflatten"] = nn.Unflatten(1, (width, 4, 4))
        for stage, (channels, count) in enumerate(zip((256, 128, 64, 64), BLOCKS[depth], strict=True), start=1):
            blocks = []
            for block in range(count):
                blocks.append(UpBlock(width, channels, expansion, doubles=stage < 4 and block == 0))
                width = channels * expansion
            layers[f"layer{stage}"] = nn.Sequential(*blocks)
        layers["conv1"] = nn.Conv2d(width, 3, 3, padding=1, bias=False)
        self.decoder = nn.Sequential(layers)
        if weights is not None:
            load_weights(self, weights)

    def encode(self, images: Tensor) -> Tensor:
        """Map (B, 3, 32, 32) to (B, L)."""
        return self.encoder(images)

    def decode(self, latent: Tensor) -> Tensor:
        """Map (B, L) to (B, 3, 32, 32)."""
        return self.decoder(latent)


class UpBlock(nn.Module):
    """A residual block that may double the resolution before its 3x3 convolution and in its shortcut.

    Args:
        in_channels: of the input.
        channels: of the 3x3 convolution that follows the doubling.
        expansion: 1: a basic block, whose first convolution keeps the channels of the input; 4: a bottleneck, which
            yields four times ``channels``.
        doubles: whether height and width are doubled.
    """

    def __init__(self, in_channels: int, channels: int, expansion: int, doubles: bool) -> None:
        super().__init__()
        self.bottleneck = expansion > 1
        inner, kernel = (channels, 1) if self.bottleneck else (in_channels, 3)
        self.conv1 = nn.Conv2d(in_channels, inner, kernel, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(inner)
        self.conv2 = nn.Conv2d(inner, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        if self.bottleneck:
            self.conv3 = nn.Conv2d(channels, channels * expansion, 1, bias=False)
            self.bn3 = nn.BatchNorm2d(channels * expansion)
        self.upsample: nn.Module = nn.Identity()
        self.shortcut: nn.Module = nn.Identity()
        if doubles:
            projection = nn.Conv2d(in_channels, channels * expansion, 1, bias=False)
            self.upsample = nn.Upsample(scale_factor=2)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(channels * expansion))

    def forward(self, maps: Tensor) -> Tensor:
        """Map (B, in_channels, h, w) to (B, channels * expansion, h, w), or twice as high and wide."""
        residual = self.upsample(F.relu(self.bn1(self.conv1(maps))))
        residual = self.bn2(self.conv2(residual))
        if self.bottleneck:
            residual = self.bn3(self.conv3(F.relu(residual)))
        return F.relu(residual + self.shortcut(self.upsample(maps)))


class MNISTAutoencoder(Autoencoder):
    """``MNISTConv`` and transposed convolutions, for grey 28x28 images; the output is not squashed.

    Args:
        latent_dim: L.
        weights: where to load from, see ``backbones.weights.load_weights``; None = random.
    """

    def __init__(self, latent_dim: int = 32, weights: str | None = None) -> None:
        super().__init__((1, 28, 28), latent_dim)
        self.encoder = MNISTConv(latent_dim, self.input_shape)  # its classifier yields the latent vector
        layers: list[nn.Module] = [nn.Linear(latent_dim, 500), nn.Linear(500, 900), nn.Unflatten(1, (100, 3, 3))]
        for stride in (1, 1, 1, 1, 2, 2):  # 3x3 maps grow to 7x7, then double twice
            layers += [nn.ConvTranspose2d(100, 100, 2, stride), nn.ReLU()]
        self.decoder = nn.Sequential(*layers, nn.Conv2d(100, 1, 1))
        if weights is not None:
            load_weights(self, weights)

    def encode(self, images: Tensor) -> Tensor:
        """Map (B, 1, 28, 28) to (B, L)."""
        return self.encoder(images)

    def decode(self, latent: Tensor) -> Tensor:
        """Map (B, L) to (B, 1, 28, 28)."""
        return self.decoder(latent)
