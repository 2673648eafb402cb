import logging

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance

from lightning_modules.evidence import Evidence
from lightning_modules.scores.relative_mahalanobis import RelativeMahalanobis


def evidence(features, num_classes=3):
    return Evidence(torch.zeros(len(features), num_classes), {"penultimate": features}, {}, None)


def fit(score, features, labels, num_classes=3):
    score.to(features.dtype)
    for rows in torch.arange(len(features)).split(64):
        score.update(evidence(features[rows], num_classes), labels[rows])
    score.finalize()
    return score


def draw(n, width, num_classes=3, condition=1.0, scale=1.0, offset=0.0, seed=0):
    """Gaussian classes with one covariance of the given condition number, values that float32 holds exactly."""
    rng = np.random.default_rng(seed)
    means = scale * rng.normal(size=(num_classes, width)) + offset
    rotation, _ = np.linalg.qr(rng.normal(size=(width, width)))
    labels = rng.integers(num_classes, size=n)
    noise = rng.normal(size=(n, width)) * np.logspace(0, -np.log10(condition) / 2, width) @ rotation.T
    return torch.from_numpy((means[labels] + noise).astype(np.float32)).double(), torch.from_numpy(labels)


def distances(features, mean, precision):
    return np.einsum("nd,de,ne->n", features - mean, precision, features - mean)


def reference(features, labels, queries):
    """Nearest class's distance, and the one to everything."""
    features, labels, queries = features.numpy(), labels.numpy(), queries.numpy()
    means = np.stack([features[labels == c].mean(0) for c in range(labels.max() + 1)])
    within = EmpiricalCovariance(assume_centered=True).fit(features - means[labels]).precision_
    everything = EmpiricalCovariance().fit(features)
    nearest = np.min([distances(queries, mean, within) for mean in means], 0)
    return nearest, distances(queries, everything.location_, everything.precision_)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_equals_scikit_learn(normalize, scale):
    features, labels = draw(400, 8, scale=scale)
    queries = draw(50, 8, scale=scale, seed=1)[0]
    unit = (lambda z: z / z.norm(dim=1, keepdim=True)) if normalize else (lambda z: z)
    nearest, everything = reference(unit(features), labels, unit(queries))
    actual = fit(RelativeMahalanobis(normalize=normalize), features, labels)(evidence(queries))
    np.testing.assert_allclose(actual.numpy(), nearest - everything, rtol=1e-10, atol=1e-10)


def long_distances(offsets, rows):
    """Mahalanobis distances of (N, D) offsets under the covariance of (M, D) centred rows, in 80 bits."""
    offsets, matrix = offsets.T.copy(), rows.T @ rows / len(rows)
    for i in range(len(matrix)):  # eliminate below the diagonal: offsets become L^-1 offsets times its diagonal
        factors = matrix[i + 1 :, i] / matrix[i, i]
        matrix[i + 1 :] -= np.outer(factors, matrix[i])
        offsets[i + 1 :] -= np.outer(factors, offsets[i])
    return (offsets**2 / matrix.diagonal()[:, None]).sum(0)


def long_reference(features, labels, queries):
    """The same as ``reference``, which at condition number 1e8 is wrong by 1e-8 itself."""
    features, queries, labels = features.numpy().astype(np.longdouble), queries.numpy(), labels.numpy()
    means = np.stack([features[labels == c].mean(0) for c in range(labels.max() + 1)])
    within = np.min([long_distances(queries - mean, features - means[labels]) for mean in means], 0)
    return within, long_distances(queries - features.mean(0), features - features.mean(0))


@pytest.mark.parametrize("scale", [1e-4, 1e-3, 1.0])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_condition_number_1e8(scale, offset):
    features, labels = draw(1300, 48, condition=1e8, scale=scale, offset=offset)
    features, labels, queries = features[:-100], labels[:-100], features[-100:]
    nearest, everything = long_reference(features, labels, queries)
    double = fit(RelativeMahalanobis(), features, labels)(evidence(queries)).numpy()
    single = fit(RelativeMahalanobis(), features.float(), labels)(evidence(queries.float())).double().numpy()
    # Relative to the distances: their difference may be 0.
    assert (np.abs(double - (nearest - everything)) / nearest).max() < 1e-8
    assert (np.abs(single - (nearest - everything)) / nearest).max() < 1e-3


def test_no_class_stands_out_where_there_is_one():
    features, labels = draw(100, 4, num_classes=1)
    assert not fit(RelativeMahalanobis(), features, labels, num_classes=1)(evidence(features, 1)).any()


def test_absent_and_single_sample_classes():
    features, labels = draw(200, 4, num_classes=2)
    features, labels = torch.cat([features, torch.full((1, 4), 5.0).double()]), torch.cat([labels, torch.tensor([3])])
    nearest, everything = reference(features, torch.where(labels == 3, 2, labels), features)
    actual = fit(RelativeMahalanobis(), features, labels, num_classes=5)(evidence(features, 5))
    np.testing.assert_allclose(actual.numpy(), nearest - everything, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", ["constant", "wide", "zero"])
def test_singular_covariance(case, dtype, caplog):
    features, labels = draw(20 if case == "wide" else 200, 40 if case == "wide" else 6)
    if case == "constant":
        features[:, 2] = 0.7
    elif case == "zero":
        features[:, 1], features[0] = 0, 0
    with caplog.at_level(logging.WARNING):
        score = fit(RelativeMahalanobis(normalize=case == "zero"), features.to(dtype), labels)
    assert "of its mean variance to the diagonal" in caplog.text
    assert score(evidence(features.to(dtype))).isfinite().all()
    assert len(score.whitening) == 2  # three means span a plane


def test_half_precision_features():
    features, labels = draw(200, 6)
    score = fit(RelativeMahalanobis(), features.float(), labels)
    half = features.bfloat16()
    assert torch.equal(score(evidence(half)), score(evidence(half.float())))
