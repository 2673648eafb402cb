import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.evidence import Evidence
from lightning_modules.scores.vim import ViM

WIDTH, CLASSES = 8, 4


class Stub(nn.Module):
    def __init__(self, bias=True, width=WIDTH):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(width, CLASSES, bias=bias).double().requires_grad_(False)


def evidence(network, features):
    return Evidence(network.head(features.to(network.head.weight.dtype)), {"penultimate": features}, {}, None)


def fit(score, network, features):
    score.to(network.head.weight.dtype).bind(network)
    for _ in range(2):
        for rows in features.split(32):
            score.update(evidence(network, rows), torch.zeros(len(rows), dtype=torch.int64))
        score.finalize()
    return score


def draw(n, width=WIDTH, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(n, width, dtype=torch.float64, generator=generator) + 1).relu()


def reference(network, features, queries, dim):
    """Follow the paper, with the projection on the principal space subtracted instead of R."""
    weight, bias = network.head.weight.numpy(), network.head.bias
    bias = np.zeros(CLASSES) if bias is None else bias.numpy()
    origin = -np.linalg.lstsq(weight, bias, rcond=None)[0]
    offsets, asked = features.numpy() - origin, queries.numpy() - origin
    _, _, directions = np.linalg.svd(offsets, full_matrices=False)
    principal = directions[:dim].T @ directions[:dim]
    norms, asked_norms = (np.linalg.norm(x - x @ principal, axis=1) for x in (offsets, asked))
    alpha = (features.numpy() @ weight.T + bias).max(1).mean() / norms.mean()
    return alpha * asked_norms - np.log(np.exp(queries.numpy() @ weight.T + bias).sum(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dim", [1, 4, 7])
def test_equals_numpy(dim, bias):
    network, features, queries = Stub(bias), draw(200), draw(30, seed=1)
    score = fit(ViM(dim), network, features)
    actual = score(evidence(network, queries))
    np.testing.assert_allclose(actual.numpy(), reference(network, features, queries, dim), rtol=1e-10, atol=1e-12)
    single = fit(ViM(dim), Stub(bias).float(), features.float())
    np.testing.assert_allclose(
        single(evidence(network.float(), queries.float())).double(), actual, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize(
    ("width", "dim"), [(8, 4), (9, 4), (768, 512), pytest.param(2048, 1000, marks=pytest.mark.slow)]
)
def test_default_dimension(width, dim):
    score, network = ViM(), Stub(width=width)
    score.bind(network)
    score.update(evidence(network, draw(3, width)), torch.zeros(3))
    score.finalize()
    assert score.residual.shape == (width, width - dim)


def test_logits_that_the_network_gave_are_used():
    network, features = Stub(), draw(100)
    score, seen = fit(ViM(4), network, features), evidence(network, features)
    doubled = score(seen._replace(logits=2 * seen.logits))
    expected = score(seen) + seen.logits.logsumexp(1) - (2 * seen.logits).logsumexp(1)
    torch.testing.assert_close(doubled, expected)


@pytest.mark.parametrize("case", ["constant", "zero", "wide"])
def test_degenerate_features(case):
    network, features = Stub(), draw(5 if case == "wide" else 100)
    if case == "constant":
        features[:, 2] = 0.7
    elif case == "zero":
        features[0] = 0
    score = fit(ViM(3), network, features)
    assert score(evidence(network, features)).isfinite().all()


def test_no_residual():
    with pytest.raises(ValueError, match=r"lie within their leading 5 dimensions.*choose a smaller dim"):
        fit(ViM(5), Stub(), draw(4))


def test_logits_below_zero():
    network = Stub()
    network.head.bias -= 100
    with pytest.raises(ValueError, match=r"mean maximum logit is -.*must be positive"):
        fit(ViM(4), network, draw(100))


@pytest.mark.parametrize("dim", [8, 9])
def test_dimensions_that_leave_nothing(dim):
    with pytest.raises(ValueError, match=rf"of 8 features, {dim} dimensions leave ViM no residual: .* 1\.\.7"):
        fit(ViM(dim), Stub(), draw(100))


def test_no_dimension():
    with pytest.raises(ValueError, match="at least 1 dimension, not 0"):
        ViM(0)


def test_not_a_number_is_refused():
    with pytest.raises(ValueError, match="NaN or infinity"):
        fit(ViM(4), Stub(), torch.full((9, 8), math.nan))


def test_only_empty_batches():
    score, network = ViM(4), Stub()
    score.bind(network)
    score.update(evidence(network, draw(10)), torch.zeros(10))
    score.finalize()
    score.update(evidence(network, draw(0)), torch.zeros(0))
    with pytest.raises(RuntimeError, match="only empty batches"):
        score.finalize()


def test_needs_a_classifier():
    with pytest.raises(ValueError, match="needs a method with a classifier"):
        ViM().bind(None)
