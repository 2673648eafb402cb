import copy
import math

import numpy as np
import pytest
import torch
from sklearn.covariance import EmpiricalCovariance
from sklearn.linear_model import LogisticRegression
from torch import nn

from lightning_modules.evidence import Evidence
from lightning_modules.scores.layered_mahalanobis import LayeredMahalanobis, regression

TAPS = ["stem", "penultimate"]
MAGNITUDES = (0.0, 0.3, 0.1)


class Net(nn.Module):
    """Two linear taps and a linear head, so that all gradients are known; counts the images it sees."""

    def __init__(self, cut=False, constants=None):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.fc = (
            nn.Linear(*shape, bias=False).double() for shape in ((8, 6), (6, 5), (5, 3))
        )
        self.cut, self.seen, self.mean = cut, 0, constants

    def forward(self, images):
        self.seen += len(images)
        stem = self.first(images.detach().flatten(1) if self.cut else images.flatten(1))
        features = {"stem": stem, "penultimate": self.second(stem)}
        return Evidence(self.fc(features["penultimate"]), features, {}, None)

    def maps(self):
        """Matrices from pixels to each tap and to the logits."""
        first, second, head = (layer.weight.detach().numpy() for layer in (self.first, self.second, self.fc))
        return first, second @ first, head @ second @ first


def draw(n, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(3, size=n)
    images = 2 * np.random.default_rng(9).normal(size=(3, 8))[labels] + rng.normal(size=(n, 8))
    return torch.from_numpy(images).view(n, 2, 2, 2), torch.from_numpy(labels)


def fit(module, score, batch=32, held_out=120, adversaries=True):
    score.double().bind(module)
    images, labels = draw(300)
    for rows in torch.arange(300).split(batch):
        score.update(module(images[rows]), labels[rows])
    score.finalize()
    images, labels = draw(held_out, seed=1)
    for rows in (torch.arange(0), *torch.arange(held_out).split(batch)):
        score.calibrate(module, images[rows], labels[rows])
    score.finalize()
    return score


class Reference:
    """The same in NumPy, gradients by hand."""

    def __init__(self, module, noise):
        self.matrices, self.noise = module.maps(), noise
        images, labels = (x.flatten(1).numpy() if x.ndim > 1 else x.numpy() for x in draw(300))
        self.gaussians = []
        for matrix in self.matrices[:2]:
            features = images @ matrix.T
            means = np.stack([features[labels == c].mean(0) for c in range(3)])
            fitted = EmpiricalCovariance(assume_centered=True).fit(features - means[labels])
            self.gaussians.append((matrix, means, fitted.precision_))

    def distances(self, images, magnitude):
        return np.stack([self.tap(images, magnitude, *gaussians) for gaussians in self.gaussians], 1)

    def tap(self, images, magnitude, matrix, means, precision):
        def nearest(x):
            offsets = (x @ matrix.T)[:, None] - means
            squares = np.einsum("nkd,de,nke->nk", offsets, precision, offsets)
            return squares.min(1), offsets[np.arange(len(x)), squares.argmin(1)]

        gradient = 2 * nearest(images)[1] @ precision @ matrix
        return nearest(images - magnitude * np.sign(gradient))[0]

    def adversaries(self, images, labels):
        logits = images @ self.matrices[2].T
        probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        return images + self.noise * np.sign((probabilities - np.eye(3)[labels]) @ self.matrices[2])

    def calibrate(self, held_out, magnitudes):
        images, labels = draw(held_out, seed=1)
        order = torch.rand(held_out, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).argsort()
        images, labels = images[order].flatten(1).numpy(), labels[order].numpy()
        groups = [images, self.adversaries(images, labels)]
        results = []
        for magnitude in magnitudes:
            clean, attacked = (self.distances(x, magnitude) for x in groups)
            half = held_out // 2
            rows = np.concatenate([clean[:half], attacked[:half]])
            mean, std = rows.mean(0), rows.std(0)
            model = LogisticRegression(max_iter=1000).fit((rows - mean) / std, [0] * half + [1] * half)
            ours, theirs = (model.decision_function((x[half:] - mean) / std) for x in (clean, attacked))
            threshold = np.sort(ours)[math.ceil(0.95 * len(ours)) - 1]
            results.append(((theirs <= threshold).mean(), magnitude, model, mean, std))
        return min(results, key=lambda result: result[0])


@pytest.mark.parametrize("noise", [0.05, 0.5])
@pytest.mark.parametrize("magnitudes", [(0.0,), (0.2,), MAGNITUDES])
def test_equals_numpy_with_gradients_by_hand(magnitudes, noise):
    module = Net()
    score = fit(module, LayeredMahalanobis(TAPS, magnitudes, noise))
    reference = Reference(module, noise)
    passing, magnitude, model, mean, std = reference.calibrate(120, magnitudes)
    assert 0 < passing < 1
    assert float(score.magnitude) == magnitude
    images = draw(40, seed=2)[0]
    distances = reference.distances(images.flatten(1).numpy(), magnitude)
    expected = model.decision_function((distances - mean) / std)
    np.testing.assert_allclose(score(module, images).detach().numpy(), expected, rtol=1e-6, atol=1e-8)


def test_the_first_of_equal_magnitudes_is_chosen():
    assert float(fit(Net(), LayeredMahalanobis(TAPS, (2e-9, 0.0, 1e-9))).magnitude) == 2e-9


@pytest.mark.parametrize("batch", [1, 7, 500])
def test_any_batches_give_the_same(batch):
    module, images = Net(), draw(10, seed=2)[0]
    scores = [fit(module, LayeredMahalanobis(TAPS, MAGNITUDES), batch=b)(module, images) for b in (32, batch)]
    torch.testing.assert_close(*scores, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("magnitudes", [(0.0,), (0.2,), MAGNITUDES])
def test_declares_the_forwards_that_it_takes(magnitudes):
    module, score = Net(), LayeredMahalanobis(TAPS, magnitudes)
    fit(module, score)
    assert module.seen == 300 + 120 * score.calibration_forwards
    module.seen = 0
    score(module, draw(10)[0])
    assert module.seen == 10 * score.forwards
    assert score.forwards == (3 if float(score.magnitude) else 1)


def test_higher_is_more_ood():
    module = Net()
    score = fit(module, LayeredMahalanobis(TAPS, MAGNITUDES))
    inside, _ = draw(50, seed=2)
    assert score(module, inside + 20).min() > score(module, inside).max()


def test_adversaries_of_a_network_that_normalises_stay_in_range():
    images, labels = torch.rand(40, 2, 2, 2, dtype=torch.float64), torch.arange(40) % 3
    seen = []
    for constants in (None, torch.zeros(1)):
        module, score = Net(constants=constants), LayeredMahalanobis(TAPS, (0.0,), noise=0.5).double()
        score.bind(module)
        score.update(module(images), labels)
        score.finalize()
        module.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach()))
        score.calibrate(module, images, labels)
        seen.append(None)
    free, bounded = seen[2], seen[6]
    assert (free - images).abs().max() == pytest.approx(0.5)
    assert torch.equal(bounded, free.clamp(0, 1))
    assert not torch.equal(bounded, free)


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_leaves_no_trace(context):
    module = Net().requires_grad_(False)
    module.fc.train(False)
    state = copy.deepcopy(module.state_dict())
    with torch.no_grad():
        score = fit(module, LayeredMahalanobis(TAPS, MAGNITUDES))
    with context():
        images, labels = draw(4)
        score.calibrate(module, images, labels)
        before = images.clone()
        values = score(module, images)
    assert values.shape == (4,)
    assert not values.requires_grad
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert module.training
    assert not module.fc.training
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_saved_score_needs_no_data(tmp_path):
    module, images = Net(), draw(10)[0]
    score = fit(module, LayeredMahalanobis(TAPS, MAGNITUDES))
    torch.save(score.state_dict(), tmp_path / "score.pt")
    fresh = LayeredMahalanobis(TAPS, MAGNITUDES).double()
    fresh.load_state_dict(torch.load(tmp_path / "score.pt", weights_only=True))
    assert torch.equal(fresh(module, images), score(module, images))
    assert fresh.forwards == score.forwards


def test_unfitted_and_uncalibrated_scores_are_refused():
    module, score = Net(), LayeredMahalanobis(TAPS).double()
    images, labels = draw(30)
    message = r"needs 1 pass\(es\) over ID training data, then calibration on held-out ID images"
    with pytest.raises(RuntimeError, match=message):
        score(module, images)
    score.update(module(images), labels)
    score.finalize()
    assert (score.passes_left, score.fitted) == (0, False)
    with pytest.raises(RuntimeError, match=message):
        score(module, images)
    with pytest.raises(ValueError, match=r"at least 4 held-out images.* not 0"):
        score.finalize()


@pytest.mark.parametrize("case", ["constant", "zero", "single"])
def test_degenerate_images(case):
    module, score = Net(), LayeredMahalanobis(TAPS, MAGNITUDES).double()
    images, labels = draw(100)
    if case == "constant":
        with torch.no_grad():
            module.first.weight[2] = 0
    elif case == "zero":
        images[0] = 0
    else:
        labels = torch.where(torch.arange(100) == 5, 2, labels % 2)
    score.update(module(images), labels)
    score.finalize()
    score.calibrate(module, images, labels)
    score.finalize()
    assert score(module, images).isfinite().all()


def test_half_precision():
    module, score = Net(), LayeredMahalanobis(TAPS, (0.0,))
    images, labels = draw(300)
    with torch.autocast("cpu", torch.bfloat16):
        score.update(module(images), labels)
        score.finalize()
        score.calibrate(module, images, labels)
        score.finalize()
        values = score(module, images)
    assert values.dtype == torch.float32
    assert len(values.unique()) > 100
    with pytest.raises(ValueError, match=r"LayeredMahalanobis moves images by steps that torch\.bfloat16 rounds away"):
        score(module.bfloat16(), images.bfloat16())


def test_a_constant_distance_has_no_weight_that_is_not_finite():
    rng = np.random.default_rng(0)
    clean, adversaries = rng.normal(size=(20, 2)), rng.normal(size=(20, 2)) + 1
    clean[:, 1] = adversaries[:, 1] = 5
    coefficients, intercept = regression(clean, adversaries)
    assert np.isfinite([*coefficients, intercept]).all()


def test_inference_tensors_and_cut_gradients_are_refused_in_words():
    images, labels = draw(9)
    with torch.inference_mode():
        module = Net()
        with pytest.raises(RuntimeError, match=r"made in torch\.inference_mode"):
            LayeredMahalanobis(TAPS).calibrate(module, images, labels)
    with pytest.raises(RuntimeError, match="the module cuts it"):
        LayeredMahalanobis(TAPS).calibrate(Net(cut=True).requires_grad_(False), images, labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"taps": []}, "at least one"),
        ({"taps": ["stem", "stem"]}, "must be different"),
        ({"taps": TAPS, "magnitudes": []}, "magnitudes are at least 0"),
        ({"taps": TAPS, "magnitudes": [-0.1]}, "magnitudes are at least 0"),
        ({"taps": TAPS, "noise": 0}, "noise is positive"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        LayeredMahalanobis(**options)
