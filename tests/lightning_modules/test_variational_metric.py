"""The variational/metric latent space on one process: its loss, statistics, validation and what it refuses."""

import copy
import math

import numpy as np
import pytest
import torch
from latent_toy import CLASSES, LATENT, QUIET, WIDTH, Alone, Net, Squeeze, draw, make, same, state_of, train
from pytorch_lightning import Callback, Trainer
from sklearn.metrics import f1_score
from torch import nn
from torch.distributions import MultivariateNormal, Normal, kl_divergence
from torch.utils.data import DataLoader

from backbones.weights import load_weights
from lightning_modules import variational_metric
from lightning_modules.losses.latent_statistics import COURSE
from lightning_modules.variational_metric import Finetune, Margin


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
