"""Every network keeps the contract of ``Backbone``; each equals an independent reference."""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import pytest
import torch
import torchvision
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.densenet import DenseNet
from backbones.digits_net import DigitsNet
from backbones.mnist_conv import MNISTConv
from backbones.resnet import ResNet
from backbones.resnet_option_a import ResNetOptionA, option_a
from backbones.timm_model import TimmModel
from backbones.vgg import VGG
from backbones.wide_resnet import HeatmapWideResNet, WideResNet

CLASSES = 7


@dataclass(frozen=True)
class Case:
    build: Callable[..., Backbone]
    shape: tuple[int, int, int]
    map_shape: tuple[int, int, int]
    widths: tuple[int, ...]  # of the stem and of the stages, in order

    def new(self, **options) -> Backbone:
        """Build in eval mode, with batch-norm statistics unlike those of a fresh network."""
        torch.manual_seed(0)
        network = self.build(num_classes=CLASSES, input_shape=self.shape, **options).eval()
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.8, 1.2)
                if module.affine:
                    nn.init.uniform_(module.weight, 0.4, 0.8)
                    nn.init.normal_(module.bias, std=0.1)
        return network

    @cache  # noqa: B019
    def shared(self) -> Backbone:
        """For tests that leave the network as it is."""
        return self.new()

    def taps(self) -> list[str]:
        """What the network offers: a last map without positions has neither deviation nor maximum."""
        return [tap for tap in self.shared().taps if len(self.map_shape) == 3 or tap not in ("std", "max")]

    def images(self, count: int = 3) -> Tensor:
        return torch.rand(count, *self.shape, generator=torch.Generator().manual_seed(1))


def timm_model(name: str, **options) -> Backbone:
    pytest.importorskip("timm")
    return TimmModel(name, **options)


BASIC, BOTTLENECK = (64, 64, 128, 256, 512), (64, 256, 512, 1024, 2048)
CASES = {
    "resnet18": Case(partial(ResNet, 18), (3, 32, 32), (512, 4, 4), BASIC),
    "resnet18-grey-28": Case(partial(ResNet, 18), (1, 28, 28), (512, 4, 4), BASIC),
    "resnet18-oblong": Case(partial(ResNet, 18), (3, 33, 16), (512, 5, 2), BASIC),
    "resnet34": Case(partial(ResNet, 34), (3, 24, 24), (512, 3, 3), BASIC),
    "resnet50": Case(partial(ResNet, 50), (3, 16, 16), (2048, 2, 2), BOTTLENECK),
    "resnet18-pooled-64": Case(partial(ResNet, 18, stem="pooled"), (3, 64, 64), (512, 4, 4), BASIC),
    "resnet18-imagenet-96": Case(partial(ResNet, 18, stem="imagenet"), (3, 96, 96), (512, 3, 3), BASIC),
    "option-a-20": Case(partial(ResNetOptionA, 20), (3, 32, 32), (64, 8, 8), (16, 16, 32, 64)),
    "option-a-20-oblong": Case(partial(ResNetOptionA, 20), (1, 29, 12), (64, 8, 3), (16, 16, 32, 64)),
    "option-a-32": Case(partial(ResNetOptionA, 32), (3, 32, 32), (64, 8, 8), (16, 16, 32, 64)),
    "option-a-44": Case(partial(ResNetOptionA, 44), (3, 32, 32), (64, 8, 8), (16, 16, 32, 64)),
    "option-a-56": Case(partial(ResNetOptionA, 56), (3, 32, 32), (64, 8, 8), (16, 16, 32, 64)),
    "wrn-10-1": Case(partial(WideResNet, 10, 1), (3, 32, 32), (64, 8, 8), (16, 16, 32, 64)),
    "wrn-16-2-oblong": Case(partial(WideResNet, 16, 2, dropout=0.3), (1, 29, 12), (128, 8, 3), (16, 32, 64, 128)),
    "wrn-10-4-bare-norm": Case(partial(WideResNet, 10, 4, affine=False), (3, 16, 16), (256, 4, 4), (16, 64, 128, 256)),
    "wrn-10-2-heatmap": Case(partial(HeatmapWideResNet, depth=10), (3, 32, 32), (128, 8, 8), (16, 32, 64, 128)),
    "densenet-22": Case(partial(DenseNet, depth=22, dropout=0.3), (3, 32, 32), (69, 8, 8), (24, 30, 33, 69)),
    "densenet-22-oblong": Case(partial(DenseNet, depth=22), (1, 29, 12), (69, 7, 3), (24, 30, 33, 69)),
    "densenet-22-bare-norm": Case(partial(DenseNet, depth=22, affine=False), (3, 16, 16), (69, 4, 4), (24, 30, 33, 69)),
    "vgg": Case(VGG, (3, 32, 32), (1024,), (64, 128, 256, 256)),
    "mnist-conv": Case(MNISTConv, (1, 28, 28), (500,), (100, 100, 100, 100)),
    "timm-resnet10t": Case(partial(timm_model, "resnet10t"), (3, 64, 64), (512, 2, 2), ()),
    "timm-vit": Case(partial(timm_model, "test_vit"), (3, 32, 32), (64,), ()),
    "digits": Case(DigitsNet, (1, 8, 8), (64, 4, 4), (16, 32, 64, 64)),
    "digits-colour-15": Case(DigitsNet, (3, 15, 15), (64, 8, 8), (16, 32, 64, 64)),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request) -> Case:
    return request.param


@pytest.mark.parametrize("count", [3, 0])
def test_shapes(case, count):
    network, images = case.shared(), case.images(count)
    with torch.no_grad():
        maps = network.forward_features(images)
        assert maps.shape == (count, *case.map_shape)
        assert network(images).shape == network.forward_head(maps).shape == (count, CLASSES)
        assert network.forward_head(maps, pre_logits=True).shape == (count, network.num_features)
        _, features = network.forward_intermediates(images, case.taps())
    pools = dict.fromkeys(("penultimate", "std", "max"), network.num_features)
    widths = pools | dict(zip(("stem", *network.stages)[: len(case.widths)], case.widths, strict=True))
    expected = {tap: (count, widths[tap]) for tap in case.taps()}
    assert {tap: tuple(value.shape) for tap, value in features.items()} == expected
    assert network.num_features == case.map_shape[0] == network.head.in_features
    assert network.num_classes == network.head.out_features == CLASSES


def test_one_pass_yields_every_tap(case, monkeypatch):
    network, images = case.shared(), case.images()
    calls = []
    stem = network.stem
    finish = network.finish
    outputs = {}

    def spied_stem(images):
        calls.append("stem")
        outputs["stem"] = stem(images)
        return outputs["stem"]

    monkeypatch.setattr(network, "stem", spied_stem)
    monkeypatch.setattr(network, "finish", lambda maps: calls.append("finish") or finish(maps))
    hooks = [
        network.get_submodule(stage).register_forward_hook(
            lambda module, args, output, stage=stage: calls.append(stage) or outputs.update({stage: output.clone()})
        )
        for stage in network.stages
    ]
    with torch.no_grad():
        maps, features = network.forward_intermediates(images, case.taps())
    for hook in hooks:
        hook.remove()
    assert calls == ["stem", *network.stages, "finish"]
    for stage, output in outputs.items():
        if stage not in features:  # the stem of a network without stages
            continue
        torch.testing.assert_close(features[stage], output.sum((-1, -2)) / output[0, 0].numel())
    with torch.no_grad():
        assert torch.equal(maps, finish(outputs[("stem", *network.stages)[-1]]))
    if maps.ndim == 2:
        assert torch.equal(features["penultimate"], maps)
        return
    assert features["std"].count_nonzero() > 0
    for row, column in ((0, 0), (1, 5), (2, 63)):
        positions = maps[row, column].flatten().double().tolist()
        mean = sum(positions) / len(positions)
        variance = sum((value - mean) ** 2 for value in positions) / (len(positions) - 1)
        assert features["penultimate"][row, column].item() == pytest.approx(mean, rel=1e-5, abs=1e-6)
        assert features["std"][row, column].item() == pytest.approx(variance**0.5, rel=1e-5, abs=1e-6)
        assert features["max"][row, column].item() == max(positions)


def test_only_the_requested_taps_are_returned(case):
    for tap in case.taps():
        _, features = case.shared().forward_intermediates(case.images(), {tap})
        assert set(features) == {tap}


def test_the_head_reads_the_penultimate_features(case):
    network, images = case.shared(), case.images()
    with torch.no_grad():
        _, features = network.forward_intermediates(images, ["penultimate"])
        logits = features["penultimate"] @ network.head.weight.T + network.head.bias
        torch.testing.assert_close(network(images), logits)


def test_eval_is_deterministic(case):
    network, images = case.shared(), case.images()
    with torch.no_grad():
        assert torch.equal(network(images), network(images))


def some_by_default(*names: str) -> list:
    """All cases, those that are not named as slow tests."""
    return [pytest.param(CASES[name], id=name, marks=[] if name in names else pytest.mark.slow) for name in CASES]


QUICK = ("resnet18", "densenet-22")


@pytest.mark.parametrize("case", some_by_default(*QUICK))
def test_channels_last_changes_nothing_but_rounding(case):
    network, images = case.new().to(memory_format=torch.channels_last), case.images()
    with torch.no_grad():
        maps, features = network.forward_intermediates(images.to(memory_format=torch.channels_last), case.taps())
        _, expected = case.shared().forward_intermediates(images, case.taps())
        torch.testing.assert_close(network.forward_head(maps), case.shared()(images), rtol=1e-4, atol=1e-4)
    for tap in case.taps():
        torch.testing.assert_close(features[tap], expected[tap], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", some_by_default(*QUICK))
def test_bf16_changes_nothing_but_rounding(case):
    network, images = case.shared(), case.images(8)
    with torch.no_grad():
        expected = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(images)
    spread = (expected - expected.mean(0)).abs().max()  # between images: far more than the rounding of a layer
    assert logits.dtype == torch.bfloat16
    assert (logits.float() - expected).abs().max() < 0.1 * spread + 0.02 * expected.abs().max()


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inside the compiler of torch 2.11
@pytest.mark.parametrize("case", some_by_default())
def test_compiled_networks_agree(case, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()
    network, images = case.shared(), case.images()
    compiled = torch.compile(partial(network.forward_intermediates, taps=tuple(case.taps())), fullgraph=True)
    with torch.no_grad():
        maps, features = compiled(images)
        _, expected = network.forward_intermediates(images, case.taps())
        torch.testing.assert_close(network.forward_head(maps), network(images), rtol=1e-4, atol=1e-4)
    for tap in case.taps():
        torch.testing.assert_close(features[tap], expected[tap], rtol=1e-4, atol=1e-4)


def test_weights_survive_a_file(case, tmp_path):
    network, images = case.shared(), case.images()
    torch.save(network.state_dict(), tmp_path / "network.pt")
    again = case.build(num_classes=CLASSES, input_shape=case.shape, weights=str(tmp_path / "network.pt")).eval()
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_gradients_reach_every_image(case):
    network, images = case.shared(), case.images().requires_grad_()
    maps, features = network.forward_intermediates(images, case.taps())
    for output in (network.forward_head(maps), *features.values()):
        (gradient,) = torch.autograd.grad(output.square().sum(), images, retain_graph=True)
        assert gradient.isfinite().all()
        assert (gradient.flatten(1).abs().sum(1) > 0).all()


def test_wrong_images_are_named_with_both_shapes(case):
    channels, height, width = case.shape
    for shape in ((channels + 1, height, width), (channels, height + 8, width)):
        with pytest.raises(ValueError, match=re.escape(f"{case.shape} (C, H, W), these are {shape}")):
            case.shared()(torch.zeros(2, *shape))


def test_an_unknown_tap_lists_the_known_ones(case):
    known = ", ".join(case.shared().taps)
    with pytest.raises(ValueError, match=f"no tap layer9; its taps: {known}"):
        case.shared().forward_intermediates(case.images(), ["penultimate", "layer9"])


def test_normalisation_inside_equals_normalisation_outside(case):
    mean, std = (0.49, 0.48, 0.45)[: case.shape[0]], (0.25, 0.2, 0.22)[: case.shape[0]]
    inside, outside, images = case.new(mean=mean, std=std), case.shared(), case.images()
    assert list(inside.state_dict()) == list(outside.state_dict())
    normalised = torch.stack([(images[:, c] - mean[c]) / std[c] for c in range(case.shape[0])], 1)
    with torch.no_grad():
        torch.testing.assert_close(inside(images), outside(normalised))
        assert not torch.allclose(inside(images), outside(images))


def test_incomplete_normalisation_is_refused():
    with pytest.raises(ValueError, match="give both or neither"):
        DigitsNet(10, mean=(0.5,))
    with pytest.raises(ValueError, match="std has 2 values, the input has 3 channels"):
        DigitsNet(10, (3, 8, 8), mean=(0.5,), std=(0.5, 0.5))


class Flat(Backbone):
    """A network without a map."""

    def __init__(self) -> None:
        super().__init__(5, 3, (1, 2, 2))
        self.layer, self.fc = nn.Linear(4, 5), nn.Linear(5, 3)

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def stem(self, images: Tensor) -> Tensor:
        return self.layer(images.flatten(1))


def test_a_network_without_a_map():
    network, images = Flat(), torch.rand(2, 1, 2, 2)
    maps, features = network.forward_intermediates(images, ["penultimate"])
    assert torch.equal(features["penultimate"], maps)
    assert network.taps == ("penultimate", "std", "max")  # the stem is the whole network
    torch.testing.assert_close(network(images), maps @ network.fc.weight.T + network.fc.bias)
    for tap in ("std", "max"):
        with pytest.raises(ValueError, match=f"tap {tap} needs a last map with positions, that of Flat has none"):
            network.forward_intermediates(images, [tap])


def test_a_single_position_has_no_std():
    with pytest.raises(ValueError, match="tap std needs"):
        ResNet(18, 10, (3, 8, 8)).forward_intermediates(torch.rand(2, 3, 8, 8), ["std"])


def test_an_unknown_stem_lists_the_valid_ones():
    with pytest.raises(ValueError, match="stems cifar, pooled, imagenet, not tiny"):
        ResNet(18, 10, stem="tiny")


@pytest.mark.parametrize(("network", "valid"), [(ResNet, "18, 34, 50"), (ResNetOptionA, "20, 32, 44, 56")])
def test_an_unknown_depth_lists_the_valid_ones(network, valid):
    with pytest.raises(ValueError, match=f"{valid}, not 19"):
        network(19, 10)


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("depth", "classes", "parameters", "entries"),
    [
        (18, 10, 11_173_962, 122),
        (18, 100, 11_220_132, 122),
        (34, 10, 21_282_122, 218),
        (34, 100, 21_328_292, 218),
        (50, 10, 23_520_842, 320),
    ],
)
def test_size_of_resnet(depth, classes, parameters, entries):
    network = ResNet(depth, classes)
    assert count(network) == parameters
    assert len(network.state_dict()) == entries


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85)])  # He et al., table 6
def test_size_of_resnet_option_a(depth, millions):
    blocks, expected, before = (depth - 2) // 6, 9 * 3 * 16 + 2 * 16, 16
    for width in (16, 32, 64):
        expected += 9 * before * width + (2 * blocks - 1) * 9 * width * width + 2 * blocks * 2 * width
        before = width
    expected += 64 * 10 + 10
    network = ResNetOptionA(depth, 10)
    assert count(network) == expected
    assert round(expected / 1e6, 2) == millions
    assert sum(not name.endswith("num_batches_tracked") for name in network.state_dict()) == 5 * (depth - 1) + 2


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["resnet18", "resnet34", "resnet50", "resnet18-pooled-64", "resnet18-imagenet-96"])
def test_resnet_equals_torchvision_with_another_stem(name, training):
    network, images = CASES[name].new().train(training), CASES[name].images()
    reference = getattr(torchvision.models, name.partition("-")[0])(num_classes=CLASSES)
    if "imagenet" not in name:
        reference.conv1 = nn.Conv2d(3, 64, kernel_size=3, stride=1, padding=1, bias=False)
        reference.maxpool = nn.MaxPool2d(2) if "pooled" in name else nn.Identity()
    reference.load_state_dict(network.state_dict(), strict=True)
    reference.train(training)
    maps = {}
    reference.layer4.register_forward_hook(lambda module, args, output: maps.update(last=output))
    with torch.no_grad():
        logits = reference(images)
        features = network.forward_features(images)
    assert torch.equal(features, maps["last"])
    torch.testing.assert_close(network.forward_head(features), logits)


@pytest.mark.parametrize(("height", "width"), [(6, 4), (5, 7)])
def test_shortcut_of_option_a(height, width):
    maps = torch.rand(2, 4, height, width)
    expected = torch.zeros(2, 8, (height + 1) // 2, (width + 1) // 2)
    for row in range(0, height, 2):
        for column in range(0, width, 2):
            for channel in range(4):
                expected[:, 2 + channel, row // 2, column // 2] = maps[:, channel, row, column]
    assert torch.equal(option_a(maps, 8, 2), expected)
    assert torch.equal(option_a(maps, 4, 1), maps)


def test_option_a_equals_a_network_written_by_name():
    case = CASES["option-a-20"]
    network, images = case.shared(), case.images()
    state = network.state_dict()

    def normed(maps, convolution, norm, stride=1):
        maps = F.conv2d(maps, state[f"{convolution}.weight"], stride=stride, padding=1)
        mean, variance, weight, bias = (
            state[f"{norm}.{name}"].view(-1, 1, 1) for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (maps - mean) / (variance + 1e-5).sqrt() * weight + bias

    maps = normed(images, "conv1", "bn1").clamp(min=0)
    for layer in (1, 2, 3):
        for block in range(3):
            name, stride = f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1
            hidden = normed(maps, f"{name}.conv1", f"{name}.bn1", stride).clamp(min=0)
            hidden = normed(hidden, f"{name}.conv2", f"{name}.bn2")
            if stride == 2:
                nothing = torch.zeros_like(hidden[:, : maps.shape[1] // 2])
                maps = torch.cat([nothing, maps[..., ::2, ::2], nothing], 1)
            maps = (hidden + maps).clamp(min=0)
    logits = maps.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]
    with torch.no_grad():
        torch.testing.assert_close(network(images), logits, rtol=1e-4, atol=1e-4)


def test_digits_net_learns_digits():
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16, torch.tensor(labels)
    torch.manual_seed(0)
    network, (train, test) = DigitsNet(10), torch.randperm(len(labels)).split([1300, 497])
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(3):
        for rows in train[torch.randperm(len(train))].split(65):
            optimizer.zero_grad()
            F.cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
    network.eval()
    assert (network(images[test]).argmax(1) == labels[test]).float().mean() > 0.95


@pytest.mark.parametrize(
    ("network", "fans"),
    [
        (lambda: ResNet(18, 10), {"conv1": 9 * 64, "layer2.0.conv1": 9 * 128}),  # fan out
        (lambda: ResNet(18, 10, stem="imagenet"), {"conv1": 49 * 64}),
        (lambda: ResNetOptionA(20, 10), {"conv1": 9 * 3, "layer3.1.conv2": 9 * 64, "linear": 64}),  # fan in
    ],
)
def test_weights_start_with_variance_two_over_fan(network, fans):
    torch.manual_seed(0)
    modules = dict(network().named_modules())
    for name, fan in fans.items():
        weight = modules[name].weight
        assert weight.std().item() == pytest.approx((2 / fan) ** 0.5, rel=4 / (2 * weight.numel()) ** 0.5)
