import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, rel_entr, softmax
from torch import nn

from lightning_modules.evidence import Evidence
from lightning_modules.scores.prototypes import ClassMean, Cosine, KLMatching, Norm


def evidence(logits=None, features=None):
    logits = torch.zeros(len(features), 4) if logits is None else logits
    return Evidence(logits, {} if features is None else {"penultimate": features}, {}, None)


def randn(*shape, seed=0, scale=1.0):
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def fit(score, seen, labels):
    score.double()
    for rows in torch.arange(len(labels)).split(64):
        features = {name: values[rows] for name, values in seen.features.items()}
        score.update(Evidence(seen.logits[rows], features, {}, None), labels[rows])
    score.finalize()
    return score


def test_kl_matching_equals_scipy():
    logits, queries = randn(300, 6, scale=3), randn(40, 6, scale=3, seed=1)
    logits[:, 2] -= 100  # never predicted
    p, q = softmax(logits.numpy(), axis=1), softmax(queries.numpy(), axis=1)
    templates = [p[p.argmax(1) == c].mean(0) for c in range(6) if c != 2]
    expected = np.min([rel_entr(q, t).sum(1) for t in templates], axis=0)
    score = fit(KLMatching(), evidence(logits), torch.full((300,), 5))  # whatever the labels
    assert score.log_templates.shape == (5, 6)
    np.testing.assert_allclose(score(evidence(queries)).numpy(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_kl_matching_of_certain_answers(dtype):
    certain = torch.tensor([[0.0, -2000, -2000], [-2000, 0, -2000], [-2000, -2000, 0.0]], dtype=dtype)
    score = fit(KLMatching(), evidence(certain[:2]), torch.tensor([0, 1])).to(dtype)
    assert score(evidence(certain)).tolist()[:2] == [0, 0]
    assert score(evidence(certain))[2] > 1e30
    assert score(evidence(certain.log_softmax(1).masked_fill(certain < 0, -math.inf))).tolist()[:2] == [0, 0]


def test_kl_matching_with_one_class():
    score = fit(KLMatching(), evidence(randn(5, 1)), torch.zeros(5, dtype=torch.int64))
    assert score(evidence(randn(3, 1, seed=1))).tolist() == [0, 0, 0]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("reduce", ["max", "logsumexp"])
def test_class_mean_equals_numpy(reduce, normalize):
    features, queries, labels = randn(200, 8), randn(30, 8, seed=1), torch.arange(200) % 3
    features[5], queries[2] = 0, 0
    z, q = features.numpy(), queries.numpy()
    if normalize:
        z, q = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-12) for x in (z, q))
    products = q @ np.stack([z[labels.numpy() == c].mean(0) for c in range(3)]).T  # class 3 of the logits is absent
    expected = -(products.max(1) if reduce == "max" else logsumexp(products, axis=1))
    score = fit(ClassMean(normalize=normalize, reduce=reduce), evidence(features=features), labels)
    assert score.means.shape == (3, 8)
    np.testing.assert_allclose(score(evidence(features=queries)).numpy(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("label", [-1, 4])
def test_class_mean_of_a_foreign_label(label):
    with pytest.raises(ValueError, match=rf"labels must lie in 0..3, this batch also holds \[{label}\]"):
        ClassMean().update(evidence(features=torch.zeros(2, 4)), torch.tensor([0, label]))


def test_class_mean_reduction_is_known():
    with pytest.raises(ValueError, match="reduced by max or logsumexp, not by 'mean'"):
        ClassMean(reduce="mean")


@pytest.mark.parametrize("make", [KLMatching, ClassMean])
def test_only_empty_batches(make):
    score = make()
    score.update(evidence(torch.zeros(0, 4), torch.zeros(0, 3)), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="only empty batches"):
        score.finalize()


@pytest.mark.parametrize("make", [KLMatching, ClassMean])
def test_state_does_not_grow_with_the_data(make):
    sizes = []
    for n in (20, 320):
        score = make()
        for _ in range(n // 20):
            score.update(evidence(randn(20, 4), randn(20, 3)), torch.arange(20) % 4)
        sizes.append(score._means._sums.numel())
    assert sizes[0] == sizes[1]


def test_cosine_equals_a_loop():
    head, queries = nn.Linear(8, 5).double().requires_grad_(False), randn(20, 8)
    head.weight[1], queries[4] = 0, 0
    network = nn.Module()
    network.head = head

    def cosine(a, b):
        lengths = math.hypot(*a) * math.hypot(*b)
        return sum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0

    expected = [-math.log(sum(math.exp(cosine(z, w)) for w in head.weight.tolist())) for z in queries.tolist()]
    score = Cosine()
    score.bind(network)
    torch.testing.assert_close(score(evidence(features=queries)), torch.tensor(expected, dtype=torch.float64))
    torch.testing.assert_close(score(evidence(features=1000 * queries)), score(evidence(features=queries)))


def test_norm_is_higher_for_weak_features():
    features = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.3, 0.4]])
    assert Norm()(evidence(features=features)).tolist() == pytest.approx([-5, 0, -0.5])
    assert Norm("layer2")(Evidence(torch.zeros(3, 4), {"layer2": features}, {}, None)).min() == -5


def test_norm_widens_half_precision_and_keeps_double():
    features = randn(30, 64)
    exact = features.bfloat16().double().square().sum(1).sqrt()
    half = Norm()(evidence(features=features.bfloat16()))
    assert half.dtype == torch.float32
    torch.testing.assert_close(-half.double(), exact, rtol=1e-6, atol=0)
    assert Norm()(evidence(features=features)).dtype == torch.float64
