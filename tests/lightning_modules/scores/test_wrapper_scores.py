"""Scores around scores: clipped features, cluster labels, principal components."""

import math

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans as ReferenceKMeans
from sklearn.covariance import EmpiricalCovariance
from sklearn.decomposition import PCA as ReferencePCA
from sklearn.neighbors import NearestNeighbors

from lightning_modules.evidence import Evidence
from lightning_modules.scores.clipped import Clipped
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.kmeans import KMeans
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import MSP
from lightning_modules.scores.odin import ODIN
from lightning_modules.scores.pca import PCA
from lightning_modules.scores.react import ReAct

WRAPPERS = {"clipped": Clipped, "kmeans": KMeans, "pca": lambda score: PCA(score, components=2)}


def evidence(features, num_classes=3):
    return Evidence(torch.zeros(len(features), num_classes), {"penultimate": features}, {}, None)


def fit(score, features, labels=None, num_classes=3):
    score.to(features.dtype)
    labels = torch.zeros(len(features), dtype=torch.int64) if labels is None else labels
    for _ in range(score.passes):
        for rows in torch.arange(len(features)).split(64):
            score.update(evidence(features[rows], num_classes), labels[rows])
        score.finalize()
    return score


def draw(n=300, width=6, seed=0, spread=4.0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    centres = np.random.default_rng(7).normal(size=(3, width))
    features = (spread * centres[labels] + rng.normal(size=(n, width)) * np.arange(1, width + 1)).astype(np.float32)
    return torch.from_numpy(features).double(), torch.from_numpy(labels)


def unit(features):
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)


def mahalanobis(features, labels, queries):
    means = np.stack([features[labels == c].mean(0) for c in range(labels.max() + 1)])
    precision = EmpiricalCovariance(assume_centered=True).fit(features - means[labels]).precision_
    return np.min([np.einsum("nd,de,ne->n", queries - m, precision, queries - m) for m in means], 0)


@pytest.mark.parametrize("quantile", [0.6, 0.95])
def test_clipped_then_normalised_equals_scikit_learn(quantile):
    (features, labels), (queries, _) = draw(), draw(40, seed=1)
    score = fit(Clipped(Mahalanobis(normalize=True), quantile), features, labels)
    threshold = float(score.threshold)
    assert threshold == pytest.approx(np.quantile(features.numpy(), quantile), rel=2**-10)
    clipped = [unit(np.minimum(z.numpy(), threshold)) for z in (features, queries)]
    expected = mahalanobis(clipped[0], labels.numpy(), clipped[1])
    np.testing.assert_allclose(score(evidence(queries)).numpy(), expected, rtol=1e-10)


def test_clusters_instead_of_labels_equal_scikit_learn():
    (features, _), (queries, _) = draw(spread=20.0), draw(40, seed=1, spread=20.0)
    score = fit(KMeans(Mahalanobis(normalize=True)), features)
    clusters = ReferenceKMeans(3, n_init=20, random_state=5).fit(features.numpy())  # on features as they are
    expected = mahalanobis(unit(features.numpy()), clusters.labels_, unit(queries.numpy()))
    np.testing.assert_allclose(score(evidence(queries)).numpy(), expected, rtol=1e-9)
    order, other = score.centres[:, 0].argsort(), np.argsort(clusters.cluster_centers_[:, 0])
    np.testing.assert_allclose(score.centres[order].numpy(), clusters.cluster_centers_[other], rtol=1e-9)


def test_clusters_of_a_sample_find_distant_groups():
    features, labels = draw(2000, spread=40.0)
    score = fit(KMeans(Mahalanobis(), rows=100), features)
    expected = mahalanobis(features.numpy(), labels.numpy(), features.numpy())
    np.testing.assert_allclose(score(evidence(features)).numpy(), expected, rtol=1e-9)


def test_clusters_far_from_the_origin():
    features, labels = draw(spread=40.0)
    score = fit(KMeans(Mahalanobis()), (features + 1e5).float())
    relabelled = score.relabel(evidence((features + 1e5).float()), labels)
    assert len({*zip(relabelled.tolist(), labels.tolist(), strict=True)}) == 3


def test_fewer_images_than_clusters():
    with pytest.raises(ValueError, match="3 clusters among only 2 training images"):
        fit(KMeans(Mahalanobis()), torch.randn(2, 4))


def test_clusters_need_classes_to_count():
    with pytest.raises(ValueError, match="this method has none"):
        fit(KMeans(Mahalanobis()), torch.randn(9, 4), num_classes=0)


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("components", [1, 3, 6])
def test_components_equal_scikit_learn(components, normalize, whiten):
    (features, _), (queries, _) = draw(), draw(40, seed=1)
    prepare = unit if normalize else (lambda z: z)
    reference = ReferencePCA(components, whiten=whiten, svd_solver="full").fit(prepare(features.numpy()))
    score = fit(PCA(KNN(k=3), components, whiten, normalize), features)
    projected = score.transform(evidence(queries)).features["penultimate"].numpy()
    expected = reference.transform(prepare(queries.numpy()))
    np.testing.assert_allclose(np.abs(projected), np.abs(expected), rtol=1e-8, atol=1e-10)
    assert (score.directions.gather(1, score.directions.abs().argmax(1, keepdim=True)) > 0).all()
    bank, asked = unit(reference.transform(prepare(features.numpy()))), unit(expected)
    nearest, _ = NearestNeighbors(n_neighbors=3, algorithm="brute").fit(bank).kneighbors(asked)
    np.testing.assert_allclose(score(evidence(queries)).numpy(), nearest[:, -1] ** 2, rtol=1e-8, atol=1e-13)


def test_a_density_of_all_components_is_that_of_the_features_but_for_a_constant():
    (features, labels), (queries, _) = draw(), draw(40, seed=1)
    plain = fit(GMMEnergy(normalize=False), features, labels)(evidence(queries))
    score = fit(PCA(GMMEnergy(normalize=False), 6, whiten=True), features, labels)(evidence(queries))
    torch.testing.assert_close(score - score.mean(), plain - plain.mean(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("case", ["constant", "zero", "single"])
def test_degenerate_features_stay_finite(name, case):
    features, labels = draw()
    if case == "constant":
        features[:, 2] = 0.7
    elif case == "zero":
        features[0] = 0
    else:
        labels = torch.where(torch.arange(len(labels)) == 5, 2, labels % 2)
    score = fit(WRAPPERS[name](Mahalanobis(normalize=True)), features.float(), labels)
    assert score(evidence(features.float())).isfinite().all()


def test_more_features_than_images():
    features, labels = draw(20, 40)
    score = fit(PCA(Mahalanobis(), components=8, whiten=True), features, labels)
    assert score(evidence(features)).isfinite().all()
    with pytest.raises(ValueError, match="vary in 19 directions only: PCA cannot whiten 20"):
        fit(PCA(Mahalanobis(), components=20, whiten=True), features, labels)
    with pytest.raises(ValueError, match="has 40 features, too few for 41 components"):
        fit(PCA(Mahalanobis(), components=41), features, labels)


@pytest.mark.parametrize("name", WRAPPERS)
def test_not_a_number_is_refused(name):
    if name != "clipped":  # there, the inner score finds it
        with pytest.raises(ValueError, match="NaN or infinity"):
            fit(WRAPPERS[name](KNN(k=1)), torch.full((9, 4), math.nan))


@pytest.mark.parametrize("name", WRAPPERS)
def test_only_empty_batches(name):
    score = WRAPPERS[name](Mahalanobis())
    score.update(evidence(torch.empty(0, 4)), torch.empty(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"only empty batches|at least 2 training images|no training data"):
        score.finalize()


@pytest.mark.parametrize("name", WRAPPERS)
def test_what_cannot_be_wrapped_is_refused_in_words(name):
    with pytest.raises(ValueError, match="MSP does not read: it reads no features"):
        WRAPPERS[name](MSP())
    with pytest.raises(ValueError, match="ODIN makes its own from the images"):
        WRAPPERS[name](ODIN())


def test_a_head_needs_all_features():
    with pytest.raises(ValueError, match="ReAct classifies the features"):
        PCA(ReAct())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clipped(KNN(), quantile=0), r"must lie in \(0, 1\], not be 0"),
        (lambda: KMeans(KNN(), rows=0), "at least 1 training image"),
        (lambda: PCA(KNN(), components=0), "at least 1 component, not 0"),
    ],
)
def test_options_out_of_range(make, message):
    with pytest.raises(ValueError, match=message):
        make()
