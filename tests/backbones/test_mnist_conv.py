import pytest
import torch
from torch import nn

from backbones.mnist_conv import MNISTConv

ENDS = {"stem": 1, "layer1": 2, "layer2": 4, "layer3": 6, "penultimate": 14}  # index of the last module of each tap


def one_sequence():
    torch.manual_seed(0)
    modules, before = [], 1
    for follows in ("", "pool", "", "pool", "pool"):
        modules += [nn.Conv2d(before, 100, 3, padding=1), nn.ReLU()]
        modules += [nn.MaxPool2d(2)] * bool(follows)
        before = 100
    return nn.Sequential(*modules, nn.Flatten(), nn.Linear(900, 500), nn.Linear(500, 7))


def test_taps_equal_those_of_one_sequence():
    reference, network = one_sequence(), MNISTConv(num_classes=7)
    network.load_state_dict(dict(zip(network.state_dict(), reference.state_dict().values(), strict=True)))
    images = torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps, features = network.forward_intermediates(images, ENDS)
        for tap, end in ENDS.items():
            output = reference[: end + 1](images)
            expected = output.mean((2, 3)) if output.ndim == 4 else output
            torch.testing.assert_close(features[tap], expected, msg=lambda text, tap=tap: f"{tap}: {text}")
        torch.testing.assert_close(network.forward_head(maps), reference(images))
    assert {tap: value.shape[1] for tap, value in features.items()} == {
        "stem": 100,
        "layer1": 100,
        "layer2": 100,
        "layer3": 100,
        "penultimate": 500,
    }
    assert (features["layer1"] < 0).any()
    assert (features["layer3"] >= 0).all()
    assert (maps < 0).any()  # no activation at the end


def test_size():
    network = MNISTConv(num_classes=7)
    assert sum(parameter.numel() for parameter in network.parameters()) == 811_900 + 500 * 7 + 7


def test_a_network_of_another_size():
    network = MNISTConv(num_classes=5, input_shape=(3, 16, 33))
    assert network(torch.zeros(2, 3, 16, 33)).shape == (2, 5)
    with pytest.raises(ValueError, match="40x7 is smaller than 8x8"):
        MNISTConv(num_classes=5, input_shape=(3, 40, 7))
