import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.evidence import Evidence
from lightning_modules.scores.react import ReAct, histogram, histogram_quantile

SAMPLES = {
    "relu": lambda rng: np.maximum(rng.normal(size=(500, 40)), 0),
    "normal": lambda rng: rng.normal(size=(500, 40)),
    "negative": lambda rng: -rng.exponential(size=(500, 40)) - 1e-6,
    "heavy": lambda rng: np.exp(10 * rng.normal(size=(500, 40))),
    "few": lambda rng: rng.choice([1.0, 100.0], size=(3, 1)),
    "one": lambda rng: rng.normal(size=(1, 1)),
}


class Stub(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.head = nn.Linear(40, 5, bias=bias)


@pytest.mark.parametrize("quantile", [0.05, 0.5, 0.9, 0.95, 1.0])
@pytest.mark.parametrize("kind", SAMPLES)
def test_quantile_equals_numpy(kind, quantile):
    values = SAMPLES[kind](np.random.default_rng(0)).astype(np.float32)
    counts = sum(histogram(torch.from_numpy(part)) for part in np.array_split(values, 7))
    order = np.sort(values, axis=None).astype(np.float64)
    position = quantile * (values.size - 1)
    largest = max(abs(order[math.floor(position)]), abs(order[math.ceil(position)]))
    expected = np.quantile(values.astype(np.float64), quantile)
    assert abs(histogram_quantile(counts, quantile).item() - expected) <= 2**-11 * largest + 1e-40


def test_state_does_not_grow_with_the_data():
    assert histogram(torch.randn(3)).shape == histogram(torch.randn(300_000)).shape == (2**20,)


@pytest.mark.parametrize("bias", [True, False])
def test_score_equals_energy_of_clipped_features(bias):
    generator = torch.Generator().manual_seed(0)
    features, queries = (torch.randn(n, 40, generator=generator).relu() for n in (300, 20))
    network, score = Stub(bias).requires_grad_(False), ReAct(0.9)
    score.bind(network)
    for rows in features.split(64):
        score.update(Evidence(torch.zeros(len(rows), 5), {"penultimate": rows}, {}, None), torch.zeros(len(rows)))
    score.finalize()
    threshold = np.quantile(features.numpy(), 0.9)
    assert score.threshold.item() == pytest.approx(threshold, rel=2**-11)
    clipped = np.minimum(queries.numpy(), score.threshold.item())
    logits = clipped @ network.head.weight.numpy().T + (network.head.bias.numpy() if bias else 0)
    expected = -np.log(np.exp(logits).sum(1))
    actual = score(Evidence(torch.zeros(20, 5), {"penultimate": queries}, {}, None))
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-5)
    network.head.weight.zero_()  # the score holds a copy
    assert torch.equal(score(Evidence(torch.zeros(20, 5), {"penultimate": queries}, {}, None)), actual)


def test_fixed_threshold_needs_no_training_data():
    network, score = Stub().requires_grad_(False), ReAct(quantile=None, threshold=1.0)
    score.bind(network)
    queries = 2 * torch.randn(20, 40, generator=torch.Generator().manual_seed(0)).relu()
    logits = np.minimum(queries.numpy(), 1) @ network.head.weight.numpy().T + network.head.bias.numpy()
    evidence = Evidence(torch.zeros(20, 5), {"penultimate": queries}, {}, None)
    assert score.fitted
    np.testing.assert_allclose(score(evidence).numpy(), -np.log(np.exp(logits).sum(1)), rtol=1e-5)
    with pytest.raises(RuntimeError, match="nothing to fit"):
        score.finalize()


@pytest.mark.parametrize(("quantile", "threshold"), [(None, None), (0.9, 1.0)])
def test_either_quantile_or_threshold(quantile, threshold):
    with pytest.raises(ValueError, match=rf"but quantile is {quantile} and threshold is {threshold}"):
        ReAct(quantile, threshold)


def test_needs_a_classifier():
    with pytest.raises(ValueError, match="needs a method with a classifier"):
        ReAct().bind(None)


@pytest.mark.parametrize("quantile", [0, 1.5])
def test_quantile_out_of_range(quantile):
    with pytest.raises(ValueError, match=rf"must lie in \(0, 1\], not be {quantile}"):
        ReAct(quantile)


def test_only_empty_batches():
    score = ReAct()
    score.update(Evidence(torch.zeros(0, 5), {"penultimate": torch.zeros(0, 40)}, {}, None), torch.zeros(0))
    with pytest.raises(RuntimeError, match="only empty batches"):
        score.finalize()
