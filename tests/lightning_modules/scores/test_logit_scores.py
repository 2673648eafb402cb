import math

import pytest
import torch

from lightning_modules.evidence import Evidence
from lightning_modules.scores.logits import GEN, MSP, Energy, MaxLogit


def reference(logits, temperature):
    """Python floats, one image at a time."""
    rows = logits.tolist()
    sums = [[math.exp(v / temperature) for v in row] for row in rows]
    energies = [-temperature * math.log(sum(row)) for row in sums]
    msp = [-max(math.exp(v) for v in row) / sum(math.exp(v) for v in row) for row in rows]
    return msp, [-max(row) for row in rows], energies


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_values(temperature):
    logits = 4 * torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    evidence = Evidence(logits, {}, {}, None)
    scores = (MSP(), MaxLogit(), Energy(temperature))
    for score, expected in zip(scores, reference(logits, temperature), strict=True):
        torch.testing.assert_close(score(evidence), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_large_logits_stay_finite():
    evidence = Evidence(torch.tensor([[2000.0, -2000.0]]), {}, {}, None)
    assert [score(evidence).item() for score in (MSP(), MaxLogit(), Energy())] == [-1, -2000, -2000]


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="must be positive, not 0"):
        Energy(0)


@pytest.mark.parametrize(("gamma", "top"), [(0.1, 100), (0.1, 3), (0.5, 7), (1.0, 1)])
def test_generalized_entropy(gamma, top):
    logits = 2 * torch.randn(50, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = []
    for row in logits.tolist():
        total = sum(math.exp(v) for v in row)
        shares = sorted((math.exp(v) / total for v in row), reverse=True)[:top]
        expected.append(sum(p**gamma * (1 - p) ** gamma for p in shares))
    actual = GEN(gamma, top)(Evidence(logits, {}, {}, None))
    torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=0)


@pytest.mark.parametrize("gap", [20.0, 50.0, 500.0])
def test_generalized_entropy_of_confident_answers(gap):
    logits = torch.tensor([[0.0, -gap, -gap], [-gap, -gap, 0.0]])  # 1 - p rounds to 0 in float32
    expected = (2**0.1 + 2) * math.exp(-gap / 10)
    assert GEN()(Evidence(logits, {}, {}, None)).tolist() == pytest.approx([expected] * 2, rel=1e-4)


def test_generalized_entropy_of_one_class_and_of_absent_ones():
    assert GEN()(Evidence(torch.tensor([[3.0]]), {}, {}, None)).tolist() == [0]
    even = GEN()(Evidence(torch.tensor([[0.0, 0.0, -math.inf]]), {}, {}, None))
    assert even.tolist() == pytest.approx([2 * 0.25**0.1])


@pytest.mark.parametrize(("options", "message"), [({"gamma": 0}, "must be positive"), ({"top": 0}, "at least 1")])
def test_generalized_entropy_options(options, message):
    with pytest.raises(ValueError, match=message):
        GEN(**options)
