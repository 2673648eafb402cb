"""What chains do, as a picture."""

from collections.abc import Iterable

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.scores.energy import EnergyScore


def chains_figure(energy: EnergyScore, starts: Tensor, walk: Iterable[tuple[Tensor, Tensor]]) -> Figure:
    """Draw energy, length of the gradient and distance from the start over the steps: medians, and 5 to 95 percent.

    Args:
        energy: that the chains descend.
        starts: (B, D).
        walk: of ``SGLD``.
    """
    energies, gradients, distances = [energy.energy(starts)], [], [torch.zeros(len(starts))]
    for features, gradient in walk:
        energies.append(energy.energy(features))
        gradients.append(gradient.norm(dim=1))
        distances.append((features - starts).norm(dim=1))
    figure = Figure(figsize=(10.2, 3.0), layout="constrained")
    curves = {"hybrid energy": energies, "length of its gradient": gradients, "distance from the start": distances}
    for panel, (title, curve) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        values = torch.stack([step.cpu() for step in curve]).double()
        low, median, high = values.quantile(torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64), dim=1)
        steps = range(len(curve))
        panel.plot(steps, median, color="tab:blue")
        panel.fill_between(steps, low, high, alpha=0.3, linewidth=0, color="tab:blue")
        panel.set(title=title, xlabel="step of the chain")
    return figure
