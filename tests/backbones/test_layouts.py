"""Published layouts enter our networks by name and shape, and compute what their authors' networks compute."""

from functools import partial
from pathlib import Path

import pytest
import torch
import torchvision
from published_files import (
    Shapes,
    affine_map,
    bn,
    bolts_autoencoder,
    densenet,
    heatmap_wide_resnet,
    latent,
    masked,
    meta,
    mnist_autoencoder,
    mnist_conv,
    option_a,
    prefixed,
    resnet,
    trainable,
    vgg,
    wide_resnet,
)
from torch import Tensor

from backbones.autoencoders import MNISTAutoencoder, ResNetAutoencoder
from backbones.densenet import DenseNet
from backbones.heatmap_decoder import HeatmapDecoder
from backbones.layouts import fill_affine, heatmap_decoder, latent_space, residual_energy, translate
from backbones.mnist_conv import MNISTConv
from backbones.resnet import ResNet
from backbones.resnet_option_a import ResNetOptionA
from backbones.vgg import VGG
from backbones.weights import adapt, compare, unwrap
from backbones.wide_resnet import HeatmapWideResNet, WideResNet

R18, R34, R50 = (2, 2, 2, 2), (3, 4, 6, 3), (3, 4, 6, 3)
FC10 = affine_map("fc", 10, 512)
UM_DENSENET, UM_WRN = densenet(10, affine=False), wide_resnet(6, 4, affine=False) | affine_map("fc", 10, 256)
WRN_40_2 = wide_resnet(6, 2)
DENSENET = partial(DenseNet, 10)
HEAD = {"fc.weight", "fc.bias"}
SPLIT = "net_state_dict + cls_state_dict"

# name: (the file's entries, how many, trainable scalars, our network, its container)
PUBLISHED = {
    "heat-10": (resnet(R34, 2, "downsample") | FC10, 218, 21_282_122, lambda: ResNet(34, 10), "model_state"),
    "heat-100": (
        resnet(R34, 2, "downsample") | affine_map("fc", 100, 512),
        218,
        21_328_292,
        lambda: ResNet(34, 100),
        "model_state",
    ),
    "um-densenet": (prefixed("module.", UM_DENSENET), 398, 745_174, DENSENET, "state_dict"),
    "um-densenet-free": (UM_DENSENET, 398, 745_174, lambda: DenseNet(10, affine=False), "state_dict"),
    "um-densenet-100": (densenet(100, affine=False), 398, 776_044, lambda: DenseNet(100), None),
    "um-densenet-affine": (densenet(10), 596, 769_162, DENSENET, "state_dict"),
    "um-wrn": (prefixed("module.", UM_WRN), 153, 8_938_426, lambda: WideResNet(40, 4, 10), "state_dict"),
    "um-wrn-free": (UM_WRN, 153, 8_938_426, lambda: WideResNet(40, 4, 10, affine=False), None),
    "um-wrn-affine": (
        wide_resnet(6, 4) | affine_map("fc", 10, 256),
        227,
        8_949_210,
        lambda: WideResNet(40, 4, 10),
        None,
    ),
    "heatmap-resnet18": (
        resnet(R18, 2, "shortcut") | affine_map("linear", 10, 512),
        122,
        11_168_832 + 5_130,
        lambda: ResNet(18, 10),
        SPLIT,
    ),
    "heatmap-resnet50": (
        resnet(R50, 3, "shortcut") | affine_map("linear", 200, 2048),
        320,
        23_500_352 + 409_800,
        lambda: ResNet(50, 200, (3, 64, 64), "pooled"),
        SPLIT,
    ),
    "heatmap-wrn": (
        heatmap_wide_resnet() | affine_map("linear", 10, 128),
        267,
        2_245_184 + 1_290,
        lambda: HeatmapWideResNet(10),
        SPLIT,
    ),
    "energy-wrn-10": (WRN_40_2 | affine_map("fc", 10, 128), 227, 2_243_546, lambda: WideResNet(40, 2, 10), None),
    "energy-wrn-100": (WRN_40_2 | affine_map("fc", 100, 128), 227, 2_255_156, lambda: WideResNet(40, 2, 100), None),
    "energy-wrn-old": (
        wide_resnet(6, 2, counter=False) | affine_map("fc", 10, 128),
        190,
        2_243_546,
        lambda: WideResNet(40, 2, 10),
        None,
    ),
    "akamaster-20": (option_a(3), 97, 269_722, lambda: ResNetOptionA(20, 10), "state_dict"),
    "akamaster-32": (option_a(5), 157, 464_154, lambda: ResNetOptionA(32, 10), "state_dict"),
    "akamaster-44": (option_a(7), 217, 658_586, lambda: ResNetOptionA(44, 10), "state_dict"),
    "akamaster-56": (option_a(9), 277, 853_018, lambda: ResNetOptionA(56, 10), "state_dict"),
    "openood-10": (resnet(R18, 2, "shortcut") | FC10, 122, 11_173_962, lambda: ResNet(18, 10), None),
    "openood-100": (
        resnet(R18, 2, "shortcut") | affine_map("fc", 100, 512),
        122,
        11_220_132,
        lambda: ResNet(18, 100),
        None,
    ),
    "ae-18": (bolts_autoencoder(), 239, 19_925_760, lambda: ResNetAutoencoder(18), "lightning"),
    "ae-mnist": (mnist_autoencoder(), 32, 1_536_033, MNISTAutoencoder, "lightning"),
}
# name: (encoder's entries, F, D, encoder entries, encoder parameters, all entries, our network)
LATENT = {
    "densenet-10": (densenet(10), 342, 32, 596, 769_162, 840, DENSENET),
    "densenet-100": (densenet(100), 342, 64, 596, 800_032, 840, lambda: DenseNet(100)),
    "resnet": (resnet(R18, 2, "downsample"), 512, 32, 120, 11_168_832, 364, lambda: ResNet(18, 10)),
    "vgg": (vgg(), 1024, 32, 60, 8_569_600, 304, lambda: VGG(10)),
    "wresnet": (wide_resnet(4, 10), 640, 32, 153, 36_472_784, 397, lambda: WideResNet(28, 10, 10)),
    "mnist": (mnist_conv(), 500, 32, 12, 811_900, 256, lambda: MNISTConv(10)),
}


def own(build) -> dict[str, Tensor]:
    with torch.device("meta"):
        return build().state_dict()


def contain(state: dict[str, Tensor], container: str | None) -> dict:
    if container is None:
        return state
    if container == SPLIT:
        parts = {part: {} for part in ("net_state_dict", "cls_state_dict")}
        for name, value in state.items():
            parts["cls_state_dict" if name.startswith("linear") else "net_state_dict"][name] = value
        return parts
    if container == "lightning":
        return {"state_dict": state, "pytorch-lightning_version": "1.1.2", "epoch": 3}
    return {container: state, "epoch": 3, "optimizer": {"lr": 0.1}}


@pytest.mark.parametrize(("shapes", "entries", "parameters", "build", "container"), PUBLISHED.values(), ids=PUBLISHED)
def test_a_published_file_fits_our_network(shapes, entries, parameters, build, container):
    assert (len(shapes), trainable(shapes)) == (entries, parameters)
    network = own(build)
    state = unwrap(contain(meta(shapes), container), Path("net.pt"))
    assert compare(adapt(state, network), network) == []


@pytest.mark.parametrize(
    ("encoder", "width", "dim", "entries", "parameters", "total", "build"), LATENT.values(), ids=LATENT
)
def test_the_encoder_of_a_latent_space_fits_but_for_the_classifier(
    encoder, width, dim, entries, parameters, total, build
):
    file = latent(encoder, width, dim)
    assert (len(encoder), trainable(encoder), len(file)) == (entries, parameters, total)
    network = own(build)
    state = adapt(unwrap(contain(meta(file), "lightning"), Path("net.ckpt")), network)
    # a classifier that is in the file was never trained
    assert compare(state, network) == [f"missing: {name}" for name in network if name in HEAD]


@pytest.mark.parametrize("width", [342, 500])
def test_a_latent_space_keeps_encoder_and_heads(width):
    encoder = mnist_conv() if width == 500 else densenet(10)
    heads = {f"{head}.{entry}" for head in ("fc_mu", "fc_var") for entry in ("weight", "bias")}
    kept = latent_space(meta(latent(encoder, width, 32)))
    assert kept.keys() == heads | {f"encoder.{name}" for name in encoder}
    assert kept["fc_mu.weight"].shape == (32, width)
    with pytest.raises(ValueError, match=r"only encoder\., .* belong here, not classifier\.weight$"):
        latent_space(meta(latent(encoder, width, 32) | {"classifier.weight": (1,)}))


def test_our_own_checkpoint_of_a_latent_space_is_told_apart():
    state = {"backbone.fc.bias": torch.ones(1), "fc_mu.weight": torch.zeros(1)}
    assert list(unwrap(contain(state, "lightning"), Path("last.ckpt"))) == ["backbone.fc.bias"]


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_torchvision_itself(depth):
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"resnet{depth}")().state_dict()
    ours = own(lambda: ResNet(depth, 1000, (3, 224, 224), "imagenet"))
    assert adapt(theirs, ours).keys() == theirs.keys()
    assert compare(theirs, ours) == []


@pytest.mark.parametrize(
    ("shapes", "entries", "stored", "build"),
    [
        (masked(UM_DENSENET), 498, 1_490_338, lambda: DenseNet(10, affine=False)),
        (masked(densenet(100, affine=False)), 498, 1_551_988, lambda: DenseNet(100, affine=False)),
        (masked(UM_WRN), 194, 17_876_842, lambda: WideResNet(40, 4, 10, affine=False)),
    ],
)
def test_the_scores_of_a_mask_stay_beside_their_weights(shapes, entries, stored, build):
    assert (len(shapes), trainable(shapes)) == (entries, stored)
    network = own(build)
    state = adapt(meta(prefixed("module.", shapes)), network)
    convolutions = [name for name, value in network.items() if name.endswith("weight") and value.ndim > 1]
    scores = {name.removesuffix("weight") + "scores" for name in convolutions}
    assert state.keys() == network.keys() | scores
    assert all(state[name].shape == state[name.removesuffix("scores") + "weight"].shape for name in scores)
    assert {line.partition(": ")[2] for line in compare(state, network)} == scores  # a plain network refuses them


@pytest.mark.parametrize("change", ["classes", "missing", "another network"])
def test_what_does_not_fit_is_listed(change):
    shapes = densenet(100 if change == "classes" else 10)
    if change == "missing":
        del shapes["trans1.conv1.weight"]
    network = own(lambda: WideResNet(40, 2, 10) if change == "another network" else DenseNet(10))
    misfits = compare(adapt(meta(shapes), network), network)
    if change == "classes":
        assert misfits[0] == "mis-shaped: fc.weight is (100, 342) in the file, (10, 342) in the network"
    elif change == "missing":
        assert misfits == ["missing: layer1.transition.conv1.weight"]
    else:
        assert "missing: layer1.0.shortcut.weight" in misfits
        assert "unexpected: trans1.conv1.weight" in misfits


def test_a_scale_does_not_enter_a_network_without():
    network = own(lambda: DenseNet(10, affine=False))
    misfits = compare(adapt(meta(densenet(10)), network), network)
    assert len(misfits) == 596 - 398
    assert all(line.startswith("unexpected: ") and "bn" in line for line in misfits)


def test_one_scale_among_the_batch_norms_and_none_is_filled_in():
    state = meta(UM_DENSENET | {"block1.layer.0.bn1.weight": (24,)})
    assert fill_affine(state, state) == state
    network = own(DENSENET)
    assert "missing: bn1.weight" in compare(adapt(state, network), network)


def test_names_of_the_network_itself_stay():
    state = {"block1.layer.0.weight": torch.ones(1), "layer1.0.weight": torch.zeros(1), "linear.bias": torch.ones(1)}
    assert translate(state, list(state)) == state
    assert list(translate(state, ["block1.layer.0.weight", "fc.bias"])) == [*list(state)[:2], "fc.bias"]
    network = own(lambda: MNISTConv(10))  # has a `linear` beside its `fc`, which this file lacks
    file = {name: value for name, value in network.items() if name not in HEAD}
    assert compare(adapt(file, network), network) == [f"missing: {name}" for name in network if name in HEAD]


def test_two_modules_never_become_one():
    state = {"linear.weight": torch.zeros(1), "fc.weight": torch.ones(1)}
    assert translate(state, ["fc.weight"]) == state
    double = {"layer1.0.shortcut.0.weight": torch.zeros(1), "layer1.0.convShortcut.weight": torch.ones(1)}
    assert list(translate(double, ["layer1.0.shortcut.weight"])) == [
        "layer1.0.shortcut.weight",
        "layer1.0.convShortcut.weight",
    ]


def residual(layers: list[tuple[str, int, int]]) -> Shapes:
    return {k: v for name, to, of in layers for k, v in affine_map(f"mlp.{name}", to, of).items()}


def narrowing(blocks: int) -> Shapes:
    layers, width = [("0", 1024, 2048)], 1024
    for block in range(2, blocks + 2):
        layers += [(f"{block}.0", width, width), (f"{block}.2", width, width), (f"{block}.4", width // 2, width)]
        width //= 2
    return residual([*layers, (str(blocks + 2), 1, width)])


CONSTANT = residual([("0", 1024, 512), *((str(i), 1024, 1024) for i in (2, 4, 6, 8)), ("10", 1, 1024)])
CLASSIFIER = affine_map("base_dist.classifier_head", 10, 512)


@pytest.mark.parametrize(
    ("shapes", "entries", "kept", "parameters"),
    [
        (CONSTANT, 12, 12, 1_575_937 + 3 * (1024 * 1024 + 1024)),  # one layer is stored four times
        (CONSTANT | CLASSIFIER, 14, 12, 1_575_937 + 3 * (1024 * 1024 + 1024)),
        (narrowing(4), 28, 28, 5_584_641),
        (narrowing(6), 40, 40, 5_597_633),
    ],
)
def test_a_residual_energy_leaves_its_classifier_behind(shapes, entries, kept, parameters):
    assert len(shapes) == entries
    state = {name: torch.zeros(shape) for name, shape in shapes.items()}
    result = residual_energy(state)
    assert len(result) == kept
    assert all(result[name] is state[name] for name in result)
    assert trainable({name: tuple(value.shape) for name, value in result.items()}) == parameters


def test_hidden_layers_of_a_residual_energy_must_be_one():
    state = {name: torch.zeros(shape) for name, shape in CONSTANT.items()}
    with pytest.raises(ValueError, match=r"^mlp\.6\.bias should repeat mlp\.2\.bias"):
        residual_energy(state | {"mlp.6.bias": torch.ones(1024)})
    del state["mlp.8.weight"]
    with pytest.raises(ValueError, match=r"^mlp\.8\.weight should repeat"):
        residual_energy(state)
    with pytest.raises(ValueError, match=r"belong here, not conv1\.weight$"):
        residual_energy({"conv1.weight": torch.zeros(1)})


@pytest.mark.parametrize(
    ("inputs", "hidden", "widths", "entries", "parameters"),
    [
        (522, 100, (512, 256, 128, 64), 27, 3_626_124),
        (612, 512, (512, 256, 128, 64), 27, 7_262_784),
        (138, 128, (256, 128, 64, 32), 27, 1_231_264),
        (228, 128, (256, 128, 64, 32), 27, 1_242_784),
        (2248, 512, (2048, 1024, 512, 256, 128), 33, 62_501_504),
    ],
)
def test_of_a_heatmap_checkpoint_the_last_decoder_is_taken(inputs, hidden, widths, entries, parameters):
    shapes, last = affine_map("fc1", hidden, inputs), hidden
    for block, width in enumerate(widths, start=1):
        shapes |= {f"conv_block{block}.0.weight": (last, width, 4, 4)} | bn(f"conv_block{block}.1", width)
        last = width
    shapes[f"conv_block{len(widths) + 1}.0.weight"] = (last, 3, 1, 1)
    assert (len(shapes), trainable(shapes)) == (entries, parameters)
    epochs = {epoch: {"generator": meta(shapes)} for epoch in range(9, 150, 10)}
    state = heatmap_decoder({"min": 0, "max": 2.5, **epochs})
    with torch.device("meta"):
        decoder = HeatmapDecoder(inputs - 10, 10, hidden, widths)
    assert {name: value.shape for name, value in decoder.state_dict().items()} == {
        name: value.shape for name, value in state.items()
    }
    assert list(map(id, state.values())) == list(map(id, epochs[149]["generator"].values()))
    with pytest.raises(ValueError, match=r"under 149; this one has epochs \[9, 19\]$"):
        heatmap_decoder({"min": 0, "max": 2.5, 9: epochs[9], 19: epochs[19]})
