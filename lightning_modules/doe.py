"""DOE: outlier exposure under a perturbation of the weights that makes outliers harder.

What weights perturbed along some direction make of an outlier is what unperturbed ones would make of another: a search
among weights is one among outliers that nobody has. From an epoch on, each iteration takes two steps of the optimiser:
one by the loss V of the outliers, at weights moved by a running perturbation, and one by the cross-entropy C of the ID
images, at weights moved back. Wang et al., "Out-of-distribution Detection with Implicit Outlier Transformation", ICLR
2023. A floor U turns C into |C - U| + U (Zhu et al., "Unleashing Mask", ICML 2023).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.cli import ReduceLROnPlateau as MonitoredPlateau
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.func import functional_call

from backbones.backbone import Backbone
from lightning_modules.distributed import first_process, mean_over_processes
from lightning_modules.evidence import Evidence, observe
from lightning_modules.losses.cross_entropy import cross_entropy
from lightning_modules.losses.loss_floor import loss_floor, resolve_floor
from lightning_modules.losses.outlier_exposure import UniformTarget, scale_slope
from lightning_modules.ood_module import Batch, Images, OODModule
from lightning_modules.scores.score import widen

CLIP = 1.0  # the length of a step's gradient at most
KEPT = 0.6  # share of the perturbation so far in the new one
TINY = 1e-20


class DOE(OODModule):
    """A network that learns from ID images and outliers, the latter at perturbed weights.

    A perturbation has for each weight of two or more dimensions the length of that weight, and points along the
    gradient of R, the square of the slope at which the loss of outliers changes with the scale of their logits
    (``scale_slope``): one step of plain SGD on a copy of the network, up to its length. Before ``warmup``, a step has
    the loss C + V at the weights as they are. Every step's gradient is clipped to a length of 1.

    Statistics of batch-norm see each image twice an iteration, at both weights; the pass behind R changes none, and has
    no dropout. ``global_step`` counts iterations.

    Args:
        backbone: the network, usually trained, with its ``weights``.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each iteration.
        floor: U, of the cross-entropy alone, at least 0; 0 = none. ``auto`` = what ``estimate`` found.
        estimate: where ``auto`` reads it, ``run:unleashing_mask/<setting>[/<name>]``.
        warmup: epochs without perturbation.
        strengths: by which the running perturbation is multiplied; each iteration draws one of them.
        direction: ``official`` moves weights to where R falls, as the authors' training does; ``ascent`` to where it
            rises, as the paper has it.
    """

    needs_outliers = True

    def __init__(
        self,
        backbone: Backbone,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        floor: float | Literal["auto"] = 0.0,
        estimate: str | None = None,
        warmup: int = 5,
        strengths: Sequence[float] = (1e-1, 1e-2, 1e-3, 1e-4),
        direction: Literal["official", "ascent"] = "official",
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        if warmup < 0 or not strengths or min(strengths) < 0:
            raise ValueError(
                f"warmup and strengths must be at least 0, and there is at least one strength; got warmup={warmup}, "
                f"strengths={list(strengths)}"
            )
        if direction not in ("official", "ascent"):
            raise ValueError(f"direction is official or ascent, not {direction!r}")
        self.automatic_optimization = False
        self.floor = resolve_floor(floor, estimate, backbone)
        self.warmup, self.strengths, self.direction = warmup, tuple(strengths), direction
        self.outlier_loss = UniformTarget(weight=1.0)
        self.perturbation: dict[str, Tensor] = {}  # the running one, by name of the weight

    def setup(self, stage: str) -> None:
        """Refuse precisions in which a small perturbation vanishes, or a gradient is scaled when it is clipped."""
        precision = self.trainer.precision
        if stage == "fit" and precision in ("bf16-true", "16-true", "16-mixed"):
            raise ValueError(f"DOE moves weights by little and clips gradients: choose 32-true, not {precision}")

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images: logits (B, K), ``penultimate`` and the requested taps."""
        return observe(self.backbone, images, self.taps)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Make one step, or two from ``warmup`` on; return the losses behind them, added up."""
        images, labels, _ = batch
        if self.current_epoch < self.warmup:
            logits = widen(self.backbone(images))
            loss, outlier_loss = self.floored(logits, labels), self.outlier_loss(logits, labels)
            self.step(loss + outlier_loss)
        else:
            self.perturb(images, labels)
            drawn = first_process(torch.randint(len(self.strengths), (), device=self.device))
            strength = self.strengths[int(drawn)]
            self.move(strength)
            outlier_loss = self.outlier_loss(widen(self.backbone(images)), labels)
            self.step(outlier_loss, counts=False)
            self.move(-strength)
            loss = self.floored(widen(self.backbone(images)), labels)
            self.step(loss)
        if self._lr_interval == "step":
            self._step_schedules()
        total, outliers = mean_over_processes(torch.stack([loss + outlier_loss, outlier_loss]).detach())
        self.log("train/outliers", outliers)
        self.log("train/loss", total, prog_bar=True)
        return total

    def floored(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Return the cross-entropy of the ID images, with its floor."""
        loss = cross_entropy(logits, labels)
        level = mean_over_processes(loss.detach())
        self.log("train/cross_entropy", level)
        return loss_floor(loss, self.floor, level)

    def perturb(self, images: Images, labels: Tensor) -> None:
        """Renew the running perturbation from a batch: that of the whole one, over all processes."""
        named = self.backbone.named_parameters()
        weights = {name: weight for name, weight in named if weight.ndim >= 2 and weight.requires_grad}
        buffers = {name: buffer.clone() for name, buffer in self.backbone.named_buffers()}
        with without_dropout(self.backbone):
            slope = scale_slope(widen(functional_call(self.backbone, buffers, (images,))), labels)
        gradients = torch.autograd.grad(slope, list(weights.values()))
        slope, *means = mean_over_processes(torch.cat([slope.detach()[None], *(g.flatten() for g in gradients)])).split(
            [1, *(gradient.numel() for gradient in gradients)]
        )
        sign = 1 if self.direction == "ascent" else -1
        for (name, weight), gradient in zip(weights.items(), means, strict=True):
            ascent = 2 * slope * gradient.view_as(weight)
            new = sign * weight.detach().norm() / (ascent.norm() + TINY) * ascent
            old = self.perturbation.get(name, new).to(new)
            self.perturbation[name] = KEPT * old + (1 - KEPT) * new

    @torch.no_grad()
    def move(self, strength: float) -> None:
        """Add the running perturbation to the weights, so many times."""
        for name, change in self.perturbation.items():
            self.backbone.get_parameter(name).add_(change, alpha=strength)

    def step(self, loss: Tensor, counts: bool = True) -> None:
        """Let the optimiser make a step by a loss; Lightning counts one an iteration, by which it saves and logs."""
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, CLIP, "norm")
        (optimizer if counts else optimizer.optimizer).step()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Leave out when a schedule steps, which Lightning says it ignores where a method makes its own steps."""
        configured = super().configure_optimizers()
        if not isinstance(configured, dict):
            return configured
        return {"optimizer": configured["optimizer"], "lr_scheduler": configured["lr_scheduler"]["scheduler"]}  # type: ignore

    def on_train_start(self) -> None:
        """Say it again for what reads it: this method and the contract."""
        for config in self.trainer.lr_scheduler_configs:
            config.interval = self._lr_interval
            if isinstance(config.scheduler, MonitoredPlateau):
                config.reduce_on_plateau, config.monitor = True, config.scheduler.monitor
        super().on_train_start()

    def on_train_epoch_end(self) -> None:
        """Step the schedules that go by epochs."""
        super().on_train_epoch_end()
        if self._lr_interval == "epoch":
            self._step_schedules()

    def _step_schedules(self) -> None:
        for config in self.trainer.lr_scheduler_configs:
            if not config.reduce_on_plateau:
                config.scheduler.step()  # type: ignore[call-arg]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the running perturbation, and the floor: a run goes on with the one that it began with."""
        checkpoint |= {"floor": self.floor, "perturbation": self.perturbation}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take both from the run; a test of another method's checkpoint has none."""
        self.floor, self.perturbation = checkpoint.get("floor", self.floor), checkpoint.get("perturbation", {})


@contextmanager
def without_dropout(network: nn.Module) -> Iterator[None]:
    """Hold the dropout layers of a network that trains in eval mode."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.modules.dropout._DropoutNd)]
    active = [layer for layer in layers if layer.training]
    for layer in active:
        layer.eval()
    try:
        yield
    finally:
        for layer in active:
            layer.train()
