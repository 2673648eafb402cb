"""Masks of exact counts, their gradients, and a subnetwork beside a network that does not change."""

import math
from fractions import Fraction

import pytest
import torch
from torch import nn
from torch.nn import functional

from backbones.backbone import Backbone
from backbones.densenet import DenseNet
from backbones.resnet_option_a import ResNetOptionA
from backbones.subnetwork import StraightThrough, Subnetwork, kept, maskable, top_mask
from backbones.wide_resnet import WideResNet

KEEPS = {0.5: Fraction(1, 2), 0.8: Fraction(4, 5), 0.965: Fraction(193, 200), 1.0: Fraction(1)}


class Small(Backbone):
    """A convolution, batch-norm with scale and shift, dropout, and a head."""

    stages = ("layer1",)

    def __init__(self):
        super().__init__(4, 3, (2, 6, 6))
        self.conv1, self.layer1 = nn.Conv2d(2, 4, 3, bias=False), nn.Sequential(nn.BatchNorm2d(4), nn.Dropout(0.3))
        self.fc = nn.Linear(4, 3)

    def stem(self, images):
        return self.conv1(images)

    def finish(self, maps):
        return maps.relu()


@pytest.fixture
def network():
    network = Small()
    with torch.no_grad():  # statistics as of training
        for _ in range(3):
            network(torch.randn(16, 2, 6, 6))
    return network.eval()


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


# Masks


@pytest.mark.parametrize("keep", KEEPS)
@pytest.mark.parametrize("numel", [10, 20, 3420, 45000])
def test_counts_are_exact(numel, keep):
    expected = numel - math.floor((1 - KEEPS[keep]) * numel)
    assert kept(numel, keep) == expected
    for dtype in (torch.float32, torch.bfloat16):  # as a CPU, and as all else selects
        mask = top_mask(torch.randn(numel).to(dtype), keep)
        assert mask.float().sum() == expected
    assert set(mask.tolist()) <= {0.0, 1.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("keep", KEEPS)
def test_what_is_kept_has_the_largest_magnitudes(keep, dtype):
    scores = (torch.randperm(200) - 99.5).view(10, 5, 2, 2).to(dtype)
    mask = top_mask(scores, keep)
    assert mask.shape == scores.shape
    if keep < 1:
        assert scores.abs()[mask == 1].min() >= scores.abs()[mask == 0].max()
        assert mask.float().sum() == kept(200, keep)


@pytest.mark.parametrize("values", [torch.zeros(100), torch.tensor([1.0, -1.0]).repeat(50)])
def test_among_equals_the_count_is_exact_too(values):
    assert top_mask(values, 0.8).sum() == 80


def test_memory_format_does_not_matter():
    scores = torch.randn(8, 6, 3, 3)
    expected = top_mask(scores, 0.8)
    assert torch.equal(top_mask(scores.to(memory_format=torch.channels_last), 0.8), expected)
    assert torch.equal(top_mask(scores.transpose(0, 1), 0.8), expected.transpose(0, 1))
    assert torch.equal(top_mask(torch.stack([scores, scores], -1)[..., 0], 0.8), expected)


def test_gradients_pass_straight_through_to_magnitudes_of_pruned_entries_too():
    scores, weight = torch.randn(4, 3, 3, 3, requires_grad=True), torch.randn(4, 3, 3, 3)
    images = torch.randn(2, 3, 8, 8)
    masked = (weight * StraightThrough.apply(scores, 0.5)).requires_grad_()
    functional.conv2d(images, masked).square().sum().backward()
    effective = (weight * top_mask(scores, 0.5)).detach().requires_grad_()
    functional.conv2d(images, effective).square().sum().backward()
    expected = effective.grad * weight * scores.detach().sign()
    torch.testing.assert_close(scores.grad, expected)
    assert (scores.grad[top_mask(scores, 0.5) == 0] != 0).all()


@pytest.mark.parametrize(
    ("backbone", "keep", "total"),
    [
        (lambda: DenseNet(10, affine=False), 0.8, 596_190),
        (lambda: DenseNet(10, affine=False), 0.965, 719_130),
        (lambda: DenseNet(100, affine=False), 0.8, 620_814),
        (lambda: DenseNet(100, affine=False), 0.965, 748_832),
    ],
)
def test_layers_of_densenet_keep_so_many(backbone, keep, total):
    backbone = backbone()
    assert sum(int(top_mask(weight, keep).sum()) for _, weight in maskable(backbone)) == total


def test_scores_of_densenet_are_as_many_as_its_weights_and_within_their_bound():
    backbone = DenseNet(10, affine=False)
    subnetwork = Subnetwork(backbone, 0.8, 0)
    assert sum(scores.numel() for scores in subnetwork.parameters()) == 745_164
    assert len(list(subnetwork.parameters())) == 100
    for name, weight in maskable(backbone):
        scores = subnetwork.scores[name.replace(".", "/")]
        bound = 1 / math.sqrt(weight[0].numel())
        assert 0.9 * bound < scores.abs().max() <= bound
    assert float(subnetwork.scores["fc/weight"].detach().abs().max()) == pytest.approx(0.05407, rel=1e-3)


# The seed


def test_other_seeds_make_other_masks_and_the_same_the_same(network):
    first, same, other = (Subnetwork(network, 0.5, seed) for seed in (0, 0, 1))
    assert torch.equal(first.scores["conv1/weight"], same.scores["conv1/weight"])
    assert not torch.equal(top_mask(first.scores["fc/weight"], 0.5), top_mask(other.scores["fc/weight"], 0.5))


def test_scores_are_not_the_weights_that_the_same_seed_makes():
    backbone = Small()
    torch.manual_seed(5)
    backbone.conv1 = nn.Conv2d(40, 50, 3, bias=False)  # the first layer, from the start of the stream
    initial, scores = backbone.conv1.weight.detach(), Subnetwork(backbone, 0.5, 5).scores["conv1/weight"].detach()
    assert abs(float(torch.corrcoef(torch.stack([scores.flatten(), initial.flatten()]))[0, 1])) < 0.02


def test_no_random_number_of_others_is_used(network):
    before = torch.get_rng_state()
    Subnetwork(network, 0.8, 0)
    assert torch.equal(torch.get_rng_state(), before)


# Beside the network


@pytest.mark.parametrize("training", [False, True])
def test_the_network_does_not_change_when_the_subnetwork_runs(network, training):
    subnetwork, before = Subnetwork(network, 0.8, 0), state_of(network)
    network.train(training)
    own = state_of(subnetwork)
    logits, features = subnetwork(network, torch.randn(8, 2, 6, 6), {"layer1"})
    logits.sum().backward()
    assert features.keys() == {"penultimate", "layer1"}
    assert all(torch.equal(value, before[name]) for name, value in state_of(network).items())
    moved = {name for name, value in state_of(subnetwork).items() if not torch.equal(value, own[name])}
    statistics = {name for name in own if name.startswith("statistics.")}
    assert len(statistics) == 3
    assert moved == (statistics if training else set())


@pytest.mark.parametrize("backbone", [Small, lambda: ResNetOptionA(20, 10), lambda: WideResNet(10, 1, 10)])
def test_with_all_weights_it_is_the_network(backbone):
    network = backbone().eval()
    images = torch.randn(3, *network.input_shape)
    logits, features = Subnetwork(network, 1.0, 0)(network, images, {"layer1"})
    _, expected = network.forward_intermediates(images, {"penultimate", "layer1"})
    assert torch.equal(logits, network(images))
    assert all(torch.equal(features[tap], expected[tap]) for tap in features)


def test_it_computes_with_masked_weights_and_statistics_of_its_own(network):
    subnetwork = Subnetwork(network, 0.5, 0)
    subnetwork.statistics.get_buffer("layer1/0/running_mean").add_(1.0)
    alone = Small()
    state = state_of(network)
    for name in ("conv1.weight", "fc.weight"):
        state[name] *= top_mask(subnetwork.scores[name.replace(".", "/")], 0.5)
    state["layer1.0.running_mean"] += 1.0
    alone.load_state_dict(state)
    alone.eval()
    images = torch.randn(4, 2, 6, 6)
    torch.testing.assert_close(subnetwork(network, images)[0], alone(images))
    extracted = subnetwork.extract(network)
    assert torch.equal(extracted(images), alone(images))
    assert all(torch.equal(value, state[name]) for name, value in extracted.state_dict().items())


def test_channels_last_changes_nothing(network):
    subnetwork = Subnetwork(network, 0.8, 0)
    images = torch.randn(4, 2, 6, 6)
    expected = subnetwork(network, images)[0]
    network.to(memory_format=torch.channels_last)
    subnetwork.to(memory_format=torch.channels_last)
    torch.testing.assert_close(subnetwork(network, images)[0], expected)


def test_it_loads_strictly(network):
    subnetwork = Subnetwork(network, 0.8, 0)
    state = subnetwork.state_dict()
    del state["scores.fc/weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*scores.fc/weight"):
        Subnetwork(network, 0.8, 1).load_state_dict(state)


def test_nothing_to_mask(network):
    with pytest.raises(ValueError, match="Identity has neither a convolution nor a linear layer to mask"):
        Subnetwork(nn.Identity(), 0.8, 0)


@pytest.mark.parametrize("keep", [0.0, -0.1, 1.1, 80])
def test_no_such_share(network, keep):
    with pytest.raises(
        ValueError, match=f"keep is the share of the weights that stay, above 0 and up to 1, not {keep}"
    ):
        Subnetwork(network, keep, 0)
