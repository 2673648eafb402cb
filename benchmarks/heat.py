"""Langevin chains and updates of HEAT, over the bare matrix products of the residual network.

The sizes are the paper's on CIFAR-10: 1024 chains, 512 features of unit length, 10 classes, five hidden layers of width
1024. The limit of a chain is what the residual multiplies in each step, forward and back to its input, into memory that
is there already; ours draws the starts and descends the prior as well. Chains have 10 of the paper's 40 steps, so that
the draw weighs four times as much as there. The plain formulation is what ``torch.distributions`` and autograd suggest:
a mixture that draws from every component and keeps one, and the gradient of the whole energy, by way of a residual
whose parameters require theirs.

An update is a step of the ``Trainer`` on rows of a feature cache, its chains as long as in the paper. Its limit is the
products of the chains and those of the loss, forward and back to the parameters.
"""

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal
from torch.nn import functional as F

from backbones.digits_net import DigitsNet
from backbones.residual_energy import ResidualEnergy
from benchmarks.feature_batches import cached
from benchmarks.features import fit, gaussians
from benchmarks.images import table
from benchmarks.job import CLASSES, quiet
from benchmarks.measure import COLUMNS, Seconds, interleave, print_table, timing_rows
from benchmarks.training import Steps, trainer
from datamodules.loader import Loader
from datamodules.plans import Plan
from lightning_modules.heat import HEAT
from lightning_modules.samplers.sgld import SGLD
from lightning_modules.scores.energy import EnergyScore
from lightning_modules.scores.gmm import GMMEnergy

STEP_SIZE, NOISE, PRIOR_TEMPERATURE = 1e-4, 5e-3, 1e3
ADAM = partial(torch.optim.Adam, lr=1e-5, betas=(0.0, 0.999))
SETTINGS = {"GMM": (40, 3), "GMM-std": (1, 16)}  # S steps of a chain; updates that are measured


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    size, width, hidden, steps = (32, 16, 32, 3) if quick else (1024, 512, 1024, 10)
    batches = [(features.relu(), labels) for features, labels in gaussians(CLASSES, width, 4 * width).batches()]
    features, labels = map(torch.cat, zip(*batches, strict=True))
    features = F.normalize(features, dim=1)

    def make(steps: int) -> HEAT:
        backbone, residual = DigitsNet(CLASSES), ResidualEnergy(width, hidden)  # the backbone is never run
        sgld = SGLD(steps, STEP_SIZE, NOISE)
        module = HEAT(backbone, GMMEnergy(), residual, sgld, ADAM, prior_temperature=PRIOR_TEMPERATURE)
        fit(module.energy, batches, CLASSES)
        return module

    print(f"  B={size} chains, D={width} features, C={CLASSES} classes, hidden width {hidden}, float32")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module = make(steps)
        report_chains(module, features, labels, size, quick)
        report_prior(module, features[:size], quick)
        report_updates(make, features, labels, size, quick)


def report_chains(module: HEAT, features: Tensor, labels: Tensor, size: int, quick: bool) -> None:
    """Compare the plain formulation with ours, print what negatives cost."""
    plain = Plain(module.energy.residual, module.sgld.steps, features, labels)
    real, classes = features[:size], labels[:size]
    print(f"  same values: {compare(module, plain, real, classes)}")
    contenders = {
        "limit": partial(Products(module.energy.residual, size).descend, module.sgld.steps),
        "ours": partial(descend, module, real, classes),
        "plain": partial(plain.descend, size),
    }
    seconds = interleave(contenders, repetitions=1 if quick else 5)
    rows = timing_rows(f"chains, S={module.sgld.steps}", seconds, 1.2, {"plain": None}, judge=not quick)
    print_table(COLUMNS, rows)


def descend(module: HEAT, real: Tensor, labels: Tensor) -> None:
    """Draw starts and walk, as a training step does."""
    starts, classes = module.propose(real, labels)
    for _ in module.sgld.walk(module.energy, starts, classes):
        pass


class Plain:
    """The same chains, of a prior that is fitted here, on features (N, D) of unit length and their labels (N,)."""

    def __init__(self, residual: nn.Module, steps: int, features: Tensor, labels: Tensor) -> None:
        means = torch.stack([features[labels == label].double().mean(0) for label in range(CLASSES)])
        rows = features - means[labels]
        factor = torch.linalg.cholesky(rows.T @ rows / len(rows))
        gaussians = MultivariateNormal(means.float(), scale_tril=factor.float())
        self.mixture = MixtureSameFamily(Categorical(labels.bincount() / len(labels)), gaussians)
        self.residual, self.steps = residual, steps

    def energy(self, features: Tensor) -> Tensor:
        """Hybrid energy (B,) of (B, D) features."""
        energy: Tensor = self.residual(features) - self.mixture.log_prob(features) / PRIOR_TEMPERATURE
        return energy

    def gradient(self, features: Tensor) -> Tensor:
        """Gradient (B, D) of the hybrid energy."""
        features = features.detach().requires_grad_()
        return torch.autograd.grad(self.energy(features).sum(), features)[0]

    def walk(self, features: Tensor) -> Tensor:
        """Move (B, D) starts to the ends of their chains."""
        for step in range(self.steps):
            decay = 0.1 + 0.9 * (1 - step / self.steps) ** 2
            features = features - decay * STEP_SIZE * self.gradient(features)
            features = features - decay * NOISE * torch.randn_like(features)
            features = F.normalize(features.relu(), dim=1)
        return features

    def descend(self, number: int) -> None:
        """Draw so many starts and walk."""
        self.walk(F.normalize(self.mixture.sample((number,)).relu(), dim=1))


def compare(module: HEAT, plain: Plain, real: Tensor, labels: Tensor) -> str:
    """Raise an ``AssertionError`` where the plain formulation differs from ours, say what was held."""
    starts, _ = module.propose(real, labels)
    for points in (real, starts):
        torch.testing.assert_close(module.energy.energy(points), plain.energy(points), rtol=1e-4, atol=1e-4)
        expected = plain.gradient(points)
        tolerance = 1e-4 * float(expected.norm(dim=1).amax())
        torch.testing.assert_close(module.energy.gradient(points), expected, rtol=0, atol=tolerance)
    state = torch.get_rng_state()
    *_, (ends, _) = module.sgld.walk(module.energy, starts)
    torch.set_rng_state(state)
    torch.testing.assert_close(ends, plain.walk(starts), rtol=0, atol=1e-5)
    return "energies and gradients of real features and starts, ends of chains with the same noise"


class Products:
    """The matrix products of a residual network for so many rows, and nothing else."""

    def __init__(self, residual: ResidualEnergy, number: int) -> None:
        self.weights = [layer.weight.detach() for layer in residual.mlp if isinstance(layer, nn.Linear)]
        widths = [*(weight.shape[1] for weight in self.weights), 1]
        self.values, self.gradients = ([torch.ones(number, width) for width in widths] for _ in range(2))
        self.changes = [torch.empty_like(weight) for weight in self.weights]

    def forward(self) -> None:
        """Multiply features by weights, up to the energy."""
        for weight, (below, above) in zip(self.weights, pairwise(self.values), strict=True):
            torch.mm(below, weight.T, out=above)

    def backward(self, last: int = 0) -> None:
        """Multiply gradients by weights, down to what enters the ``last`` layer."""
        for layer in reversed(range(last, len(self.weights))):
            torch.mm(self.gradients[layer + 1], self.weights[layer], out=self.gradients[layer])

    def descend(self, steps: int) -> None:
        """Do what so many steps of the chains need."""
        for _ in range(steps):
            self.forward()
            self.backward()

    def train(self) -> None:
        """Do what the gradient of the parameters needs."""
        self.forward()
        self.backward(last=1)
        for change, below, above in zip(self.changes, self.values[:-1], self.gradients[1:], strict=True):
            torch.mm(above.T, below, out=change)


def report_prior(module: HEAT, features: Tensor, quick: bool) -> None:
    """Print what the closed form of the prior's gradient costs, over whitening and the way back alone."""
    prior = module.energy.prior
    assert isinstance(prior, GMMEnergy)
    whitened, back = torch.empty_like(features), torch.empty_like(features)

    def limit() -> None:
        torch.mm(features, prior.whitening.T, out=whitened)
        torch.mm(whitened, prior.whitening, out=back)

    ours, autograd = partial(prior.gradient, features), partial(EnergyScore.gradient, prior, features)
    torch.testing.assert_close(ours(), autograd(), rtol=1e-3, atol=1e-3)
    seconds = interleave({"limit": limit, "ours": ours, "autograd": autograd}, repetitions=1 if quick else 25)
    print_table(*table("gradient of the prior", seconds, None, judge=not quick))


def report_updates(make: Callable[[int], HEAT], features: Tensor, labels: Tensor, size: int, quick: bool) -> None:
    """Train on cached features, print the time of an update and how many there are in a second."""
    rows = (features, features.new_zeros(len(features), CLASSES), labels, torch.arange(len(features)))
    columns = (*COLUMNS[:4], "ours, 1/s", "limit, 1/s")
    cells = []
    with TemporaryDirectory() as folder, quiet():
        loader = Loader(cached(rows, Path(folder)), Plan(len(labels), size, shuffle=True, drop_last=True))
        for name, (steps, updates) in SETTINGS.items():
            seconds = time_updates(make(steps), loader, size, 3 if quick else updates)
            row = timing_rows(f"update of {name}, S={steps}", seconds, math.inf, {"": None}, judge=False)[0]
            cells.append((*row[:4], *(f"{1 / median(seconds[who]):.3g}" for who in ("ours", "limit"))))
    print_table(columns, cells)


def time_updates(module: HEAT, loader: Loader, size: int, updates: int) -> Seconds:
    """Time so many updates, after a first one, and after each the products that it needs."""
    chains = Products(module.energy.residual, size)
    loss = Products(module.energy.residual, 3 * size)  # real features, ends and starts

    def limit() -> None:
        chains.descend(module.sgld.steps)
        loss.train()

    timed = Steps({"limit": limit})
    # an update lasts until the next one starts
    fitting = trainer(timed, max_epochs=1, limit_train_batches=updates + 2, limit_val_batches=0)
    fitting.fit(module, loader, loader)
    return {who: values[1:] for who, values in timed.seconds.items()}
