"""What holds for every score that reads evidence."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence, observe
from lightning_modules.scores.gaussian import GMMEnergy, Mahalanobis
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import MSP, Energy, MaxLogit
from lightning_modules.scores.react import ReAct
from lightning_modules.scores.score import Score

SCORES = {
    "msp": MSP,
    "max_logit": MaxLogit,
    "energy": Energy,
    "mahalanobis": Mahalanobis,
    "ssd": lambda: Mahalanobis(normalize=True),
    "gmm": GMMEnergy,
    "gmm_raw": lambda: GMMEnergy(normalize=False),
    "knn": lambda: KNN(k=5),
    "react": ReAct,
}
FITTED = [name for name, make in SCORES.items() if make().passes]
CENTRES = 3 * torch.eye(3, 6, dtype=torch.float64)


class Flat(Backbone):
    """Features = pixels; the head answers to the three class centres."""

    def __init__(self) -> None:
        super().__init__(6, 3, (1, 2, 3))
        self.fc = nn.Linear(6, 3)
        self.fc.load_state_dict({"weight": CENTRES.clone(), "bias": torch.tensor([0.1, -0.2, 0.3])})

    @property
    def head(self) -> nn.Linear:
        return self.fc

    def stem(self, images: Tensor) -> Tensor:
        return images.flatten(1)


def data(n: int = 100) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (n,), generator=generator)
    features = CENTRES[labels] + 0.3 * torch.randn(n, 6, dtype=torch.float64, generator=generator)
    return features.reshape(n, 1, 2, 3), labels


def fit(name: str, images: Tensor, labels: Tensor, batch: int = 16) -> tuple[Score, Backbone]:
    backbone = Flat().double().requires_grad_(False)
    score = SCORES[name]().double()
    score.bind(backbone)
    for _ in range(score.passes):
        for rows in torch.arange(len(images)).split(batch):
            score.update(observe(backbone, images[rows]), labels[rows])
        score.finalize()
    return score, backbone


@pytest.mark.parametrize("name", SCORES)
def test_higher_is_more_ood(name):
    score, backbone = fit(name, *data())
    inside = score(observe(backbone, data(30)[0]))
    # Far from all centres in direction and, for scores of logits, without any evidence for a class.
    outside = score(observe(backbone, -data(30)[0]))
    assert inside.shape == (30,)
    assert outside.min() > inside.max()


@pytest.mark.parametrize("name", SCORES)
def test_empty_batch(name):
    score, backbone = fit(name, *data())
    assert score(observe(backbone, torch.empty(0, 1, 2, 3, dtype=torch.float64))).shape == (0,)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_half_precision_evidence_is_scored_in_float32(name, autocast):
    fitted, backbone = fit(name, *data())
    score = copy.deepcopy(fitted).float()
    evidence = observe(backbone, data(30)[0])
    half = Evidence(evidence.logits.bfloat16(), {k: v.bfloat16() for k, v in evidence.features.items()}, {}, None)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        actual = score(half)
    exact = fitted(Evidence(half.logits.double(), {k: v.double() for k, v in half.features.items()}, {}, None))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("name", FITTED)
def test_unfitted_score_is_refused(name):
    score = SCORES[name]()
    with pytest.raises(RuntimeError, match=r"is not fitted: it needs 1 pass\(es\)"):
        score(observe(Flat().double(), data(2)[0]))
    with pytest.raises(RuntimeError, match="has seen no training data"):
        score.finalize()


@pytest.mark.parametrize("name", FITTED)
def test_saved_score_needs_no_data(name, tmp_path):
    fitted, backbone = fit(name, *data())
    torch.save(fitted.state_dict(), tmp_path / "score.pt")
    fresh = SCORES[name]().double()
    fresh.load_state_dict(torch.load(tmp_path / "score.pt", weights_only=True))
    evidence = observe(backbone, data(30)[0])
    assert torch.equal(fresh(evidence), fitted(evidence))


@pytest.mark.parametrize("name", FITTED)
@pytest.mark.parametrize("batch", [1, 7, 100])
def test_any_split_fits_the_same(name, batch):
    images, labels = data()
    expected, backbone = fit(name, images, labels)
    score = SCORES[name]().double()
    score.bind(backbone)
    for rows in (torch.arange(0), *torch.arange(100).split(batch), torch.arange(0)):
        score.update(observe(backbone, images[rows]), labels[rows])
    score.finalize()
    assert set(score.state_dict()) == set(expected.state_dict())
    for key, value in expected.state_dict().items():
        difference = (score.state_dict()[key] - value).abs().max()
        assert difference <= 1e-12 * value.abs().max(), key


def share(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    images, labels = data()
    for case, border in {"unequal": 37, "empty": 100}.items():
        rows = slice(0, border) if rank == 0 else slice(border, None)
        states = {}
        for name in FITTED:
            states[name] = fit(name, images[rows], labels[rows], batch=40)[0].state_dict()
        torch.save(states, folder / f"{case}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_fit_what_one_does(tmp_path):
    torch.multiprocessing.spawn(share, (tmp_path,), nprocs=2)
    for name in FITTED:
        fitted, backbone = fit(name, *data())
        evidence = observe(backbone, torch.cat([data(30)[0], -data(30)[0]]))
        for case in ("unequal0", "unequal1", "empty0", "empty1"):
            other = SCORES[name]().double()
            other.load_state_dict(torch.load(tmp_path / f"{case}.pt", weights_only=True)[name])
            torch.testing.assert_close(other(evidence), fitted(evidence), rtol=1e-9, atol=0)


def test_missing_tap_is_named():
    score, backbone = fit("mahalanobis", *data())
    score.tap = "std"
    with pytest.raises(ValueError, match="no features 'std', only penultimate"):
        score(observe(backbone, data(2)[0]))
