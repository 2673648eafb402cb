"""HEAT on points of the plane, against densities that numpy computes on a grid."""

from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image

from experiments import heat_toy
from experiments.__main__ import main
from lightning_modules.samplers.sgld import SGLD

SIDE, CELLS, STD, HEIGHT = 6, 300, 0.4, 1.5
TICKS = SIDE * (2 * (np.arange(CELLS) + 0.5) / CELLS - 1)
GRID = np.stack(np.meshgrid(TICKS, TICKS), -1).reshape(-1, 2)
PRIOR_STD = np.hypot(STD, HEIGHT)  # of y within a class
NO_CHAINS = SGLD(steps=0, step_size=0.0, noise=0.0, relu=False)


def gaussian(x, y, std_y):
    """Masses of a Gaussian of standard deviations STD and std_y in the cells of the grid."""
    density = np.exp(-(((GRID[:, 0] - x) / STD) ** 2 + ((GRID[:, 1] - y) / std_y) ** 2) / 2)
    return density / density.sum()


DATA = sum(gaussian(x, y, STD) for x in (-2, 2) for y in (-HEIGHT, HEIGHT)) / 4
PRIOR = sum(gaussian(x, 0, PRIOR_STD) for x in (-2, 2)) / 2


def kl_from_data(energy):
    masses = np.exp(energy.min() - energy)
    return DATA @ np.log(DATA / (masses / masses.sum()))


def correlation(a, b, masses):
    masses = masses / masses.sum()
    a, b = a - masses @ a, b - masses @ b
    return masses @ (a * b) / np.sqrt((masses @ a**2) * (masses @ b**2))


def mann_whitney(known, unknown):
    below, up_to = (np.searchsorted(np.sort(known), unknown, side) for side in ("left", "right"))
    return (below + up_to).mean() / (2 * len(known))


def data_points(number, seed):
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1, 1], (number, 2))
    return signs * [2, HEIGHT] + STD * generator.standard_normal((number, 2))


def prior_points(number, seed):
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1, 1], number)
    return signs[:, None] * [2, 0] + generator.standard_normal((number, 2)) * [STD, PRIOR_STD]


def train(seed=0, **settings):
    torch.manual_seed(seed)
    return heat_toy.train(*heat_toy.draw(10_000), **settings)


@cache
def train_once(seed, settings):
    return train(seed, **dict(settings))


def trained(seed=0, **settings):
    return train_once(seed, frozenset(settings.items()))


@torch.no_grad()
def energies(module, points):
    """Residual and prior energies of points, in float64."""
    return [part.double().numpy() for part in module.energy.parts(torch.tensor(points, dtype=torch.float32))]


def areas(module):
    """AUROC of prior and hybrid energy, each between the modes of a class and on draws from the prior."""
    gap = data_points(20_000, 4)
    gap[:, 1] = np.random.default_rng(5).uniform(-0.4, 0.4, len(gap))
    known_residual, known = energies(module, data_points(20_000, 6))
    found = []
    for ood in (gap, prior_points(20_000, 7)):
        residual, prior = energies(module, ood)
        found.append((mann_whitney(known, prior), mann_whitney(known_residual + known, residual + prior)))
    return found


def test_data_lie_in_four_modes_two_of_each_class():
    torch.manual_seed(0)
    points, labels = (tensor.numpy() for tensor in heat_toy.draw(40_000))
    assert ((points[:, 0] > 0) == labels).mean() == 1
    for x in (-2, 2):
        for y in (-HEIGHT, HEIGHT):
            mode = points[(points[:, 0] * x > 0) & (points[:, 1] * y > 0)]
            assert len(mode) == pytest.approx(10_000, rel=0.05)
            assert mode.mean(0) == pytest.approx([x, y], abs=0.02)
            assert mode.std(0) == pytest.approx([STD, STD], abs=0.01)


@pytest.mark.slow
def test_prior_with_one_gaussian_for_each_class_misses_the_modes():
    _, prior = energies(trained(), GRID)
    assert kl_from_data(prior) == pytest.approx(0.663, abs=0.003)


@pytest.mark.parametrize(
    ("regularization", "least", "most"),
    [(1.0, 0.37, 0.45), pytest.param(0.1, 0.0, 0.35, marks=pytest.mark.slow)],
)
def test_without_chains_the_residual_is_the_contrast_of_data_and_prior(regularization, least, most):
    # Starts beside the ends would be the same points twice.
    module = trained(steps=1500, sgld=NO_CHAINS, regularization=regularization, include_starts=False)
    residual, prior = energies(module, GRID)
    contrast = (PRIOR - DATA) / (2 * regularization * (PRIOR + DATA))
    assert correlation(residual, contrast, PRIOR + DATA) > 0.95
    assert least < kl_from_data(residual + prior) < most


@pytest.mark.parametrize(
    ("seed", "settings"),
    [
        (0, {}),
        *(pytest.param(seed, {}, marks=pytest.mark.slow) for seed in (1, 2)),
        *(pytest.param(seed, {"include_starts": False}, marks=pytest.mark.slow) for seed in (0, 1, 2)),
    ],
)
def test_with_chains_the_hybrid_density_is_that_of_the_data(seed, settings):
    residual, prior = energies(trained(seed, **settings), GRID)
    assert kl_from_data(residual + prior) < 0.15


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2))])
def test_ood_points_are_found_that_the_prior_takes_for_data(seed):
    (prior, hybrid), (prior_on_draws, hybrid_on_draws) = areas(trained(seed))
    assert prior == pytest.approx(0.23, abs=0.02)
    assert hybrid > 0.95
    assert prior_on_draws == pytest.approx(0.44, abs=0.02)
    assert hybrid_on_draws > 0.70


@pytest.mark.parametrize(
    "settings",
    [
        {"steps": 300, "sgld": NO_CHAINS, "include_starts": False},
        pytest.param({"steps": 1500, "sgld": NO_CHAINS, "include_starts": False}, marks=pytest.mark.slow),
        pytest.param({}, marks=pytest.mark.slow),
    ],
    ids=["brief", "without chains", "with chains"],
)
def test_strong_regularization_leaves_a_small_residual(settings):
    module = trained(regularization=20.0, **settings)
    for points in (data_points(20_000, 2), prior_points(20_000, 3)):
        residual, _ = energies(module, points)
        assert np.sqrt((residual**2).mean()) <= 0.025
        assert np.quantile(np.abs(residual), 0.95) <= 0.035
    residual, prior = energies(module, GRID)
    assert 0.64 < kl_from_data(residual + prior) < 0.66


def test_same_seed_gives_the_same_weights():
    first, again, other = (train(seed, steps=20).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["energy.residual.mlp.0.weight"], other["energy.residual.mlp.0.weight"])


def test_command_prints_what_numpy_finds_and_writes_the_figure(monkeypatch, checkpoints, capsys):
    seeds = []
    monkeypatch.setattr(heat_toy, "train", lambda points, labels: seeds.append(torch.initial_seed()) or trained())
    assert main(["heat-toy", "--seed", "7"]) == 0
    assert seeds == [7]
    *rows, path = capsys.readouterr().out.splitlines()[1:]
    residual, prior = energies(trained(), GRID)
    expected = [(kl_from_data(prior), kl_from_data(residual + prior)), *areas(trained())]
    for row, pair in zip(rows, expected, strict=True):
        assert [float(number) for number in row.split()[-2:]] == pytest.approx(pair, abs=0.015)
    assert path == str(checkpoints / "heat" / "toy" / "toy.png")
    with Image.open(path) as image:
        assert image.width > 3 * image.height


def test_figure_shows_both_densities_in_the_same_colours():
    points, labels = heat_toy.draw(100)
    figure = heat_toy.toy_figure(points, labels, heat_toy.scores(trained(), heat_toy.grid()))
    panels = figure.axes[:4]
    filled = [[part for part in panel.collections if getattr(part, "filled", False)] for panel in panels]
    assert [len(parts) for parts in filled] == [0, 1, 1, 1]
    assert [panel.get_aspect() for panel in panels] == [1, 1, 1, 1]
    _, (prior,), (residual,), (hybrid,) = filled
    assert prior.get_clim() == hybrid.get_clim()
    assert prior.levels.tolist() == hybrid.levels.tolist()
    assert prior.levels.max() >= (DATA / (2 * SIDE / CELLS) ** 2).max()
    assert residual.get_clim() == (-5, 5)
