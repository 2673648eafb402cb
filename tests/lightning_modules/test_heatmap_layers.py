"""Maps of the network that are forwarded to the decoder, and networks that a decoder does not fit."""

from functools import partial

import pytest
import torch
from heatmap_toy import CLASSES, Planted, adam, decode, digits_net, fit, liven, make, published, scaled, small_decoder

from backbones.digits_net import DigitsNet
from backbones.heatmap_decoder import HeatmapDecoder
from backbones.resnet import ResNet
from backbones.wide_resnet import HeatmapWideResNet
from lightning_modules.heatmap import Heatmap

RESNET = (512, 256, 128, 64)
NETWORKS = {  # network; D, blocks; stage of each map -> the block behind which it is added, from the last stage on
    "resnet18": (partial(ResNet, 18), 512, RESNET, {"layer4": 1, "layer3": 2, "layer2": 3}),
    "pooled resnet18": (
        partial(ResNet, 18, input_shape=(3, 64, 64), stem="pooled"),
        512,
        (512, 256, 128, 64, 8),
        {"layer4": 1, "layer3": 2, "layer2": 3},
    ),
    "wrn10-2": (
        partial(HeatmapWideResNet, depth=10),
        128,
        (256, 128, 64, 32),
        {"layer3": 2, "layer2": 3, "layer1": 4},
    ),
}


def maps_of(network, images):
    """Run stage by stage, without what the network itself does to forward maps."""
    maps, values = network.conv1(images), {}
    if isinstance(network, ResNet):
        maps = network.bn1(maps).relu()
        maps = torch.nn.functional.max_pool2d(maps, 2) if network.input_shape[1] == 64 else maps
    for stage in ("layer1", "layer2", "layer3", "layer4"):
        if hasattr(network, stage):
            maps = values[stage] = getattr(network, stage)(maps)
    last = maps if isinstance(network, ResNet) else network.bn1(maps).relu()
    return last.mean((2, 3)), values


@pytest.mark.parametrize(
    ("name", "norm"), [*((name, "minmax") for name in NETWORKS), ("resnet18", "none"), ("wrn10-2", "none")]
)
@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@torch.no_grad()
def test_so_many_maps_of_the_last_stages_are_added_where_they_fit(name, layers, norm):
    build, features, widths, places = NETWORKS[name]
    network = build(num_classes=CLASSES).eval()
    module = make(network, liven(HeatmapDecoder(features, CLASSES, 9, widths)), fw_layers=layers, feature_norm=norm)
    module = scaled(module, -3.0, 5.0).eval()
    images = torch.randn(2, *network.input_shape)
    vector, maps = maps_of(network, images)
    logits = vector @ network.fc.weight.T + network.fc.bias
    scale = (lambda values: (values + 3) / 8) if norm == "minmax" else (lambda values: values)
    forwarded = list(places.items())[: layers - 1]
    added = {block: scale(maps[stage]) for stage, block in forwarded}
    expected = decode(published(module.decoder), scale(vector), logits.argmax(1), CLASSES, added=added)
    evidence = module(images)
    torch.testing.assert_close(evidence.maps, expected, rtol=1e-4, atol=1e-5)
    for block in added:
        less = {other: map_ for other, map_ in added.items() if other != block}
        without = decode(published(module.decoder), scale(vector), logits.argmax(1), CLASSES, added=less)
        assert (without - expected).abs().max() > 0.01


SETTINGS = {
    "cifar10_resnet18": (partial(ResNet, 18, 10), (512, 10, 100, RESNET)),
    "cifar100_resnet18": (partial(ResNet, 18, 100), (512, 100, 512, RESNET)),
    "cifar10_wrn40_2": (partial(HeatmapWideResNet, 10), (128, 10, 128, (256, 128, 64, 32))),
    "cifar100_wrn40_2": (partial(HeatmapWideResNet, 100), (128, 100, 128, (256, 128, 64, 32))),
    "tinyimagenet_resnet50": (
        partial(ResNet, 50, 200, (3, 64, 64), "pooled"),
        (2048, 200, 512, (2048, 1024, 512, 256, 128)),
    ),
}


@pytest.mark.parametrize("layers", [1, 2, 3, 4])
@pytest.mark.parametrize("name", SETTINGS)
def test_published_networks_forward_up_to_four_layers(name, layers):
    build, decoder = SETTINGS[name]
    with torch.device("meta"):
        network = build()
        module = Heatmap(network, HeatmapDecoder(*decoder), adam, feature_norm="none", fw_layers=layers)
        evidence = module(torch.empty(2, *network.input_shape))
    assert evidence.maps.shape == (2, *network.input_shape)
    assert evidence.scores["heatmap"].shape == (2,)


def digits_maps(network, images):
    maps = {"layer1": network.layer1(network.conv1(images))}
    maps["layer2"] = network.layer2(maps["layer1"])
    maps["layer3"] = network.layer3(maps["layer2"])
    return maps["layer3"].mean((2, 3)), maps


@pytest.mark.parametrize("layers", [2, 3, 4])
def test_forwarded_maps_are_scaled_by_the_extremes_of_all_layers(tmp_path, layers):
    module, data, _ = fit(tmp_path, make(digits_net(), small_decoder(widths=(64, 32)), fw_layers=layers))
    data.trainer = None
    images = data.on_after_batch_transfer(data.sets["train"][torch.arange(data.sizes["train"])], 0).images
    with torch.no_grad():
        vector, maps = digits_maps(module.backbone, images)
    values = [vector.max(), *(map_.max() for map_ in list(maps.values())[::-1][: layers - 1])]
    assert module.minmax.low == 0
    torch.testing.assert_close(module.minmax.high, max(values))
    assert module.minmax.high > vector.max()


def test_signed_maps_count_as_they_are():
    network = HeatmapWideResNet(CLASSES, depth=10).eval()
    module = make(network, HeatmapDecoder(128, CLASSES, 8, (256, 128, 64, 32)), fw_layers=3)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        vector, maps = maps_of(network, images)
        evidence = module.encode(images)
    everything = torch.cat([vector, maps["layer3"].flatten(1), maps["layer2"].flatten(1)], 1)
    (extremes,) = (values for name, values in evidence.features.items() if name != "penultimate")
    torch.testing.assert_close(extremes, torch.stack([everything.amin(1), everything.amax(1)], 1))
    assert everything.min() < 0
    assert all(values.ndim == 2 for values in evidence.features.values())


def test_training_forwards_the_maps_of_the_images_that_it_sees(tmp_path):
    module = make(digits_net(), liven(small_decoder(widths=(64, 32))), fw_layers=3)
    before = {name: value.clone() for name, value in published(module.decoder).items()}
    fit(tmp_path, module, Planted(batch_size=130, mean=[0.3], std=[0.25]))
    (batch,), (loss,) = module.batches, module.losses
    with torch.no_grad():
        vector, maps = digits_maps(module.backbone, batch.inputs[0])
        logits = vector @ module.backbone.fc.weight.T + module.backbone.fc.bias
        high = module.minmax.high
        added = {1: (maps["layer3"] + maps["layer2"]) / high}
        heatmaps = decode(before, vector / high, logits.argmax(1), CLASSES, training=True, added=added)
    images, targets = (part / 127.5 - 1 for part in (batch.images, batch.targets))
    expected = ((1 + 5 * targets.abs()) * (images + heatmaps - targets) ** 2).sum() / len(images)
    assert loss == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize("layers", [0, 5, -1])
def test_other_numbers_of_layers_are_refused(layers):
    with pytest.raises(ValueError, match=f"^fw_layers must be 1, 2, 3 or 4, got {layers}$"):
        make(digits_net(), fw_layers=layers)


def test_a_network_with_too_few_stages_is_refused():
    network = digits_net()
    network.stages = ("layer2", "layer3")
    with pytest.raises(ValueError, match=r"^DigitsNet has 2 stages, too few for fw_layers=4$"):
        make(network, fw_layers=4)
    make(network, fw_layers=3)


MISFITS = {
    "features": (small_decoder(features=63), r"num_features 63, not 64$"),
    "classes": (small_decoder(CLASSES - 1), r"num_classes 4, not 5$"),
    "channels": (small_decoder(channels=3), r"image shape \(3, 8, 8\), not \(1, 8, 8\)"),
    "all": (small_decoder(4, features=63), r"num_features 63, not 64; num_classes 4, not 5$"),
    "blocks": (small_decoder(widths=(8, 8, 8)), r"image shape \(1, 16, 16\), .*each further one doubles the side$"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_decoder_that_does_not_fit_the_network_is_refused(case):
    decoder, message = MISFITS[case]
    with pytest.raises(ValueError, match=f"^HeatmapDecoder does not fit DigitsNet, it has {message}"):
        make(DigitsNet(CLASSES), decoder)


def test_maps_that_no_block_yields_are_refused():
    module = scaled(make(digits_net(), small_decoder(widths=(16, 8)), fw_layers=2)).eval()
    with pytest.raises(ValueError, match=r"maps of shape \(64, 4, 4\) .* yield \(16, 4, 4\), \(8, 8, 8\)$"):
        module(torch.zeros(2, 1, 8, 8))
    statistics = module.backbone.layer1[1].running_mean.clone()
    module.train()
    with pytest.raises(ValueError, match=r"^maps of shape \(64, 4, 4\)"):  # before anything is trained or cached
        module.configure_model()
    assert torch.equal(module.backbone.layer1[1].running_mean, statistics)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_the_decoder_draws_in_the_precision_of_its_weights(dtype):
    module = scaled(make(digits_net(), small_decoder(widths=(64, 32)), fw_layers=2)).eval().to(dtype)
    evidence = module(torch.randn(3, 1, 8, 8, dtype=dtype))
    assert evidence.maps.dtype == torch.promote_types(dtype, torch.float32)
    assert evidence.scores["heatmap"].isfinite().all()


def test_a_decoder_whose_scale_is_not_known_is_not_validated():
    module = make(digits_net(), small_decoder(widths=(16, 8)))
    with pytest.raises(ValueError, match="the scale of the features is not known: train the decoder"):
        module.validation_step((torch.zeros(2, 1, 8, 8), torch.zeros(2), torch.arange(2)), 0)
