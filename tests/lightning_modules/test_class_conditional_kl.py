"""The class-conditional divergence against torch.distributions, and how it is averaged."""

import math
from functools import partial

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from lightning_modules.losses.class_conditional_kl import class_conditional_kl

LABELS = [2, 0, 2, 2, 0, 4, 2]  # of five classes two are absent, and the others unequally frequent


def posteriors(width=3, classes=5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    number = len(LABELS)
    mean, log_variance = (torch.randn(number, width, generator=generator, dtype=dtype) for _ in range(2))
    centres = torch.randn(classes, width, generator=generator, dtype=dtype)
    return mean, log_variance, torch.tensor(LABELS), centres


def distributions(mean, log_variance, labels, centres, scale):
    return Normal(mean, (log_variance / 2).exp()), Normal(centres[labels], scale)


def average(values, labels):
    """Mean over dimensions and the samples of a class, then over classes, one by one."""
    classes = sorted(set(labels.tolist()))
    of_class = [[float(row.mean()) for row, label in zip(values, labels, strict=True) if label == c] for c in classes]
    return sum(sum(rows) / len(rows) for rows in of_class) / len(classes)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_the_closed_form_is_that_of_torch(scale):
    drawn = posteriors()
    expected = average(kl_divergence(*distributions(*drawn, scale)), drawn[2])
    assert float(class_conditional_kl(*drawn, scale)) == pytest.approx(expected, rel=1e-6)
    if scale == 0.1:
        assert class_conditional_kl(*drawn) == class_conditional_kl(*drawn, scale)


@pytest.mark.parametrize("scale", [0.1, 2.0])
def test_one_draw_is_the_difference_of_two_log_densities(scale):
    drawn = posteriors()
    posterior, prior = distributions(*drawn, scale)
    draws = posterior.sample()
    expected = average(posterior.log_prob(draws) - prior.log_prob(draws), drawn[2])
    assert float(class_conditional_kl(*drawn, scale, draws)) == pytest.approx(expected, rel=1e-6)


def test_many_draws_agree_with_the_closed_form_in_value_and_gradient():
    mean, log_variance, labels, centres = posteriors()
    inputs = mean.requires_grad_(), log_variance.requires_grad_()
    exact = class_conditional_kl(*inputs, labels, centres)
    times = 10_000
    many = [tensor.repeat(times, 1) for tensor in inputs]
    noise = torch.randn(many[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    draws = many[0] + (many[1] / 2).exp() * noise
    estimate = class_conditional_kl(*many, labels.repeat(times), centres, draws=draws)
    assert float(estimate.detach()) == pytest.approx(float(exact.detach()), rel=0.01)
    pairs = zip(torch.autograd.grad(estimate, inputs), torch.autograd.grad(exact, inputs), strict=True)
    assert all(float((found - expected).norm() / expected.norm()) < 0.03 for found, expected in pairs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_posterior_like_the_prior_costs_nothing(dtype):
    _, _, labels, centres = posteriors(dtype=dtype)
    centres = 20 * centres
    log_variance = torch.full((len(labels), 3), 2 * math.log(0.1), dtype=dtype)
    assert abs(class_conditional_kl(centres[labels], log_variance, labels, centres)) < 1e-6


def test_classes_are_averaged_not_samples():
    mean, log_variance, labels, centres = posteriors()
    loss = class_conditional_kl(mean, log_variance, labels, centres)
    of_samples = kl_divergence(*distributions(mean, log_variance, labels, centres, 0.1)).mean()
    assert abs(loss - of_samples) > 0.05 * loss
    often = torch.cat([torch.arange(len(labels)), torch.tensor([5, 5, 5])])  # the only sample of its class
    repeated = class_conditional_kl(mean[often], log_variance[often], labels[often], centres)
    torch.testing.assert_close(repeated, loss)


@pytest.mark.parametrize("estimated", [False, True])
def test_gradients_are_those_of_finite_differences(estimated):
    mean, log_variance, labels, centres = posteriors()
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(mean, log_variance):
        draws = mean + (log_variance / 2).exp() * noise if estimated else None
        return class_conditional_kl(mean, log_variance, labels, centres, draws=draws)

    assert torch.autograd.gradcheck(loss, (mean.requires_grad_(), log_variance.requires_grad_()))


@pytest.mark.parametrize("estimated", [False, True])
def test_an_empty_batch_gives_zero_with_a_live_graph(estimated):
    mean, log_variance = (torch.zeros(0, 3, requires_grad=True) for _ in range(2))
    draws = mean + log_variance if estimated else None
    loss = class_conditional_kl(mean, log_variance, torch.zeros(0, dtype=torch.long), torch.ones(5, 3), draws=draws)
    loss.backward()
    assert loss == 0
    assert mean.grad.shape == log_variance.grad.shape == (0, 3)


@pytest.mark.parametrize("estimated", [False, True])
def test_half_precision_is_widened_and_autocast_changes_nothing(estimated):
    mean, log_variance, labels, centres = posteriors(dtype=torch.bfloat16)
    draws = mean + 0.1 if estimated else None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = class_conditional_kl(mean, log_variance, labels, centres.double(), draws=draws)
    assert found.dtype == torch.float32
    wide = partial(class_conditional_kl, mean.double(), log_variance.double(), labels, centres.double())
    assert float(found) == pytest.approx(float(wide(draws=None if draws is None else draws.double())), rel=1e-5)


@pytest.mark.parametrize("label", [-1, 5])
def test_a_label_without_a_centre_is_an_error(label):
    mean, log_variance, labels, centres = posteriors()
    labels[1] = label
    with pytest.raises(ValueError, match=rf"none of the 5 centres is for labels \[{label}\]"):
        class_conditional_kl(mean, log_variance, labels, centres)


def test_a_scale_that_is_no_deviation_is_an_error():
    with pytest.raises(ValueError, match="must be positive, got 0"):
        class_conditional_kl(*posteriors(), 0)
