"""The variational/metric latent space on one process: its loss, statistics, phases, validation and scores."""

import copy
import math

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.cli import ReduceLROnPlateau
from sklearn.metrics import f1_score
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils.data import DataLoader

from backbones.autoencoders import Autoencoder, MNISTAutoencoder, ResNetAutoencoder
from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from backbones.mnist_conv import MNISTConv
from backbones.weights import load_weights
from lightning_modules import variational_metric
from lightning_modules.losses.latent_statistics import COURSE
from lightning_modules.scores.class_density import ClassDensity
from lightning_modules.scores.weighted_density import ERROR
from lightning_modules.variational_metric import Finetune, Margin, VariationalMetric

WIDTH, CLASSES, LATENT = 6, 3, 4
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Net(Backbone):
    """A hidden layer on the pixels, with batch-norm before its ReLU."""

    stages = ("layer1",)

    def __init__(self, classes=CLASSES, width=WIDTH, features=5):
        super().__init__(features, classes, (width, 1, 1))
        self.conv1, self.layer1 = nn.Conv2d(width, features, 1, bias=False), nn.BatchNorm2d(features)
        self.fc = nn.Linear(features, classes)

    def stem(self, images):
        return self.conv1(images)

    def finish(self, maps):
        return maps.relu()


class Squeeze(Autoencoder):
    """Half of the pixels are lost."""

    def __init__(self):
        super().__init__((WIDTH, 1, 1), WIDTH // 2)
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(WIDTH, WIDTH // 2), nn.BatchNorm1d(WIDTH // 2))
        self.back = nn.Sequential(nn.Linear(WIDTH // 2, WIDTH), nn.Unflatten(1, (WIDTH, 1, 1)))

    def encode(self, images):
        return self.layers(images)

    def decode(self, latent):
        return self.back(latent)


class Alone(VariationalMetric):
    """Needs no trainer; its epoch is what a test says."""

    epoch, current_epoch = 0, property(lambda self: self.epoch)

    def all_gather(self, data, group=None, sync_grads=False):
        return data

    def log(self, *args, **kwargs):
        pass

    log_dict = log


def draw(number=240, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % CLASSES
    means = 2 * torch.randn(CLASSES, WIDTH, generator=torch.Generator().manual_seed(0))
    images = means[labels] + torch.randn(number, WIDTH, generator=generator)
    return images[..., None, None], labels, torch.arange(number)


def make(kind=VariationalMetric, backbone=Net, optimizer=None, taps=("layer1", "latent"), **options):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        optimizer = optimizer or (lambda parameters: torch.optim.SGD(parameters, 0.01, momentum=0.9))
        module = kind(backbone(), ClassDensity(list(taps)), optimizer, **{"latent_dim": LATENT} | options)
    module.configure_model()
    return module


def train(module, epochs, steps=4, size=24, **options):
    batches = DataLoader([tuple(rows[i : i + size] for rows in draw()) for i in range(0, size * steps, size)], None)
    torch.manual_seed(0)
    options = {"max_epochs": epochs, "limit_val_batches": 0, "enable_checkpointing": False} | QUIET | options
    Trainer(**options).fit(module, batches, batches)
    return module


def state_of(module, prefix=""):
    return {name: value.clone() for name, value in module.state_dict().items() if name.startswith(prefix)}


def same(before, after):
    return all(torch.equal(value, after[name]) for name, value in before.items())


# The loss


def metric_by_hand(draws, labels, margin):
    """Look at all triplets one by one."""
    draws, losses = draws.double(), []
    for a, p, n in np.ndindex(*3 * [len(labels)]):
        if labels[a] == labels[p] != labels[n] and a != p:
            near, far = (draws[a] - draws[p]).norm(), (draws[a] - draws[n]).norm()
            losses.append(float((near - far + 0.1).clamp(min=0) + (margin - far).clamp(min=0)))
    active = [loss for loss in losses if loss > 0]
    return sum(active) / len(active)


def divergence_by_hand(mean, log_variance, labels, centres):
    values = kl_divergence(Normal(mean, (log_variance / 2).exp()), Normal(centres[labels], 0.1))
    return float(torch.stack([values[labels == label].mean() for label in labels.unique()]).mean())


def posteriors(module, images):
    features = module.backbone.train().forward_intermediates(images, {"penultimate"})[1]["penultimate"]
    return module.fc_mu(features).double(), module.fc_var(features).double()


@pytest.mark.parametrize("epoch", [0, 1, 2, 9])
def test_loss_is_that_of_draws_and_from_its_epoch_on_the_divergence(epoch, monkeypatch):
    module, (images, labels, ids) = make(Alone, kl_epoch=2, margin=Margin(final=3, first_epoch=1)), draw(18)
    module.epoch = epoch
    centres = torch.randn(CLASSES, LATENT, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    module.statistics.means.copy_(centres)
    noise = torch.randn(18, LATENT, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    with torch.no_grad():
        mean, log_variance = posteriors(copy.deepcopy(module), images)
    draws, margin = mean + (log_variance / 2).exp() * noise, 0.15 + min(epoch, 3)
    expected = metric_by_hand(draws, labels, margin)
    if epoch >= 2:
        expected += 0.1 * divergence_by_hand(mean, log_variance, labels, centres)
    loss = module.training_step((images, labels, ids), 0).detach()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
    module.statistics.means += 1
    assert torch.equal(module.training_step((images, labels, ids), 0).detach(), loss) == (epoch < 2)


def test_one_draw_estimates_the_divergence(monkeypatch):
    module, (images, labels, ids) = make(Alone, kl_estimator="mc", kl_epoch=0, kl_weight=0.7), draw(18)
    noise = torch.randn(18, LATENT, generator=torch.Generator().manual_seed(2))
    monkeypatch.setattr(torch, "randn_like", lambda tensor: noise)
    with torch.no_grad():
        mean, log_variance = posteriors(copy.deepcopy(module), images)
    draws, scale = mean + (log_variance / 2).exp() * noise, (log_variance / 2).exp()
    values = Normal(mean, scale).log_prob(draws) - Normal(0.0, 0.1).log_prob(draws)
    divergence = torch.stack([values[labels == label].mean() for label in range(CLASSES)]).mean()
    expected = metric_by_hand(draws, labels, 0.15) + 0.7 * float(divergence)
    assert float(module.training_step((images, labels, ids), 0).detach()) == pytest.approx(expected, rel=1e-5)


def test_variances_are_bounded():
    module = make(Alone, kl_epoch=0)
    with torch.no_grad():
        module.fc_var.bias.fill_(300.0)
    loss, deviation = module.training_step(draw(18), 0), module.statistics.deviations / module.statistics.counts.sum()
    assert loss.isfinite()
    assert float(deviation) == pytest.approx(math.exp(5))  # of a log-variance of 10


def test_mixed_precision_leaves_heads_and_loss_in_float32():
    module, seen = make(Alone, kl_epoch=0), []
    for head in (module.fc_mu, module.fc_var):
        head.register_forward_hook(lambda head, inputs, output: seen.append((head, *inputs, output)))
    with torch.autocast("cpu", torch.bfloat16):
        loss = module.training_step(draw(18), 0)
        evidence = module.eval()(draw(18)[0])
    assert loss.dtype == evidence.features["latent"].dtype == evidence.logits.dtype == torch.float32
    assert len(seen) == 3
    for head, features, output in seen:
        assert features.dtype == output.dtype == torch.float32
        expected = features.double() @ head.weight.double().T + head.bias
        torch.testing.assert_close(output.double(), expected, rtol=1e-5, atol=1e-5)


# The statistics of the epoch before


class Spy(Callback):
    """Notes, for each step, margin, draws, labels and the centres of the divergence."""

    def __init__(self, monkeypatch):
        self.epochs = []
        divergence, metric = variational_metric.class_conditional_kl, variational_metric.TripletDistancingLoss.forward

        def look(mean, log_variance, labels, centres, draws):
            self.epochs[-1][-1]["centres"] = centres.clone()
            return divergence(mean, log_variance, labels, centres, draws=draws)

        def measure(loss, draws, labels, margin):
            self.epochs[-1].append({"draws": draws.detach(), "labels": labels, "margin": margin})
            return metric(loss, draws, labels, margin)

        monkeypatch.setattr(variational_metric, "class_conditional_kl", look)
        monkeypatch.setattr(variational_metric.TripletDistancingLoss, "forward", measure)

    def on_train_epoch_start(self, trainer, pl_module):
        self.epochs.append([])


def test_centres_are_the_mean_draws_of_the_epoch_before(monkeypatch):
    spy = Spy(monkeypatch)
    module = train(make(kl_epoch=0, margin=Margin(final=1.5, first_epoch=1)), 4, callbacks=[spy])
    assert [len(steps) for steps in spy.epochs] == 4 * [4]
    assert not any(step["centres"].any() for step in spy.epochs[0])
    for before, steps in zip(spy.epochs, spy.epochs[1:], strict=False):
        draws, labels = (torch.cat([step[key] for step in before]) for key in ("draws", "labels"))
        expected = torch.stack([draws[labels == label].double().mean(0) for label in range(CLASSES)])
        for step in steps:
            torch.testing.assert_close(step["centres"].double(), expected, rtol=1e-6, atol=1e-6)
            assert torch.equal(step["centres"], steps[0]["centres"])
    assert [{round(step["margin"], 9) for step in steps} for steps in spy.epochs] == [{0.15}, {1.15}, {2.15}, {2.15}]
    assert module.statistics.course[:, 0].tolist() == pytest.approx([0.15, 1.15, 2.15, 2.15])


# A backbone that is trained already


class Watch(Callback):
    """Notes the rate of each step, how it differs from one without momentum, and the backbone at each epoch's end."""

    def __init__(self):
        self.rates, self.backbones, self.momenta = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        (group,) = optimizer.param_groups
        self.rates.append(group["lr"])
        weight = pl_module.fc_mu.weight
        self.expected = (weight - group["lr"] * weight.grad).detach()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.momenta.append(float((pl_module.fc_mu.weight.detach() - self.expected).abs().max()))

    def on_train_epoch_end(self, trainer, pl_module):
        self.backbones.append(state_of(pl_module.backbone))


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_only_the_heads_learn_until_the_backbone_does(batch_norm):
    watch, module = Watch(), make(finetune=Finetune(2, 0.02, batch_norm), lr_scheduler=step_lr)
    first = state_of(module.backbone)
    train(module, 6, callbacks=[watch])
    assert watch.rates == pytest.approx(8 * [0.02] + 8 * [0.01] + 8 * [0.001])
    learned = [name for name, _ in module.backbone.named_parameters() if not name.startswith("fc.")]
    for epoch, state in enumerate(watch.backbones):
        for name in learned:
            assert torch.equal(state[name], first[name]) == (epoch < 2), (epoch, name)
        moves = not torch.equal(state["layer1.running_mean"], first["layer1.running_mean"])
        assert moves == (batch_norm or epoch >= 2)
        assert torch.equal(state["fc.weight"], first["fc.weight"])


def test_momenta_of_the_heads_are_not_carried_over():
    watch = Watch()
    train(make(finetune=Finetune(2, 0.02)), 3, callbacks=[watch])
    assert [step for step, momentum in enumerate(watch.momenta) if momentum < 1e-6] == [0, 8]


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, monitor="latent/margin", patience=0)  # which does not change


SCHEDULES = {  # schedule, interval, rates of the steps from where the backbone learns
    "by step": (step_lr, "step", [0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6, 1e-7, 1e-7]),
    "growing": (
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2),
        "epoch",
        4 * [0.0025] + 4 * [0.00625] + 4 * [0.01],
    ),
    "plateau": (plateau, "epoch", 8 * [0.01] + 4 * [0.001]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_begin_where_the_backbone_learns(name):
    schedule, interval, expected = SCHEDULES[name]
    watch = Watch()
    options = {"margin": Margin(first_epoch=99), "lr_scheduler": schedule, "lr_interval": interval}
    train(make(finetune=Finetune(2, 0.02), **options), 5, callbacks=[watch])
    assert watch.rates == pytest.approx(8 * [0.02] + expected)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_schedule_is_made_for_the_epochs_in_which_it_steps(length):
    module = make(
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length),
        finetune=Finetune(unfreeze_epoch=2, lr=0.5),
    )
    if length == 2:
        with pytest.raises(ValueError, match="made for 2 epochs, and the run has 3 after the first 2 epochs"):
            train(module, 5)
    else:
        train(module, 5)


def test_without_finetuning_everything_learns_from_the_start():
    module = make(kl_epoch=0)
    first = state_of(module)
    train(module, 1)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, first[name]) == name.startswith("backbone.fc."), name


# The autoencoder


def test_training_leaves_the_autoencoder_alone():
    module = make(autoencoder=Squeeze())
    before = state_of(module, "autoencoder.")
    assert len(before) == 9
    train(module, 2)
    assert same(before, module.state_dict())
    assert not module.autoencoder.training
    (group,) = module.configure_optimizers().param_groups
    trained = {id(parameter) for parameter in group["params"]}
    assert trained.isdisjoint(map(id, module.autoencoder.parameters()))
    assert trained.isdisjoint(map(id, module.backbone.fc.parameters()))


REAL = {
    "mnist": (lambda: MNISTConv(CLASSES), MNISTAutoencoder),
    "resnet": (lambda: DigitsNet(CLASSES, (3, 32, 32)), lambda: ResNetAutoencoder(18)),
}


@pytest.mark.parametrize("name", ["mnist", pytest.param("resnet", marks=pytest.mark.slow)])
def test_any_number_of_images_is_weighed(name):
    backbone, autoencoder = (make_part() for make_part in REAL[name])
    module = make(backbone=lambda: backbone, autoencoder=autoencoder, taps=["layer2", "layer1", "latent"]).eval()
    images = torch.randn(7, *backbone.input_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        whole = module(images).features[ERROR]
        _, real = backbone.forward_intermediates(images, {"layer2"})
        _, drawn = backbone.forward_intermediates(autoencoder(images), {"layer2"})
        expected = (real["layer2"] - drawn["layer2"]).double().numpy() ** 2
        np.testing.assert_allclose(whole.squeeze(1), expected.mean(1), rtol=1e-4)
        for number in (3, 1, 0):
            torch.testing.assert_close(module(images[:number]).features[ERROR], whole[:number], rtol=1e-4, atol=1e-7)


# Scores


def fitted(kind=Alone, taps=("layer1", "latent"), **options):
    module = make(kind, taps=taps, **options).eval()
    images, labels, _ = draw()
    with torch.no_grad():
        for _ in range(module.density.passes):
            module.density.update(module(images), labels)
            module.density.finalize()
    return module


def by_hand(module, images):
    """Compute largest log-likelihoods and errors in float64."""
    module = copy.deepcopy(module).double()

    def embed(x):
        features = module.backbone.forward_intermediates(x.double(), {"layer1", "penultimate"})[1]
        return features["layer1"], torch.cat([features["layer1"], module.fc_mu(features["penultimate"])], 1)

    with torch.no_grad():
        (_, known), (first, asked), labels = embed(draw()[0]), embed(images), draw()[1]
        gaussians = []
        for label in range(CLASSES):
            rows = known[labels == label]
            noise = float(module.density_epsilon) * torch.eye(rows.shape[1]).double()
            gaussians.append(MultivariateNormal(rows.mean(0), torch.from_numpy(np.cov(rows.T, bias=True)) + noise))
        likelihoods = torch.stack([gaussian.log_prob(asked) for gaussian in gaussians], 1)
        errors = (first - embed(module.autoencoder(images.double()))[0]).square().mean(1)
    return likelihoods, errors


def test_scores_are_the_formulas():
    module, images = fitted(autoencoder=Squeeze()), 1.5 * draw(50, seed=1)[0]
    module.density_epsilon = module.density.density.epsilon
    with torch.no_grad():
        evidence = module(images)
    (known, known_errors), (likelihoods, errors) = by_hand(module, draw()[0]), by_hand(module, images)
    largest = likelihoods.amax(1)
    weighted = errors / known_errors.max() * (1 - (largest - known.max()).clamp(max=0))
    expected = {"likelihood": -largest, "reconstruction": errors, "weighted": weighted}
    assert list(evidence.scores) == list(expected)
    for name, values in expected.items():
        np.testing.assert_allclose(evidence.scores[name], values, rtol=1e-4, atol=1e-4, err_msg=name)
    np.testing.assert_allclose(evidence.logits, likelihoods, rtol=1e-4, atol=1e-4)
    assert torch.equal(evidence.logits.argmax(1), likelihoods.argmax(1))
    for row in (0, 31):
        alone = module(images[row : row + 1]).scores["weighted"]
        torch.testing.assert_close(alone, evidence.scores["weighted"][row : row + 1], rtol=1e-4, atol=0)


def test_without_an_autoencoder_the_likelihood_is_all():
    module = fitted()
    evidence = module(draw(5)[0])
    assert list(evidence.scores) == ["likelihood"]
    assert set(evidence.features) == {"layer1", "latent", "penultimate"}
    assert module.extra_forwards == 0
    scores = {"likelihood": np.zeros(3)}
    assert module.complete(scores, np.array(["id", "id", "far"])) is scores


def test_before_anything_is_fitted_there_are_logits_and_no_scores():
    module = make(autoencoder=Squeeze()).eval()
    evidence = module(draw(5)[0])
    latent = evidence.features["latent"]
    standard = MultivariateNormal(torch.zeros(LATENT), torch.eye(LATENT))
    torch.testing.assert_close(evidence.logits, standard.log_prob(latent)[:, None].expand(-1, CLASSES))
    assert evidence.scores == {}
    assert module(draw(5)[0][:0]).logits.shape == (0, CLASSES)


@pytest.mark.parametrize("calibration", ["id_val", "test"])
def test_calibration_on_other_images_than_those_of_training(calibration):
    module = fitted(autoencoder=Squeeze(), calibration=calibration)
    assert list(module(draw(5)[0]).scores) == ["likelihood", "reconstruction"]
    splits = np.array(["calibration"] * 4 + ["id"] * 3 + ["far"] * 3)
    generator = np.random.default_rng(0)
    scores = {name: generator.random(10).astype(np.float32) for name in ("likelihood", "reconstruction")}
    scores["likelihood"] *= 50
    rows = splits == "calibration" if calibration == "id_val" else splits != "calibration"
    ceiling, largest = (-scores["likelihood"][rows]).max(), scores["reconstruction"][rows].max()
    completed = module.complete(scores, splits)
    bracket = np.minimum(-scores["likelihood"] - ceiling, 0) - 1
    np.testing.assert_allclose(completed["weighted"], -scores["reconstruction"] / largest * bracket, rtol=1e-5)
    assert completed["weighted"].dtype == np.float32
    broken = scores | {"reconstruction": np.full(10, np.nan, np.float32)}
    with pytest.raises(ValueError, match="are to weigh others and cannot"):
        module.complete(broken, splits)
    if calibration == "id_val":
        with pytest.raises(ValueError, match=r"takes held-out ID images: set val_split of the data"):
            module.complete({name: values[4:] for name, values in scores.items()}, splits[4:])


def test_calibration_on_training_images_completes_nothing():
    module, scores = fitted(autoencoder=Squeeze()), {"likelihood": np.zeros(2)}
    assert module.complete(scores, np.array(["id", "far"])) is scores


def test_other_scores_may_read_the_latent_means():
    module = make(autoencoder=Squeeze()).eval()
    module.taps |= {"latent", ERROR, "max"}  # as the evaluation asks
    with pytest.raises(ValueError, match="tap max needs"):
        module(draw(5)[0])
    module.taps -= {"max"}
    assert set(module(draw(5)[0]).features) == {"layer1", "latent", "penultimate", ERROR}


@pytest.mark.parametrize(("taps", "compared"), [(["latent", "layer1"], "layer1"), (["latent"], "penultimate")])
def test_images_are_compared_by_the_first_tap_of_the_backbone(taps, compared):
    assert make(taps=taps, autoencoder=Squeeze()).first_tap == compared


# Validation


def validate(module, *batches):
    return Trainer(**QUIET, enable_checkpointing=False).validate(module, DataLoader(batches, None), verbose=False)[0]


def latent_only(images, labels):
    """A module whose latent means are the pixels' first numbers, and a batch."""
    module = make(latent_dim=WIDTH)
    module.backbone.forward_intermediates = lambda images, taps: (None, {"penultimate": images.flatten(1)})
    module.fc_mu = nn.Identity()
    return module, (images, labels, torch.arange(len(images)))


def test_the_open_set_is_judged_by_the_bounds_of_the_classes():
    images, labels, _ = draw(300, seed=3)
    labels = labels.masked_fill(torch.arange(300) % 5 == 0, -1)
    images[labels < 0] *= 1.7
    module, _ = latent_only(images, labels)
    fit_images, fit_labels, _ = draw()
    module.statistics.update(fit_images.flatten(1), fit_labels, torch.ones(240, WIDTH))
    module.statistics.finish(0.15)
    module.statistics.bounds.copy_(torch.tensor([-9.5, -10.0, -10.5]))
    gaussians = MultivariateNormal(module.statistics.means, module.statistics.covariances)
    likelihoods = gaussians.log_prob(images.flatten(1).double()[:, None])
    accepted = likelihoods >= module.statistics.bounds
    predictions = torch.where(accepted, likelihoods, -math.inf).argmax(1).where(accepted.any(1), CLASSES)
    known, truth = labels >= 0, labels.where(labels >= 0, CLASSES)
    assert 0.05 < (predictions == CLASSES).float().mean() < 0.8
    rows = torch.arange(300).split(64)
    found = validate(module, *((images[r], labels[r], r) for r in rows))
    expected = {
        "val/accuracy": (likelihoods[known].argmax(1) == labels[known]).float().mean(),
        "val/known_accepted": (predictions[known] < CLASSES).float().mean(),
        "val/unknown_rejected": (predictions[~known] == CLASSES).float().mean(),
        "val/open_f1": f1_score(truth, predictions, average="macro", labels=range(CLASSES + 1)),
    }
    assert found == pytest.approx({name: float(value) for name, value in expected.items()}, abs=1e-6)
    again = validate(module, (images[known], labels[known], torch.arange(int(known.sum()))))
    assert again == pytest.approx({name: found[name] for name in ("val/accuracy", "val/known_accepted")}, abs=1e-6)


def test_an_empty_share_of_validation_is_fine():
    images, labels, ids = draw(30)
    module = make()
    assert validate(module, (images, labels, ids), (images[:0], labels[:0], ids[:0]))["val/known_accepted"] == 1


# What is refused


def test_outliers_are_refused():
    images, labels, ids = draw(18)
    with pytest.raises(ValueError, match="is trained without outliers: leave out outlier_feed"):
        make(Alone).training_step((images, labels.where(ids != 4, -1), ids), 0)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_embeddings_that_are_no_numbers_are_refused_before_anything_changes(value):
    module, (images, labels, ids) = make(Alone), draw(18)
    images[4, 2] = value
    module.backbone.layer1.eval()
    before = state_of(module, "statistics.")
    module.backbone.requires_grad_(False)
    with pytest.raises(ValueError, match="embeddings are not finite: the training has diverged"):
        module.training_step((images, labels, ids), 0)
    assert same(before, module.state_dict())


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_half_precision_parameters_are_refused(precision):
    module = make()
    module.trainer = Trainer(precision=precision, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match=f"do not survive {precision}: choose 32-true or bf16-mixed"):
        module.setup("fit")


@pytest.mark.parametrize(("finetune", "stage"), [(None, "fit"), (Finetune(), "test"), (Finetune(), "fit")])
def test_several_processes_must_look_for_what_does_not_learn(finetune, stage):
    module = make(finetune=finetune)
    for strategy in ("ddp", "ddp_find_unused_parameters_true"):
        module.trainer = Trainer(strategy=strategy, devices=2, enable_checkpointing=False, **QUIET)
        if (finetune, stage, strategy) == (Finetune(), "fit", "ddp"):
            with pytest.raises(ValueError, match=r"take --trainer.strategy ddp_find_unused_parameters_true"):
                module.setup(stage)
        else:
            module.setup(stage)


def test_taps_that_the_backbone_does_not_yield_are_refused():
    with pytest.raises(ValueError, match=r"reads layer7, which Net does not yield: penultimate, .*layer1, latent"):
        make(taps=["layer1", "layer7", "latent"])


@pytest.mark.parametrize("trained", [False, True])
def test_an_autoencoder_without_weights_is_warned_of(trained, tmp_path, caplog):
    autoencoder = Squeeze()
    torch.save(autoencoder.state_dict(), tmp_path / "weights.pt")
    if trained:
        load_weights(autoencoder, str(tmp_path / "weights.pt"))
    train(make(autoencoder=autoencoder), 1)
    assert ("the autoencoder is not trained" in caplog.text) == (not trained)


@pytest.mark.parametrize("trained", [False, True])
def test_a_backbone_to_be_finetuned_without_weights_is_warned_of(trained, tmp_path, caplog):
    module = make(finetune=Finetune(unfreeze_epoch=1))
    torch.save(module.backbone.state_dict(), tmp_path / "weights.pt")
    if trained:
        load_weights(module.backbone, str(tmp_path / "weights.pt"))
    train(module, 1)
    assert ("to be fine-tuned, but it is not trained" in caplog.text) == (not trained)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_estimator": "MC"}, "kl_estimator is analytic or mc, not 'MC'"),
        ({"calibration": "val"}, "calibration is train or id_val or test, not 'val'"),
        ({"latent_dim": 0}, "latent_dim must be at least 1"),
        ({"kl_weight": -1.0}, "kl_weight at least 0, got latent_dim=4, kl_weight=-1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_a_margin_that_does_not_grow_is_refused():
    with pytest.raises(ValueError, match="jumps that must be positive, got 0"):
        Margin(jump=0.0)


class Logged(Callback):
    def on_train_end(self, trainer, pl_module):
        self.metrics = dict(trainer.callback_metrics)


def test_the_course_of_training_is_logged_and_drawn():
    logged, module = Logged(), make()
    assert module.figures() == {}
    train(module, 3, callbacks=[logged])
    course = module.statistics.course
    assert course.shape == (3, 6)
    for name, value in zip(COURSE, course[-1], strict=True):
        assert float(logged.metrics[f"latent/{name}"]) == pytest.approx(float(value), rel=1e-6)
    distances, norms, deviations = module.figures()["latent_space"].axes
    curves = {line.get_label(): line.get_ydata() for line in distances.lines}
    assert curves["nearest two class means"] == pytest.approx(course[:, 5].numpy())
    assert curves["margin"] == pytest.approx(course[:, 0].numpy())
    assert norms.lines[0].get_ydata() == pytest.approx(course[:, 3].numpy())
    assert deviations.lines[0].get_ydata() == pytest.approx(course[:, 1].numpy())


# Learning


class Perceptron(Net):
    def __init__(self):
        super().__init__(10, 20, 128)
        self.layer1 = nn.Sequential(nn.ReLU(), nn.Conv2d(128, 128, 1))


LENGTHS = {  # epochs, margin, least distance between class means
    "short": (7, Margin(final=3.0, first_epoch=1), 3.0),
    "whole": (60, Margin(final=32.0, first_epoch=10), 30.0),
}


@pytest.mark.parametrize("length", ["short", pytest.param("whole", marks=pytest.mark.slow)])
def test_classes_become_tight_and_far_apart(length):
    epochs, margin, distance = LENGTHS[length]
    generator = torch.Generator().manual_seed(0)
    means = 1.5 * torch.randn(10, 20, generator=generator)

    def batches(number, size):
        labels = torch.arange(10).repeat_interleave(size)
        noise = torch.randn(number, len(labels), 20, generator=generator)
        return [((means[labels] + rows)[..., None, None], labels, torch.arange(len(labels))) for rows in noise]

    def adam(parameters):
        return torch.optim.Adam(parameters, 1e-3)

    module = make(backbone=Perceptron, latent_dim=32, margin=margin, optimizer=adam)
    torch.manual_seed(0)
    trainer = Trainer(max_epochs=epochs, limit_val_batches=0, enable_checkpointing=False, **QUIET)
    loader = DataLoader(batches(60, 8), None)
    trainer.fit(module, loader, loader)
    (images, labels, _), _ = batches(2, 100)
    with torch.no_grad():
        mean, log_variance = posteriors(module.eval(), images)
    nearest = torch.cdist(mean, module.statistics.means).argmin(1)
    assert (nearest == labels).float().mean() > 0.98
    assert torch.nn.functional.pdist(module.statistics.means).min() > distance
    assert 0.07 < (log_variance / 2).exp().mean() < 0.16
    assert module.statistics.course[-1, -1] == pytest.approx(
        float(torch.nn.functional.pdist(module.statistics.means).min())
    )
