"""DenseNet equals a network written by name and torchvision's, and has the sizes that the papers' weights have."""

import re

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.densenet import DenseNet


def small(training: bool = False, **options) -> DenseNet:
    """Two bottlenecks a stage, with batch-norm statistics and weights unlike those of a fresh network."""
    torch.manual_seed(0)
    network = DenseNet(5, depth=16, input_shape=(3, 12, 8), **options).train(training)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            if module.affine:
                nn.init.uniform_(module.weight, 0.4, 0.8)
                nn.init.normal_(module.bias, std=0.1)
    return network


def by_name(
    state: dict[str, Tensor], images: Tensor, blocks: int, training: bool, dropout: float
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and pooled taps; in training the statistics in ``state`` move."""

    def bn_relu(name: str, maps: Tensor) -> Tensor:
        parts = (state.get(f"{name}.{part}") for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(maps, *parts, training, 0.1, 1e-5).clamp(min=0)

    def step(name: str, number: int, maps: Tensor, padding: int) -> Tensor:
        weight = state[f"{name}.conv{number}.weight"]
        maps = F.conv2d(bn_relu(f"{name}.bn{number}", maps), weight, padding=padding)
        return F.dropout(maps, dropout, training)

    maps = F.conv2d(images, state["conv1.weight"], padding=1)
    taps = {"stem": maps}
    for layer in (1, 2, 3):
        for block in range(blocks):
            name = f"layer{layer}.{block}"
            maps = torch.cat([maps, step(name, 2, step(name, 1, maps, 0), 1)], 1)
        if layer < 3:
            maps = step(f"layer{layer}.transition", 1, maps, 0)
            maps = (maps[..., ::2, ::2] + maps[..., 1::2, ::2] + maps[..., ::2, 1::2] + maps[..., 1::2, 1::2]) / 4
        taps[f"layer{layer}"] = maps
    taps["penultimate"] = bn_relu("bn1", maps)
    taps = {tap: maps.mean((2, 3)) for tap, maps in taps.items()}
    return taps["penultimate"] @ state["fc.weight"].T + state["fc.bias"], taps


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("options", [{}, {"affine": False}, {"growth_rate": 5, "reduction": 0.7}])
def test_equals_a_network_written_by_name(options, training):
    network, images = small(training, dropout=0.4, **options), torch.rand(4, 3, 12, 8)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    with torch.no_grad():
        torch.manual_seed(1)
        maps, features = network.forward_intermediates(images, ["stem", *network.stages, "penultimate"])
        torch.manual_seed(1)  # the same units drop out
        logits, expected = by_name(state, images, 2, training, 0.4)
        torch.testing.assert_close(network.forward_head(maps), logits, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)
    for name, value in network.state_dict().items():
        if "running" in name:
            torch.testing.assert_close(value, state[name], rtol=1e-4, atol=1e-5)


def torchvision_name(name: str) -> str:
    """Name of a weight of ours in torchvision's network."""
    if block := re.fullmatch(r"layer(\d)\.(\d+)\.(.*)", name):
        layer, index, rest = block.groups()
        return f"features.denseblock{layer}.denselayer{int(index) + 1}.{rest.replace('bn', 'norm')}"
    if transition := re.fullmatch(r"layer(\d)\.transition\.(.*)", name):
        layer, rest = transition.groups()
        return f"features.transition{layer}.{rest.replace('bn1', 'norm').replace('conv1', 'conv')}"
    module, part = name.split(".")
    return {"conv1": "features.conv0", "bn1": "features.norm5", "fc": "classifier"}[module] + f".{part}"


@pytest.mark.parametrize("training", [False, True])
def test_equals_torchvision_with_another_stem(training):
    network, images = small(training), torch.rand(4, 3, 12, 8)
    reference = torchvision.models.DenseNet(12, (2, 2, 2), 24, num_classes=5).train(training)
    reference.features.conv0 = nn.Conv2d(3, 24, 3, padding=1, bias=False)
    reference.features.norm0 = reference.features.relu0 = reference.features.pool0 = nn.Identity()
    state = {torchvision_name(name): value for name, value in network.state_dict().items()}
    reference.load_state_dict(state, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(network(images), reference(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("classes", "affine", "parameters", "entries"),
    [(10, False, 745_174, 398), (100, False, 776_044, 398), (10, True, 769_162, 596), (100, True, 800_032, 596)],
)
def test_sizes(classes, affine, parameters, entries):
    with torch.device("meta"):
        network = DenseNet(classes, affine=affine)
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == entries
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        assert sum(isinstance(module, kind) for module in network.modules()) == 99


def test_maps():
    with torch.device("meta"):
        network, images = DenseNet(10), torch.empty(2, 3, 32, 32)
    maps = network.stem(images)
    assert maps.shape == (2, 24, 32, 32)
    for stage, width, side in zip(network.stages, (108, 150, 342), (16, 8, 8), strict=True):
        maps = network.get_submodule(stage)(maps)
        assert maps.shape == (2, width, side, side)
    last, features = network.forward_intermediates(images, network.taps)
    assert last.shape == (2, 342, 8, 8)
    assert [features[tap].shape[1] for tap in ("stem", *network.stages, "penultimate")] == [24, 108, 150, 342, 342]
    assert network.num_features == 342


def test_growth_and_reduction():
    network = DenseNet(5, depth=16, growth_rate=5, reduction=0.7)
    shapes = {name: tuple(value.shape[:2]) for name, value in network.named_parameters() if "conv" in name}
    assert shapes["conv1.weight"] == (10, 3)
    assert shapes["layer1.1.conv1.weight"] == (20, 15)
    assert shapes["layer1.transition.conv1.weight"] == (14, 20)  # 10 + 2 * 5, of which 70%
    assert shapes["layer2.transition.conv1.weight"] == (16, 24)  # 16.8, rounded down
    assert network.num_features == 26


@pytest.mark.parametrize(("dropout", "drops"), [(0.3, True), (0.0, False)])
def test_dropout_is_for_training(dropout, drops):
    network, images = small(dropout=dropout), torch.rand(2, 3, 12, 8)
    with torch.no_grad():
        assert torch.equal(network.train()(images), network(images)) is not drops
        assert torch.equal(network.eval()(images), network(images))


def test_initialisation():
    torch.manual_seed(0)
    network = DenseNet(10, depth=22)
    for name in ("layer1.2.conv1", "layer1.0.conv2", "layer2.transition.conv1"):
        weight = network.get_submodule(name).weight
        assert weight.std().item() == pytest.approx((2 / weight[0].numel()) ** 0.5, rel=0.06)
    assert network.fc.weight.abs().max().item() == pytest.approx(network.num_features**-0.5, rel=0.01)


@pytest.mark.parametrize("depth", [-2, 4, 18, 101])
def test_a_depth_of_no_such_network_is_refused(depth):
    with pytest.raises(ValueError, match=rf"^DenseNet has a depth of 6n \+ 4 \(10, 16, 22, \.\.\.\), not {depth}$"):
        DenseNet(10, depth)


@pytest.mark.parametrize("size", [31, 36, 64])
def test_images_of_another_size_are_refused(size):
    with pytest.raises(ValueError, match=rf"\(3, 32, 32\) \(C, H, W\), these are \(3, {size}, {size}\)"):
        DenseNet(10, 10)(torch.zeros(2, 3, size, size))
