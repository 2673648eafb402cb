import logging
import math

import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal

from lightning_modules.evidence import Evidence
from lightning_modules.scores.gaussian import ClassStatistics, Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy, log_sum_exp


def evidence(features, num_classes=3):
    return Evidence(torch.zeros(len(features), num_classes), {"penultimate": features}, {}, None)


def fit(score, features, labels, num_classes=3, batch=64):
    score.to(features.dtype)
    for rows in torch.arange(len(features)).split(batch):
        score.update(evidence(features[rows], num_classes), labels[rows])
    score.finalize()
    return score


def draw(n, width, num_classes=3, condition=1.0, scale=1.0, offset=0.0, seed=0):
    """Gaussian classes with one covariance of the given condition number; values that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, width, dtype=torch.float64, generator=generator)
    means = scale * torch.randn(num_classes, width, dtype=torch.float64, generator=generator) + offset
    rotation, _ = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64, generator=generator))
    labels = torch.randint(num_classes, (n,), generator=generator)
    deviations = torch.logspace(0, -math.log10(condition) / 2, width, dtype=torch.float64)
    return (means[labels] + noise * deviations @ rotation.T).float().double(), labels


def reference_parameters(features, labels, num_classes=3):
    means = torch.stack([features[labels == c].mean(0) for c in range(num_classes)])
    fitted = EmpiricalCovariance(assume_centered=True).fit((features - means[labels]).numpy())
    shares = torch.tensor([(labels == c).double().mean() for c in range(num_classes)])
    return shares, means, torch.from_numpy(fitted.covariance_), torch.from_numpy(fitted.precision_)


def reference_mahalanobis(features, labels, queries, num_classes=3):
    _, means, _, precision = reference_parameters(features, labels, num_classes)
    return torch.stack([((queries - m) @ precision * (queries - m)).sum(1) for m in means]).amin(0)


def unit(features):
    return features / features.square().sum(1, keepdim=True).sqrt()


@pytest.mark.parametrize("normalize", [False, True])
def test_mahalanobis_equals_sklearn(normalize):
    features, labels = draw(400, 8)
    queries = draw(50, 8, seed=1)[0]
    prepare = unit if normalize else lambda z: z
    expected = reference_mahalanobis(prepare(features), labels, prepare(queries))
    score = fit(Mahalanobis(normalize=normalize), features, labels)
    torch.testing.assert_close(score(evidence(queries)), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
def test_gmm_energy_equals_torch_distributions(normalize):
    features, labels = draw(400, 8, scale=0.5)
    queries = draw(50, 8, scale=0.5, seed=1)[0]
    prepare = unit if normalize else lambda z: z
    shares, means, covariance, _ = reference_parameters(prepare(features), labels)
    mixture = MixtureSameFamily(Categorical(shares), MultivariateNormal(means, covariance))
    score = fit(GMMEnergy(normalize=normalize), features, labels)
    torch.testing.assert_close(score(evidence(queries)), -mixture.log_prob(prepare(queries)), rtol=1e-10, atol=1e-10)
    single = fit(GMMEnergy(normalize=normalize), features.float(), labels)
    assert single(evidence(queries.float())).dtype == torch.float32
    torch.testing.assert_close(single(evidence(queries)).double(), score(evidence(queries)), rtol=1e-4, atol=1e-4)


def test_gmm_energy_gradient():
    score = fit(GMMEnergy(normalize=False), *draw(200, 4, scale=0.5))
    queries = draw(6, 4, seed=2)[0].requires_grad_()
    assert torch.autograd.gradcheck(score.energy, queries)


def test_density_integrates_to_one():
    score = fit(GMMEnergy(normalize=False), *draw(300, 2, scale=2.0))
    axis = torch.linspace(-14, 14, 701, dtype=torch.float64)
    density = (-score(evidence(torch.cartesian_prod(axis, axis)))).exp()
    assert density.sum() * (axis[1] - axis[0]) ** 2 == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-3, 1.0])
@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_condition_number_1e8(scale, offset):
    features, labels = draw(3000, 48, condition=1e8, scale=scale, offset=offset)
    features, labels, queries = features[:-300], labels[:-300], features[-300:]
    expected = reference_mahalanobis(features, labels, queries)
    double = fit(Mahalanobis(), features, labels)(evidence(queries))
    torch.testing.assert_close(double, expected, rtol=1e-8, atol=0)
    single = fit(Mahalanobis(), features.float(), labels)(evidence(queries.float()))
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=0)


def test_gmm_energy_at_condition_number_1e8():
    features, labels = draw(3000, 48, condition=1e8, offset=100.0)
    features, labels, queries = features[:-300], labels[:-300], features[-300:]
    shares, means, covariance, precision = reference_parameters(features, labels)
    offsets = queries[:, None] - means
    exponents = shares.log() - torch.einsum("bkd,de,bke->bk", offsets, precision, offsets) / 2
    log_scale = (48 * math.log(2 * math.pi) + torch.linalg.eigvalsh(covariance).log().sum()) / 2
    expected = log_scale - exponents.logsumexp(1)
    double = fit(GMMEnergy(normalize=False), features, labels)(evidence(queries))
    torch.testing.assert_close(double, expected, rtol=1e-8, atol=0)
    single = fit(GMMEnergy(normalize=False), features.float(), labels)(evidence(queries.float()))
    torch.testing.assert_close(single.double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_sum_exp_equals_torch(dtype):
    terms = torch.linspace(0, 300, 60, dtype=dtype).view(6, 10)
    terms = torch.cat([terms, terms[:, :1] + torch.tensor([[1e-3, -1e3, -math.inf]]), terms.flip(0)], 1).double()
    torch.testing.assert_close(log_sum_exp(terms.to(dtype)).double(), terms.logsumexp(1), rtol=5e-7, atol=0)
    torch.testing.assert_close(log_sum_exp(terms), terms.logsumexp(1), rtol=1e-15, atol=0)


def test_weights_are_class_shares():
    labels = torch.tensor([0] * 6 + [1] * 3 + [2])
    score = fit(GMMEnergy(normalize=False), draw(10, 2)[0], labels, batch=4)
    torch.testing.assert_close(score.log_prior.exp(), torch.tensor([0.6, 0.3, 0.1]).double())


def test_far_offset_does_not_cancel():
    features, labels = draw(500, 4)
    near, far = ClassStatistics(3, 4, torch.device("cpu")), ClassStatistics(3, 4, torch.device("cpu"))
    for rows in torch.arange(500).split(9):
        near.update((features[rows] + 2.0**26) - 2.0**26, labels[rows])
        far.update(features[rows] + 2.0**26, labels[rows])
    torch.testing.assert_close(far.scatter, near.scatter, rtol=1e-6, atol=1e-5)


def test_state_does_not_grow_with_the_data():
    statistics = ClassStatistics(3, 5, torch.device("cpu"))
    features, labels = draw(300, 5)
    for rows in torch.arange(300).split(10):
        statistics.update(features[rows], labels[rows])
        assert sum(tensor.numel() for tensor in vars(statistics).values()) == 3 + 3 * 5 + 5 * 5


@pytest.mark.parametrize("label", [-1, 3])
def test_foreign_label(label):
    with pytest.raises(ValueError, match=rf"labels must lie in 0..2, this batch also holds \[{label}\]"):
        Mahalanobis().update(evidence(torch.zeros(2, 4)), torch.tensor([0, label]))


@pytest.mark.parametrize("make", [Mahalanobis, GMMEnergy])
def test_absent_and_single_sample_classes(make):
    features, labels = draw(200, 4, num_classes=2)
    features, labels = torch.cat([features, 5 * torch.ones(1, 4).double()]), torch.cat([labels, torch.tensor([3])])
    score, queries = make(normalize=False), features[-5:].clone().requires_grad_()
    actual = fit(score, features, labels, num_classes=5)(evidence(queries))
    compact = torch.where(labels == 3, 2, labels)
    expected = fit(make(normalize=False), features, compact)(evidence(queries))
    torch.testing.assert_close(actual, expected)
    assert torch.autograd.grad(actual.sum(), queries)[0].isfinite().all()
    assert score.distances(queries)[:, [2, 4]].isposinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["constant", "twin", "wide", "zero"])
def test_singular_covariance_is_lifted_and_logged(case, dtype, caplog):
    features, labels = draw(20 if case == "wide" else 200, 40 if case == "wide" else 6)
    if case == "constant":
        features[:, 2] = 0.7
    elif case == "twin":
        features[:, 2] = features[:, 3]
    elif case == "zero":
        features[:, 1], features[0] = 0, 0
    with caplog.at_level(logging.WARNING, "lightning_modules.scores.gaussian"):
        score = fit(Mahalanobis(normalize=case == "zero"), features.to(dtype), labels)
    assert "of its mean variance to the diagonal" in caplog.text
    training = score(evidence(features.to(dtype)))
    assert training.isfinite().all()
    assert training.median() < len(features.T) * 2
    assert score(evidence(features.to(dtype) + 100 * torch.randn_like(features[:1]).to(dtype))).min() > training.max()


def test_regular_covariance_is_left_alone(caplog):
    fit(Mahalanobis(), *draw(2000, 20, condition=1e8))
    assert not caplog.records


@pytest.mark.parametrize(
    ("features", "message"),
    [(torch.ones(9, 3), "do the features vary within the classes"), (torch.full((9, 3), math.nan), "NaN or infinity")],
)
def test_hopeless_features(features, message):
    with pytest.raises(ValueError, match=message):
        fit(Mahalanobis(), features, torch.arange(9) % 3)


def test_only_empty_batches():
    score = Mahalanobis()
    score.update(evidence(torch.empty(0, 4)), torch.empty(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="only empty batches"):
        score.finalize()
