import math

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from lightning_modules.evidence import Evidence
from lightning_modules.scores.composition import Composition, compose
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.logits import MSP, Energy
from lightning_modules.scores.odin import ODIN
from lightning_modules.scores.score import Score


class Column(Score):
    """One feature as it is, times a positive factor and shifted."""

    taps = frozenset({"penultimate"})

    def __init__(self, column, factor=1.0, shift=0.0):
        super().__init__()
        self.column, self.factor, self.shift = column, factor, shift

    def forward(self, evidence):
        return self.factor * evidence.features["penultimate"][:, self.column] + self.shift


def evidence(rows):
    return Evidence(rows[:, :3], {"penultimate": rows}, {}, None)


def sample(number=400, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(number, 4, generator=generator, dtype=torch.float64) * torch.tensor([1.0, 5.0, 0.1, 2.0]) + 7
    return rows, torch.randint(3, (number,), generator=generator)


def fit(score, rows, labels, sizes=(150, 0, 250)):
    for _ in range(score.passes):
        for batch, classes in zip(rows.split(sizes), labels.split(sizes), strict=True):
            score.update(evidence(batch), classes)
        score.finalize()
    return score


@pytest.mark.parametrize(
    ("beta", "expected"), [(0, 4), (1, 3.1269), (-1, 0.8731), (math.inf, 3), (-math.inf, 1), (2, 3.0091)]
)
def test_known_values(beta, expected):
    assert float(compose(torch.tensor([[1.0, 3.0]]), beta)) == pytest.approx(expected, abs=5e-5)


def test_small_and_great_beta_rank_as_their_limits():
    scores = torch.randn(500, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for beta, limit in ((1e-3, 0), (50, math.inf), (-50, -math.inf)):
        assert spearmanr(compose(scores, beta), compose(scores, limit)).statistic > 0.999


@pytest.mark.parametrize("beta", [0, -1.0, 2.0, math.inf, -math.inf])
def test_members_are_standardised_over_all_training_data(beta):
    (rows, labels), (images, _) = sample(), sample(20, seed=2)
    score = fit(Composition({"a": Column(0), "b": Column(1), "c": Column(3)}, beta).double(), rows, labels)
    chosen = rows[:, [0, 1, 3]].numpy()
    standard = (images[:, [0, 1, 3]].numpy() - chosen.mean(0)) / chosen.std(0, ddof=1)
    expected = {
        0: standard.sum(1),
        math.inf: standard.max(1),
        -math.inf: standard.min(1),
    }.get(beta)
    if expected is None:
        expected = np.log(np.exp(beta * standard).sum(1)) / beta
    np.testing.assert_allclose(score(evidence(images)), expected, rtol=1e-10)


@pytest.mark.parametrize("beta", [0, -1.0, math.inf])
def test_rescaling_a_member_changes_nothing(beta):
    (rows, labels), (images, _) = sample(), sample(20, seed=2)
    plain, scaled = (
        fit(Composition({"a": Column(0), "b": Column(1, factor, shift)}, beta).double(), rows, labels)(evidence(images))
        for factor, shift in ((1, 0), (250, -4e3))
    )
    torch.testing.assert_close(scaled, plain)


def test_members_are_fitted_before_their_scores_are_counted():
    (rows, labels), (images, _) = sample(), sample(20, seed=2)
    members = {"energy": Energy(), "maha": Mahalanobis(), "gmm": GMMEnergy(normalize=False)}
    score = Composition(members).double()
    assert score.passes == 2
    assert score.taps == {"penultimate"}
    fit(score, rows, labels)
    alone = [fit(kind.double(), rows, labels) for kind in (Energy(), Mahalanobis(), GMMEnergy(normalize=False))]
    trained = torch.stack([member(evidence(rows)) for member in alone], 1)
    fresh = torch.stack([member(evidence(images)) for member in alone], 1)
    torch.testing.assert_close(score(evidence(images)), ((fresh - trained.mean(0)) / trained.std(0)).sum(1))


def test_members_that_are_fitted_need_no_pass_of_their_own():
    (rows, labels), (images, _) = sample(), sample(20, seed=2)
    maha = fit(Mahalanobis().double(), rows[:200], labels[:200], sizes=(200, 0, 0))
    score = Composition({"maha": maha, "energy": Energy()}).double()
    assert score.passes == 1
    alone = maha(evidence(images))
    fit(score, rows, labels)
    assert torch.equal(maha(evidence(images)), alone)
    trained = torch.stack([maha(evidence(rows)), Energy()(evidence(rows))], 1)
    fresh = torch.stack([alone, Energy()(evidence(images))], 1)
    torch.testing.assert_close(score(evidence(images)), ((fresh - trained.mean(0)) / trained.std(0)).sum(1))


def test_a_saved_composition_needs_no_training_data():
    (rows, labels), (images, _) = sample(), sample(20, seed=2)
    score = fit(Composition({"maha": Mahalanobis(), "msp": MSP()}, -1), rows.float(), labels)
    again = Composition({"maha": Mahalanobis(), "msp": MSP()}, -1)
    again.load_state_dict(score.state_dict())
    assert again.fitted
    assert torch.equal(again(evidence(images.float())), score(evidence(images.float())))


def test_what_makes_no_composition():
    with pytest.raises(ValueError, match="at least one member"):
        Composition({})
    with pytest.raises(ValueError, match="odin runs the network again"):
        Composition({"msp": MSP(), "odin": ODIN()})
    with pytest.raises(ValueError, match="not nan"):
        Composition({"msp": MSP()}, math.nan)
    rows, labels = sample(4)
    with pytest.raises(ValueError, match="still scores all training images alike"):
        fit(Composition({"moving": Column(0), "still": Column(0, 0.0)}), rows, labels, sizes=(4, 0, 0))
    with pytest.raises(ValueError, match="needs two training images, there are 1"):
        fit(Composition({"one": Column(0)}), rows[:1], labels[:1], sizes=(1, 0, 0))
