"""What is asked of outliers, against formulas written out with torch alone."""

import math

import pytest
import torch
from torch.nn import functional

from lightning_modules.losses.outlier_exposure import EnergyMargins, UniformTarget, scale_slope

LABELS = torch.tensor([0, -1, 2, -1, -1])


def logits(scale=1.0, classes=10):
    return (scale * torch.randn(len(LABELS), classes)).requires_grad_()


@pytest.mark.parametrize("classes", [2, 10])
@pytest.mark.parametrize("constant", [-3.0, 0.0, 7.0])
def test_constant_logits_of_outliers_cost_log_k_which_is_the_least(classes, constant):
    even = torch.full((len(LABELS), classes), constant)
    assert float(UniformTarget(1.0)(even, LABELS)) == pytest.approx(math.log(classes), rel=1e-6)
    assert UniformTarget(1.0)(logits(classes=classes), LABELS) > math.log(classes)


def test_uniform_target_is_the_cross_entropy_of_outliers_alone():
    values = logits(3.0)
    expected = functional.cross_entropy(values[LABELS < 0], torch.full((3, 10), 0.1))
    torch.testing.assert_close(UniformTarget()(values, LABELS), 0.5 * expected)
    (gradient,) = torch.autograd.grad(UniformTarget()(values, LABELS), values)
    assert not gradient[LABELS >= 0].any()


def energies(known, unknown):
    """Logits of two classes with the energies -logsumexp that are asked for."""
    values = torch.tensor([known, unknown, known, unknown, unknown])
    return torch.stack([-values - math.log(2)] * 2, 1)


def test_energies_beyond_their_margins_cost_nothing():
    for known, unknown in ((-25.0, -7.0), (-40.0, 3.0)):
        assert float(EnergyMargins()(energies(known, unknown), LABELS)) == pytest.approx(0, abs=1e-9)


def test_energies_within_cost_their_squares():
    assert float(EnergyMargins()(energies(-22.0, -7.0), LABELS)) == pytest.approx(0.1 * 9, rel=1e-5)
    assert float(EnergyMargins()(energies(-25.0, -11.0), LABELS)) == pytest.approx(0.1 * 16, rel=1e-5)
    assert float(EnergyMargins(weight=2.0)(energies(-22.0, -11.0), LABELS)) == pytest.approx(2 * 25, rel=1e-5)
    assert float(EnergyMargins(-5.0, -5.0)(energies(-4.0, -5.0), LABELS)) == pytest.approx(0.1, rel=1e-5)


def test_energies_of_a_batch_are_hinged_one_by_one():
    values = logits(8.0)
    energy = -values.logsumexp(1)
    inside = ((energy[[0, 2]] + 25).clamp(min=0) ** 2).mean()
    outside = ((-7 - energy[[1, 3, 4]]).clamp(min=0) ** 2).mean()
    torch.testing.assert_close(EnergyMargins()(values, LABELS), 0.1 * (inside + outside))


@pytest.mark.parametrize("scale", [0.1, 1.0, 20.0])
def test_the_squared_slope_is_the_squared_derivative_by_the_scale(scale):
    values = logits(scale)
    factor = torch.ones((), requires_grad=True)
    loss = functional.cross_entropy(factor * values[LABELS < 0], torch.full((3, 10), 0.1))
    expected = torch.autograd.grad(loss, factor, create_graph=True)[0].square()
    found = scale_slope(values, LABELS).square()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found, values)[0], torch.autograd.grad(expected, values)[0], rtol=1e-4, atol=1e-7
    )
    assert scale_slope(values, LABELS) < 0


@pytest.mark.parametrize("loss", [UniformTarget(), EnergyMargins(), scale_slope])
@pytest.mark.parametrize("labels", [[], [0, 1]])
def test_a_share_without_outliers_has_a_finite_loss_and_a_live_graph(loss, labels):
    values = torch.full((len(labels), 3), 30.0, requires_grad=True)
    value = loss(values, torch.tensor(labels, dtype=torch.int64))
    (gradient,) = torch.autograd.grad(value, values)
    assert value == 0
    assert not gradient.any()


@pytest.mark.parametrize("loss", [UniformTarget, EnergyMargins])
def test_a_weight_below_0_is_refused(loss):
    with pytest.raises(ValueError, match="the weight of the outliers must be at least 0, got -1"):
        loss(weight=-1)


def test_margins_that_are_exchanged_are_refused():
    with pytest.raises(ValueError, match=r"m_in must not be above m_out, got -7.0 and -25.0"):
        EnergyMargins(m_in=-7.0, m_out=-25.0)
