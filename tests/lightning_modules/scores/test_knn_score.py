import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from lightning_modules.evidence import Evidence
from lightning_modules.scores import knn
from lightning_modules.scores.knn import KNN, smallest


def evidence(features):
    return Evidence(torch.zeros(len(features), 2), {"penultimate": features}, {}, None)


def fit(score, features):
    for rows in features.split(64):
        score.update(evidence(rows), torch.zeros(len(rows), dtype=torch.int64))
    score.finalize()
    return score


@pytest.mark.parametrize("chunk", [7, 176, 16000])
@pytest.mark.parametrize("k", [1, 10, 200])
def test_equals_sklearn(k, chunk, monkeypatch):
    monkeypatch.setattr(knn, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    features, queries = (torch.randn(n, 16, dtype=torch.float64, generator=generator) for n in (200, 30))
    features[3], queries[4] = 0, 0
    bank, asked = (z / z.norm(dim=1, keepdim=True).where(z.any(1, keepdim=True), 1) for z in (features, queries))
    distances, _ = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(bank.numpy()).kneighbors(asked.numpy())
    expected = torch.from_numpy(distances[:, -1]) ** 2
    torch.testing.assert_close(fit(KNN(k).double(), features)(evidence(queries)), expected, rtol=1e-10, atol=1e-14)
    single = fit(KNN(k), features)
    assert single.bank.dtype == torch.float32
    torch.testing.assert_close(single(evidence(queries)).double(), expected, rtol=0, atol=1e-6)


def test_training_image_is_its_own_nearest_neighbour():
    features = torch.randn(300, 32, generator=torch.Generator().manual_seed(0))
    assert not fit(KNN(1), features)(evidence(features)).any()


def test_zero_vector_is_one_away_from_all():
    features = torch.randn(10, 4, generator=torch.Generator().manual_seed(0))
    assert fit(KNN(3), features)(evidence(torch.zeros(2, 4))).tolist() == pytest.approx([1, 1])


def test_bank_smaller_than_k():
    with pytest.raises(ValueError, match="neighbour k=50 among only 49 training images"):
        fit(KNN(), torch.ones(49, 3))


@pytest.mark.parametrize("k", [1, 3, 40])
@pytest.mark.parametrize("width", [1, 48, 64, 65, 1600])
def test_the_smallest_equal_sorting(width, k):
    values = torch.randn(20, width, generator=torch.Generator().manual_seed(0))
    least, index = smallest(values, k)
    assert torch.equal(values.gather(1, index), least)
    assert torch.equal(least.sort(1).values, values.sort(1).values[:, :k])


def test_the_smallest_among_equals_are_different_entries():
    _, index = smallest(torch.zeros(2, 320), 5)
    assert [len(row.unique()) for row in index] == [5, 5]


@pytest.mark.parametrize("batch", [1, 64, 500])
def test_subsample_equals_sklearn_with_k_scaled(batch):
    generator = torch.Generator().manual_seed(0)
    features, queries = (torch.randn(n, 8, dtype=torch.float64, generator=generator) for n in (500, 30))
    score = KNN(k=25, subsample=100).double()
    for rows in features.split(batch):
        score.update(evidence(rows), torch.zeros(len(rows)))
    score.finalize()
    keys = torch.rand(500, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    bank = features[keys.argsort()[:100]]
    bank, asked = (z / z.norm(dim=1, keepdim=True) for z in (bank, queries))
    torch.testing.assert_close(score.bank, bank, rtol=1e-15, atol=1e-15)
    distances, _ = NearestNeighbors(n_neighbors=5, algorithm="brute").fit(bank.numpy()).kneighbors(asked.numpy())
    torch.testing.assert_close(score(evidence(queries)), torch.from_numpy(distances[:, -1]) ** 2, rtol=1e-10, atol=0)


def test_a_subsample_that_is_everything_changes_nothing():
    generator = torch.Generator().manual_seed(0)
    features, queries = torch.randn(90, 4, generator=generator), torch.randn(9, 4, generator=generator)
    whole, sampled = fit(KNN(k=7), features), fit(KNN(k=7, subsample=90), features)
    assert torch.equal(whole(evidence(queries)), sampled(evidence(queries)))
    assert int(fit(KNN(k=1, subsample=2), features).neighbour) == 1


def test_subsample_of_nothing():
    with pytest.raises(ValueError, match="at least 1 training image, not 0"):
        KNN(subsample=0)


def test_gradient_reaches_the_features():
    score = fit(KNN(k=3).double(), torch.randn(50, 4, dtype=torch.float64))
    queries = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: score(evidence(z)), queries)


def test_k_below_one():
    with pytest.raises(ValueError, match="cannot be 0"):
        KNN(0)
