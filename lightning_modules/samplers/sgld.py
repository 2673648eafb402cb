"""Stochastic gradient Langevin dynamics on features: schedules, projection, chains that persist."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.distributed import gather_rows
from lightning_modules.scores.energy import EnergyScore


@dataclass(frozen=True)
class SGLD:
    """Chains z <- z - eta_t grad E(z) - eps_t xi, xi ~ N(0, I), projected back to where features lie after each step.

    Step size and noise both fall along (1 - t/S)^2, from their start to ``end`` of it, which they do not reach in S
    steps. The noise is not tied to the step: Langevin dynamics at temperature 1 would be eps = sqrt(2 eta), and the
    published settings are colder, by eps^2 / (2 eta). Lafon et al., "Hybrid Energy Based Model in the Feature Space for
    Out-of-Distribution Detection", ICML 2023.

    Attributes:
        steps: S; with 0 a chain is its projected start.
        step_size: eta at t = 0.
        noise: eps at t = 0, a standard deviation.
        end: share of both that is left in the end; 1 = constant.
        relu: whether chains stay where all features are at least 0; not for features that can be negative.
    """

    steps: int
    step_size: float
    noise: float
    end: float = 0.1
    relu: bool = True

    def __post_init__(self) -> None:
        if self.steps < 0 or min(self.step_size, self.noise, self.end) < 0:
            raise ValueError(f"steps, step_size, noise and end of SGLD must be at least 0: {self}")

    def schedule(self, start: float, step: int) -> float:
        """Value at a step, counted from 0, of what is ``start`` there.

        >>> [round(SGLD(10, 1e-4, 0).schedule(1e-4, t), 8) for t in (0, 5, 9)]
        [0.0001, 3.25e-05, 1.09e-05]
        """
        end = self.end * start
        return (start - end) * (1 - step / self.steps) ** 2 + end

    def project(self, features: Tensor, unit_length: bool) -> Tensor:
        """Bring (B, D) features back to at least 0, and to length 1 if so; a row of zeros stays one."""
        features = features.relu() if self.relu else features
        return F.normalize(features, dim=1) if unit_length else features

    def walk(
        self, energy: EnergyScore, starts: Tensor, classes: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield where the chains are after each step, (B, D), and the gradient that led there, (B, D).

        Args:
            energy: what the chains descend; its parameters are left alone, and get no gradient.
            starts: (B, D), projected.
            classes: (B,), where the energy is that given the class of each chain.
        """
        features = starts
        for step in range(self.steps):
            gradient = energy.gradient(features, classes)
            features = features.add(gradient, alpha=-self.schedule(self.step_size, step))
            features.add_(torch.randn_like(features), alpha=-self.schedule(self.noise, step))
            features = self.project(features, energy.unit_length)
            yield features, gradient


class ChainBuffer(nn.Module):
    """Ends of earlier chains, in which some of the next ones start; the newest replace the oldest.

    It is the same on every process, and saved.

    Args:
        capacity: how many ends it holds, at most.
        restart: share of the chains that start afresh.

    Attributes:
        ends: (n, D), the oldest first.
    """

    ends: Tensor

    def __init__(self, capacity: int = 40_000, restart: float = 0.1) -> None:
        super().__init__()
        if capacity < 1 or not 0 <= restart <= 1:
            raise ValueError(
                f"chains persist with a capacity of at least 1 and a restart share in [0, 1], not {capacity}, {restart}"
            )
        self.capacity, self.restart = capacity, restart
        self.register_buffer("ends", torch.empty(0))

    def mix(self, fresh: Tensor) -> Tensor:
        """Replace all but ``restart`` of (B, D) starts by ends, once the buffer is half full."""
        if len(self.ends) < self.capacity / 2:
            return fresh
        number = len(fresh) - int(self.restart * len(fresh))
        chosen = torch.randint(len(self.ends), (number,), device=fresh.device)
        return torch.cat([self.ends[chosen], fresh[number:]])

    def keep(self, ends: Tensor) -> None:
        """Take in the (B, D) ends of this step's chains, of all processes."""
        ends = gather_rows(ends.detach())
        self.ends = torch.cat([self.ends.view(-1, ends.shape[1]), ends])[-self.capacity :]

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: object) -> None:
        if (stored := state_dict.get(prefix + "ends")) is not None:
            self.ends = self.ends.new_empty(stored.shape)
        super()._load_from_state_dict(state_dict, prefix, *args)
