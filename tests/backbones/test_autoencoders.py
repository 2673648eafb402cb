import re
import shutil
from functools import partial

import pytest
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from backbones.autoencoders import Autoencoder, MNISTAutoencoder, ResNetAutoencoder

BLOCKS = {18: (2, 2, 2, 2), 50: (3, 4, 6, 3)}
BUILDERS = {"resnet18": lambda: ResNetAutoencoder(18), "mnist": MNISTAutoencoder}


def unlike_fresh(network):
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
            nn.init.uniform_(module.weight, 0.4, 0.8)
            nn.init.normal_(module.bias, std=0.1)
    return network.eval()


@pytest.fixture(params=BUILDERS.values(), ids=BUILDERS.keys(), scope="module")
def network(request):
    torch.manual_seed(0)
    return unlike_fresh(request.param())


def images_for(network, count=2):
    return torch.randn(count, *network.input_shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("build", "parameters", "entries"),
    [
        (lambda: ResNetAutoencoder(18), 19_925_760, 239),
        (lambda: ResNetAutoencoder(50), 40_658_752, 629),
        (MNISTAutoencoder, 1_536_033, 32),
    ],
)
def test_size(build, parameters, entries):
    network = build()
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert len(network.state_dict()) == entries


@pytest.mark.parametrize("count", [3, 0])
def test_shapes(network, count):
    images = images_for(network, count)
    with torch.no_grad():
        latent = network.encode(images)
        assert latent.shape == (count, network.latent_dim)
        assert network.decode(latent).shape == images.shape
        assert torch.equal(network(images), network.decode(latent))


def test_every_parameter_takes_part(network):
    network.zero_grad()
    network(images_for(network)).square().sum().backward()
    assert [name for name, parameter in network.named_parameters() if not parameter.grad.any()] == []


def test_weights_survive_a_file(network, tmp_path):
    torch.save({"state_dict": network.state_dict()}, tmp_path / "network.pt")
    kwargs = {"depth": 18} if isinstance(network, ResNetAutoencoder) else {}
    again = type(network)(**kwargs, weights=str(tmp_path / "network.pt")).eval()
    with torch.no_grad():
        assert torch.equal(again(images_for(network)), network(images_for(network)))


def test_wrong_images_are_named_with_both_shapes(network):
    for call in (network, network.encode):
        with pytest.raises(ValueError, match=re.escape(f"{network.input_shape} (C, H, W), these are (3, 36, 36)")):
            call(torch.zeros(2, 3, 36, 36))


def test_an_unknown_depth_lists_the_valid_ones():
    with pytest.raises(ValueError, match="18, 50, not 34"):
        ResNetAutoencoder(34)


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        Autoencoder((3, 32, 32), 4)


@pytest.mark.parametrize("depth", [18, 50])
def test_a_resnet_autoencoder_equals_one_written_by_name(depth):
    torch.manual_seed(0)
    network = unlike_fresh(ResNetAutoencoder(depth, latent_dim=16))
    state, images = network.state_dict(), images_for(network)
    encoder = getattr(torchvision.models, f"resnet{depth}")(num_classes=16)
    encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.Identity()
    encoder.load_state_dict(
        {name.removeprefix("encoder."): value for name, value in state.items() if name.startswith("encoder.")}
    )

    def convolve(maps, name):
        weight = state[f"{name}.weight"]
        return F.conv2d(maps, weight, padding=weight.shape[-1] // 2)

    def normed(maps, name):
        mean, variance, weight, bias = (
            state[f"{name}.{part}"].view(-1, 1, 1) for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (maps - mean) / (variance + 1e-5).sqrt() * weight + bias

    with torch.no_grad():
        latent = encoder.eval()(images)
        weight, bias = state["decoder.linear.weight"], state["decoder.linear.bias"]
        maps = (latent @ weight.T + bias).view(2, -1, 4, 4)
        for stage, blocks in enumerate(BLOCKS[depth], start=1):
            for block in range(blocks):
                name = f"decoder.layer{stage}.{block}"
                residual = normed(convolve(maps, f"{name}.conv1"), f"{name}.bn1").clamp(min=0)
                shortcut = maps
                if stage < 4 and block == 0:  # every pixel becomes four
                    residual, repeated = (
                        grid.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) for grid in (residual, maps)
                    )
                    shortcut = normed(convolve(repeated, f"{name}.shortcut.0"), f"{name}.shortcut.1")
                residual = normed(convolve(residual, f"{name}.conv2"), f"{name}.bn2")
                if depth == 50:
                    residual = normed(convolve(residual.clamp(min=0), f"{name}.conv3"), f"{name}.bn3")
                maps = (residual + shortcut).clamp(min=0)
        expected = convolve(maps, "decoder.conv1")
        torch.testing.assert_close(network.encode(images), latent, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network(images), expected, rtol=1e-4, atol=1e-4)
    assert (expected < 0).any()


def test_the_mnist_decoder_equals_one_written_by_hand():
    torch.manual_seed(0)
    network = MNISTAutoencoder()
    tensors = iter(value for name, value in network.state_dict().items() if name.startswith("decoder."))
    pairs = list(zip(tensors, tensors, strict=True))
    latent = torch.randn(2, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        values = latent
        for weight, bias in pairs[:2]:  # no activation after either
            values = values @ weight.T + bias
        maps, sizes = values.view(2, 100, 3, 3), [3]
        for (weight, bias), stride in zip(pairs[2:-1], (1, 1, 1, 1, 2, 2), strict=True):
            height = (maps.shape[2] - 1) * stride + 2
            drawn = torch.zeros(2, 100, height, height)
            for row in range(maps.shape[2]):
                for column in range(maps.shape[3]):  # every position stamps a 2x2 patch
                    patch = torch.einsum("bi,iohw->bohw", maps[:, :, row, column], weight)
                    drawn[:, :, row * stride : row * stride + 2, column * stride : column * stride + 2] += patch
            maps = (drawn + bias.view(-1, 1, 1)).clamp(min=0)
            sizes.append(height)
        weight, bias = pairs[-1]
        expected = torch.einsum("bihw,oi->bohw", maps, weight[:, :, 0, 0]) + bias.view(-1, 1, 1)
        torch.testing.assert_close(network.decode(latent), expected, rtol=1e-4, atol=1e-5)
    assert sizes == [3, 4, 5, 6, 7, 14, 28]


@pytest.mark.parametrize("build", [MNISTAutoencoder, partial(ResNetAutoencoder, 18), partial(ResNetAutoencoder, 50)])
def test_formats_change_nothing_but_rounding(build):
    network = unlike_fresh(build()).eval()
    images = torch.rand(4, *network.input_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        expected = network(images)
        assert torch.equal(network(images), expected)
        with torch.autocast("cpu", torch.bfloat16):
            half = network(images).float()
        turned = network.to(memory_format=torch.channels_last)(images.to(memory_format=torch.channels_last))
    torch.testing.assert_close(turned, expected, rtol=1e-3, atol=1e-4)
    assert (half - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")  # inside the compiler of torch 2.11
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("build", [MNISTAutoencoder, partial(ResNetAutoencoder, 18), partial(ResNetAutoencoder, 50)])
def test_compiled_autoencoders_agree(build, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    network = unlike_fresh(build()).eval()
    images = torch.rand(4, *network.input_shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(network)(images), network(images), rtol=1e-3, atol=1e-4)
