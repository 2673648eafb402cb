import copy
import math

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from scipy.special import logsumexp
from scipy.stats import multivariate_normal
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from backbones.backbone import Backbone
from backbones.residual_energy import ResidualEnergy
from lightning_modules import heat
from lightning_modules.evidence import Evidence, EvidenceBatch
from lightning_modules.heat import HEAT, DivergenceError
from lightning_modules.samplers.sgld import SGLD, ChainBuffer
from lightning_modules.scores.energy import EnergyScore, FeatureEnergy
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.logits import Energy

WIDTH, CLASSES, SIZE = 6, 3, 16
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Net(Backbone):
    """Its features are its pixels; spread over 2 x 2 positions they vary by a quarter of them."""

    def __init__(self):
        super().__init__(WIDTH, CLASSES, (WIDTH, 1, 1))
        self.fc = nn.Linear(WIDTH, CLASSES)

    def stem(self, images):
        return images * torch.tensor([0.5, 1.5, 1.0, 1.0]).view(1, 1, 2, 2)


def draw(number=300):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(number) % CLASSES
    means = 1 + 2 * torch.rand(CLASSES, WIDTH, generator=generator)
    return (means[labels] + 0.3 * torch.randn(number, WIDTH, generator=generator)).relu()[..., None, None], labels


def adam(parameters):
    return torch.optim.Adam(parameters, 1e-3, (0.0, 0.999))


def fitted(prior=None, sgld=None, residual=None, **options):
    """A module with a fitted prior, as training finds it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        backbone, residual = Net(), residual or ResidualEnergy(WIDTH, 8, 2)
    sgld = sgld or SGLD(3, 1e-3, 1e-2)
    module = HEAT(backbone, prior or GMMEnergy(), residual, sgld, options.pop("optimizer", adam), **options)
    module.configure_model()
    module.energy.bind(backbone)
    with torch.no_grad():
        while not module.energy.fitted:
            module.energy.update(module.encode(draw()[0]), draw()[1])
            module.energy.finalize()
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def batch_of(module, size=SIZE, offset=0):
    images, labels = (rows[offset : offset + size] for rows in draw())
    with torch.no_grad():
        return EvidenceBatch(module.encode(images), labels, torch.arange(offset, offset + size))


def train(module, steps=5, size=SIZE, **options):
    """Train on batches one after the other, without shuffling."""
    for name in ("log", "log_dict"):
        vars(module).pop(name, None)
    batches = DataLoader([batch_of(module, size, size * step) for step in range(steps)], batch_size=None)
    options = {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False} | QUIET | options
    Trainer(**options).fit(module, batches, batches)
    return module


def state_of(module):
    return {name: value.clone() for name, value in module.state_dict().items()}


def unchanged(module, before):
    return all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


class Recorded(ResidualEnergy):
    """Keeps the rows that it is asked for with gradients on: real ones, then negatives."""

    def __init__(self):
        super().__init__(WIDTH, 8, 2)
        self.rows = []

    def forward(self, features):
        if torch.is_grad_enabled() and not features.requires_grad:
            self.rows.append(features)
        return super().forward(features)


# Scores


def test_scores_are_the_hybrid_energy_and_its_parts():
    module, images = fitted(temperature=2.0, prior_temperature=50.0), draw()[0][:40] + 0.2
    scores = module(images).scores
    rows, labels = F.normalize(draw()[0].flatten(1), dim=1).double().numpy(), draw()[1].numpy()
    means = np.stack([rows[labels == c].mean(0) for c in range(CLASSES)])
    covariance = (rows - means[labels]).T @ (rows - means[labels]) / len(rows)
    queries = F.normalize(images.flatten(1), dim=1)
    terms = [
        multivariate_normal(mean, covariance).logpdf(queries.numpy()) + np.log(np.mean(labels == c))
        for c, mean in enumerate(means)
    ]
    np.testing.assert_allclose(scores["prior"].numpy(), -logsumexp(terms, axis=0) / 50, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scores["residual"], module.energy.residual(queries) / 2, rtol=1e-6, atol=1e-7)
    assert torch.equal(scores["heat"], scores["prior"] + scores["residual"])
    assert list(scores) == ["heat", "prior", "residual"]


def test_no_image_has_no_score():
    assert fitted()(draw()[0][:0]).scores["heat"].shape == (0,)


def test_features_of_another_pooling():
    module, images = fitted(GMMEnergy("std")), draw()[0][:20]
    assert module.taps == {"std"}
    evidence = module.encode(images)
    maps = (images * torch.tensor([0.5, 1.5, 1.0, 1.0]).view(1, 1, 2, 2)).numpy()
    np.testing.assert_allclose(evidence.features["std"].numpy(), maps.std((2, 3), ddof=1), rtol=1e-5)
    logits = images.flatten(1) @ module.backbone.fc.weight.T + module.backbone.fc.bias
    torch.testing.assert_close(evidence.logits, logits)
    assert module(images).scores["heat"].isfinite().all()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.float16, 1e-3)])
def test_cached_features_have_the_scores_of_images(dtype, tolerance):
    module, images = fitted(prior_temperature=10.0), draw()[0][:50]
    evidence = module.encode(images)
    stored = {tap: rows.to(dtype).float() for tap, rows in evidence.features.items()}
    actual = module.energy(evidence._replace(features=stored))
    torch.testing.assert_close(actual, module(images).scores["heat"], rtol=tolerance, atol=tolerance)


def test_an_unfitted_module_scores_nothing_and_is_not_trained():
    module = HEAT(Net(), GMMEnergy(), ResidualEnergy(WIDTH, 8), SGLD(1, 0.1, 0.1), adam)
    assert module(draw()[0]).scores == {}
    with pytest.raises(RuntimeError, match=r"prior of HybridEnergy is not fitted: it needs 1 pass\(es\)"):
        module.training_step(batch_of(module), 0)


# The loss and its parts


def loss_by_hand(module, real, negatives):
    r, n = (module.energy.residual(rows).detach().double().numpy() / 2 for rows in (real, negatives))
    return r.mean() - n.mean() + 10 * ((r**2).mean() + (n**2).mean())


def test_without_steps_the_negatives_are_the_starts_twice():
    module = fitted(sgld=SGLD(0, 0.1, 0.1), residual=Recorded(), data_noise=0.0, temperature=2.0)
    batch = batch_of(module)
    torch.manual_seed(1)
    loss = module.training_step(batch, 0)
    torch.manual_seed(1)
    expected = F.normalize(module.energy.prior.sample(SIZE)[1].relu(), dim=1)
    real, negatives = module.energy.residual.rows[:2]
    assert torch.equal(real, F.normalize(batch.evidence.features["penultimate"], dim=1))
    assert torch.equal(negatives, torch.cat([expected, expected]))
    assert loss.item() == pytest.approx(loss_by_hand(module, real, expected), rel=1e-5)


@pytest.mark.parametrize("include_starts", [True, False])
def test_negatives_are_the_ends_of_chains_and_their_starts_if_included(include_starts):
    torch.manual_seed(0)
    module = fitted(
        sgld=SGLD(4, 1e-2, 0.3),
        residual=Recorded(),
        include_starts=include_starts,
        data_noise=0.0,
        temperature=2.0,
    )
    batch = batch_of(module)
    torch.manual_seed(1)
    loss = module.training_step(batch, 0)
    torch.manual_seed(1)
    real = module.energy.embed(batch.evidence)
    starts, _ = module.propose(real, batch.labels)
    *_, (ends, _) = module.sgld.walk(module.energy, starts)
    torch.testing.assert_close(module.energy.residual.rows[1], torch.cat([ends, starts]))
    negatives = torch.cat([ends, starts]) if include_starts else ends
    assert loss.item() == pytest.approx(loss_by_hand(module, real, negatives), rel=1e-5)
    others = ends if include_starts else torch.cat([ends, starts])
    assert loss.item() != pytest.approx(loss_by_hand(module, real, others), rel=1e-3)
    assert (ends - starts).norm(dim=1).min() > 1e-3


def test_noise_is_added_to_real_features_and_negatives_alike():
    module = fitted(sgld=SGLD(0, 0.1, 0.1), residual=Recorded(), data_noise=0.05, proposal="data")
    batch = batch_of(module, 300)
    module.training_step(batch, 0)
    rows, (real, negatives) = F.normalize(draw()[0].flatten(1), dim=1), module.energy.residual.rows[:2]
    for noise in (real - rows, negatives[:300] - rows, negatives[300:] - rows):
        assert noise.std().item() == pytest.approx(0.05, rel=0.05)
    assert (negatives[:300] - negatives[300:]).std() > 0.05


def test_a_step_of_chains_leaves_gradients_to_the_loss():
    module, before = fitted(), None
    before = state_of(module)
    loss = module.training_step(batch_of(module), 0)
    assert unchanged(module, before)
    assert all(parameter.grad is None for parameter in module.parameters())
    loss.backward()
    assert all(parameter.grad is not None for parameter in module.energy.residual.parameters())


class Learned(EnergyScore):
    """A prior with parameters, as a network would have."""

    def __init__(self):
        super().__init__()
        self.centre = nn.Parameter(torch.ones(WIDTH))

    def embed(self, evidence):
        return evidence.features["penultimate"]

    def energy(self, features):
        return (features - self.centre).square().sum(1)


def test_only_the_residual_is_optimised_and_the_prior_has_no_gradient():
    module = fitted(Learned(), proposal="normal")
    (group,) = module.configure_optimizers().param_groups
    assert {id(parameter) for parameter in group["params"]} == {
        id(parameter) for parameter in module.energy.residual.parameters()
    }
    module.training_step(batch_of(module), 0).backward()
    assert module.energy.prior.centre.grad is None
    assert all(parameter.grad is None for parameter in module.backbone.parameters())


@pytest.mark.parametrize("prior", [GMMEnergy, lambda: FeatureEnergy(Energy())])
def test_training_moves_the_residual_alone(prior):
    module = fitted(prior(), proposal="normal", regularization=0.1)
    before = state_of(module)
    train(module)
    for name, value in module.state_dict().items():
        assert torch.equal(value, before[name]) != name.startswith("energy.residual"), name


def test_training_lowers_real_energies_below_those_of_negatives():
    module = fitted(
        proposal="normal",
        regularization=0.1,
        optimizer=lambda parameters: torch.optim.Adam(parameters, 1e-2, (0.0, 0.999)),
    )
    train(module, max_epochs=10)
    real = F.normalize(draw()[0].flatten(1), dim=1)
    with torch.no_grad():
        torch.manual_seed(0)
        starts, _ = module.propose(real, draw()[1])
        assert module.energy.residual(starts).mean() > module.energy.residual(real).mean() + 0.1


# Proposals


def test_proposals_of_noise():
    torch.manual_seed(0)
    module = fitted(FeatureEnergy(Energy()), proposal="normal")
    starts, classes = module.propose(torch.zeros(20_000, WIDTH), torch.zeros(20_000, dtype=torch.int64))
    assert classes is None
    assert starts.min() == 0
    expected = torch.full((WIDTH,), 1 / math.sqrt(2 * math.pi))  # the mean of a rectified standard normal
    torch.testing.assert_close(starts.mean(0), expected, rtol=0, atol=0.03)


def test_proposals_from_the_prior_have_its_frequencies_or_those_of_the_batch():
    torch.manual_seed(0)
    labels = torch.tensor([2] * 1000 + [1] * 3000)
    means = torch.stack([F.normalize(draw()[0].flatten(1), dim=1)[c::CLASSES].mean(0) for c in range(CLASSES)])
    for conditional, expected in ((False, [1 / 3, 1 / 3, 1 / 3]), (True, [0, 0.75, 0.25])):
        starts, classes = fitted(conditional=conditional).propose(torch.zeros(4000, WIDTH), labels)
        nearest = torch.cdist(starts, means).argmin(1)
        shares = nearest.bincount(minlength=CLASSES) / 4000
        torch.testing.assert_close(shares, torch.tensor(expected), rtol=0, atol=0.04)
        assert (classes is not None) == conditional
        if conditional:
            assert (nearest == classes).float().mean() > 0.97
        torch.testing.assert_close(starts.norm(dim=1), torch.ones(4000))


def test_chains_of_a_class_descend_its_energy(monkeypatch):
    module, seen = fitted(conditional=True), []
    gradient = GMMEnergy.gradient
    monkeypatch.setattr(GMMEnergy, "gradient", lambda *args: seen.append(args[2]) or gradient(*args))
    batch = batch_of(module)._replace(labels=torch.full((SIZE,), 2))
    module.training_step(batch, 0)
    assert [classes.tolist() for classes in seen] == 3 * [SIZE * [2]]


def test_temperatures_are_drawn_for_each_batch(monkeypatch):
    torch.manual_seed(0)
    module, seen = fitted(proposal="prior_tempered", conditional=True), []
    sample = GMMEnergy.sample
    monkeypatch.setattr(GMMEnergy, "sample", lambda *args: seen.append(args[3]) or sample(*args))
    labels = torch.arange(SIZE) % CLASSES
    for _ in range(500):
        starts, _ = module.propose(torch.zeros(SIZE, WIDTH), labels)
        assert ((starts >= 0).all(1) & starts.isfinite().all(1)).all()
    assert 0 <= min(seen) < 2
    assert 98 < max(seen) <= 100
    assert np.mean(seen) == pytest.approx(50, abs=5)
    assert len(set(seen)) == 500


@pytest.mark.parametrize("conditional", [False, True])
def test_proposals_of_the_data(conditional):
    module = fitted(proposal="data", conditional=conditional)
    batch = batch_of(module)
    real = module.energy.embed(batch.evidence)
    starts, classes = module.propose(real, batch.labels)
    torch.testing.assert_close(starts, real)
    assert torch.equal(classes, batch.labels) if conditional else classes is None


def test_chains_go_on_from_earlier_ends_and_are_saved():
    chains = ChainBuffer(capacity=4 * SIZE, restart=0.25)
    module = fitted(chains=chains, sgld=SGLD(2, 0.0, 0.1))
    train(module, steps=2)
    assert chains.ends.shape == (2 * SIZE, WIDTH)
    real = module.energy.embed(batch_of(module).evidence)
    starts, _ = module.propose(real, draw()[1][:SIZE])
    earlier = (starts[:, None] - chains.ends).abs().amax(2).amin(1) < 1e-6
    assert earlier.sum() == SIZE - SIZE // 4
    other = fitted(chains=ChainBuffer(capacity=4 * SIZE, restart=0.25))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.chains.ends, chains.ends)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"conditional": True, "chains": ChainBuffer()}, "take conditional or chains, not both"),
        ({"conditional": True, "proposal": "normal"}, "noise has no class"),
        ({"regularization": -1.0}, "regularization and data_noise must be at least 0, not regularization=-1.0"),
        ({"data_noise": -1e-4}, "data_noise=-0.0001"),
        ({"prior_temperature": 0.0}, "prior_temperature must be positive"),
    ],
)
def test_combinations_without_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        fitted(**options)


def spoilt(batch, value):
    features = batch.evidence.features["penultimate"].clone()
    features[3, 2] = value
    return batch._replace(evidence=batch.evidence._replace(features={"penultimate": features}), ids=batch.ids + 40)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda batch: (draw()[0], batch.labels, batch.ids), "this batch holds images: add callbacks.frozen_features"),
        (
            lambda batch: batch._replace(labels=batch.labels - 1),
            "image 0 is an outlier: HEAT is trained without",
        ),
        (lambda batch: spoilt(batch, -0.1), "has features below 0.*set sgld.relu to false"),
        (lambda batch: spoilt(batch, math.nan), "training image 43 has features that are NaN or infinite"),
        (lambda batch: spoilt(batch, math.inf), "training image 43 has features that are NaN or infinite"),
    ],
)
def test_batches_that_it_cannot_train_on_are_refused(spoil, message):
    module = fitted()
    before = state_of(module)
    with pytest.raises(ValueError, match=message):
        module.training_step(spoil(batch_of(module)), 0)
    assert unchanged(module, before)


def test_negative_features_are_fine_without_relu():
    module = fitted(sgld=SGLD(3, 1e-3, 1e-2, relu=False))
    assert module.training_step(spoilt(batch_of(module), -0.1), 0).isfinite()


def test_a_prior_that_cannot_be_drawn_from_says_what_to_do():
    module = fitted(FeatureEnergy(Energy()))
    with pytest.raises(
        ValueError, match=r"FeatureEnergy cannot be drawn from: let chains start elsewhere \(proposal\)"
    ):
        module.training_step(batch_of(module), 0)


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_parameters_are_refused(precision):
    module = fitted()
    module.trainer = Trainer(precision=precision, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match=f"takes steps that {precision} rounds away: choose 32-true or bf16-mixed"):
        module.setup("fit")


def test_mixed_precision_changes_no_step():
    module = fitted()
    batch, losses = batch_of(module), []
    for enabled in (False, True):
        torch.manual_seed(0)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(module.training_step(batch, 0))
    assert torch.equal(*losses)
    assert losses[1].dtype == torch.float32


def test_a_batch_of_one():
    module = fitted(prior_temperature=10.0)
    loss = module.training_step(batch_of(module, 1), 0)
    assert loss.shape == ()
    loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.energy.residual.parameters())


# Divergence


def scaled(factor):
    residual = ResidualEnergy(WIDTH, 8, 2)
    with torch.no_grad():
        residual.mlp[-1].weight *= factor
    return residual


DIVERGENCES = {
    "exploding chains": (
        {"sgld": SGLD(1, 1e4, 0.0), "prior": GMMEnergy(normalize=False)},
        r"step 0: the length of a chain's end reaches .*, of at most .*Remedy: lower step_size or noise of "
        r"SGLD\(steps=1, step_size=10000.0.*, or raise prior_temperature 1.0",
    ),
    "noisy chains": (
        {"sgld": SGLD(1, 0.0, 1e5), "prior": GMMEnergy(normalize=False)},
        r"a chain's end reaches .*noise=100000.0",
    ),
    "chains that are no numbers": (
        {"sgld": SGLD(5, math.inf, 0.0)},
        "the length of a chain's end is not a finite number. Remedy: lower step_size",
    ),
    "exploding energies": (
        {"residual": scaled(1e6), "sgld": SGLD(0, 0, 0)},
        "step 0: a residual energy reaches .*, of at most 50. Remedy: lower the learning rate, or raise "
        "regularization 10.0",
    ),
    "energies that are no numbers": (
        {"residual": scaled(math.nan), "sgld": SGLD(0, 0, 0), "regularization": 0.0},
        "a residual energy is not a finite number. Remedy: lower the learning rate",
    ),
}


@pytest.mark.parametrize("name", DIVERGENCES)
def test_divergence_is_caught_before_anything_changes(name):
    options, message = DIVERGENCES[name]
    module = fitted(chains=ChainBuffer(), **options)
    before = copy.deepcopy(state_of(module))
    with pytest.raises(DivergenceError, match=message):
        train(module)
    for key, value in module.state_dict().items():
        if key != "chains.ends" or "chain" in name:
            torch.testing.assert_close(value, before[key], rtol=0, atol=0, equal_nan=True)


def test_a_step_that_goes_too_far_is_caught_before_it_is_saved(tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 3 else 1e9)

    module = fitted(lr_scheduler=schedule, lr_interval="step")
    keep = ModelCheckpoint(tmp_path, filename="last", every_n_train_steps=1, enable_version_counter=False)
    with pytest.raises(DivergenceError, match=r"diverged in step 3: a residual energy .* lower the learning rate"):
        train(module, steps=8, callbacks=[keep], enable_checkpointing=True)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert saved["global_step"] == 3
    other = fitted()
    other.load_state_dict(saved["state_dict"])
    assert other(draw()[0]).scores["heat"].abs().max() < 100


def test_a_process_stops_when_another_has_diverged(monkeypatch):
    module = fitted()
    real = module.energy.embed(batch_of(module).evidence)
    monkeypatch.setattr(heat, "sum_over_processes", lambda lost: lost + 1)
    with pytest.raises(DivergenceError, match="a chain's end is lost on another process"):
        module.contrast(real, real, None)
    with pytest.raises(ValueError, match="training an image of another process is an outlier"):
        module.training_step(batch_of(module), 0)


# Runs


def test_the_same_seed_trains_the_same_weights():
    states = []
    for seed in (0, 0, 1):
        module = fitted(regularization=0.1)
        torch.manual_seed(seed)
        states.append(state_of(train(module)))
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert not all(torch.equal(value, states[2][name]) for name, value in states[0].items())


@pytest.mark.parametrize("prior", [GMMEnergy, lambda: FeatureEnergy(Energy())])
def test_a_reloaded_checkpoint_has_the_same_scores_without_training_data(prior, tmp_path):
    module = fitted(prior(), proposal="normal")
    keep = ModelCheckpoint(tmp_path, filename="last", save_on_train_epoch_end=True)
    train(module, callbacks=[keep], enable_checkpointing=True)
    fresh = HEAT(Net(), prior(), ResidualEnergy(WIDTH, 8, 2), SGLD(3, 1e-3, 1e-2), adam, proposal="normal")
    fresh.load_state_dict(torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"])
    with torch.no_grad():
        for name, value in module(draw()[0]).scores.items():
            assert torch.equal(fresh(draw()[0]).scores[name], value)


class Apart(nn.Module):
    """Residual energies of -height near real features and +height elsewhere: what the loss asks for."""

    num_features = WIDTH

    def __init__(self, height):
        super().__init__()
        self.height = height
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, features):
        return self.scale * self.height * torch.where(features.min(1).values > 0.1, -1.0, 1.0)

    def gradient(self, features):
        return torch.zeros_like(features)


@pytest.mark.parametrize(("share", "saturation", "balance"), [(1.0, 1.0, 1.0), (0.5, 0.5, 2.0)])
def test_diagnostics(share, saturation, balance):
    module = fitted(
        residual=Apart(share / 20),
        sgld=SGLD(2, 0.0, 0.0),
        proposal="normal",
        prior_temperature=100.0,
        data_noise=0.0,
    )
    real = module.energy.embed(batch_of(module).evidence)
    starts = F.normalize(torch.eye(WIDTH), dim=1)
    _, known = module.contrast(real, starts, None)
    assert known["saturation"].item() == pytest.approx(saturation)
    assert known["balance"].item() == pytest.approx(balance)
    assert known["residual_real"].item() == pytest.approx(-share / 20)
    assert known["residual_negatives"].item() == pytest.approx(share / 20)
    prior = module.energy.prior
    assert known["energy_real"].item() == pytest.approx(prior.energy(real).mean().item() / 100 - share / 20, rel=1e-5)
    expected = prior.energy(starts).mean().item() / 100 + share / 20
    assert known["energy_starts"].item() == pytest.approx(expected, rel=1e-5)
    assert known["energy_ends"].item() == pytest.approx(expected, rel=1e-5)
    assert known["last_gradient"].item() == pytest.approx(prior.gradient(starts).norm(dim=1).mean().item() / 100)
    assert known["movement"] == 0


def test_movement_is_how_far_chains_go():
    torch.manual_seed(0)
    module = fitted(sgld=SGLD(1, 0.0, 0.1, relu=False), prior=GMMEnergy(normalize=False))
    rows = torch.ones(4000, WIDTH)
    _, known = module.contrast(rows, rows, None)
    # the mean length of 6 normal numbers
    expected = 0.1 * math.sqrt(2) * math.gamma((WIDTH + 1) / 2) / math.gamma(WIDTH / 2)
    assert known["movement"].item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("options", [{}, {"conditional": True}, {"proposal": "prior_tempered"}, {"proposal": "normal"}])
def test_figure_of_chains_leaves_the_random_numbers_alone(options):
    module = fitted(**options)
    state, before = torch.get_rng_state(), state_of(module)
    (figure,) = module.figures().values()
    assert torch.equal(torch.get_rng_state(), state)
    assert unchanged(module, before)
    assert len(figure.axes) == 3
    torch.rand(())
    (again,) = module.figures().values()
    for first, second in zip(figure.axes, again.axes, strict=True):
        np.testing.assert_array_equal(first.lines[0].get_ydata(), second.lines[0].get_ydata())


@pytest.mark.parametrize("options", [{"proposal": "data"}, {"sgld": SGLD(0, 0.1, 0.1)}])
def test_no_figure_where_no_chain_moves(options):
    assert fitted(**options).figures() == {}


def test_images_are_encoded_without_the_energies():
    evidence = fitted().encode(draw()[0])
    assert isinstance(evidence, Evidence)
    assert evidence.scores == {}


@pytest.mark.parametrize("step_size", [1e3, 1e10, 1e30])
def test_a_projection_does_not_hide_chains_that_explode(step_size):
    module = fitted(sgld=SGLD(3, step_size, 0.0))
    assert module.energy.unit_length
    with pytest.raises(DivergenceError, match=r"length of a chain's step reaches.*lower step_size"):
        module.training_step(batch_of(module), 0)


def test_ends_of_energies_far_beyond_all_others_are_lost():
    module = fitted(sgld=SGLD(1, 0.0, 0.0))
    starts = real = module.energy.embed(batch_of(module).evidence)
    module.contrast(real, starts, None)
    energy = module.energy.prior.energy
    high = torch.ones(2 * SIZE)
    high[0] = 1e5
    module.energy.prior.energy = lambda rows: energy(rows) * (high if len(rows) == len(high) else 1)
    with pytest.raises(DivergenceError, match=r"the energy of a chain's end reaches.*lower step_size"):
        module.contrast(real, starts, None)


def test_diagnostics_reach_the_loggers():
    trainer = Trainer(max_epochs=1, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    module = fitted()
    for name in ("log", "log_dict"):
        vars(module).pop(name)
    batches = DataLoader([batch_of(module)], batch_size=None)
    trainer.fit(module, batches, batches)
    diagnostics = ["energy_real", "energy_starts", "energy_ends", "residual_real", "residual_negatives"]
    diagnostics += ["last_gradient", "movement", "saturation", "balance", "loss"]
    assert {f"train/{name}" for name in diagnostics} <= trainer.logged_metrics.keys()
    assert trainer.logged_metrics["train/movement"] > 0


def test_chains_that_die_at_the_origin_are_lost():
    module = fitted(sgld=SGLD(1, 3.0, 0.0))
    module.energy.gradient = lambda features, classes: features
    with pytest.raises(DivergenceError, match=r"share of chains that are at 0 reaches 1.*lower step_size"):
        module.training_step(batch_of(module), 0)
