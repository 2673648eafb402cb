"""Energies of features: what a residual corrects and chains start from and descend."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp
from scipy.stats import multivariate_normal, spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn
from torch.nn import functional as F

from backbones import weights
from backbones.backbone import Backbone
from backbones.residual_energy import ResidualEnergy
from lightning_modules.evidence import Evidence
from lightning_modules.scores.activations import DICE
from lightning_modules.scores.clipped import Clipped
from lightning_modules.scores.composition import Composition
from lightning_modules.scores.energy import FeatureEnergy
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.hybrid_energy import HybridEnergy
from lightning_modules.scores.kmeans import KMeans
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import MSP, Energy, MaxLogit
from lightning_modules.scores.odin import ODIN
from lightning_modules.scores.pca import PCA
from lightning_modules.scores.prototypes import Cosine, KLMatching
from lightning_modules.scores.relative_mahalanobis import RelativeMahalanobis

COUNTS = (300, 200, 100)


class Net(Backbone):
    """Its features are its images."""

    def __init__(self, num_features=5, num_classes=3):
        super().__init__(num_features, num_classes, (1, 1, num_features))
        self.fc = nn.Linear(num_features, num_classes)
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for parameter in self.fc.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))

    def stem(self, images):
        return images.flatten(1)


def evidence(features, backbone=None, num_classes=3):
    logits = torch.zeros(len(features), num_classes) if backbone is None else backbone.head(features).detach()
    return Evidence(logits, {"penultimate": features}, {}, None)


def draw(counts=COUNTS, width=5, scale=2.0, seed=0):
    """Correlated Gaussian classes of these sizes, in float64 numbers that float32 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    means = scale * torch.randn(len(counts), width, dtype=torch.float64, generator=generator)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=generator) / width**0.5
    noise = torch.randn(len(labels), width, dtype=torch.float64, generator=generator)
    return (means[labels] + noise @ mixing).float().double(), labels


def fit(score, features, labels, backbone=None, num_classes=3):
    score = score.to(features.dtype)
    score.bind(backbone)
    while not score.fitted:
        for rows in torch.arange(len(features)).split(97):
            score.update(evidence(features[rows], backbone, num_classes), labels[rows])
        score.finalize()
    return score


def gaussians(features, labels):
    """Shares, means and the biased pooled covariance, one sample after the other."""
    features, labels = features.numpy(), labels.numpy()
    classes = np.unique(labels)
    means = [features[labels == c].mean(0) for c in classes]
    covariance = np.zeros((features.shape[1],) * 2)
    for row, label in zip(features, labels, strict=True):
        offset = row - means[list(classes).index(label)]
        covariance += np.outer(offset, offset) / len(features)
    return [np.mean(labels == c) for c in classes], means, covariance


def mixture_energy(parameters, queries):
    shares, means, covariance = parameters
    terms = [np.log(s) + multivariate_normal(m, covariance).logpdf(queries) for s, m in zip(shares, means, strict=True)]
    return -logsumexp(terms, axis=0)


def differences(energy, features, step=1e-5):
    """Gradient (B, D) of a function of (B, D) float64 arrays by central differences."""
    shifts = step * np.eye(features.shape[1])
    features = features.numpy()
    return np.stack([(energy(features + s) - energy(features - s)) / (2 * step) for s in shifts], 1)


# The mixture of Gaussians


def test_energy_of_float32_equals_the_density_of_scipy():
    (features, labels), queries = draw(), draw(seed=1)[0][::12]
    score = fit(GMMEnergy(normalize=False), features.float(), labels)
    expected = mixture_energy(gaussians(features, labels), queries.numpy())
    np.testing.assert_allclose(score.energy(queries.float()).numpy(), expected, rtol=1e-4, atol=1e-4)


def test_energy_of_a_class_is_that_of_its_gaussian():
    (features, labels), queries = draw(), draw(seed=1)[0][::12]
    score, (_, means, covariance) = fit(GMMEnergy(normalize=False), features, labels), gaussians(features, labels)
    classes = torch.arange(len(queries)) % 3
    expected = [-multivariate_normal(means[c], covariance).logpdf(z) for z, c in zip(queries, classes, strict=True)]
    np.testing.assert_allclose(score.class_energy(queries, classes).numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize("normalize", [False, True])
def test_closed_gradients_are_those_of_finite_differences(normalize):
    features, labels = draw(scale=0.7)
    score = fit(GMMEnergy(normalize=normalize), features, labels)
    queries = score.embed(evidence(features[::25]))
    parameters = gaussians(score.embed(evidence(features)), labels)
    expected = differences(lambda z: mixture_energy(parameters, z), queries)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(score.gradient(queries).numpy(), expected, rtol=1e-6, atol=1e-8 * scale)
    single = fit(GMMEnergy(normalize=normalize), features.float(), labels).gradient(queries.float())
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-3, atol=1e-4 * scale)
    _, means, covariance = parameters
    for c in range(3):
        expected = differences(lambda z, c=c: -multivariate_normal(means[c], covariance).logpdf(z), queries)
        actual = score.gradient(queries, torch.full((len(queries),), c))
        np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-6, atol=1e-8 * scale)


def test_gradient_far_from_all_means_still_tells_the_classes_apart():
    """Two unit Gaussians; far away and as far from both, each takes half of the responsibility."""
    labels = torch.arange(2000) % 2
    noise = torch.randn(1000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    noise -= noise.mean(0)
    whitened = noise @ torch.linalg.inv(torch.linalg.cholesky(noise.T @ noise / 1000)).T
    features = whitened.repeat_interleave(2, 0) + torch.stack([2.0 * labels - 1, 0 * labels], 1)
    score = fit(GMMEnergy(normalize=False), features.float(), labels, num_classes=2)
    queries = torch.tensor([[0.0, 1e4], [0.2, 1e4], [-0.2, -1e4]])
    expected = queries[:, 0] - queries[:, 0].tanh()  # the mean of the two means, by responsibility
    torch.testing.assert_close(score.gradient(queries)[:, 0], expected, rtol=0, atol=0.02)


def moments(draws, classes, number):
    means = torch.stack([draws[classes == c].mean(0) for c in range(number)])
    residuals = draws - means[classes]
    return classes.bincount(minlength=number) / len(draws), means, residuals.T @ residuals / len(draws)


def test_draws_have_the_frequencies_means_and_covariance_of_the_mixture():
    torch.manual_seed(0)
    features, labels = draw()
    classes, draws = fit(GMMEnergy(normalize=False), features.float(), labels).sample(200_000)
    assert draws.dtype == torch.float32
    shares, means, covariance = map(torch.tensor, map(np.array, gaussians(features, labels)))
    actual_shares, actual_means, actual_covariance = moments(draws.double(), classes, 3)
    torch.testing.assert_close(actual_shares.double(), shares, rtol=0, atol=5 * (0.25 / 200_000) ** 0.5)
    deviation = covariance.diagonal().max().sqrt()
    torch.testing.assert_close(actual_means, means, rtol=0, atol=5 * float(deviation) / 33_000**0.5)
    noise = (2 / 200_000) ** 0.5 * float(covariance.diagonal().max())
    torch.testing.assert_close(actual_covariance, covariance, rtol=0, atol=5 * noise)


def test_draws_with_given_shares():
    torch.manual_seed(0)
    score = fit(GMMEnergy(normalize=False), *draw())
    classes, draws = score.sample(20_000, torch.tensor([0.0, 1.0, 3.0]))
    torch.testing.assert_close(classes.bincount() / 20_000, torch.tensor([0, 0.25, 0.75]), rtol=0, atol=0.015)
    means = torch.tensor(np.array(gaussians(*draw())[1]))
    torch.testing.assert_close(moments(draws[classes > 0], classes[classes > 0] - 1, 2)[1], means[1:], rtol=0, atol=0.1)


def test_tempered_draws_fall_into_five_groups():
    torch.manual_seed(0)
    features, labels = draw(width=40)
    score = fit(GMMEnergy(normalize=False), features, labels)
    classes, draws = score.sample(50_000, temperature=3.0)
    _, means, covariance = gaussians(features, labels)
    offsets = draws.numpy() - np.array(means)[classes.numpy()]
    whitened = np.linalg.solve(np.linalg.cholesky(covariance), offsets.T).T
    groups = np.digitize(np.log10(np.sqrt((whitened**2).mean(1)) / 3), [-1.5, -0.5, 0.5, 1.5])
    np.testing.assert_allclose(np.bincount(groups) / 50_000, 5 * [0.2], atol=0.01)
    for group, factor in enumerate((0.01, 0.1, 1.0, 10.0, 100.0)):
        assert whitened[groups == group].std() == pytest.approx(3 * factor, rel=0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_classes_without_samples(dtype):
    torch.manual_seed(0)
    features, labels = draw((300, 200))
    score = fit(GMMEnergy(normalize=False), features.to(dtype), 2 * labels, num_classes=4)  # neither 1 nor 3
    classes, draws = score.sample(10_000)
    assert classes.bincount().tolist()[1::2] == [0]
    assert draws.isfinite().all()
    queries = features[::20]
    expected = differences(lambda z: mixture_energy(gaussians(features, labels), z), queries)
    np.testing.assert_allclose(score.gradient(queries.to(dtype)).numpy(), expected, rtol=1e-4, atol=1e-4)
    absent = torch.tensor([0, 3])
    for use in (
        lambda: score.sample(100, torch.tensor([0.5, 0.0, 0.0, 0.5])),
        lambda: score.class_energy(features[:2].to(dtype), absent),
        lambda: score.gradient(features[:2].to(dtype), absent),
    ):
        with pytest.raises(ValueError, match=r"no Gaussian for classes \[3\]"):
            use()


def test_fewer_samples_than_features():
    """100 images of 512 features: the Gaussians are flat in 416 directions but for what keeps the covariance regular.

    There rounded features lie as far out as others: energies of training data are right to 3 digits only, and the
    gradient along these directions is that of the rounding errors. Anywhere else both are those of float64.
    """
    torch.manual_seed(0)
    features, labels = F.normalize(torch.rand(100, 512), dim=1), torch.arange(100) % 4
    rows = features.double()
    exact, score = (fit(GMMEnergy(normalize=False), data, labels, num_classes=4) for data in (rows, features))
    classes, draws = score.sample(5000)
    assert draws.isfinite().all()
    means = torch.stack([rows[labels == c].mean(0) for c in range(4)])
    offsets, spread = draws.double() - means[classes], float((rows - means[labels]).square().sum()) / 100
    assert offsets.square().sum(1).mean() == pytest.approx(spread, rel=0.05)
    basis = torch.linalg.svd(rows - means[labels], full_matrices=False).Vh[:96]
    assert (offsets - offsets @ basis.T @ basis).norm(dim=1).max() < 1e-5 * spread**0.5
    torch.testing.assert_close(score.energy(features).double(), exact.energy(rows), rtol=5e-3, atol=0)
    assert score.gradient(features).isfinite().all()
    outside = features + 1e-3 * torch.randn(100, 512)
    torch.testing.assert_close(score.energy(outside).double(), exact.energy(outside.double()), rtol=1e-4, atol=0)
    expected = exact.gradient(outside.double())
    assert ((score.gradient(outside) - expected).norm(dim=1) < 1e-4 * expected.norm(dim=1)).all()


def test_features_that_are_always_zero():
    """Energies and gradients of float32 are those of float64 where some features do not vary at all."""
    torch.manual_seed(0)
    features, labels = torch.rand(600, 40), torch.arange(600) % 4
    features[:, :7] = 0
    features = F.normalize(features, dim=1)
    exact, score = (fit(GMMEnergy(normalize=False), x, labels, num_classes=4) for x in (features.double(), features))
    _, draws = score.sample(1000)
    assert draws[:, :7].abs().max() < 1e-6
    for queries in (features, draws, features + 1e-3 * torch.randn(600, 40)):
        torch.testing.assert_close(score.energy(queries).double(), exact.energy(queries.double()), rtol=1e-4, atol=1e-4)
        expected = exact.gradient(queries.double())
        assert ((score.gradient(queries) - expected).norm(dim=1) < 1e-4 * expected.norm(dim=1)).all()


def test_reduced_matrix_products_change_nothing():
    features, labels = draw(width=64)
    score = fit(GMMEnergy(normalize=False), features.float(), labels)
    exact = score(evidence(features.float()))
    chosen = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        assert torch.equal(score(evidence(features.float())), exact)
    finally:
        torch.set_float32_matmul_precision(chosen)


# Scores of logits and features


def numpy_energies(head):
    """Scores of (B, D) features as functions of NumPy arrays."""
    weight, bias = head.weight.detach().double().numpy(), head.bias.detach().double().numpy()

    def unit(rows):
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)

    def softmax(z):
        return np.exp(z @ weight.T + bias - logsumexp(z @ weight.T + bias, axis=1, keepdims=True))

    return {
        "msp": lambda z: -softmax(z).max(1),
        "max_logit": lambda z: -(z @ weight.T + bias).max(1),
        "energy": lambda z: -logsumexp(z @ weight.T + bias, axis=1),
        "cosine": lambda z: -logsumexp(unit(z) @ unit(weight).T, axis=1),
        "dice": lambda z: -logsumexp(z @ dice_weight(weight).T + bias, axis=1),
        "kl_matching": lambda z: kl_matching(softmax(z), softmax(draw()[0].numpy())),
    }


def dice_weight(weight):
    contributions = weight * draw()[0].numpy().mean(0)
    return weight * (contributions > np.percentile(contributions, 40))


def kl_matching(probabilities, training):
    predicted = training.argmax(1)
    templates = [training[predicted == c].mean(0) for c in np.unique(predicted)]
    return np.min([(probabilities * np.log(probabilities / t)).sum(1) for t in templates], axis=0)


FEATURE_ENERGIES = {
    "msp": MSP,
    "max_logit": MaxLogit,
    "energy": Energy,
    "cosine": Cosine,
    "dice": lambda: DICE(percentile=40),
    "kl_matching": KLMatching,
}


def feature_energy(name, backbone):
    return fit(FeatureEnergy(FEATURE_ENERGIES[name]()), *draw(), backbone)


@pytest.mark.parametrize("name", FEATURE_ENERGIES)
def test_feature_energies_and_their_gradients_equal_those_of_numpy(name):
    backbone = Net().double()
    score, expected = feature_energy(name, backbone), numpy_energies(backbone.head)[name]
    queries = draw(seed=3)[0][::30]
    np.testing.assert_allclose(score.energy(queries).numpy(), expected(queries.numpy()), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(score(evidence(queries, backbone)).numpy(), expected(queries.numpy()), rtol=1e-9)
    slopes = differences(expected, queries)
    assert np.abs(slopes).max() > 1e-3
    np.testing.assert_allclose(score.gradient(queries).numpy(), slopes, rtol=1e-5, atol=1e-8)
    assert torch.equal(score.embed(evidence(queries)), queries)
    assert not score.unit_length


@pytest.mark.parametrize("name", FEATURE_ENERGIES)
def test_feature_energies_are_saved_with_the_head(name):
    backbone = Net().double()
    score, queries = feature_energy(name, backbone), draw(seed=3)[0]
    expected = score.energy(queries)
    with torch.no_grad():
        backbone.fc.weight.zero_()
    other = FeatureEnergy(FEATURE_ENERGIES[name]()).double()
    other.load_state_dict(score.state_dict())
    assert torch.equal(score.energy(queries), expected)
    assert torch.equal(other.energy(queries), expected)
    assert not list(score.parameters())


def test_what_is_no_energy_of_features_is_refused():
    with pytest.raises(ValueError, match="ODIN runs the network on images"):
        FeatureEnergy(ODIN())
    with pytest.raises(ValueError, match="KNN reads std, not only logits"):
        FeatureEnergy(KNN(tap="std"))
    with pytest.raises(RuntimeError, match="holds no classifier yet: call bind first"):
        FeatureEnergy(Energy())(evidence(torch.ones(2, 5)))
    with pytest.raises(ValueError, match="needs a method with a classifier"):
        FeatureEnergy(Energy()).bind(None)


def test_what_only_mixtures_can_is_refused():
    score = fit(FeatureEnergy(Energy()), *draw(), Net().double())
    with pytest.raises(ValueError, match="FeatureEnergy cannot be drawn from"):
        score.sample(3)
    with pytest.raises(ValueError, match="FeatureEnergy has no energy of a class"):
        score.gradient(torch.ones(2, 5).double(), torch.zeros(2, dtype=torch.int64))


@pytest.mark.parametrize("make", [Mahalanobis, RelativeMahalanobis])
def test_distances_are_energies_with_the_gradient_of_autograd(make):
    score, queries = fit(make(), *draw()), draw(seed=3)[0][::30]
    assert torch.equal(score(evidence(queries)), score.energy(queries))
    expected = differences(lambda z: score.energy(torch.from_numpy(z)).numpy(), queries)
    np.testing.assert_allclose(score.gradient(queries).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert make(normalize=True).unit_length
    assert not make().unit_length


# Scores around energies

WRAPPERS = {
    "pca": lambda: PCA(GMMEnergy(normalize=False), components=3),
    "pca_unit": lambda: PCA(GMMEnergy(), components=4),
    "kmeans": lambda: KMeans(GMMEnergy(normalize=False)),
    "clipped": lambda: Clipped(GMMEnergy(), quantile=0.9),
    "clipped_pca": lambda: PCA(Clipped(GMMEnergy(normalize=False)), components=3),
    "react": lambda: Clipped(FeatureEnergy(Energy())),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrapped_energies_are_those_of_the_inner_features(name):
    backbone = Net().double()
    score, queries = fit(WRAPPERS[name](), *draw(), backbone), evidence(draw(seed=3)[0][::30], backbone)
    embedded = score.embed(queries)
    assert embedded.shape == (20, {"pca": 3, "pca_unit": 4, "clipped_pca": 3}.get(name, 5))
    torch.testing.assert_close(score.energy(embedded), score(queries), rtol=1e-12, atol=0)
    assert score.unit_length == (name in ("pca_unit", "clipped"))
    assert torch.allclose(embedded.norm(dim=1), torch.ones(()).double()) == score.unit_length
    expected = differences(lambda z: score.energy(torch.from_numpy(z)).numpy(), embedded)
    scale = np.abs(expected).max()
    np.testing.assert_allclose(score.gradient(embedded).numpy(), expected, rtol=1e-5, atol=1e-7 * scale)


@pytest.mark.parametrize("name", [name for name in WRAPPERS if name != "react"])
def test_draws_from_wrapped_energies_lie_where_the_training_data_do(name):
    torch.manual_seed(0)
    features, labels = draw()
    score = fit(WRAPPERS[name](), features, labels, Net().double())
    embedded, (classes, draws) = score.embed(evidence(features)), score.sample(60_000)
    assert draws.shape == (60_000, embedded.shape[1])
    assert set(classes.tolist()) == {0, 1, 2}
    spread = float(embedded.std(0).max())
    torch.testing.assert_close(draws.mean(0), embedded.mean(0), rtol=0, atol=0.02 * spread)
    torch.testing.assert_close(draws.T.cov(), embedded.T.cov(), rtol=0, atol=0.05 * spread**2)
    assert set(score.sample(50, torch.tensor([0.0, 1.0, 0.0]))[0].tolist()) == {1}
    assert score.sample(2000, temperature=50.0)[1].std() > 5 * draws.std()


def test_a_wrapper_around_what_is_no_energy_scores_all_the_same_but_is_no_prior():
    score = fit(PCA(KNN(k=3), components=3), *draw())
    assert score(evidence(draw(seed=3)[0])).shape == (600,)
    for use in (score.embed, score.energy, score.gradient, score.sample):
        with pytest.raises(ValueError, match="KNN is no energy of features, and so PCA around it is none either"):
            use(evidence(draw(seed=3)[0]))
    with pytest.raises(ValueError, match="KNN is no energy"):
        HybridEnergy(PCA(KNN()), ResidualEnergy(5))


# Prior and residual


PRIORS = {
    "gmm": GMMEnergy,
    "el": lambda: FeatureEnergy(Energy()),
    "kl": lambda: FeatureEnergy(KLMatching()),
    "clipped": lambda: Clipped(GMMEnergy()),
    "pca": lambda: PCA(GMMEnergy(), components=4),
}


def residual(num_features=5, seed=0, zero=False):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = ResidualEnergy(num_features, 16)
    if zero:
        nn.init.zeros_(network.mlp[-1].weight)
        nn.init.zeros_(network.mlp[-1].bias)
    return network


def hybrid(prior=None, zero=False, dtype=torch.float64, width=5, **options):
    score = HybridEnergy(prior or GMMEnergy(), residual(width, zero=zero), **options)
    features, labels = draw()
    return fit(score, features.to(dtype), labels, Net().to(dtype))


def test_hybrid_energy_is_the_sum_of_its_parts():
    score, queries = hybrid(temperature=2.0, prior_temperature=50.0), draw(seed=3)[0]
    prior = fit(GMMEnergy(), *draw())
    rows = prior.embed(evidence(queries))
    expected = score.residual(rows) / 2, prior.energy(rows) / 50
    for actual, part in zip(score.parts(score.embed(evidence(queries))), expected, strict=True):
        torch.testing.assert_close(actual, part, rtol=1e-12, atol=0)
    torch.testing.assert_close(score(evidence(queries)), expected[0] + expected[1], rtol=1e-12, atol=1e-14)
    assert (score.passes, score.taps, score.unit_length) == (1, {"penultimate"}, True)


def test_gradient_of_the_hybrid_energy_is_that_of_finite_differences():
    score = hybrid(GMMEnergy(normalize=False), temperature=0.5, prior_temperature=3.0)
    queries, classes = draw(seed=3)[0][::50], torch.arange(12) % 3
    with torch.no_grad():
        expected = differences(lambda z: score.energy(torch.from_numpy(z)).numpy(), queries)
        np.testing.assert_allclose(score.gradient(queries).numpy(), expected, rtol=1e-6, atol=1e-8)

        def of_class(z):
            z = torch.from_numpy(z)
            return (score.residual(z) / 0.5 + score.prior.class_energy(z, classes) / 3).numpy()

        expected = differences(of_class, queries)
        np.testing.assert_allclose(score.gradient(queries, classes).numpy(), expected, rtol=1e-6, atol=1e-8)
    assert all(parameter.grad is None for parameter in score.parameters())


def fpr95(inside, outside):
    return np.mean(outside < np.percentile(inside, 95))


@pytest.mark.parametrize("name", ["gmm", "el", "pca"])
def test_a_residual_of_zero_leaves_the_prior(name):
    width = 4 if name == "pca" else 5
    score = hybrid(PRIORS[name](), zero=True, dtype=torch.float32, width=width, prior_temperature=1e3)
    alone = fit(PRIORS[name](), draw()[0].float(), draw()[1], Net())
    inside, outside = (evidence(rows.float(), Net()) for rows in (draw()[0], draw(seed=3)[0]))
    scores = []
    for which in (inside, outside):
        assert torch.equal(score(which), alone(which) / 1e3)
        scores.append((score(which).detach().double().numpy(), alone(which).double().numpy()))
    hybrids, priors = zip(*scores, strict=True)
    labels = np.repeat([0, 1], [len(rows) for rows in hybrids])
    assert fpr95(*hybrids) == pytest.approx(fpr95(*priors), abs=1e-4)
    aurocs = [roc_auc_score(labels, np.concatenate(pair)) for pair in (hybrids, priors)]
    assert aurocs[0] == pytest.approx(aurocs[1], abs=1e-4)


def test_a_residual_of_zero_ranks_as_the_distance_where_classes_are_equal_and_far_apart():
    features, labels = draw((200, 200, 200), scale=12.0)
    score = fit(HybridEnergy(GMMEnergy(normalize=False), residual(zero=True)), features, labels)
    distance = fit(Mahalanobis(), features, labels)
    queries = evidence(torch.cat([features, draw((100, 100), scale=12.0, seed=5)[0]]))
    assert spearmanr(score(queries).detach(), distance(queries)).statistic > 0.99


def test_composition_of_hybrid_energies():
    features, labels = draw()
    queries = evidence(torch.cat([features, draw(seed=3)[0]]), Net().double())

    def members(factor):
        scaled = {"temperature": factor, "prior_temperature": 20 * factor}
        return {
            "el": HybridEnergy(FeatureEnergy(Energy()), residual(seed=1), **scaled),
            "gmm": HybridEnergy(GMMEnergy(), residual(seed=2), prior_temperature=100.0),
        }

    raw = np.stack([fit(m, features, labels, Net().double())(queries).detach() for m in members(1.0).values()], 1)
    standard = (raw - raw[:600].mean(0)) / raw[:600].std(0, ddof=1)
    for beta, expected in {
        0: standard.sum(1),
        -1: -logsumexp(-standard, axis=1),
        2: logsumexp(2 * standard, axis=1) / 2,
        math.inf: standard.max(1),
        -math.inf: standard.min(1),
    }.items():
        for factor in (1.0, 7.0):  # of a member as a whole: it changes nothing
            actual = fit(Composition(members(factor), beta), features, labels, Net().double())(queries)
            np.testing.assert_allclose(actual.detach().numpy(), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: HybridEnergy(GMMEnergy(), residual(), temperature=0.0), ValueError, "temperature must be positive"),
        (lambda: HybridEnergy(GMMEnergy(), residual(), prior_temperature=-1.0), ValueError, "prior_temperature must"),
        (lambda: HybridEnergy(GMMEnergy(), residual()).embed(evidence(draw()[0])), RuntimeError, "is not fitted"),
        (
            lambda: fit(HybridEnergy(GMMEnergy(), residual(4)), *draw())(evidence(draw()[0])),
            ValueError,
            "the prior is about 5 features, the residual reads 4: give it num_features 5",
        ),
    ],
)
def test_impossible_hybrids_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def saved(folder, prior, name="last.ckpt"):
    """A checkpoint as the module of HEAT leaves it, and the energies it stands for."""
    score = hybrid(PRIORS[prior](), dtype=torch.float32, prior_temperature=100.0)
    state = {f"energy.{key}": value for key, value in score.state_dict().items()}
    state |= {f"backbone.{key}": value for key, value in Net().state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "pytorch-lightning_version": "2.6.0", "epoch": 3}, folder / name)
    return score


@pytest.mark.parametrize("prior", ["gmm", "el", "kl", "clipped"])
def test_a_trained_energy_is_read_from_its_run(checkpoints, prior):
    trained = saved(checkpoints / "heat" / "digits_gmm" / "seed0", prior)
    score = HybridEnergy(PRIORS[prior](), residual(seed=9), prior_temperature=100.0, weights="run:heat/digits_gmm")
    assert score.fitted
    score.bind(Net())
    other = Net()
    other.fc.bias.data[0] += 1e-3
    with pytest.raises(ValueError, match="run:heat/digits_gmm was trained on the features of a network with other"):
        score.bind(other)
    queries = evidence(draw(seed=3)[0].float(), Net())
    assert torch.equal(score(queries), trained(queries))
    file = checkpoints / "heat" / "digits_gmm" / "seed0" / "last.ckpt"
    expected = {"source": "run:heat/digits_gmm", "file": "last.ckpt", "sha256": weights.file_sha256(file)}
    assert weights.origins(score) == {"": expected}


def test_what_does_not_fit_is_not_loaded_at_all(tmp_path):
    saved(tmp_path, "gmm")
    cases = {
        "mis-shaped": (GMMEnergy(), ResidualEnergy(5, 24), "size mismatch for residual.mlp.2.weight"),
        "deeper": (GMMEnergy(), ResidualEnergy(5, 16, hidden_layers=5), "residual.mlp.12.weight"),
        "other prior": (FeatureEnergy(Energy()), residual(), "prior.whitening"),
    }
    for prior, network, message in cases.values():
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(ValueError, match=rf"(?s)does not fit this energy, nothing was loaded.*{message}"):
            HybridEnergy(prior, network, weights=str(tmp_path / "last.ckpt"))
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
        assert not prior.finished


@pytest.mark.parametrize("content", [{"state_dict": {"backbone.fc.weight": torch.ones(2)}}, {"fc.weight": 1}, [1]])
def test_a_checkpoint_of_another_method_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other.ckpt holds no energy of HEAT: it is the checkpoint of another method"):
        HybridEnergy(GMMEnergy(), residual(), weights=str(tmp_path / "other.ckpt"))


def test_a_run_that_is_not_there_is_named(checkpoints):
    with pytest.raises(FileNotFoundError, match=r"run:heat/digits_gmm is not trained yet.*make heat-digits_gmm"):
        HybridEnergy(GMMEnergy(), residual(), weights="run:heat/digits_gmm")


def test_clusters_are_no_labels():
    score = KMeans(GMMEnergy())
    with pytest.raises(ValueError, match="clusters, not labels"):
        score.gradient(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
