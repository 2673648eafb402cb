import math

import numpy as np
import pytest
import torch
from torch import nn

from backbones.residual_energy import ResidualEnergy

SHAPES = {
    "tied": {},
    "untied": {"tie_hidden": False},
    "reduced": {"reduce_width": True, "hidden_layers": 2},
    "none": {"hidden_layers": 0},
}


def residual(name, num_features=5, hidden_dim=8):
    torch.manual_seed(0)
    return ResidualEnergy(num_features, hidden_dim, **SHAPES[name]).double()


def perceptron(state, features):
    """The same in NumPy, from a state dict that names each layer as often as it is applied."""
    names = sorted({name.rpartition(".")[0] for name in state}, key=lambda name: int(name.split(".")[1]))
    for name in names:
        features = features @ state[f"{name}.weight"].numpy().T + state[f"{name}.bias"].numpy()
        if name != names[-1]:
            features = np.where(features > 0, features, 0.2 * features)
    return features[:, 0]


@pytest.mark.parametrize(
    ("num_features", "options", "number"),
    [
        (512, {}, 1_575_937),
        (512, {"tie_hidden": False}, 4_724_737),
        (2048, {"reduce_width": True, "hidden_layers": 6}, 5_597_633),
        (2048, {"reduce_width": True, "hidden_layers": 4}, 5_584_641),
    ],
)
def test_number_of_parameters_of_the_published_shapes(num_features, options, number):
    with torch.device("meta"):
        energy = ResidualEnergy(num_features, **options)
    assert sum(parameter.numel() for parameter in energy.parameters()) == number


@pytest.mark.parametrize("tie_hidden", [True, False])
def test_published_names_of_one_width(tie_hidden):
    with torch.device("meta"):
        state = ResidualEnergy(512, tie_hidden=tie_hidden).state_dict()
    shapes = [(1024, 512), *4 * [(1024, 1024)], (1, 1024)]
    expected = {f"mlp.{2 * layer}.weight": shape for layer, shape in enumerate(shapes)}
    expected |= {f"mlp.{2 * layer}.bias": shape[:1] for layer, shape in enumerate(shapes)}
    assert {name: tuple(value.shape) for name, value in state.items()} == expected


def test_published_names_of_reduced_width():
    with torch.device("meta"):
        state = ResidualEnergy(2048, hidden_layers=6, reduce_width=True).state_dict()
    shapes = [(1024, 2048)]
    for width in (1024, 512, 256, 128, 64, 32):
        shapes += [(width, width), (width, width), (width // 2, width)]
    shapes += [(1, 16)]
    weights = {name: tuple(value.shape) for name, value in state.items() if name.endswith("weight")}
    assert weights == {f"mlp.{2 * layer}.weight": shape for layer, shape in enumerate(shapes)}


def test_tied_layers_are_one_and_stay_one_after_training_and_loading():
    energy, other = residual("tied"), residual("tied")
    energy(torch.ones(3, 5).double()).sum().backward()
    with torch.no_grad():
        for parameter in energy.parameters():
            parameter -= 0.1 * parameter.grad
    state = energy.state_dict()
    for layer in (4, 6, 8):
        assert torch.equal(state[f"mlp.{layer}.weight"], state["mlp.2.weight"])
    other.load_state_dict(state)
    assert torch.equal(other(torch.ones(3, 5).double()), energy(torch.ones(3, 5).double()))
    assert not torch.equal(residual("untied").mlp[2].weight, residual("untied").mlp[4].weight)


@pytest.mark.parametrize("name", SHAPES)
def test_energy_equals_that_of_numpy(name):
    energy = residual(name)
    features = torch.randn(20, 5, generator=torch.Generator().manual_seed(1)).double()
    expected = perceptron(energy.state_dict(), features.numpy())
    assert expected.std() > 0
    np.testing.assert_allclose(energy(features).detach().numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_one_energy_for_each_row_whatever_their_number(number):
    assert residual("tied")(torch.ones(number, 5).double()).shape == (number,)


@pytest.mark.parametrize("name", SHAPES)
def test_gradient_is_that_of_finite_differences(name):
    energy = residual(name)
    features = torch.randn(6, 5, generator=torch.Generator().manual_seed(2)).double()
    state, step = energy.state_dict(), 1e-6
    expected = np.empty((6, 5))
    for feature in range(5):
        shift = step * np.eye(5)[feature]
        above, below = (perceptron(state, features.numpy() + sign * shift) for sign in (1, -1))
        expected[:, feature] = (above - below) / (2 * step)
    np.testing.assert_allclose(energy.gradient(features).numpy(), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("grad", [True, False])
def test_gradient_leaves_parameters_and_features_alone(grad):
    energy, features = residual("tied"), torch.ones(4, 5).double()
    with torch.set_grad_enabled(grad):
        assert not energy.gradient(features).requires_grad
    assert all(parameter.requires_grad and parameter.grad is None for parameter in energy.parameters())
    assert not features.requires_grad


def test_layers_start_as_linear_ones_do():
    for layer in residual("untied", 64, 64).mlp:
        if isinstance(layer, nn.Linear):
            bound = 1 / math.sqrt(layer.in_features)
            assert 0.5 * bound < layer.weight.abs().max() <= bound
            assert layer.bias.abs().max() <= bound


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_features": 0}, "at least 1 feature.*num_features=0"),
        ({"num_features": 4, "hidden_dim": 0}, "hidden_dim=0"),
        ({"num_features": 4, "hidden_layers": -1}, "hidden_layers=-1"),
        ({"num_features": 4, "hidden_dim": 24, "reduce_width": True}, "24 cannot be halved 4 times"),
    ],
)
def test_impossible_shapes_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        ResidualEnergy(**arguments)
