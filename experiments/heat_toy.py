"""``heat-toy``: HEAT on points of the plane, where densities can be computed and looked at.

The data are four round Gaussians, two for each class. The prior has one Gaussian for each class, which fills the gap
between the two; the residual energy has to empty it.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from matplotlib.axes import Axes
from matplotlib.contour import ContourSet
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F

from backbones import weights
from backbones.backbone import Backbone
from backbones.residual_energy import ResidualEnergy
from callbacks.metrics import auroc, rank
from lightning_modules.heat import HEAT
from lightning_modules.samplers.sgld import SGLD
from lightning_modules.scores.gmm import GMMEnergy

MEANS = torch.tensor([[-2.0, -1.5], [-2.0, 1.5], [2.0, -1.5], [2.0, 1.5]])
STD = 0.4
POINTS = 10_000  # to train on, and of each kind to measure on
LANGEVIN = SGLD(steps=10, step_size=0.05, noise=0.1**0.5, end=1.0, relu=False)  # temperature 1: noise^2 = 2 step_size
REGULARIZATION = 0.1
ADAM = partial(torch.optim.Adam, lr=2e-3, betas=(0.0, 0.999))
EDGE, CELLS = 6.0, 240  # the grid: CELLS^2 squares on [-EDGE, EDGE]^2, which hold all but 1e-4 of the prior
VIEW = 4.0  # the figure shows [-VIEW, VIEW]^2


class Plane(Backbone):
    """Takes (B, 2, 1, 1) images for points of the plane, which are its features."""

    def __init__(self) -> None:
        super().__init__(num_features=2, num_classes=2, input_shape=(2, 1, 1))
        self.fc = nn.Linear(2, 2)

    def stem(self, images: Tensor) -> Tensor:
        """Return the images as they are."""
        return images


def heat_toy(args: Sequence[str]) -> None:
    """``heat-toy [--seed 0] [--folder FOLDER]``: train HEAT on points of the plane, measure and draw what it learns."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments heat-toy", description=heat_toy.__doc__, allow_abbrev=False
    )
    parser.add_argument("--seed", type=int, default=0, help="of the points, the network and the chains")
    parser.add_argument(
        "--folder", type=Path, default=weights.CHECKPOINTS / "heat" / "toy", help="where toy.png goes; now: %(default)s"
    )
    options = parser.parse_args(args)
    torch.manual_seed(options.seed)
    points, labels = draw(POINTS)
    module = train(points, labels)
    landscape = scores(module, grid())
    numbers = {"KL(data || density)": {name: divergence(landscape[name]) for name in ("prior", "heat")}}
    numbers |= {f"AUROC, {name}": areas for name, areas in detect(module).items()}
    print(f"{'':28}{'prior':>8}{'hybrid':>8}")
    for name, values in numbers.items():
        print(f"{name:28}{values['prior']:8.3f}{values['heat']:8.3f}")
    options.folder.mkdir(parents=True, exist_ok=True)
    toy_figure(points, labels, landscape).savefig(options.folder / "toy.png", dpi=150)
    print(options.folder / "toy.png")


def draw(number: int) -> tuple[Tensor, Tensor]:
    """Draw points (number, 2) of the data, and their classes (number,): 0 on the left, 1 on the right."""
    modes = torch.randint(len(MEANS), (number,))
    return MEANS[modes] + STD * torch.randn(number, 2), modes // 2


def train(
    points: Tensor,
    labels: Tensor,
    steps: int = 600,
    sgld: SGLD = LANGEVIN,
    regularization: float = REGULARIZATION,
    include_starts: bool = True,
) -> HEAT:
    """Fit the prior to (N, 2) points with labels (N,), and train the residual on so many batches of 256."""
    module = HEAT(
        Plane(),
        GMMEnergy(normalize=False),
        ResidualEnergy(2, hidden_dim=64, hidden_layers=3, tie_hidden=False),
        sgld,
        ADAM,
        regularization=regularization,
        include_starts=include_starts,
    )
    evidence = module.encode(points[:, :, None, None])
    module.energy.bind(module.backbone)
    module.energy.update(evidence, labels)
    module.energy.finalize()
    features = module.energy.embed(evidence)
    optimizer = ADAM(module.energy.residual.parameters())
    for _ in range(steps):
        rows = torch.randint(len(features), (256,))
        loss, _ = module.contrast(features[rows], *module.propose(features[rows], labels[rows]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return module


@torch.no_grad()
def scores(module: HEAT, points: Tensor) -> dict[str, Tensor]:
    """Energies (N,) of (N, 2) points: ``heat``, and its parts ``prior`` and ``residual``."""
    return module(points[:, :, None, None]).scores


def detect(module: HEAT) -> dict[str, dict[str, float]]:
    """AUROC of every score on points in the gap between the modes of a class, and on draws from the prior."""
    known, _ = draw(POINTS)
    gap, _ = draw(POINTS)
    gap[:, 1].uniform_(-STD, STD)
    _, drawn = module.energy.prior.sample(POINTS)
    scores_known = scores(module, known)
    return {
        name: {score: auroc(rank(scores_known[score], energies)) for score, energies in scores(module, ood).items()}
        for name, ood in (("between the modes", gap), ("draws from the prior", drawn))
    }


def grid() -> Tensor:
    """Centres (CELLS^2, 2) of the cells; the second coordinate runs faster."""
    ticks = EDGE * ((2 * torch.arange(CELLS) + 1) / CELLS - 1)
    return torch.cartesian_prod(ticks, ticks)


def divergence(energy: Tensor) -> float:
    """KL(data || exp(-energy)) of energies (CELLS^2,) in the cells of the grid, in nats."""
    data = (torch.cdist(grid().double(), MEANS.double()) / STD).square().div(-2).logsumexp(1).log_softmax(0)
    return float(F.kl_div((-energy.double()).log_softmax(0), data, reduction="sum", log_target=True))


def toy_figure(points: Tensor, labels: Tensor, landscape: dict[str, Tensor]) -> Figure:
    """Draw the data, the density of the prior, the residual energy, and the density of the hybrid energy.

    Args:
        points: (N, 2) of the data.
        labels: (N,).
        landscape: the ``scores`` of the grid.
    """
    densities = {name: landscape[name].neg().softmax(0) * (CELLS / (2 * EDGE)) ** 2 for name in ("prior", "heat")}
    levels = torch.arange(0, float(max(map(torch.max, densities.values()))) + 0.02, 0.02)
    limit = 1 / (2 * REGULARIZATION)  # where the loss leaves the residual energy of points that are never real
    figure = Figure(figsize=(14.0, 3.6), layout="compressed")
    data, prior, residual, hybrid = panels = figure.subplots(1, 4, sharex=True, sharey=True)
    for label, colour in enumerate(("tab:blue", "tab:orange")):
        data.scatter(*points[labels == label].T, s=1.5, color=colour, alpha=0.5, linewidths=0)
    data.set(title="data, two classes")
    _contours(prior, densities["prior"], levels, "Blues", "neither")
    prior.set(
        title=r"prior density, $\exp(-E_q) / Z$", xlabel=f"KL(data || prior) = {divergence(landscape['prior']):.2f}"
    )
    filled = _contours(residual, landscape["residual"], torch.linspace(-limit, limit, 21), "RdBu_r", "both")
    figure.colorbar(filled, ax=residual, ticks=range(-4, 5, 2))
    residual.set(title=r"residual energy, $E_\theta$")
    filled = _contours(hybrid, densities["heat"], levels, "Blues", "neither")
    figure.colorbar(filled, ax=hybrid, label="both densities")
    hybrid.set(
        title=r"hybrid density, $\exp(-E_q - E_\theta) / Z$",
        xlabel=f"KL(data || hybrid) = {divergence(landscape['heat']):.2f}",
    )
    ticks = range(-4, 5, 2)
    for panel in panels:
        panel.set(aspect="equal", xlim=(-VIEW, VIEW), ylim=(-VIEW, VIEW), xticks=ticks, yticks=ticks)
    for panel in panels[1:]:
        panel.scatter(*points[:1000].T, s=0.8, color="black", alpha=0.4, linewidths=0)
    return figure


def _contours(
    panel: Axes, values: Tensor, levels: Tensor, colours: str, extend: Literal["neither", "both"]
) -> ContourSet:
    x, y = grid().T.unflatten(1, (CELLS, CELLS))
    values = values.view(CELLS, CELLS)
    panel.contour(x, y, values, levels, colors="black", linewidths=0.3, alpha=0.5)
    return panel.contourf(x, y, values, levels, cmap=colours, extend=extend)
