"""The contract that every method keeps."""

import logging
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning import LightningModule
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.cli import ReduceLROnPlateau as MonitoredPlateau
from pytorch_lightning.utilities.types import LRSchedulerConfigType, LRSchedulerTypeUnion, OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy

from backbones.autoencoders import Autoencoder
from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence

log = logging.getLogger(__name__)

Images = Tensor
Labels = Tensor
Ids = Tensor
Column = NDArray[np.floating]
Batch = tuple[Images, Labels, Ids]  # what every loader yields; label -1 = outlier


class OODModule(LightningModule, ABC):
    """What every method shares: validation, testing, optimisation, and parts that stay frozen.

    A method gives ``forward`` and ``training_step``. It knows no OOD set, no path, no normalisation constant, no logger
    and no metric; what needs both module and data is a callback. What is ``Fitted`` among its parts, such as a
    ``Score``, is fitted on the ID training images by whatever comes first: the feature cache, before training, or the
    evaluation.

    Attributes:
        taps: the features that ``forward`` returns beside ``penultimate``; the evaluation adds what its scores read.
        selection: the checkpoint to test: ``best`` on held-out ID images, or ``last``.
        best_by: what the best has most of, as validation logs it.
        frozen: names of submodules that stay in eval mode, take no gradient and are no business of the optimiser.
        epochs_without_schedule: at the start of training; ``lr_scheduler`` is made for the others.
        extra_forwards: passes of an image through a network in a test, beside the one, as the evaluation reports.
        needs_outliers: whether training batches must hold auxiliary outliers; the data module then has an
            ``outlier_feed``.
        notes: choices of the method, by name, that a result is to state.
        num_classes: K, the width of the logits; 0 for a method without classes, which validates in its own way.

    Args:
        backbone: the network; an autoencoder where there are no classes.
        optimizer: makes the optimiser from the parameters that are not frozen.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
    """

    selection: ClassVar[Literal["best", "last"]] = "last"
    best_by: str = "val/accuracy"
    frozen: tuple[str, ...] = ()
    epochs_without_schedule: int = 0
    extra_forwards: int = 0
    needs_outliers: ClassVar[bool] = False
    backbone: Backbone  # or an Autoencoder, where num_classes is 0: a union would burden every other method

    def __init__(
        self,
        backbone: Backbone | Autoencoder,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
    ) -> None:
        super().__init__()
        self.backbone = backbone  # type: ignore[assignment]
        self.num_classes = backbone.num_classes if isinstance(backbone, Backbone) else 0
        self.taps: set[str] = set()
        self.notes: dict[str, str | int] = {}
        self._optimizer, self._lr_scheduler, self._lr_interval = optimizer, lr_scheduler, lr_interval
        if self.num_classes:
            self.val_accuracy = MulticlassAccuracy(self.num_classes, average="micro")

    @property
    def backbone_of_logits(self) -> Backbone | None:
        """The network whose head the logits come from, for scores that copy it; None where there is none."""
        return self.backbone if self.num_classes else None

    @abstractmethod
    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images in one pass; B may be 0."""

    @abstractmethod
    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the loss of one batch; a process's share of it may hold ID rows only, or outliers only."""

    def encode(self, images: Images) -> Evidence:
        """Return what the frozen part sees of (B, C, H, W) images: the logits and features that are cached of them.

        Pure: it depends on the images and on ``frozen`` submodules alone. It is called without gradients, in eval mode,
        on images that are not augmented; training batches are then ``EvidenceBatch``. With a frozen backbone it is
        ``observe(self.backbone, images, taps)``.
        """
        raise TypeError(f"{type(self).__name__} has nothing frozen to cache: it does not say how to `encode` images")

    def complete(self, scores: dict[str, Column], splits: NDArray[np.str_]) -> dict[str, Column]:
        """Return all scores of an evaluation, once every image has been seen; here those it has.

        Args:
            scores: name -> (N,) over the images of all splits.
            splits: (N,) the split of each: ``calibration`` (held-out ID), ``id``, or an OOD set.
        """
        return scores

    def findings(self) -> dict[str, Any]:
        """Return what training has found out beside weights, by name; the run record writes ``<name>.json`` of each."""
        return {}

    def figures(self) -> dict[str, Figure]:
        """Return the method's own pictures, by name; a callback decides where they go."""
        return {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Observe the held-out images as a test does, and count."""
        self.count_correct(self.test_step(batch, batch_idx), batch[1])

    def count_correct(self, evidence: Evidence, labels: Labels) -> None:
        """Count the correctly classified among B validated images; those labelled -1 do not count."""
        predictions, known = evidence.logits if evidence.predictions is None else evidence.predictions, labels >= 0
        if known.any():  # the last share of a process may be empty
            self.val_accuracy.update(predictions[known], labels[known])
        self.log("val/accuracy", self.val_accuracy, on_epoch=True, prog_bar=True)

    def test_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Evidence:  # type: ignore[override]
        """Observe the images; the evaluation callback reads the evidence."""
        return self(batch[0])

    predict_step = test_step

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Hand every parameter that is not frozen to the optimiser."""
        optimizer = self._optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])
        if self._lr_scheduler is None:
            return optimizer
        scheduler = self._lr_scheduler(optimizer)
        config: LRSchedulerConfigType = {"scheduler": scheduler, "interval": self._lr_interval}
        if isinstance(scheduler, MonitoredPlateau):
            config["monitor"] = scheduler.monitor
        return {"optimizer": optimizer, "lr_scheduler": config}

    def on_train_start(self) -> None:
        """Warn of a schedule that is made for more epochs or steps than the run has, and refuse one that ends early."""
        for config in self.trainer.lr_scheduler_configs:
            made_for = getattr(config.scheduler, "total_steps", getattr(config.scheduler, "T_max", None))
            by_step = config.interval == "step"
            epochs = self.trainer.max_epochs or 0
            length = round(self.trainer.estimated_stepping_batches) if by_step else epochs
            if self.epochs_without_schedule and epochs > 0:
                length -= length * self.epochs_without_schedule // epochs
            if made_for is None or made_for == length:
                continue
            kind, unit = type(config.scheduler).__name__, "steps" if by_step else "epochs"
            message = f"{kind} is made for {made_for} {unit}, and the run has {length}"
            if self.epochs_without_schedule:
                message += f" after the first {self.epochs_without_schedule} epochs, which have none"
            if made_for < length:
                raise ValueError(f"{message}: make it for as many")
            log.warning(message)

    def on_train_epoch_end(self) -> None:
        """Step a schedule that waits for a plateau; Lightning would do so behind the back of the checkpoint."""
        for config in self.trainer.lr_scheduler_configs:
            if not config.reduce_on_plateau:
                continue
            if config.monitor not in self.trainer.callback_metrics:
                raise ValueError(
                    f"the learning rate waits for a plateau of {config.monitor}, which was not logged in this epoch; "
                    f"there is {', '.join(sorted(self.trainer.callback_metrics))}. Are images held out (val_split)?"
                )
            config.scheduler.step(self.trainer.callback_metrics[config.monitor])  # type: ignore[arg-type]

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: Any | None) -> None:
        """Step a schedule that follows the count of steps or epochs."""
        if metric is None:  # else ``on_train_epoch_end`` has done it
            super().lr_scheduler_step(scheduler, metric)

    def configure_model(self) -> None:
        """Take the gradients of what is frozen away, and its training mode; Lightning calls this before all else.

        Lightning itself switches no mode before the first validation.
        """
        for module in self._frozen_modules():
            module.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "OODModule":
        """Switch the mode of everything but what is frozen."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        return self

    def _frozen_modules(self) -> list[nn.Module]:
        return [self.get_submodule(name) for name in self.frozen]
