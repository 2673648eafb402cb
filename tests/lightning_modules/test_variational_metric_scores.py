"""What the latent space says of images: likelihoods, reconstruction errors, and both as one score."""

import copy

import numpy as np
import pytest
import torch
from latent_toy import CLASSES, LATENT, Alone, Squeeze, draw, make, same, state_of, train
from torch.distributions import MultivariateNormal

from backbones.autoencoders import MNISTAutoencoder, ResNetAutoencoder
from backbones.digits_net import DigitsNet
from backbones.mnist_conv import MNISTConv
from lightning_modules.scores.weighted_density import ERROR


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
