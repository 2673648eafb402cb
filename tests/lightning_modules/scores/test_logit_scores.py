import math

import pytest
import torch

from lightning_modules.evidence import Evidence
from lightning_modules.scores.logits import MSP, Energy, MaxLogit


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
