import pytest
import torch
from sklearn.neighbors import NearestNeighbors

from lightning_modules.evidence import Evidence
from lightning_modules.scores import knn
from lightning_modules.scores.knn import KNN


def evidence(features):
    return Evidence(torch.zeros(len(features), 2), {"penultimate": features}, {}, None)


def fit(score, features):
    for rows in features.split(64):
        score.update(evidence(rows), torch.zeros(len(rows), dtype=torch.int64))
    score.finalize()
    return score


@pytest.mark.parametrize("chunk", [7, 16384])
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


def test_k_below_one():
    with pytest.raises(ValueError, match="cannot be 0"):
        KNN(0)
