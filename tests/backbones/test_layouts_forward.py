"""A network with published weights computes what its authors' network computes, written here by their names."""

from collections.abc import Callable

import pytest
import torch
from published_files import (
    affine_map,
    bolts_autoencoder,
    densenet,
    drawn,
    heatmap_wide_resnet,
    mnist_autoencoder,
    mnist_conv,
    option_a,
    resnet,
    vgg,
    wide_resnet,
)
from torch import Tensor
from torch.nn import functional as F

from backbones.autoencoders import MNISTAutoencoder, ResNetAutoencoder
from backbones.densenet import DenseNet
from backbones.mnist_conv import MNISTConv
from backbones.resnet import ResNet
from backbones.resnet_option_a import ResNetOptionA
from backbones.vgg import VGG
from backbones.weights import load_weights
from backbones.wide_resnet import HeatmapWideResNet, WideResNet


class Theirs:
    """The authors' networks in eval mode; each reads a state dict by its published names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        self.state = {name.removeprefix("module."): value for name, value in state.items()}

    def conv(self, name: str, maps: Tensor, stride: int = 1) -> Tensor:
        weight = self.state[f"{name}.weight"]
        return F.conv2d(maps, weight, self.state.get(f"{name}.bias"), stride, padding=weight.shape[-1] // 2)

    def bn(self, name: str, maps: Tensor) -> Tensor:
        entries = (self.state.get(f"{name}.{entry}") for entry in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(maps, *entries, eps=1e-5)

    def linear(self, name: str, features: Tensor) -> Tensor:
        return F.linear(features, self.state[f"{name}.weight"], self.state[f"{name}.bias"])

    def resnet_features(self, images: Tensor, shortcut: str, prefix: str = "", pool: int = 1) -> Tensor:
        maps = F.max_pool2d(F.relu(self.bn(f"{prefix}bn1", self.conv(f"{prefix}conv1", images))), pool)
        for stage in (1, 2, 3, 4):
            block = 0
            while f"{prefix}layer{stage}.{block}.conv1.weight" in self.state:
                name, stride = f"{prefix}layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                bottleneck = f"{name}.conv3.weight" in self.state
                hidden = F.relu(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", maps, 1 if bottleneck else stride)))
                hidden = self.bn(f"{name}.bn2", self.conv(f"{name}.conv2", hidden, stride if bottleneck else 1))
                if bottleneck:
                    hidden = self.bn(f"{name}.bn3", self.conv(f"{name}.conv3", F.relu(hidden)))
                if f"{name}.{shortcut}.0.weight" in self.state:
                    maps = self.bn(f"{name}.{shortcut}.1", self.conv(f"{name}.{shortcut}.0", maps, stride))
                maps = F.relu(hidden + maps)
                block += 1
        return maps.mean((2, 3))

    def openood(self, images: Tensor) -> Tensor:
        return self.linear("fc", self.resnet_features(images, "shortcut"))

    def heatmap_resnet(self, images: Tensor) -> Tensor:
        return self.linear("linear", self.resnet_features(images, "shortcut", pool=2))

    def wide_resnet(self, images: Tensor) -> Tensor:
        maps = self.conv("conv1", images)
        for stage in (1, 2, 3):
            for block in range(6):
                name, stride = f"block{stage}.layer.{block}", 2 if stage > 1 and block == 0 else 1
                activated = F.relu(self.bn(f"{name}.bn1", maps))
                hidden = F.relu(self.bn(f"{name}.bn2", self.conv(f"{name}.conv1", activated, stride)))
                if block == 0:
                    maps = self.conv(f"{name}.convShortcut", activated, stride)
                maps = maps + self.conv(f"{name}.conv2", hidden)
        return self.linear("fc", F.relu(self.bn("bn1", maps)).mean((2, 3)))

    def heatmap_wide_resnet(self, images: Tensor) -> Tensor:
        maps = self.conv("conv1", images)
        for stage in (1, 2, 3):
            for block in range(6):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                hidden = self.conv(f"{name}.conv1", F.relu(self.bn(f"{name}.bn1", maps)))
                hidden = self.conv(f"{name}.conv2", F.relu(self.bn(f"{name}.bn2", hidden)), stride)
                maps = hidden + (self.conv(f"{name}.shortcut.0", maps, stride) if block == 0 else maps)
        return self.linear("linear", F.relu(self.bn("bn1", maps)).mean((2, 3)))

    def densenet(self, images: Tensor) -> Tensor:
        maps = self.conv("conv1", images)
        for block in (1, 2, 3):
            for layer in range(16):
                name = f"block{block}.layer.{layer}"
                hidden = self.conv(f"{name}.conv1", F.relu(self.bn(f"{name}.bn1", maps)))
                maps = torch.cat([maps, self.conv(f"{name}.conv2", F.relu(self.bn(f"{name}.bn2", hidden)))], 1)
            if block < 3:
                maps = self.conv(f"trans{block}.conv1", F.relu(self.bn(f"trans{block}.bn1", maps)))
                maps = F.avg_pool2d(maps, 2)
        return self.linear("fc", F.relu(self.bn("bn1", maps)).mean((2, 3)))

    def option_a(self, images: Tensor) -> Tensor:
        maps = F.relu(self.bn("bn1", self.conv("conv1", images)))
        for stage in (1, 2, 3):
            for block in range(3):
                name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
                hidden = F.relu(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", maps, stride)))
                hidden = self.bn(f"{name}.bn2", self.conv(f"{name}.conv2", hidden))
                if stride == 2:
                    zeros = torch.zeros_like(hidden[:, : hidden.shape[1] // 4])
                    maps = torch.cat([zeros, maps[:, :, ::2, ::2], zeros], 1)
                maps = F.relu(hidden + maps)
        return self.linear("linear", maps.mean((2, 3)))

    def vgg(self, images: Tensor) -> Tensor:
        maps = images
        for index in (0, 3, 7, 10, 14, 17, 20, 23):
            maps = F.relu(self.bn(f"encoder.{index + 1}", self.conv(f"encoder.{index}", maps)))
            if index in (3, 10, 23):
                maps = F.max_pool2d(maps, 2)
        features = F.relu(self.linear("encoder.28", maps.flatten(1)))
        return self.linear("fc", F.relu(self.linear("encoder.30", features)))

    def mnist_features(self, images: Tensor, prefix: str = "") -> Tensor:
        maps = images
        for index in (0, 2, 5, 7, 10):
            maps = F.relu(self.conv(f"{prefix}encoder.{index}", maps))
            if index in (2, 7, 10):
                maps = F.max_pool2d(maps, 2)
        return self.linear(f"{prefix}dec_layer", maps.flatten(1))

    def mnist_conv(self, images: Tensor) -> Tensor:
        return self.linear("fc", self.mnist_features(images))

    def bolts_autoencoder(self, images: Tensor) -> Tensor:
        code = self.linear("fc", self.resnet_features(images, "downsample", "encoder."))
        maps = self.linear("decoder.linear", code).unflatten(1, (512, 4, 4))
        for stage in (1, 2, 3, 4):
            for block in (0, 1):
                name, grows = f"decoder.layer{stage}.{block}", stage < 4 and block == 0
                hidden = F.relu(self.bn(f"{name}.bn1", self.conv(f"{name}.conv1", maps)))
                if grows:
                    hidden, larger = F.interpolate(hidden, scale_factor=2), F.interpolate(maps, scale_factor=2)
                    maps = self.bn(f"{name}.upsample.1", self.conv(f"{name}.upsample.0.1", larger))
                hidden = self.bn(f"{name}.bn2", self.conv(f"{name}.conv2{'.1' if grows else ''}", hidden))
                maps = F.relu(hidden + maps)
        return self.conv("decoder.conv1", maps)

    def mnist_autoencoder(self, images: Tensor) -> Tensor:
        code = self.linear("fc", self.mnist_features(images, "encoder."))
        maps = self.linear("decoder.enc_layer", self.linear("decoder.latent", code)).unflatten(1, (100, 3, 3))
        for index in (0, 2, 4, 6, 8, 10):
            name = f"decoder.decoder.{index}"
            weight, bias = self.state[f"{name}.weight"], self.state[f"{name}.bias"]
            maps = F.relu(F.conv_transpose2d(maps, weight, bias, stride=2 if index > 6 else 1))
        return self.conv("decoder.decoder.12", maps)


R18, COLOUR, GREY = (2, 2, 2, 2), (3, 32, 32), (1, 28, 28)
FREE = densenet(10, affine=False)
CASES: dict[str, tuple[dict, Callable, Callable, tuple[int, int, int]]] = {
    "openood": (resnet(R18, 2, "shortcut") | affine_map("fc", 10, 512), Theirs.openood, lambda: ResNet(18, 10), COLOUR),
    "heatmap-resnet50": (
        resnet((1, 1, 1, 1), 3, "shortcut") | affine_map("linear", 10, 2048),
        Theirs.heatmap_resnet,
        lambda: shallow(ResNet(50, 10, stem="pooled")),
        COLOUR,
    ),
    "wide-resnet": (
        wide_resnet(6, 2) | affine_map("fc", 10, 128),
        Theirs.wide_resnet,
        lambda: WideResNet(40, 2, 10),
        COLOUR,
    ),
    "wide-resnet-free": (
        wide_resnet(6, 4, affine=False) | affine_map("fc", 10, 256),
        Theirs.wide_resnet,
        lambda: WideResNet(40, 4, 10),
        COLOUR,
    ),
    "heatmap-wide-resnet": (
        heatmap_wide_resnet() | affine_map("linear", 10, 128),
        Theirs.heatmap_wide_resnet,
        lambda: HeatmapWideResNet(10),
        COLOUR,
    ),
    "densenet": (densenet(10), Theirs.densenet, lambda: DenseNet(10), COLOUR),
    "densenet-free": (FREE, Theirs.densenet, lambda: DenseNet(10), COLOUR),
    "densenet-free-into-free": (FREE, Theirs.densenet, lambda: DenseNet(10, affine=False), COLOUR),
    "option-a": (option_a(3), Theirs.option_a, lambda: ResNetOptionA(20, 10), COLOUR),
    "vgg": (vgg() | affine_map("fc", 10, 1024), Theirs.vgg, lambda: VGG(10), COLOUR),
    "mnist-conv": (mnist_conv() | affine_map("fc", 10, 500), Theirs.mnist_conv, lambda: MNISTConv(10), GREY),
    "bolts-autoencoder": (bolts_autoencoder(), Theirs.bolts_autoencoder, lambda: ResNetAutoencoder(18), COLOUR),
    "mnist-autoencoder": (mnist_autoencoder(), Theirs.mnist_autoencoder, MNISTAutoencoder, GREY),
}


def shallow(network: ResNet) -> ResNet:
    """Keep the first block of each stage, to be fast."""
    for stage in network.stages:
        setattr(network, stage, getattr(network, stage)[:1])
    return network


@pytest.mark.parametrize(("shapes", "forward", "build", "shape"), CASES.values(), ids=CASES)
def test_a_loaded_network_computes_what_the_authors_network_computes(tmp_path, shapes, forward, build, shape):
    state = drawn(shapes)
    torch.save({"state_dict": state}, tmp_path / "net.pt")
    network = build()
    load_weights(network.eval(), str(tmp_path / "net.pt"))
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = forward(Theirs(state), images)
        assert expected.isfinite().all()
        assert (expected[0] - expected[1]).abs().max() > 1e-3 * expected.abs().max()  # of the image, not of the biases
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
