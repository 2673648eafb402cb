import sys

import pytest
import torch

from backbones.timm_model import TimmModel
from backbones.weights import origins, weights_sha256

SIZES = {  # name: image size, shape of the last map, or None where the classifier does not read its mean
    "resnet10t": (64, (512, 2, 2)),
    "test_byobnet": (64, (256, 2, 2)),
    "test_vit": (32, None),  # tokens
    "mobilenetv3_small_050": (64, None),  # a layer between pooling and classifier
    "test_convnext": (64, None),  # a norm there
    "swinv2_cr_tiny_ns_224": (64, (768, 2, 2)),
    "swin_tiny_patch4_window7_224": (56, None),  # channels last
}


@pytest.fixture(params=SIZES)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def timm():
    return pytest.importorskip("timm")


def build(name, **options):
    torch.manual_seed(0)
    size, _ = SIZES[name]
    return TimmModel(name, 7, (3, size, size), **options)


def images_for(name):
    size, _ = SIZES[name]
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(1))


def test_features_and_logits_are_those_of_timm_bit_for_bit(name, timm):
    network, images = build(name).eval(), images_for(name)
    fixed = {"img_size": SIZES[name][0]} if "vit" in name or "swin" in name else {}
    reference = timm.create_model(name, num_classes=7, **fixed).eval()
    reference.load_state_dict(network.network.state_dict(), strict=True)
    read = []
    reference.get_classifier().register_forward_pre_hook(lambda module, args: read.append(args[0]))
    with torch.no_grad():
        logits = reference(images)
        maps, features = network.forward_intermediates(images, ["penultimate"])
        assert torch.equal(network(images), logits)
        assert torch.equal(features["penultimate"], read[0])
    assert network.head.weight.shape == (7, network.num_features) == (7, read[0].shape[1])
    assert maps.shape[1:] == (SIZES[name][1] or (network.num_features,))


def test_an_empty_batch_passes_through(name):
    network = build(name)
    features = network.forward_features(images_for(name)[:0])
    assert features.shape == (0, *(SIZES[name][1] or (network.num_features,)))
    network.forward_head(features).sum().backward()
    assert not any(parameter.grad.any() for parameter in network.parameters() if parameter.grad is not None)


def test_only_a_map_has_spatial_statistics():
    network, images = build("resnet10t").eval(), images_for("resnet10t")
    with torch.no_grad():
        maps, features = network.forward_intermediates(images, ["std", "max"])
    torch.testing.assert_close(features["std"], maps.flatten(2).std(2))
    assert torch.equal(features["max"], maps.flatten(2).max(2).values)
    assert network.taps == ("penultimate", "std", "max")
    for name in ("test_vit", "test_convnext"):
        with pytest.raises(ValueError, match="tap std needs a last map with positions, that of TimmModel has none"):
            build(name).forward_intermediates(images_for(name), ["std"])


def test_it_is_built_ready_for_training():
    network = build("resnet10t")
    assert all(module.training for module in network.modules())
    statistics = [value for key, value in network.state_dict().items() if key.endswith("num_batches_tracked")]
    assert not any(statistics)


def test_grey_images_and_weights_from_a_file(tmp_path):
    options = {"num_classes": 3, "input_shape": (1, 64, 48)}
    network = TimmModel("test_byobnet", **options).eval()
    torch.save(network.state_dict(), tmp_path / "network.pt")
    again = TimmModel("test_byobnet", **options, weights=str(tmp_path / "network.pt")).eval()
    images = torch.rand(2, 1, 64, 48)
    with torch.no_grad():
        assert torch.equal(again(images), network(images))


def test_two_sources_of_weights_are_refused():
    with pytest.raises(ValueError, match="Give one of the two"):
        TimmModel("resnet10t", 7, pretrained=True, weights="network.pt")


@pytest.mark.parametrize(
    ("name", "hint"), [("resnet10", "did you mean .*resnet10t"), ("a-b-c", r"timm.list_models\(\) lists them")]
)
def test_an_unknown_name_meets_its_neighbours(name, hint):
    with pytest.raises(ValueError, match=f"has no model '{name}'; {hint}"):
        TimmModel(name, 7)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("deit_tiny_distilled_patch16_224", "tuple"),  # two classifiers
        ("efficientvit_m0", "Linear"),  # behind a batch-norm, which does nothing yet
    ],
)
def test_a_classifier_that_is_no_single_linear_layer_is_refused(name, kind):
    with pytest.raises(ValueError, match=rf"timm's {name} does not end with .* layer \({kind}\)"):
        TimmModel(name, 7, (3, 224, 224))


def test_without_timm_it_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ModuleNotFoundError, match="pip install timm"):
        TimmModel("resnet10t", 7)


def test_pretrained_weights_are_recorded(monkeypatch, timm):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained, **options: create(name, False, **options))
    network = TimmModel("resnet10t", 7, (3, 64, 64), pretrained=True)
    assert origins(network)[""] == {"source": "timm", "file": "resnet10t", "sha256": weights_sha256(network.network)}
    assert origins(TimmModel("resnet10t", 7, (3, 64, 64))) == {}


def test_a_file_of_timms_own_fits(tmp_path, timm):
    theirs = timm.create_model("resnet10t", num_classes=7)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pt")
    network = TimmModel("resnet10t", 7, (3, 64, 64), weights=str(tmp_path / "theirs.pt")).eval()
    images = images_for("resnet10t")
    with torch.no_grad():
        assert torch.equal(network(images), theirs.eval()(images))
