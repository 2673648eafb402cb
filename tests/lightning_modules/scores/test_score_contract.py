"""What holds for every score that reads evidence."""

import copy
import pickle
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from backbones.backbone import Backbone
from backbones.residual_energy import ResidualEnergy
from lightning_modules.evidence import Evidence, observe
from lightning_modules.scores.activations import ASH, DICE, SCALE
from lightning_modules.scores.class_density import ClassDensity
from lightning_modules.scores.clipped import Clipped
from lightning_modules.scores.composition import Composition
from lightning_modules.scores.energy import EnergyScore, FeatureEnergy
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.gradnorm import GradNorm
from lightning_modules.scores.hybrid_energy import HybridEnergy
from lightning_modules.scores.kmeans import KMeans
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import GEN, MSP, Energy, MaxLogit
from lightning_modules.scores.pca import PCA
from lightning_modules.scores.prototypes import ClassMean, Cosine, KLMatching, Norm
from lightning_modules.scores.react import ReAct
from lightning_modules.scores.relative_mahalanobis import RelativeMahalanobis
from lightning_modules.scores.score import Score
from lightning_modules.scores.vim import ViM


def hybrid(prior: EnergyScore) -> HybridEnergy:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return HybridEnergy(prior, ResidualEnergy(6, hidden_dim=8, hidden_layers=1))


SCORES = {
    "msp": MSP,
    "max_logit": MaxLogit,
    "energy": Energy,
    "mahalanobis": Mahalanobis,
    "ssd": lambda: Mahalanobis(normalize=True),
    "gmm": GMMEnergy,
    "gmm_raw": lambda: GMMEnergy(normalize=False),
    "class_density": lambda: ClassDensity(["penultimate"]),
    "class_density_twice": lambda: ClassDensity(2 * ["penultimate"], deduplicate=False, jitter=0.01),
    "knn": lambda: KNN(k=5),
    "react": ReAct,
    "react_fixed": lambda: ReAct(quantile=None, threshold=1.0),
    "ash_p": lambda: ASH("p"),
    "ash_b": lambda: ASH("b"),
    "ash_s": ASH,
    "scale": lambda: SCALE(percentile=65),
    "dice": lambda: DICE(percentile=70),
    "gen": GEN,
    "kl_matching": KLMatching,
    "cosine": Cosine,
    "mean": ClassMean,
    "mean_unit": lambda: ClassMean(normalize=True, reduce="logsumexp"),
    "norm": Norm,
    "gradnorm": GradNorm,
    "relative_mahalanobis": RelativeMahalanobis,
    "ssd_clipped": lambda: Clipped(Mahalanobis(normalize=True)),
    "ssd_kmeans": lambda: KMeans(Mahalanobis(normalize=True)),
    "pca": lambda: PCA(Mahalanobis(), components=4),
    "pca_whitened": lambda: PCA(KNN(k=5), components=4, whiten=True, normalize=True),
    "pca_clipped": lambda: PCA(Clipped(GMMEnergy(normalize=False)), components=4),
    "knn_subsample": lambda: KNN(k=10, subsample=60),
    "vim": ViM,
    "energy_of_features": lambda: FeatureEnergy(Energy()),
    "kl_matching_of_features": lambda: FeatureEnergy(KLMatching()),
    "hybrid": lambda: hybrid(GMMEnergy()),
    "hybrid_clipped": lambda: hybrid(Clipped(GMMEnergy(normalize=False))),
    "composition": lambda: Composition({"energy": Energy(), "std.gmm": GMMEnergy(), "items": Clipped(Mahalanobis())}),
}
FITTED = [name for name, make in SCORES.items() if make().passes]
SAMPLED = ("ssd_kmeans", "knn_subsample")  # their sample is that of one process where batches are dealt out
MAGNITUDE = ("react_fixed", "gen", "norm", "gradnorm")  # a mirrored vector is as long, and two classes share its answer
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
    length = 0.1 if name in MAGNITUDE else 1
    images = -length * data(30)[0]
    if name == "vim":
        images[:, :, 1] += 3  # off the subspace of the classes
    outside = score(observe(backbone, images))
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


BACKENDS = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul


@pytest.fixture
def matmul_precision():
    """Precisions of matrix products, which are as before at the end of the test."""
    before = [backend.fp32_precision for backend in BACKENDS]
    yield lambda: [backend.fp32_precision for backend in BACKENDS]
    torch.set_float32_matmul_precision("highest")
    for backend, precision in zip(BACKENDS, before, strict=True):
        backend.fp32_precision = precision


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("choice", ["medium", "one kind of device", "none"])
def test_scores_multiply_in_full_precision_and_leave_the_choice_as_it_was(choice, fails, matmul_precision):
    class Probe(Score):
        def forward(self, rows: Tensor) -> Tensor:
            assert matmul_precision() == ["ieee", "ieee"]
            assert not torch.is_autocast_enabled("cpu")
            if fails:
                raise ArithmeticError
            return rows @ rows.T

    if choice == "medium":
        torch.set_float32_matmul_precision("medium")
    elif choice == "one kind of device":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    chosen = matmul_precision()
    with torch.autocast("cpu", torch.bfloat16):
        if fails:
            with pytest.raises(ArithmeticError):
                Probe()(torch.ones(2, 2))
        else:
            assert Probe()(torch.ones(2, 2)).dtype == torch.float32
        assert torch.is_autocast_enabled("cpu")
    assert matmul_precision() == chosen
    if choice == "medium":
        assert torch.get_float32_matmul_precision() == "medium"


@pytest.mark.parametrize("name", FITTED)
def test_unfitted_score_is_refused(name):
    score = SCORES[name]()
    with pytest.raises(RuntimeError, match=rf"is not fitted: it needs {score.passes} pass\(es\)"):
        score(observe(Flat().double(), data(2)[0]))
    with pytest.raises(RuntimeError, match="has seen no training data"):
        score.finalize()


@pytest.mark.parametrize("name", SCORES)
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
    for _ in range(score.passes):
        for rows in (torch.arange(0), *torch.arange(100).split(batch), torch.arange(0)):
            score.update(observe(backbone, images[rows]), labels[rows])
        score.finalize()
    assert set(score.state_dict()) == set(expected.state_dict())
    for key, value in expected.state_dict().items():
        difference = (score.state_dict()[key].double() - value.double()).abs().max()
        zero = 1e-14 if name.startswith("pca") else 0  # around which projected features are centred
        assert difference <= 1e-12 * value.double().abs().max() + zero, key


@pytest.mark.parametrize("name", [name for name in FITTED if name not in (*SAMPLED, "knn", "pca_whitened")])
def test_state_does_not_grow_with_the_data(name):
    backbone, (images, labels) = Flat().double().requires_grad_(False), data()
    sizes: dict[int, list[int]] = {1: [], 16: []}
    for times, bytes_ in sizes.items():
        score = SCORES[name]().double()
        score.bind(backbone)
        for _ in range(score.passes):
            for _ in range(times):
                score.update(observe(backbone, images), labels)
            bytes_.append(len(pickle.dumps(score)))
            score.finalize()
    assert sizes[1] == sizes[16]


def share(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=rank, world_size=2)
    images, labels = data()
    shares = {"unequal": [slice(0, 37), slice(37, None)], "empty": [slice(0, 100), slice(100, None)]}
    for case, rows in (shares | {"dealt": [slice(0, None, 2), slice(1, None, 2)]}).items():
        states = {}
        for name in FITTED:
            if case == "dealt" or name not in SAMPLED:
                states[name] = fit(name, images[rows[rank]], labels[rows[rank]], batch=20)[0].state_dict()
        torch.save(states, folder / f"{case}{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_fit_what_one_does(tmp_path):
    torch.multiprocessing.spawn(share, (tmp_path,), nprocs=2)
    for name in FITTED:
        fitted, backbone = fit(name, *data())
        evidence = observe(backbone, torch.cat([data(30)[0], -data(30)[0]]))
        cases = ("dealt",) if name in SAMPLED else ("unequal", "empty", "dealt")
        for case in (f"{case}{rank}" for case in cases for rank in (0, 1)):
            other = SCORES[name]().double()
            other.load_state_dict(torch.load(tmp_path / f"{case}.pt", weights_only=True)[name])
            torch.testing.assert_close(other(evidence), fitted(evidence), rtol=1e-9, atol=0)
            if name not in SAMPLED:
                continue
            for key, value in fitted.state_dict().items():
                torch.testing.assert_close(other.state_dict()[key], value, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("broken", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", FITTED)
def test_training_data_that_hold_no_numbers_are_refused(name, broken):
    images, labels = data()
    images[7, 0, 1, 1] = broken
    with pytest.raises(ValueError, match=r"NaN or infinity"):
        fit(name, images, labels)


def test_missing_tap_is_named():
    score, backbone = fit("mahalanobis", *data())
    score.tap = "std"
    with pytest.raises(ValueError, match="no features 'std', only penultimate"):
        score(observe(backbone, data(2)[0]))
