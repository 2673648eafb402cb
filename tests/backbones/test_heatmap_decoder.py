"""The decoder against functions of the published names: shapes, counts, values, forwarded maps and weights."""

import pytest
import torch
from heatmap_toy import decode, liven, published
from torch import nn

from backbones.heatmap_decoder import HeatmapDecoder

RESNET, WRN, TINY = (512, 256, 128, 64), (256, 128, 64, 32), (2048, 1024, 512, 256, 128)
SETTINGS = {  # D, K, C0, blocks; parameters, entries, side
    "cifar10_resnet18": (512, 10, 100, RESNET, 3_626_124, 27, 32),
    "cifar100_resnet18": (512, 100, 512, RESNET, 7_262_784, 27, 32),
    "cifar10_wrn40_2": (128, 10, 128, WRN, 1_231_264, 27, 32),
    "cifar100_wrn40_2": (128, 100, 128, WRN, 1_242_784, 27, 32),
    "tinyimagenet_resnet50": (2048, 200, 512, TINY, 62_501_504, 33, 64),
}
SMALL = (24, 5, 10, (16, 8, 12))


def small(weights=None):
    return liven(HeatmapDecoder(*SMALL)) if weights is None else HeatmapDecoder(*SMALL, weights=weights)


def inputs(number=6, features=SMALL[0], classes=SMALL[1]):
    generator = torch.Generator().manual_seed(3)
    return torch.rand(number, features, generator=generator), torch.randint(classes, (number,), generator=generator)


@pytest.mark.parametrize("name", SETTINGS)
def test_a_published_decoder_has_its_shapes_and_counts(name):
    features, classes, hidden, widths, parameters, entries, side = SETTINGS[name]
    with torch.device("meta"):
        decoder = HeatmapDecoder(features, classes, hidden, widths)
        heatmaps = decoder(torch.empty(2, features), torch.zeros(2, dtype=torch.int64))
        sizes, maps = [], decoder.linear(torch.empty(2, features + classes))[:, :, None, None]
        for block in decoder.blocks:
            maps = block(maps)
            sizes.append(tuple(maps.shape[1:]))
    assert heatmaps.shape == (2, 3, side, side)
    assert decoder.shape == (3, side, side)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == parameters
    assert len(decoder.state_dict()) == entries
    assert sizes == [(width, 4 * 2**i, 4 * 2**i) for i, width in enumerate(widths)]


def test_the_last_layer_has_neither_bias_nor_batch_norm_and_nothing_follows_the_linear_map():
    decoder = small()
    assert [name for name, _ in decoder.last.named_parameters()] == ["weight"]
    assert decoder.last.weight.shape == (12, 3, 1, 1)
    assert decoder.linear.bias.shape == (10,)
    assert all(block[0].bias is None for block in decoder.blocks)
    assert sum(isinstance(module, nn.BatchNorm2d) for module in decoder.modules()) == len(decoder.blocks)
    assert sum(isinstance(module, nn.ReLU) for module in decoder.modules()) == len(decoder.blocks)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [SMALL, (24, 3, 7, (9,)), (8, 10, 6, (16, 8, 12, 4, 4))])
@pytest.mark.parametrize("channels", [1, 3])
def test_heatmaps_equal_those_of_the_reference(shape, training, channels):
    decoder = liven(HeatmapDecoder(*shape, channels=channels)).double().train(training)
    features, classes = inputs(6, *shape[:2])
    features = 3 * features.double() - 1
    state = {name: value.clone() for name, value in published(decoder).items()}
    heatmaps = decoder(features, classes)
    assert heatmaps.shape == (6, *decoder.shape)
    torch.testing.assert_close(heatmaps, decode(state, features, classes, shape[1], training))
    assert heatmaps.std() > 0.1
    assert ((heatmaps > -1) & (heatmaps < 1)).all()


@pytest.mark.parametrize("name", ["cifar10_resnet18", "cifar10_wrn40_2"])
def test_a_fresh_decoder_says_nearly_nothing(name):
    features, classes, hidden, widths, *_ = SETTINGS[name]
    fresh = HeatmapDecoder(features, classes, hidden, widths).eval()(*inputs(4, features, classes))
    assert 0 < fresh.abs().max() < 0.01


def test_each_class_is_drawn_in_its_own_way_and_each_row_by_itself():
    decoder, (features, _) = small().eval(), inputs()
    drawn = decoder(features[:1].expand(5, -1), torch.arange(5))
    assert (torch.pdist(drawn.flatten(1)) > 0.1).all()
    together = decoder(features, torch.tensor([4, 3, 2, 1, 0, 0]))
    for row, label in enumerate([4, 3, 2, 1, 0, 0]):
        torch.testing.assert_close(decoder(features[row : row + 1], torch.tensor([label]))[0], together[row])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_classes_take_the_type_of_the_features(dtype):
    features, classes = inputs()
    assert small().to(dtype)(features.to(dtype), classes).dtype == dtype


def test_no_images_have_no_heatmaps():
    features, classes = inputs(0)
    assert small().eval()(features, classes).shape == (0, 3, 16, 16)
    assert small().eval()(features, classes, [torch.ones(0, 8, 8, 8)]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize("blocks", [(1,), (2,), (3,), (2, 1), (3, 1, 2)])
def test_maps_are_added_behind_the_block_of_their_shape(blocks):
    decoder, (features, classes) = small().eval(), inputs()
    sizes = {1: (16, 4, 4), 2: (8, 8, 8), 3: (12, 16, 16)}
    maps = {block: torch.randn(6, *sizes[block]) for block in blocks}
    found = decoder(features, classes, list(maps.values()))
    torch.testing.assert_close(found, decode(published(decoder), features, classes, 5, added=maps))
    for block in blocks:
        less = {other: map_ for other, map_ in maps.items() if other != block}
        assert (found - decode(published(decoder), features, classes, 5, added=less)).abs().max() > 0.05


@pytest.mark.parametrize("shape", [(16, 8, 8), (8, 4, 4), (12, 32, 32), (12, 16, 8)])
def test_maps_of_another_shape_are_refused(shape):
    message = rf"maps of shape \({shape[0]}, {shape[1]}, {shape[2]}\) .* yield \(16, 4, 4\), \(8, 8, 8\), "
    with pytest.raises(ValueError, match=message):
        small()(*inputs(), [torch.zeros(6, 8, 8, 8), torch.zeros(6, *shape)])


@pytest.mark.parametrize("options", [{"widths": ()}, {"widths": (8, 0)}, {"hidden": 0}, {"num_classes": 0}])
def test_a_decoder_without_blocks_or_channels_is_refused(options):
    given = {"num_features": 24, "num_classes": 5, "hidden": 10, "widths": (16, 8)} | options
    with pytest.raises(ValueError, match="at least one block, and at least 1 feature, class and channel"):
        HeatmapDecoder(**given)


@pytest.mark.parametrize("saved", ["published", "ours"])
def test_published_weights_draw_what_they_drew(saved, tmp_path):
    theirs, fresh = small(), published(HeatmapDecoder(*SMALL))
    path = tmp_path / "model.pt"
    epochs = {epoch: {"generator": published(theirs) if epoch == 149 else fresh} for epoch in range(9, 150, 10)}
    torch.save({"min": 0.0, "max": 2.5} | epochs if saved == "published" else theirs.state_dict(), path)
    loaded, (features, classes) = small(weights=str(path)).eval(), inputs()
    torch.testing.assert_close(loaded(features, classes), decode(published(theirs), features, classes, 5))
    with pytest.raises(ValueError, match=r"does not fit HeatmapDecoder, nothing was loaded:\n  mis-shaped: linear.wei"):
        HeatmapDecoder(25, *SMALL[1:], weights=str(path))
