"""The wide ResNets equal networks written by name, and have the sizes that the papers' weights have."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.wide_resnet import HeatmapWideResNet, WideResNet


class ByName:
    """Functional layers that read, and in training update, a state dict."""

    def __init__(self, network: nn.Module, dropout: float) -> None:
        self.state = {name: value.clone() for name, value in network.state_dict().items()}
        self.training, self.rate = network.training, dropout

    def conv(self, name: str, maps: Tensor, stride: int = 1) -> Tensor:
        weight, bias = self.state[f"{name}.weight"], self.state.get(f"{name}.bias")
        return F.conv2d(maps, weight, bias, stride, padding=weight.shape[-1] // 2)

    def bn_relu(self, name: str, maps: Tensor, momentum: float = 0.1) -> Tensor:
        mean, variance, weight, bias = (
            self.state.get(f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias")
        )
        return F.batch_norm(maps, mean, variance, weight, bias, self.training, momentum, 1e-5).clamp(min=0)

    def dropout(self, maps: Tensor) -> Tensor:
        return F.dropout(maps, self.rate, self.training)

    def standard(self, name: str, maps: Tensor, stride: int) -> Tensor:
        activated = self.bn_relu(f"{name}.bn1", maps)
        hidden = self.dropout(self.bn_relu(f"{name}.bn2", self.conv(f"{name}.conv1", activated, stride)))
        residual = self.conv(f"{name}.conv2", hidden)
        widens = f"{name}.shortcut.weight" in self.state
        return residual + (self.conv(f"{name}.shortcut", activated, stride) if widens else maps)

    def heatmap(self, name: str, maps: Tensor, stride: int) -> Tensor:
        hidden = self.dropout(self.conv(f"{name}.conv1", self.bn_relu(f"{name}.bn1", maps)))
        residual = self.conv(f"{name}.conv2", self.bn_relu(f"{name}.bn2", hidden), stride)
        widens = f"{name}.shortcut.weight" in self.state
        return residual + (self.conv(f"{name}.shortcut", maps, stride) if widens else maps)

    def network(self, block, momentum: float, blocks: int, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        maps = self.conv("conv1", images)
        taps = {"stem": maps}
        for layer in (1, 2, 3):
            for index in range(blocks):
                maps = block(f"layer{layer}.{index}", maps, 2 if layer > 1 and index == 0 else 1)
            taps[f"layer{layer}"] = maps
        taps["penultimate"] = self.bn_relu("bn1", maps, momentum)
        taps = {tap: maps.mean((2, 3)) for tap, maps in taps.items()}
        return taps["penultimate"] @ self.state["fc.weight"].T + self.state["fc.bias"], taps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("build", "options"),
    [
        (WideResNet, {"widen_factor": 2}),
        (WideResNet, {"widen_factor": 2, "affine": False}),
        (WideResNet, {"widen_factor": 1}),
        (HeatmapWideResNet, {"widen_factor": 2}),
        (HeatmapWideResNet, {"widen_factor": 1}),
    ],
)
def test_equals_a_network_written_by_name(build, options, training):
    torch.manual_seed(0)
    network = build(depth=16, num_classes=5, input_shape=(3, 13, 10), dropout=0.4, **options).train(training)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.4, 0.8)
                nn.init.normal_(module.bias, std=0.1)
    reference, images = ByName(network, dropout=0.4), torch.rand(4, 3, 13, 10)
    block, momentum = (reference.heatmap, 0.9) if build is HeatmapWideResNet else (reference.standard, 0.1)
    with torch.no_grad():
        torch.manual_seed(1)
        maps, features = network.forward_intermediates(images, ["stem", *network.stages, "penultimate"])
        torch.manual_seed(1)  # the same units drop out
        logits, expected = reference.network(block, momentum, 2, images)
        torch.testing.assert_close(network.forward_head(maps), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    for name, value in network.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, reference.state[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("build", "parameters", "entries"),
    [
        (lambda: WideResNet(40, 4, 10, affine=False), 8_938_426, 153),
        (lambda: WideResNet(40, 4, 100, affine=False), 8_961_556, 153),
        (lambda: WideResNet(40, 4, 10), 8_949_210, 227),
        (lambda: WideResNet(40, 4, 100), 8_972_340, 227),
        (lambda: WideResNet(40, 2, 10), 2_243_546, 227),
        (lambda: WideResNet(40, 2, 100), 2_255_156, 227),
        (lambda: WideResNet(28, 10, 10), 36_472_784 + 640 * 10 + 10, 153 + 2),
        (lambda: HeatmapWideResNet(10), 2_245_184 + 1_290, 265 + 2),
        (lambda: HeatmapWideResNet(100), 2_245_184 + 12_900, 265 + 2),
    ],
)
def test_sizes(build, parameters, entries):
    with torch.device("meta"):
        network = build()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == entries


@pytest.mark.parametrize(
    ("build", "widths"),
    [
        (lambda: WideResNet(40, 4, 10), (64, 128, 256)),
        (lambda: WideResNet(28, 10, 10), (160, 320, 640)),
        (lambda: HeatmapWideResNet(10), (32, 64, 128)),
    ],
)
def test_maps(build, widths):
    with torch.device("meta"):
        network, images = build(), torch.empty(2, 3, 32, 32)
    maps = network.stem(images)
    assert maps.shape == (2, 16, 32, 32)
    for stage, width, side in zip(network.stages, widths, (32, 16, 8), strict=True):
        maps = network.get_submodule(stage)(maps)
        assert maps.shape == (2, width, side, side)
    last, features = network.forward_intermediates(images, network.taps)
    assert last.shape == maps.shape
    assert [features[tap].shape[1] for tap in ("stem", *network.stages, "penultimate")] == [16, *widths, widths[-1]]
    assert network.num_features == widths[-1]


@pytest.mark.parametrize(
    ("build", "drops"),
    [
        (lambda: WideResNet(10, 1, 5, dropout=0.3), True),
        (lambda: WideResNet(10, 1, 5), False),
        (lambda: HeatmapWideResNet(5, 10, 1), True),
    ],
)
def test_dropout_is_for_training(build, drops):
    network, images = build(), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(network.train()(images), network(images)) is not drops
        assert torch.equal(network.eval()(images), network(images))


def test_initialisation():
    torch.manual_seed(0)
    network, heatmap = WideResNet(10, 4, 10), HeatmapWideResNet(10, 10, 4)
    for name in ("layer1.0.conv1", "layer2.0.conv1", "layer3.0.conv2", "layer3.0.shortcut"):
        weight = network.get_submodule(name).weight
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.05)
        weight = heatmap.get_submodule(name).weight
        assert weight.abs().max().item() == pytest.approx(weight[0].numel() ** -0.5, rel=0.01)
    assert network.fc.weight.abs().max().item() == pytest.approx(256**-0.5, rel=0.01)


@pytest.mark.parametrize("depth", [-2, 4, 18, 42])
def test_a_depth_of_no_such_network_is_refused(depth):
    with pytest.raises(ValueError, match=rf"^WideResNet has a depth of 6n \+ 4 \(10, 16, 22, \.\.\.\), not {depth}$"):
        WideResNet(depth, 2, 10)
    with pytest.raises(ValueError, match=rf"^HeatmapWideResNet .* not {depth}$"):
        HeatmapWideResNet(10, depth)


@pytest.mark.parametrize("size", [31, 36, 64])
def test_images_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=rf"\(3, 32, 32\) \(C, H, W\), these are \(3, {size}, {size}\)"):
        WideResNet(10, 1, 10)(torch.zeros(2, 3, size, size))
