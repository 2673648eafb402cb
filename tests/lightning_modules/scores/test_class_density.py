import logging
import math
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch.distributions import MultivariateNormal

from lightning_modules.evidence import Evidence
from lightning_modules.scores.class_density import ClassDensity, ClassScatters, weighted_score

LOGGER = "lightning_modules.scores.class_density"


def evidence(*features, num_classes=3):
    """Features of the taps t0, t1, ..."""
    taps = {f"t{i}": tap for i, tap in enumerate(features)}
    return Evidence(torch.zeros(len(features[0]), num_classes), taps, {}, None)


def fit(score, taps, labels, num_classes=3, batch=64):
    score.to(taps[0].dtype)
    for rows in torch.arange(len(labels)).split(batch) or [torch.arange(0)]:
        score.update(evidence(*(tap[rows] for tap in taps), num_classes=num_classes), labels[rows])
    score.finalize()
    return score


def draw(n, width, num_classes=3, offset=0.0, spread=1.0, condition=1e4, stretch=1.0, seed=0):
    """Classes with a covariance each, of the given condition number; values that float32 holds exactly.

    Seeds differ in the samples alone; ``stretch`` puts them farther from their means than their class has it.
    """
    fixed, generator = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    means = offset + spread * torch.randn(num_classes, width, dtype=torch.float64, generator=fixed)
    scales = torch.logspace(0, -math.log10(condition) / 2, width, dtype=torch.float64)
    mixings = torch.randn(num_classes, width, width, dtype=torch.float64, generator=fixed)
    mixings = scales[:, None] * torch.linalg.qr(mixings)[0]
    labels = torch.arange(n) % num_classes
    noise = stretch * torch.randn(n, 1, width, dtype=torch.float64, generator=generator)
    return (means[labels] + (noise @ mixings[labels])[:, 0]).float().double(), labels


def reference(features, labels, queries, jitter=0.0):
    """Log-likelihoods (B, K) of torch's own Gaussians with numpy's means and covariances."""
    columns = []
    for label in labels.unique():
        rows = features[labels == label].numpy()
        covariance = np.cov(rows.T, bias=True) + jitter * np.eye(rows.shape[1])
        gaussian = MultivariateNormal(torch.from_numpy(rows.mean(0)), torch.from_numpy(covariance))
        columns.append(gaussian.log_prob(queries))
    return torch.stack(columns, 1)


@pytest.mark.parametrize("batch", [1, 7, 100, 300])
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_equal_numpy_however_the_data_are_split(batch, offset):
    features, labels = draw(300, 20, offset=offset, condition=1.0)
    order = labels.argsort(stable=True)[
        :250
    ]  # class after class, the last one shorter: batches of 100 cut classes in two
    statistics = ClassScatters(4, 20, torch.device("cpu"))
    for rows in (order[:0], *order.split(batch)):
        statistics.update(features[rows], labels[rows])
    statistics.reduce()
    assert statistics.counts.tolist() == [100, 100, 50, 0]
    for c in range(3):
        rows = features[order][labels[order] == c].numpy()
        np.testing.assert_allclose(statistics.means[c].numpy(), rows.mean(0), rtol=1e-12, atol=1e-12)
        expected = np.cov(rows.T, bias=True)
        found = statistics.covariance(c, 0.5).numpy() - 0.5 * np.eye(20)
        np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-8 * expected.max())
        assert (found == found.T).all()


def test_state_does_not_grow_with_the_data():
    statistics = ClassScatters(3, 8, torch.device("cpu"))
    features, labels = draw(300, 8)
    for rows in torch.arange(300).split(5):
        statistics.update(features[rows], labels[rows])
        tensors = [value for value in vars(statistics).values() if isinstance(value, torch.Tensor)]
        assert sum(tensor.numel() for tensor in tensors) == 3 + 3 * 8 + 3 * 8 * 8
        assert sum(len(rows) for rows, _ in statistics._waiting) < 32 * 3


@pytest.mark.parametrize("jitter", [0.0, 0.3, None])
@pytest.mark.parametrize("batch", [34, 100])
def test_log_likelihoods_equal_torch_distributions(jitter, batch):
    features, labels = draw(100, 6, offset=3.0)
    queries = draw(50, 6, offset=3.0, stretch=3.0, seed=1)[0]
    score = fit(ClassDensity(["t0", "t1"], jitter=jitter), features.split([4, 2], 1), labels, batch=batch)
    expected = reference(features, labels, queries, jitter or 0.0)
    observed = evidence(*queries.split([4, 2], 1))
    torch.testing.assert_close(score.log_likelihoods(observed), expected, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(score(observed), -expected.amax(1), rtol=1e-8, atol=1e-8)
    assert score.epsilon == (jitter or 0)


def test_taps_are_concatenated_in_their_order():
    features, labels = draw(100, 6)
    score = ClassDensity(["t1", "t0"])
    assert score.taps == {"t0", "t1"}
    fit(score, features.split([4, 2], 1), labels)
    assert torch.equal(score.embed(evidence(*features.split([4, 2], 1))), features[:, [4, 5, 0, 1, 2, 3]])


@pytest.mark.parametrize("offset", [0.0, 100.0])
def test_float32_equals_float64(offset):
    features, labels = draw(900, 30, offset=offset)
    queries = draw(90, 30, offset=offset, stretch=2.0, seed=1)[0]
    double = fit(ClassDensity(["t0"]), [features], labels).log_likelihoods(evidence(queries))
    single = fit(ClassDensity(["t0"]), [features.float()], labels).log_likelihoods(evidence(queries.float()))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), double, rtol=1e-4, atol=1e-2)


def redundant(features):
    """Append a copy of a part, and linear maps of all that are computed in the type of the features."""
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(features.shape[1], 16, generator=generator) / features.shape[1] ** 0.5
    return features, features[:, :20], features @ maps.to(features) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1.0), (5.0, 1.0), (0.0, 30.0)])
def test_redundant_taps_change_neither_classes_nor_ranks(dtype, offset, spread):
    features, labels = draw(3000, 60, offset=offset, spread=spread)
    drawn = [draw(300, 60, offset=offset, spread=spread, stretch=stretch, seed=1)[0] for stretch in (1, 1.5)]
    queries = torch.cat([*drawn, drawn[0] + 0.2])
    expected = reference(features, labels, queries)
    score = fit(ClassDensity(["t0", "t1", "t2"]), redundant(features.to(dtype)), labels)
    actual = score.log_likelihoods(evidence(*redundant(queries.to(dtype)))).double()
    assert score.epsilon > 0
    assert torch.equal(actual.argmax(1), expected.argmax(1))
    assert spearmanr(actual.amax(1), expected.amax(1))[0] >= 0.9999


def test_equal_taps_are_left_out():
    features, labels = draw(100, 6)
    queries = draw(20, 6, seed=1)[0]
    one, other = features.split(3, 1)
    expected = fit(ClassDensity(["t0", "t1"]), [one, other], labels)
    score = fit(ClassDensity(["t0", "t1", "t2", "t1", "t3"]), [one, other, one.clone(), other.clone()], labels)
    assert score.kept.tolist() == [0, 1]
    assert score.epsilon == 0
    observed = evidence(*queries.split(3, 1), queries[:, :3], queries[:, 3:])
    torch.testing.assert_close(score(observed), expected(observed), rtol=1e-9, atol=1e-9)


def test_taps_that_differ_once_are_both_kept():
    features, labels = draw(100, 6)
    almost = features.clone()
    almost[99, 5] += 1e-3
    score = fit(ClassDensity(["t0", "t1"], jitter=0.1), [features, almost], labels, batch=10)
    assert score.kept.tolist() == [0, 1]
    assert score.means.shape == (3, 12)


def test_repeated_taps_stay_where_they_are_wanted():
    features, labels = draw(100, 6)
    score = fit(ClassDensity(["t0", "t1", "t0"], deduplicate=False, jitter=0.1), [features, features], labels)
    expected = reference(features.repeat(1, 3), labels, features.repeat(1, 3), 0.1)
    torch.testing.assert_close(score.log_likelihoods(evidence(features, features)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("singular", [0, 1, 2])
def test_all_classes_share_the_least_jitter_that_one_of_them_needs(dtype, singular, caplog):
    features, labels = draw(300, 6)
    features[labels == singular, 5] = features[labels == singular, 2]
    with caplog.at_level(logging.INFO, LOGGER):
        score = fit(ClassDensity(["t0"]), [features.to(dtype)], labels)
    jitter = float(score.epsilon)
    covariances = [np.cov(features[labels == c].T.numpy(), bias=True) for c in range(3)]
    share = jitter / np.mean([covariance.trace() / 6 for covariance in covariances])
    assert math.log10(share) == pytest.approx(round(math.log10(share)), abs=1e-6)
    assert 1e-13 < share < (1e-9 if dtype == torch.float32 else 1e-11)
    assert f"jitter of all classes: {jitter:.3g}" in caplog.text
    for covariance, rows in zip(covariances, score.whitening.double(), strict=True):
        factor = torch.linalg.inv(rows).numpy()
        np.testing.assert_allclose(factor @ factor.T, covariance + jitter * np.eye(6), rtol=0, atol=1e-6)
    assert score.log_likelihoods(evidence(features.to(dtype))).isfinite().all()


def warnings_in(caplog):
    return [record for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize("jitter", [None, 0.1])
def test_few_samples_and_none(jitter, caplog):
    features = draw(60, 6)[0]
    labels = torch.tensor([0, 1, 4]).repeat_interleave(torch.tensor([20, 6, 34]))
    with caplog.at_level(logging.WARNING, LOGGER):
        score = fit(ClassDensity(["t0"], jitter=jitter), [features], labels, num_classes=5)
    (warning,) = warnings_in(caplog)
    assert "1 of 3 classes have no more samples than there are features, 6" in warning.message
    observed = evidence(features, num_classes=5)
    log_likelihoods = score.log_likelihoods(observed)
    assert log_likelihoods[:, [2, 3]].isneginf().all()
    assert log_likelihoods[:, [0, 1, 4]].isfinite().all()
    if jitter is not None:
        expected = reference(features, labels, features, jitter)
        torch.testing.assert_close(log_likelihoods[:, [0, 1, 4]], expected, rtol=1e-8, atol=1e-8)
    points = features[:5].clone().requires_grad_()
    assert torch.autograd.grad(score.energy(points).sum(), points)[0].isfinite().all()


def test_enough_samples_need_no_warning(caplog):
    fit(ClassDensity(["t0"]), [draw(300, 6)[0]], draw(300, 6)[1])
    assert warnings_in(caplog) == []


@pytest.mark.timeout(20)
@pytest.mark.parametrize("broken", [math.nan, math.inf])
@pytest.mark.parametrize("jitter", [None, 1.0])
def test_features_that_are_no_numbers_end_the_search(broken, jitter):
    features, labels = draw(100, 6)
    features[50, 3] = broken
    with pytest.raises(ValueError, match="NaN or infinity: so do the features"):
        fit(ClassDensity(["t0"], jitter=jitter), [features], labels)


@pytest.mark.timeout(20)
def test_the_search_for_a_jitter_ends():
    with pytest.raises(ValueError, match=r"of 6 features cannot all be factorised, .* do the features vary within"):
        fit(ClassDensity(["t0"]), [torch.ones(9, 6)], torch.arange(9) % 3)


def test_a_jitter_that_is_too_small_is_refused():
    features, labels = draw(300, 6)
    features[:, 5] = features[:, 2]
    with pytest.raises(ValueError, match="not even with 1e-17 added to variances of"):
        fit(ClassDensity(["t0"], jitter=1e-17), [features], labels)


def test_running_out_of_memory_is_no_reason_for_more_jitter(monkeypatch):
    def exhausted(_):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(torch.linalg, "cholesky_ex", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        fit(ClassDensity(["t0"]), [draw(100, 6)[0]], draw(100, 6)[1])


@pytest.mark.parametrize("jitter", [-1e-6, math.nan, math.inf])
def test_no_such_jitter(jitter):
    with pytest.raises(ValueError, match="jitter is a finite variance of at least 0"):
        ClassDensity(["t0"], jitter=jitter)


def test_no_taps():
    with pytest.raises(ValueError, match="name at least one"):
        ClassDensity([])


@pytest.mark.parametrize("label", [-1, 3])
def test_foreign_label(label):
    with pytest.raises(ValueError, match=rf"labels must lie in 0..2, this batch also holds \[{label}\]"):
        ClassDensity(["t0"]).update(evidence(torch.zeros(2, 4)), torch.tensor([0, label]))


def test_log_likelihoods_before_the_fit():
    with pytest.raises(RuntimeError, match=r"ClassDensity is not fitted: it needs 1 pass\(es\)"):
        ClassDensity(["t0"]).log_likelihoods(evidence(torch.zeros(2, 4)))


def test_only_empty_batches():
    score = ClassDensity(["t0"])
    score.update(evidence(torch.empty(0, 4)), torch.empty(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="only empty batches"):
        score.finalize()


def test_a_saved_score_knows_which_taps_it_keeps(tmp_path):
    features, labels = draw(100, 6)
    fitted = fit(ClassDensity(["t0", "t1", "t2"]), [features[:, :3], features[:, :3], features[:, 3:]], labels)
    torch.save(fitted.state_dict(), tmp_path / "score.pt")
    fresh = ClassDensity(["t0", "t1", "t2"]).double()
    fresh.load_state_dict(torch.load(tmp_path / "score.pt", weights_only=True))
    observed = evidence(features[:, :3], features[:, :3], features[:, 3:])
    assert torch.equal(fresh.log_likelihoods(observed), fitted.log_likelihoods(observed))


@pytest.fixture
def two_processes(monkeypatch):
    """Call a function with 0 and with 1 as if on two processes, return both results."""
    barrier, sent = threading.Barrier(2, timeout=20), {}

    def exchange(tensor):
        sent[threading.get_ident()] = tensor.clone()
        barrier.wait()
        total = sum(sent.values())
        barrier.wait()
        return total

    monkeypatch.setattr("lightning_modules.scores.class_density.sum_over_processes", exchange)

    def call(function):
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(function, (0, 1)))

    return call


@pytest.mark.parametrize("start", [0, 10, 90])
def test_processes_keep_and_fit_what_one_does(start, two_processes, monkeypatch):
    features, labels = draw(100, 6)
    order = labels.argsort()  # hence some classes are on one process alone
    features, labels = features[order], labels[order]
    almost = features.clone()
    almost[99, 5] += 1  # a row that one process alone sees
    taps, shares = (features, almost, features.clone()), (slice(0, start), slice(start, None))

    def fit_share(rank):
        return fit(ClassDensity(["t0", "t1", "t2"], jitter=0.1), [t[shares[rank]] for t in taps], labels[shares[rank]])

    states = [score.state_dict() for score in two_processes(fit_share)]
    monkeypatch.undo()
    expected = fit(ClassDensity(["t0", "t1", "t2"], jitter=0.1), taps, labels).state_dict()
    assert expected["kept"].tolist() == [0, 1]
    for state in states:
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-11)


def test_empty_batch():
    features, labels = draw(100, 6)
    score = fit(ClassDensity(["t0"]), [features], labels)
    assert score.log_likelihoods(evidence(features[:0])).shape == (0, 3)


def test_gradient_of_the_energy():
    features, labels = draw(100, 4, condition=10.0)
    score = fit(ClassDensity(["t0"]), [features], labels)
    assert torch.autograd.gradcheck(score.energy, features[:6].clone().requires_grad_())


def test_weighted_score_is_monotone_and_positive():
    generator = torch.Generator().manual_seed(0)
    log_likelihood = 100 * torch.randn(200, dtype=torch.float64, generator=generator)
    errors = torch.linspace(1e-3, 2, 50, dtype=torch.float64)
    table = weighted_score(log_likelihood[:, None], errors, ceiling=50.0, largest_error=1.5)
    expected = -(errors / 1.5) * ((log_likelihood[:, None] - 50).clamp(max=0) - 1)
    torch.testing.assert_close(table, expected)
    assert (table > 0).all()
    assert (table.diff(dim=1) > 0).all()
    assert (table[log_likelihood.argsort()].diff(dim=0) <= 0).all()
    assert not weighted_score(log_likelihood, torch.zeros(200), ceiling=50.0).any()


def test_scale_of_the_errors_changes_no_ranks():
    generator = torch.Generator().manual_seed(0)
    log_likelihood, errors = torch.rand(2, 200, dtype=torch.float64, generator=generator)
    scores = [weighted_score(-100 * log_likelihood, errors, -20.0, largest) for largest in (1.0, 0.037, 1e6)]
    unknown = torch.arange(200) % 2
    assert len({roc_auc_score(unknown, score) for score in scores}) == 1


def test_without_errors_the_weighted_score_ranks_as_the_likelihood():
    log_likelihood = torch.linspace(-90, -10, 50)
    assert (weighted_score(log_likelihood, torch.ones(50), ceiling=-10.0).diff() < 0).all()
