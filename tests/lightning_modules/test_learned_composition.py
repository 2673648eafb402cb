"""Learned weights of a composition: the informative member wins, and each part learns from its own loss."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from backbones.digits_net import DigitsNet
from experiments.__main__ import main
from lightning_modules.evidence import Evidence, EvidenceBatch
from lightning_modules.learned_composition import LearnedComposition
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import Energy
from lightning_modules.scores.odin import ODIN
from lightning_modules.scores.score import Score

EXPERIMENTS = Path(__file__).resolve().parents[2] / "experiments"
WIDTH, IMAGES = 8, 512
PARTS = "generator", "discriminator", "weights"


class Narrow(DigitsNet):
    """A random network with few features."""

    def __init__(self):
        super().__init__(num_classes=3)
        self.num_features, self.fc = WIDTH, nn.Linear(WIDTH, 3)


class Hash(Score):
    """Uniform noise: of each feature vector its own, and always the same."""

    taps = frozenset({"penultimate"})

    def __init__(self, seed):
        super().__init__()
        self.direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))

    def forward(self, evidence):
        return (1e4 * evidence.features["penultimate"].detach() @ self.direction).sin().mul(43758.5).frac()


def make(members=None, seed=0, backbone=Narrow):
    torch.manual_seed(seed)
    module = LearnedComposition(backbone(), lambda parameters: torch.optim.Adam(parameters, 1e-2), members)
    module.configure_model()
    module.logged = {}
    module.log_dict = module.logged.update
    return module


def evidence(module, features):
    return Evidence(module.backbone.head(features), {"penultimate": features}, {}, None)


def sample(seed=0, width=WIDTH):
    """Draw ID features with labels, and outliers."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(IMAGES) % 3
    means = 2 * torch.rand(3, width, generator=generator)
    known = (means[labels] + 0.3 * torch.randn(IMAGES, width, generator=generator)).relu()
    return known, labels, 4 * torch.rand(IMAGES, width, generator=generator)


def fit(module, features, labels):
    module.composition.bind(module.backbone)
    while not module.composition.fitted:
        with torch.no_grad():
            module.composition.update(evidence(module, features), labels)
        module.composition.finalize()
    return module


def train(module, features, labels, outliers=None, epochs=30):
    optimizer = module.configure_optimizers()
    rows = [(features, labels)] if outliers is None else [(features, labels), (outliers, torch.full_like(labels, -1))]
    for _ in range(epochs):
        for index in torch.randperm(IMAGES).split(64):
            z, y = (torch.cat([kind[part][index] for kind in rows]) for part in (0, 1))
            optimizer.zero_grad()
            module.training_step(EvidenceBatch(evidence(module, z), y, index), 0).backward()
            optimizer.step()
    return module


def noisy_members():
    return {"first": Hash(1), "gmm": GMMEnergy(normalize=False), "second": Hash(2)}


def fitted(members=None, seed=0, backbone=Narrow):
    module = make(members, seed, backbone)
    known, labels, outliers = sample(seed, module.backbone.num_features)
    return fit(module, known, labels), known, labels, outliers


@pytest.mark.parametrize("with_outliers", [False, True])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_weight_goes_to_the_member_that_informs(seed, with_outliers):
    module, known, labels, outliers = fitted(noisy_members(), seed)
    torch.testing.assert_close(module.weights, torch.ones(3) / 3)
    train(module, known, labels, outliers if with_outliers else None)
    weights = module.weights.detach()
    assert weights[1] > 0.8
    assert float(module.logged["train/weight_gmm"]) == pytest.approx(float(weights[1]), abs=0.01)


def test_the_order_of_members_does_not_matter():
    weights = []
    for names in (("gmm", "knn", "energy"), ("energy", "gmm", "knn")):
        members = {"gmm": GMMEnergy(), "knn": KNN(k=5), "energy": Energy()}
        module, known, labels, _ = fitted({name: members[name] for name in names})
        train(module, known, labels, epochs=2)
        weights.append(dict(zip(names, module.weights.tolist(), strict=True)))
    assert max(weights[0].values()) > 0.34
    assert weights[0] == pytest.approx(weights[1], abs=1e-4)


@pytest.mark.parametrize("part", PARTS)
def test_a_loss_moves_its_own_part_alone(part):
    module, known, labels, outliers = fitted()
    batch, signs = torch.cat([known[:9], outliers[:7]]), torch.cat([labels[:9], torch.full((7,), -1)])
    module.losses(evidence(module, batch), signs)[part].backward()
    own = {"weights": "weight_logits"}.get(part, part)
    moved = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.grad is not None}
    assert moved == {own}
    assert all(parameter.grad.abs().sum() > 0 for name, parameter in module.named_parameters() if name.startswith(own))


def test_losses_equal_their_formulas(monkeypatch):
    module, known, labels, outliers = fitted()
    with torch.no_grad():
        module.weight_logits.copy_(torch.tensor([0.5, -1.0, 0.2]))
    noise = torch.randn(16, 100)
    monkeypatch.setattr(torch, "randn", lambda *size, **kwargs: noise)
    batch, targets = torch.cat([known[:9], outliers[:7]]), torch.cat([labels[:9], torch.full((7,), -1)])
    losses = module.losses(evidence(module, batch), targets)

    def perceptron(network, rows):
        first, second = network[0], network[2]
        return (rows @ first.weight.T + first.bias).clamp(min=0) @ second.weight.T + second.bias

    def energies(rows):
        seen = evidence(module, rows)
        scores = torch.stack([member(seen) for member in module.composition.members], 1)
        standard = (scores - module.composition.mean) / module.composition.deviation
        return (standard * module.weight_logits.exp() / module.weight_logits.exp().sum()).sum(1)

    generated = (1 + perceptron(module.generator, noise).exp()).log()
    assert (generated > 0).all()
    rows = torch.cat([batch, generated])
    found = 1 / (1 + (-perceptron(module.discriminator, rows)[:, 0]).exp())
    known_id = torch.tensor([1.0] * 9 + [0.0] * 23)
    accepted = 1 / (1 + (energies(rows) - 2).exp())
    expected = {
        "generator": (energies(generated) - 2).abs().mean(),
        "discriminator": F.binary_cross_entropy(found, known_id),
        "weights": F.binary_cross_entropy(accepted, found),
    }
    for part in PARTS:
        torch.testing.assert_close(losses[part], expected[part], rtol=1e-4, atol=1e-5)


def test_the_generator_goes_to_the_border_and_no_farther():
    module, known, labels, _ = fitted({"gmm": GMMEnergy(normalize=False), "knn": KNN(k=5)})
    train(module, known, labels)
    with torch.no_grad():
        generated = module.generator(torch.randn(500, 100))
        energy = module.composition.standardise(evidence(module, generated)) @ module.weights
    assert float(energy.mean()) == pytest.approx(2, abs=0.5)


def test_default_members():
    composition = make().composition
    assert composition.names == ("gmm", "knn", "energy")
    assert [type(member) for member in composition.members] == [GMMEnergy, KNN, Energy]
    assert composition.members[1].k == 5


def test_scores_equal_numpy_and_survive_a_reload():
    module, known, labels, _ = fitted({"maha": Mahalanobis(), "energy": Energy()}, backbone=lambda: DigitsNet(3))
    with torch.no_grad():
        module.weight_logits.copy_(torch.tensor([1.0, -0.5]))
    images = torch.rand(20, 1, 8, 8)
    module.eval()
    with torch.no_grad():
        found = module(images)
        rows = found.features["penultimate"].double().numpy()
    weight, bias = (tensor.detach().double().numpy() for tensor in (module.backbone.fc.weight, module.backbone.fc.bias))
    training, classes = known.double().numpy(), labels.numpy()
    means = np.stack([training[classes == k].mean(0) for k in range(3)])
    precision = np.linalg.inv((training - means[classes]).T @ (training - means[classes]) / IMAGES)

    def members(z):
        gaps = z[:, None] - means
        return np.stack(
            [
                np.einsum("nkd,de,nke->nk", gaps, precision, gaps).min(1),
                -np.log(np.exp(z @ weight.T + bias).sum(1)),
            ],
            1,
        )

    standard = (members(rows) - members(training).mean(0)) / members(training).std(0, ddof=1)
    shares = np.exp([1.0, -0.5]) / np.exp([1.0, -0.5]).sum()
    assert found.scores.keys() == {"learned", "sum"}
    np.testing.assert_allclose(found.scores["learned"], standard @ shares, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.scores["sum"], standard.sum(1), rtol=1e-3, atol=1e-3)

    again = make({"maha": Mahalanobis(), "energy": Energy()}, seed=1, backbone=lambda: DigitsNet(3)).eval()
    again.load_state_dict(module.state_dict())
    reloaded = again(images).scores
    assert all(torch.equal(reloaded[name], found.scores[name]) for name in found.scores)


@pytest.mark.parametrize("count", [0, 1, 8])
@pytest.mark.parametrize("kind", ["known", "outliers"])
def test_a_share_of_one_kind_or_none_gives_finite_losses_with_a_graph(kind, count):
    module, known, labels, outliers = fitted()
    rows = known[:count] if kind == "known" else outliers[:count]
    targets = labels[:count] if kind == "known" else torch.full((count,), -1)
    loss = module.training_step(EvidenceBatch(evidence(module, rows), targets, torch.arange(count)), 0)
    loss.backward()
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    assert loss.isfinite()
    assert (loss == 0) == (count == 0)
    assert all(parameter.grad.isfinite().all() for parameter in trained)


def test_members_with_parameters_are_not_trained():
    class Learnt(Score):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(()))

        def forward(self, evidence):
            return self.slope * evidence.logits.amax(1)

    module = make({"learnt": Learnt(), "energy": Energy()})
    trained = {name.split(".")[0] for name, parameter in module.named_parameters() if parameter.requires_grad}
    assert trained == {"generator", "discriminator", "weight_logits"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"odin": ODIN()}, "odin runs the network again"),
        ({"std": GMMEnergy(tap="std"), "energy": Energy()}, "std reads std, but only penultimate features are gen"),
        ({}, "at least one member"),
    ],
)
def test_members_that_are_no_energies_of_features_are_refused(members, message):
    with pytest.raises(ValueError, match=message):
        make(members)


def test_batches_that_cannot_be_trained_on_are_refused():
    module, known, labels, _ = fitted({"energy": Energy()})
    with pytest.raises(ValueError, match=r"trains on cached features, .* add callbacks.frozen_features.FrozenFeatures"):
        module.training_step((torch.rand(2, 1, 8, 8), labels[:2], labels[:2]), 0)
    with pytest.raises(ValueError, match="some features are below 0"):
        module.training_step(EvidenceBatch(evidence(module, known[:2] - 3), labels[:2], labels[:2]), 0)


QUICK = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
QUICK += ["--evaluation.figures", "false", "--evaluation.bootstrap", "10"]


def digits(verb, experiment, *options):
    assert main([verb, "--config", str(EXPERIMENTS / f"{experiment}.yaml"), *QUICK, *options]) == 0


def test_the_experiment_runs_resumes_and_reloads(checkpoints, capsys):
    digits("fit", "classifier/digits", "--trainer.max_epochs", "1")
    experiment, outliers = "heat/digits_learned_composition", ("--data.init_args.outlier_feed", "paired")
    digits("run", experiment, *outliers, "--trainer.max_epochs", "2", "--name", "whole")
    assert {"learned", "sum"} <= set(capsys.readouterr().out.split())
    digits("fit", experiment, *outliers, "--trainer.max_epochs", "1", "--name", "halves")
    folder = checkpoints / experiment / "halves"
    record = yaml.safe_load((folder / "config.yaml").read_text())
    record["trainer"]["max_epochs"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    (folder / "run.json").write_text(json.dumps({"status": "interrupted"}))
    digits("fit", experiment, *outliers, "--trainer.max_epochs", "2", "--name", "halves")

    whole, halves = (
        torch.load(checkpoints / experiment / name / "last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "halves")
    )
    assert whole.keys() == halves.keys()
    assert all(torch.equal(whole[name], halves[name]) for name in whole)
    assert whole["weight_logits"].abs().amin() > 0
