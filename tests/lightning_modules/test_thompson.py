"""The regression behind POEM's boundary, against explicit repetition, planted maps and NumPy's inverse."""

import numpy as np
import pytest
import torch

from lightning_modules.samplers.thompson import BoundaryRegression, ThompsonSampling, least

WIDTH, PRIOR, NOISE = 7, 20.0, 0.5


def drawn(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(number, WIDTH, generator=generator), torch.randn(number, generator=generator)


def regression(*parts):
    sums = BoundaryRegression(WIDTH)
    for features, targets, weight in parts:
        sums.update(features, targets, weight)
    return sums


def textbook(features, targets):
    """Mean and covariance by formula: A = Z'Z / noise + I / prior, mean = A^-1 Z'y / noise."""
    features, targets = features.double().numpy(), targets.double().numpy()
    covariance = np.linalg.inv(features.T @ features / NOISE + np.eye(WIDTH) / PRIOR)
    return covariance @ features.T @ targets / NOISE, covariance


def test_a_weight_equals_repetition_in_precision_and_mean():
    (known, y_known), (others, y_others) = drawn(30), drawn(40, seed=1)
    weighted = regression((known, y_known, 3), (others, y_others, 1)).posterior(PRIOR, NOISE)
    mean, covariance = textbook(torch.cat([known] * 3 + [others]), torch.cat([y_known] * 3 + [y_others]))
    np.testing.assert_allclose(weighted[0], mean, rtol=1e-9)
    factor = weighted[1].numpy()
    np.testing.assert_allclose(np.linalg.inv(factor @ factor.T), covariance, rtol=1e-8, atol=1e-12)


def test_the_mean_recovers_a_planted_map():
    planted = torch.linspace(-2, 2, WIDTH).double()
    features, noise = drawn(20_000)
    mean, _ = regression((features, features.double() @ planted + 0.1 * noise.double(), 1)).posterior(PRIOR, NOISE)
    torch.testing.assert_close(mean, planted, rtol=0, atol=0.01)


def test_sums_are_kept_in_float64():
    far = torch.full((1, WIDTH), 1e4)
    sums = regression((far, torch.ones(1), 1), *[(torch.full((1, WIDTH), 1e-1), torch.ones(1), 1)] * 10)
    np.testing.assert_allclose(sums.gram, 1e8 + 0.1, rtol=1e-12)  # which float32 would round off


@pytest.mark.parametrize(("scale", "expected"), [(None, PRIOR), (1.0, 1.0), (0.0, 0.0)])
def test_draws_have_the_mean_and_the_scaled_covariance_of_the_posterior(scale, expected):
    features, targets = drawn(12)
    sums, sampling = regression((features, targets, 1)), ThompsonSampling(covariance_scale=scale)
    draws = torch.stack([sampling.draw(sums, WIDTH, 0, epoch) for epoch in range(1, 1501)]).double().numpy()
    mean, covariance = textbook(features, targets)
    deviations = np.sqrt(expected * covariance.diagonal())
    np.testing.assert_allclose(draws.mean(0), mean, atol=0.12 * deviations.max() + 1e-6)
    np.testing.assert_allclose(np.cov(draws.T), expected * covariance, atol=0.12 * np.square(deviations).max() + 1e-12)


def test_before_anything_is_known_the_prior_is_drawn_from():
    draws = torch.stack([ThompsonSampling().draw(None, WIDTH, seed, 0) for seed in range(1500)])
    assert draws.dtype == torch.float32
    np.testing.assert_allclose(np.cov(draws.numpy().T), PRIOR * np.eye(WIDTH), atol=3.5)


def test_a_draw_is_of_its_seed_and_epoch():
    sums, sampling = regression((*drawn(12), 1)), ThompsonSampling()
    assert torch.equal(sampling.draw(sums, WIDTH, 3, 5), sampling.draw(sums, WIDTH, 3, 5))
    for other in ((4, 5), (3, 6)):
        assert not torch.equal(sampling.draw(sums, WIDTH, 3, 5), sampling.draw(sums, WIDTH, *other))


def test_targets_are_opposite_but_for_one_shift():
    outliers = torch.tensor([True, False, True])
    shifts = []
    for seed in range(1000):
        high, low, again = ThompsonSampling().targets(outliers, seed).tolist()
        assert high == again
        assert high - low == pytest.approx(7.8)
        shifts.append((high + low) / 2)
    assert np.mean(shifts) == pytest.approx(0, abs=0.08)
    assert np.var(shifts) == pytest.approx(NOISE, rel=0.15)


@pytest.mark.parametrize("count", [1, 10, 50])
def test_the_least_are_chosen_in_order(count):
    features, boundary = drawn(50)[0], drawn(1, seed=3)[0][0]
    scores = (features @ boundary).abs()
    rows = least(scores, count)
    assert rows.tolist() == sorted(np.argsort(scores.numpy())[:count].tolist())


def test_features_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="some features are not finite, training has diverged"):
        regression((torch.full((2, WIDTH), torch.nan), torch.ones(2), 1)).posterior(PRIOR, NOISE)


@pytest.mark.parametrize("options", [{"prior_variance": 0.0}, {"noise_variance": -1.0}, {"covariance_scale": -1.0}])
def test_variances_that_are_none_are_refused(options):
    with pytest.raises(ValueError, match="variances must be above 0 and their scale at least 0"):
        ThompsonSampling(**options)
