"""HEAT: a residual energy on a frozen network's features corrects a prior OOD score.

The hybrid energy E_h = E_theta / T + E_q / T_q is trained so that the density exp(-E_h) is that of the ID features:
Langevin chains that start from proposals descend E_h, and their ends are told from real features. Lafon, Ramzi, Rambour
and Thome, "Hybrid Energy Based Model in the Feature Space for Out-of-Distribution Detection", ICML 2023.
"""

from typing import Any, Literal

import torch
from matplotlib.figure import Figure
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from backbones.backbone import Backbone
from backbones.residual_energy import ResidualEnergy
from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence, EvidenceBatch, need_cached, observe
from lightning_modules.losses.contrastive_divergence import contrastive_divergence
from lightning_modules.ood_module import Batch, Images, OODModule
from lightning_modules.samplers.figure import chains_figure
from lightning_modules.samplers.sgld import SGLD, ChainBuffer
from lightning_modules.scores.energy import EnergyScore
from lightning_modules.scores.hybrid_energy import HybridEnergy
from lightning_modules.scores.score import full_precision

FAR = 100.0  # chains are lost at so many times the length of the features and starts
MOST = 0.5  # of the chains are lost where a step below 0 and a projection have left nothing of them
DRAWN = 256  # chains in the figure
EXPLODED = 1000.0  # times what the regularization bounds a residual energy to, or the energies that chains start from


class DivergenceError(ValueError):
    """Chains or energies grew beyond all bounds, or are not numbers."""


class HEAT(OODModule):
    """Trains the residual of a ``HybridEnergy`` on cached features; backbone and prior stay as they are.

    Its scores: ``heat``, the hybrid energy, and its two parts ``prior`` (E_q / T_q) and ``residual`` (E_theta / T).

    Args:
        backbone: the trained classifier.
        prior: E_q; it is fitted on the ID training images before training begins.
        residual: E_theta.
        sgld: how chains descend.
        optimizer: makes the optimiser from the parameters of the residual.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
        temperature: T.
        prior_temperature: T_q.
        regularization: weight of the mean squared residual energies, at least 0.
        proposal: where chains start: standard ``normal`` noise, draws from the ``prior``, draws from it at a
            temperature of their own (``prior_tempered``: for each batch uniform in 0 to 100), or the ``data``
            themselves.
        conditional: whether proposals have the classes of the batch, and chains descend the prior's energy given the
            class.
        include_starts: whether the starts count among the negatives, beside the ends of the chains.
        data_noise: standard deviation of the noise that is added to real features and negatives.
        chains: where some chains go on from the ends of earlier ones; None = all start afresh.
    """

    frozen = ("backbone",)

    def __init__(
        self,
        backbone: Backbone,
        prior: EnergyScore,
        residual: ResidualEnergy,
        sgld: SGLD,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        temperature: float = 1.0,
        prior_temperature: float = 1.0,
        regularization: float = 10.0,
        proposal: Literal["normal", "prior", "prior_tempered", "data"] = "prior",
        conditional: bool = False,
        include_starts: bool = True,
        data_noise: float = 1e-4,
        chains: ChainBuffer | None = None,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        if min(regularization, data_noise) < 0:
            raise ValueError(
                "regularization and data_noise must be at least 0, not "
                f"regularization={regularization}, data_noise={data_noise}"
            )
        if conditional and chains is not None:
            raise ValueError("chains that go on have no class of the batch: take conditional or chains, not both")
        if conditional and proposal == "normal":
            raise ValueError("noise has no class: conditional goes with another proposal")
        self.energy = HybridEnergy(prior, residual, temperature, prior_temperature)
        self.sgld, self.chains = sgld, chains
        self.regularization, self.data_noise = regularization, data_noise
        self.proposal, self.conditional, self.include_starts = proposal, conditional, include_starts
        self.taps = set(prior.taps)

    def setup(self, stage: str) -> None:
        """Refuse parameters in half precision, in which densities and small steps vanish."""
        if (precision := self.trainer.precision) in ("bf16-true", "16-true"):
            raise ValueError(f"HEAT takes steps that {precision} rounds away: choose 32-true or bf16-mixed")

    def encode(self, images: Images) -> Evidence:
        """Return logits, penultimate features and those of the prior."""
        return observe(self.backbone, images, self.taps)

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images; ``scores`` are ``heat``, ``prior`` and ``residual``."""
        evidence = observe(self.backbone, images, self.taps)
        if not self.energy.fitted:  # on the very images that it is fitted on
            return evidence
        with full_precision(self.device):
            residual, prior = self.energy.parts(self.energy.embed(evidence))
        return evidence._replace(scores={"heat": residual + prior, "prior": prior, "residual": residual})

    def training_step(self, batch: Batch | EvidenceBatch, batch_idx: int) -> Tensor:
        """Return the loss of a batch of cached features.

        Raises:
            DivergenceError: chains or energies are lost; the parameters are still those before this step.
        """
        batch = need_cached(batch, "HEAT")
        with full_precision(self.device):
            real = self.energy.embed(batch.evidence)
            self._refuse(batch.labels < 0, batch.ids, "is an outlier: HEAT is trained without outlier_feed")
            self._refuse(~real.isfinite().all(1), batch.ids, "has features that are NaN or infinite")
            if self.sgld.relu:
                below = (real < 0).any(1)
                self._refuse(below, batch.ids, "has features below 0, where chains cannot go: set sgld.relu to false")
            starts, classes = self.propose(real, batch.labels)
            loss, diagnostics = self.contrast(real, starts, classes)
        self.log("train/loss", loss, prog_bar=True)
        self.log_dict({f"train/{name}": value for name, value in diagnostics.items()})
        return loss

    def _refuse(self, rows: Tensor, ids: Tensor, reason: str) -> None:
        """Let every process raise a ``ValueError`` where one has such rows (B,)."""
        if sum_over_processes(rows.any().float()):
            image = f"image {int(ids[rows][0])}" if rows.any() else "an image of another process"
            raise ValueError(f"training {image} {reason}")

    def propose(self, real: Tensor, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """Draw where chains start, (B, D) and projected, and their classes (B,) where these count.

        Args:
            real: (B, D) embedded features of a batch.
            labels: (B,).
        """
        classes, starts = labels, real
        if self.proposal == "normal":
            starts = torch.randn_like(real)
        elif self.proposal != "data":
            shares = labels.bincount(minlength=self.num_classes).to(real) if self.conditional else None
            temperature = 100 * float(torch.rand(())) if self.proposal == "prior_tempered" else None
            classes, starts = self.energy.prior.sample(len(real), shares, temperature)
        if self.chains is not None:
            starts = self.chains.mix(starts)
        return self.sgld.project(starts, self.energy.unit_length), classes if self.conditional else None

    def contrast(self, real: Tensor, starts: Tensor, classes: Tensor | None) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of real features against the chains from some starts, and what is worth knowing of both.

        Args:
            real: (B, D) embedded features.
            starts: (B, D), projected.
            classes: (B,) of the chains where they count.
        """
        ends, gradient, strides = starts, torch.zeros_like(starts), [starts.new_zeros(len(starts))]
        for step, (ends, gradient) in enumerate(self.sgld.walk(self.energy, starts, classes)):  # noqa: B007
            strides.append(self.sgld.schedule(self.sgld.step_size, step) * gradient.norm(dim=1))
        self._check_chains(ends.norm(dim=1), torch.stack(strides), torch.cat([real, starts]).norm(dim=1).amax())
        if self.chains is not None:
            self.chains.keep(ends)
        points = torch.cat([ends, starts])
        real, points = (z + self.data_noise * torch.randn_like(z) for z in (real, points))
        (real_residual, real_prior), (residual, prior) = self.energy.parts(real), self.energy.parts(points)
        self._check_residual(torch.cat([real_residual, residual]))
        energy_real, (energy_ends, energy_starts) = real_residual + real_prior, (residual + prior).chunk(2)
        self._check_energies(energy_ends.detach(), torch.cat([energy_starts, energy_real]).detach())
        self._some = torch.cat([real, points])[::3]
        negative = residual if self.include_starts else residual[: len(ends)]
        loss = contrastive_divergence(real_residual, negative, self.regularization)
        with torch.no_grad():
            known = {
                "energy_real": energy_real.mean(),
                "energy_starts": energy_starts.mean(),
                "energy_ends": energy_ends.mean(),
                "residual_real": real_residual.mean(),
                "residual_negatives": negative.mean(),
                "last_gradient": gradient.norm(dim=1).mean(),
                "movement": (ends - starts).norm(dim=1).mean(),
            }
            if self.regularization:
                squares = real_residual.square().mean() + negative.square().mean()
                # 1 where the residual says of each point all that the loss lets it, see contrastive_divergence
                known["saturation"] = 2 * self.regularization * (squares / 2).sqrt()
                # 1 where no multiple of the residual has a lower loss
                known["balance"] = (negative.mean() - real_residual.mean()) / (2 * self.regularization * squares)
        return loss, known

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Make a step, and raise a ``DivergenceError`` if it goes too far: before any checkpoint is written of it."""
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad(), full_precision(self.device):
            self._check_residual(self.energy.residual(self._some) / self.energy.temperature)

    def _check_chains(self, ends: Tensor, strides: Tensor, others: Tensor) -> None:
        bound = FAR * float(others)
        self._check("the length of a chain's end", ends, bound, self._slower)
        # a projection hides how far a step went
        self._check("the length of a chain's step", strides, bound, self._slower)
        self._check("the share of chains that are at 0", (ends == 0).float().mean()[None], MOST, self._slower)

    def _check_energies(self, ends: Tensor, others: Tensor) -> None:
        bound = EXPLODED * float(others.abs().amax())
        self._check("the energy of a chain's end", ends.abs(), bound, self._slower)

    @property
    def _slower(self) -> str:
        return f"lower step_size or noise of {self.sgld}, or raise prior_temperature {self.energy.prior_temperature}"

    def _check_residual(self, energies: Tensor) -> None:
        bound = EXPLODED / (2 * self.regularization) if self.regularization else float("inf")
        remedy = f"lower the learning rate, or raise regularization {self.regularization}"
        self._check("a residual energy", energies.detach().abs(), bound, remedy)

    def _check(self, what: str, values: Tensor, bound: float, remedy: str) -> None:
        """Let every process raise where one is lost."""
        worst = values.nan_to_num(float("inf"), float("inf")).amax()
        if sum_over_processes((~(worst < bound)).float()):
            if worst < bound:
                reached = "is lost on another process"
            elif worst.isfinite():
                reached = f"reaches {float(worst):.3g}, of at most {bound:.3g}"
            else:
                reached = "is not a finite number"
            raise DivergenceError(f"HEAT diverged in step {self.global_step}: {what} {reached}. Remedy: {remedy}")

    def figures(self) -> dict[str, Figure]:
        """Draw how energy, gradient and distance go along chains that start from proposals."""
        if self.proposal == "data" or not self.sgld.steps:  # no proposals without data
            return {}
        with torch.random.fork_rng(), torch.inference_mode(False), torch.no_grad(), full_precision(self.device):
            torch.manual_seed(0)
            shape = DRAWN, self.energy.residual.num_features
            labels = torch.arange(DRAWN, device=self.device) % self.num_classes
            if self.conditional:  # of classes that the prior knows
                labels, _ = self.energy.prior.sample(DRAWN)
            starts, classes = self.propose(next(self.energy.parameters()).new_zeros(shape), labels)
            return {"chains": chains_figure(self.energy, starts, self.sgld.walk(self.energy, starts, classes))}
