import math

import numpy as np
import pytest
import torch

from backbones.residual_energy import ResidualEnergy
from lightning_modules.samplers import sgld
from lightning_modules.samplers.figure import chains_figure
from lightning_modules.samplers.sgld import SGLD, ChainBuffer
from lightning_modules.scores.energy import EnergyScore


class Toy(EnergyScore):
    """An energy of the features of a formula."""

    def __init__(self, formula, unit_length=False):
        super().__init__()
        self.formula, self.unit_length = formula, unit_length

    def embed(self, evidence):
        return evidence.features["penultimate"]

    def energy(self, features):
        return self.formula(features)


FLAT = Toy(lambda features: 0 * features.sum(1))
SLOPE = Toy(lambda features: features.sum(1))


def end_of(walk):
    *_, (features, _) = walk
    return features


@pytest.mark.parametrize(
    ("step_size", "noise", "stiffness", "variance"),
    [(0.1, 0.2**0.5, 1, 1.0526), (0.01, 0.02**0.5, 4, 0.2551), (0.1, 0.1, 1, 0.0526)],
)
def test_chains_in_a_parabola_reach_their_stationary_variance(step_size, noise, stiffness, variance):
    torch.manual_seed(0)
    parabola = Toy(lambda features: stiffness / 2 * features.square().sum(1))
    sampler = SGLD(200, step_size, noise, end=1.0, relu=False)
    ends = end_of(sampler.walk(parabola, torch.zeros(100_000, 1)))
    assert ends.mean().abs() < 0.02 * variance**0.5
    assert ends.var().item() == pytest.approx(variance, rel=0.03)


def test_schedule():
    sampler = SGLD(10, 1e-4, 5e-3)
    assert [sampler.schedule(1e-4, step) for step in (0, 5, 9)] == pytest.approx([1e-4, 3.25e-5, 1.09e-5])
    assert [SGLD(10, 1e-4, 0, end=1.0).schedule(1e-4, step) for step in (0, 5, 9)] == pytest.approx(3 * [1e-4])


def test_steps_follow_the_schedule():
    sampler = SGLD(6, 0.5, 0.0, end=0.2, relu=False)
    walk = sampler.walk(SLOPE, torch.zeros(2, 3, dtype=torch.float64))
    travelled = -np.cumsum([(0.5 - 0.1) * (1 - t / 6) ** 2 + 0.1 for t in range(6)])
    for (features, gradient), expected in zip(walk, travelled, strict=True):
        np.testing.assert_allclose(features.numpy(), expected, rtol=1e-12)
        assert torch.equal(gradient, torch.ones_like(gradient))


def test_noise_follows_the_schedule():
    torch.manual_seed(0)
    sampler, before = SGLD(5, 1.0, 0.3, relu=False), torch.zeros(100_000, 1)
    for t, (features, _) in enumerate(sampler.walk(FLAT, before)):
        expected = 0.03 + 0.27 * (1 - t / 5) ** 2
        assert (features - before).std().item() == pytest.approx(expected, rel=0.01)
        before = features


def test_constant_schedule_is_reached_from_the_first_step():
    features = [features for features, _ in SGLD(4, 0.1, 0.0, end=1.0, relu=False).walk(SLOPE, torch.zeros(1, 1))]
    torch.testing.assert_close(torch.cat(features).flatten(), torch.tensor([-0.1, -0.2, -0.3, -0.4]))


@pytest.mark.parametrize("unit_length", [True, False])
@pytest.mark.parametrize("relu", [True, False])
def test_chains_are_projected_after_every_step(relu, unit_length):
    torch.manual_seed(0)
    sampler, energy = SGLD(20, 0.1, 0.3, relu=relu), Toy(lambda features: features.sin().sum(1), unit_length)
    starts = sampler.project(torch.randn(500, 40), unit_length)  # no row without a positive feature
    for features, _ in sampler.walk(energy, starts):
        assert (features.min() >= 0) == relu
        lengths = features.norm(dim=1)
        assert bool(((lengths - 1).abs() < 1e-6).all()) == unit_length


def test_projection_by_hand():
    rows = torch.tensor([[3.0, -7.0, 4.0], [-1.0, -2.0, -3.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[0.6, 0.0, 0.8], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]])
    torch.testing.assert_close(SGLD(1, 0, 0).project(rows, unit_length=True), expected, rtol=0, atol=1e-7)
    assert torch.equal(SGLD(1, 0, 0).project(rows, unit_length=False), rows.clamp(min=0))
    assert torch.equal(SGLD(1, 0, 0, relu=False).project(rows, unit_length=False), rows)


def test_a_row_of_zeros_stays_one():
    pushed = Toy(lambda features: features.sum(1), unit_length=True)  # down, where no feature can go
    for features, _ in SGLD(5, 0.1, 0.0).walk(pushed, torch.zeros(3, 4)):
        assert torch.equal(features, torch.zeros(3, 4))


def test_no_steps_yield_nothing():
    assert list(SGLD(0, 0.1, 0.1).walk(FLAT, torch.zeros(2, 3))) == []


def test_chains_descend_the_energy_of_their_class():
    class Classes(Toy):
        def gradient(self, features, classes=None):
            return features - classes[:, None]  # of half the squared distance to the number of the class

    ends = end_of(SGLD(200, 0.1, 0.0, end=1.0).walk(Classes(None), torch.zeros(3, 2), torch.tensor([2, 0, 5])))
    torch.testing.assert_close(ends, torch.tensor([[2.0, 2.0], [0.0, 0.0], [5.0, 5.0]]))


@pytest.mark.parametrize("grad", [True, False])
def test_sampling_changes_nothing_but_the_state_of_the_random_numbers(grad):
    network = ResidualEnergy(4, 8)
    energy, starts = Toy(network), torch.rand(6, 4)
    energy.train()
    network.mlp[0].bias.requires_grad_(False)
    network.mlp[0].weight.grad = torch.ones_like(network.mlp[0].weight)

    def state():
        parts = {name: (part.training, dict(part.state_dict())) for name, part in energy.named_modules()}
        flags = [(parameter.requires_grad, parameter.grad) for parameter in energy.parameters()]
        return torch.utils._pytree.tree_map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, (parts, flags))

    before, kept = state(), starts.clone()
    with torch.set_grad_enabled(grad):
        ends = end_of(SGLD(5, 0.1, 0.1).walk(energy, starts))
        assert torch.is_grad_enabled() == grad
    assert state() == before
    assert torch.equal(starts, kept)
    assert not ends.requires_grad
    assert not torch.equal(ends, starts)


@pytest.mark.parametrize("name", ["steps", "step_size", "noise", "end"])
def test_negative_settings_are_refused(name):
    with pytest.raises(ValueError, match=f"must be at least 0: SGLD.*{name}=-1"):
        SGLD(**{"steps": 1, "step_size": 0.1, "noise": 0.1} | {name: -1})


def rows(*values):
    return torch.tensor(values, dtype=torch.float32)[:, None].expand(-1, 2)


def test_fresh_starts_until_the_buffer_is_half_full():
    buffer, fresh = ChainBuffer(capacity=9, restart=0.0), rows(-1.0, -2.0)
    assert torch.equal(buffer.mix(fresh), fresh)
    buffer.keep(rows(1, 2, 3, 4))  # 4 of 9 is less than half
    assert torch.equal(buffer.mix(fresh), fresh)
    buffer.keep(rows(5))
    assert (buffer.mix(fresh) > 0).all()
    even = ChainBuffer(capacity=8, restart=0.0)
    even.keep(rows(1, 2, 3, 4))
    assert (even.mix(fresh) > 0).all()


def test_the_newest_ends_replace_the_oldest():
    buffer = ChainBuffer(capacity=4)
    for batch in ((1, 2, 3), (4, 5), (6,)):
        buffer.keep(rows(*batch))
    assert buffer.ends[:, 0].tolist() == [3, 4, 5, 6]
    buffer.keep(rows(*range(10, 20)))
    assert buffer.ends[:, 0].tolist() == [16, 17, 18, 19]


@pytest.mark.parametrize(("restart", "number", "afresh"), [(0.1, 25, 2), (0.5, 3, 1), (0.0, 4, 0), (1.0, 4, 4)])
def test_share_of_chains_that_restart(restart, number, afresh):
    buffer = ChainBuffer(capacity=10, restart=restart)
    buffer.keep(rows(*range(1, 9)))
    fresh = rows(*range(-number, 0))
    starts = buffer.mix(fresh)
    assert starts.shape == fresh.shape
    assert (starts[:, 0] < 0).sum() == afresh == math.floor(restart * number)
    assert set(starts[starts[:, 0] < 0, 0].tolist()) <= set(fresh[:, 0].tolist())


def test_ends_are_drawn_uniformly_and_with_replacement():
    torch.manual_seed(0)
    buffer = ChainBuffer(capacity=4, restart=0.0)
    buffer.keep(rows(0, 1, 2, 3))
    drawn, again = (buffer.mix(rows(*[-1.0] * 40_000))[:, 0].long() for _ in range(2))
    torch.testing.assert_close(drawn.bincount() / 40_000, torch.full((4,), 0.25), rtol=0, atol=0.01)
    assert (drawn == again).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_the_buffer_takes_the_ends_of_all_processes_and_no_graph(monkeypatch):
    monkeypatch.setattr(sgld, "gather_rows", lambda own: torch.cat([own, own + 10]))
    buffer = ChainBuffer(capacity=4)
    buffer.keep(rows(1, 2).clone().requires_grad_())
    assert buffer.ends[:, 0].tolist() == [1, 2, 11, 12]
    assert not buffer.ends.requires_grad


def test_chains_go_on_after_a_reload():
    buffer, other = ChainBuffer(capacity=4), ChainBuffer(capacity=4)
    other.load_state_dict(buffer.state_dict())  # empty as it is
    assert torch.equal(other.mix(rows(-1.0)), rows(-1.0))
    buffer.keep(rows(1, 2, 3))
    other.keep(rows(7))
    other.load_state_dict(buffer.state_dict())
    assert torch.equal(other.ends, buffer.ends)
    with pytest.raises(RuntimeError, match=r'Missing key.*"ends"'):
        other.load_state_dict({})


@pytest.mark.parametrize(("capacity", "restart"), [(0, 0.1), (10, -0.1), (10, 1.1)])
def test_impossible_buffers_are_refused(capacity, restart):
    with pytest.raises(ValueError, match=f"capacity of at least 1.*not {capacity}, {restart}"):
        ChainBuffer(capacity, restart)


def test_figure_shows_energy_gradient_and_distance_by_step():
    parabola = Toy(lambda features: features.square().sum(1) / 2)
    starts = torch.linspace(1, 2, 21, dtype=torch.float64)[:, None]
    figure = chains_figure(parabola, starts, SGLD(3, 0.5, 0.0, end=1.0).walk(parabola, starts))
    positions = np.linspace(1, 2, 21)[None] * 0.5 ** np.arange(4)[:, None]
    expected = {"energy": positions**2 / 2, "gradient": positions[:-1], "distance": positions[0] - positions}
    for panel, (title, values) in zip(figure.axes, expected.items(), strict=True):
        assert title in panel.get_title()
        steps, median = panel.lines[0].get_data()
        assert list(steps) == list(range(len(values)))
        np.testing.assert_allclose(median, np.median(values, axis=1), rtol=1e-12)
        band = panel.collections[0].get_datalim(panel.transData)
        assert band.y0 == pytest.approx(np.quantile(values, 0.05, axis=1).min())
        assert band.y1 == pytest.approx(np.quantile(values, 0.95, axis=1).max())
