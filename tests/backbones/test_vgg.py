import pytest
import torch
from torch import nn

from backbones.vgg import VGG

ENDS = {"stem": 2, "layer1": 4, "layer2": 11, "layer3": 24, "penultimate": 31}  # index of the last module of each tap


def one_sequence():
    """The network without its classifier, module by module, with batch-norms unlike those of a fresh network."""
    torch.manual_seed(0)
    modules, before = [], 3
    for channels in (64, 128, "pool", 256, 256, "pool", 256, 256, 256, 256, "pool"):
        if channels == "pool":
            modules.append(nn.MaxPool2d(2))
            continue
        norm = nn.BatchNorm2d(channels)
        nn.init.normal_(norm.bias, std=0.2)
        nn.init.normal_(norm.running_mean, std=0.2)
        modules += [nn.Conv2d(before, channels, 3, padding=1), norm, nn.ReLU()]
        before = channels
    return nn.Sequential(
        *modules, nn.Flatten(), nn.Linear(4096, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 7)
    )


@pytest.mark.parametrize("training", [False, True])
def test_taps_equal_those_of_one_sequence(training):
    reference, network = one_sequence().train(training), VGG(num_classes=7).train(training)
    network.load_state_dict(dict(zip(network.state_dict(), reference.state_dict().values(), strict=True)))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        maps, features = network.forward_intermediates(images, ENDS)
        for tap, end in ENDS.items():
            output = reference[: end + 1](images)
            expected = output.mean((2, 3)) if output.ndim == 4 else output
            torch.testing.assert_close(features[tap], expected, msg=lambda text, tap=tap: f"{tap}: {text}")
        torch.testing.assert_close(network.forward_head(maps), reference(images))
    assert {tap: value.shape[1] for tap, value in features.items()} == {
        "stem": 64,
        "layer1": 128,
        "layer2": 256,
        "layer3": 256,
        "penultimate": 1024,
    }
    assert all((features[tap] < 0).any() for tap in VGG.stages)  # not yet rectified
    assert maps.shape == (3, 1024)


def test_size():
    network = VGG(num_classes=7)
    assert sum(parameter.numel() for parameter in network.parameters()) == 8_569_600 + 1024 * 7 + 7


def test_a_network_of_another_size():
    network = VGG(num_classes=5, input_shape=(1, 28, 20))
    assert network(torch.zeros(2, 1, 28, 20)).shape == (2, 5)
    with pytest.raises(ValueError, match="7x40 is smaller than 8x8"):
        VGG(num_classes=5, input_shape=(3, 7, 40))
