"""The weighted score of the latent space, against numpy and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from lightning_modules.evidence import Evidence
from lightning_modules.scores.class_density import ClassDensity
from lightning_modules.scores.weighted_density import ERROR, WeightedDensity

CLASSES, WIDTH = 3, 4


def draw(number=200, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % CLASSES
    noise, errors = torch.randn(number, WIDTH, generator=generator), torch.rand(number, 1, generator=generator)
    return (2 * labels[:, None] + noise).double(), errors.double() + 0.01, labels


def observe(features, errors):
    logits = torch.zeros(len(features), CLASSES)
    return Evidence(logits, {"layer1": features[:, :1], "latent": features[:, 1:], ERROR: errors}, {}, None)


def fit(features, errors, labels, batches=None, jitter=None):
    score = WeightedDensity(ClassDensity(["layer1", "latent"], jitter=jitter)).double()
    for _ in range(score.passes):
        for rows in batches or torch.arange(len(labels)).split(32):
            score.update(observe(features[rows], errors[rows]), labels[rows])
        score.finalize()
    return score


def log_likelihoods(features, labels, queries):
    columns = []
    for label in range(CLASSES):
        rows = features[labels == label].numpy()
        gaussian = MultivariateNormal(torch.from_numpy(rows.mean(0)), torch.from_numpy(np.cov(rows.T, bias=True)))
        columns.append(gaussian.log_prob(queries).numpy())
    return np.max(columns, axis=0)


def test_score_is_the_formula_with_the_maxima_of_the_training_images():
    (features, errors, labels), (queries, others, _) = draw(), draw(seed=1)
    ceiling = log_likelihoods(features, labels, features).max()
    likely = log_likelihoods(features, labels, queries)
    expected = others.squeeze(1).numpy() / errors.numpy().max() * (1 - np.minimum(likely - ceiling, 0))
    found = fit(features, errors, labels)(observe(queries, others))
    assert found.shape == (200,)
    np.testing.assert_allclose(found, expected, rtol=1e-8)


def test_more_error_and_less_likelihood_are_more_ood():
    features, errors, labels = draw()
    score = fit(features, errors, labels)
    point = features[:1].expand(50, -1)
    assert (score(observe(point, torch.linspace(0.01, 9, 50, dtype=torch.float64)[:, None])).diff() > 0).all()
    away = point + torch.linspace(0, 50, 50, dtype=torch.float64)[:, None]
    likely = torch.from_numpy(log_likelihoods(features, labels, away))
    scores = score(observe(away, torch.full((50, 1), 0.3, dtype=torch.float64)))[likely.argsort()]
    assert (scores.diff() <= 0).all()
    assert (scores > 0).all()


def test_a_likelihood_above_the_ceiling_does_not_turn_the_sign():
    features, errors, labels = draw()
    score = fit(features, errors, labels)
    centre = score.density.means[score.density.log_scale.argmax()][None]
    assert -float(score.density(observe(centre, errors[:1]))) > float(score.ceiling)
    low, high = (float(score(observe(centre, torch.tensor([[error]], dtype=torch.float64)))) for error in (0.1, 0.2))
    assert 0 < low < high


def test_score_of_an_image_does_not_depend_on_the_others():
    features, errors, labels = draw()
    score, (queries, others, _) = fit(features, errors, labels), draw(seed=1)
    among = score(observe(queries, others))
    for row in (0, 77):
        alone = score(observe(queries[row : row + 1], others[row : row + 1]))
        torch.testing.assert_close(alone, among[row : row + 1], rtol=1e-10, atol=0)


def test_it_takes_two_passes():
    features, errors, labels = draw()
    score = WeightedDensity(ClassDensity(["layer1", "latent"])).double()
    assert score.taps == {"layer1", "latent", ERROR}
    for passes_left in (2, 1):
        assert score.passes_left == passes_left
        with pytest.raises(RuntimeError, match="WeightedDensity is not fitted: it needs 2"):
            score(observe(features, errors))
        score.update(observe(features, errors), labels)
        score.finalize()
    assert score.fitted


def test_any_batches_fit_the_same():
    whole = fit(*draw()).state_dict()
    empty = torch.arange(0)
    parts = fit(*draw(), batches=[torch.arange(0, 150), empty, torch.arange(150, 200)]).state_dict()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value, rtol=1e-9, atol=1e-9)


def test_a_saved_score_needs_no_images(tmp_path):
    fitted, (queries, others, _) = fit(*draw()), draw(seed=1)
    torch.save(fitted.state_dict(), tmp_path / "score.pt")
    fresh = WeightedDensity(ClassDensity(["layer1", "latent"])).double()
    fresh.load_state_dict(torch.load(tmp_path / "score.pt", weights_only=True))
    assert torch.equal(fresh(observe(queries, others)), fitted(observe(queries, others)))


@pytest.mark.parametrize("broken", [math.nan, math.inf, 0.0])
def test_errors_that_cannot_weigh_are_refused(broken):
    features, errors, labels = draw()
    errors = errors * 0 if broken == 0 else errors.index_fill(0, torch.tensor([7]), broken)
    with pytest.raises(ValueError, match=rf"and {broken}, are to weigh others and cannot"):
        fit(features, errors, labels)
