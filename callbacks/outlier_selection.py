"""Choosing the outliers of an epoch by what the network makes of them: POEM's mining."""

import time
from collections.abc import Iterator
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from callbacks.processes import evaluating
from datamodules.datamodule import OODDataModule
from lightning_modules.distributed import first_process, gather_rows
from lightning_modules.ood_module import OODModule
from lightning_modules.samplers.thompson import BoundaryRegression, ThompsonSampling, least


class OutlierSelection(Callback):
    """Before each epoch, lets the data module train on the outliers that are nearest to a random boundary.

    A boundary is drawn from the posterior of a regression on the penultimate features of the ID images, as training saw
    them in the first epoch, and of the outliers of the last epochs, as it saw them then, all anew by the network as it
    is now, in eval mode. Each ID image counts as often as there are such epochs. Before the first epoch there is
    nothing to learn from, and the prior is drawn from. Processes share the work and choose the same outliers.

    A checkpoint holds which outliers were chosen in which epoch; all else follows from the network, the data and the
    seed. An epoch that a run resumes in goes on with the outliers it began with.

    Args:
        count: M, how many outliers an epoch has; as many as it feeds where not given.
        sampling: of the boundary.
        remembered: how many epochs.
    """

    def __init__(self, count: int | None = None, sampling: ThompsonSampling | None = None, remembered: int = 4) -> None:
        for name, value in (("count", count), ("remembered", remembered)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.count, self.sampling, self.remembered = count, sampling or ThompsonSampling(), remembered
        self.chosen: dict[int, Tensor] = {}  # epoch -> rows of the set ``outliers``

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a pool that is too small; go on with the outliers of the epoch that the run resumes in."""
        data: OODDataModule = trainer.datamodule  # type: ignore[attr-defined]
        if "outliers" not in data.sets or data.outlier_feed != "paired":
            raise ValueError(
                "outliers are chosen for paired batches: set outlier_feed of the data to paired, it is "
                f"{data.outlier_feed!r}"
            )
        if self.count is None:
            self.count = round(data.sizes["train"] * data.outlier_ratio)
        if self.count > data.sizes["outliers"]:
            raise ValueError(
                f"{self.count} outliers are to be chosen, and the pool has {data.sizes['outliers']}: take a larger "
                "pool, or a smaller count"
            )
        if trainer.current_epoch in self.chosen:
            data.choose_outliers(self.chosen[trainer.current_epoch])

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Choose; Lightning does not call this where a run resumes in mid-epoch."""
        module: OODModule = pl_module  # type: ignore[assignment]
        data: OODDataModule = trainer.datamodule  # type: ignore[attr-defined]
        assert self.count is not None
        started, epoch = time.perf_counter(), trainer.current_epoch
        self.chosen = {past: rows for past, rows in self.chosen.items() if epoch - self.remembered <= past < epoch}
        with evaluating(module):
            for buffer in module.buffers():  # after an epoch, statistics of batch-norm are each process's own
                buffer.copy_(first_process(buffer))
            regression = self._regress(trainer, module, data) if self.chosen else None
            boundary = self.sampling.draw(regression, module.backbone.num_features, data.seed, epoch).to(module.device)
            self.chosen[epoch] = least(self._grade(trainer, module, data, boundary), self.count)
        data.choose_outliers(self.chosen[epoch])
        seconds = time.perf_counter() - started
        rank_zero_info(f"chose {self.count:,} of {data.sizes['outliers']:,} outliers in {seconds:.1f} s")

    def _regress(self, trainer: Trainer, module: OODModule, data: OODDataModule) -> BoundaryRegression:
        """Sum up the ID images, and the outliers of the epochs that are remembered."""
        regression = BoundaryRegression(module.backbone.num_features, module.device)
        known = torch.arange(data.sizes["train"])
        parts = [(known, 0, len(self.chosen))]
        parts += [(len(known) + rows, epoch, 1) for epoch, rows in self.chosen.items()]
        for rows, epoch, weight in parts:
            for features, labels, _ in self._observe(trainer, module, data, rows, epoch):
                regression.update(features, self.sampling.targets(labels < 0, data.seed), weight)
        regression.reduce()
        return regression

    def _grade(self, trainer: Trainer, module: OODModule, data: OODDataModule, boundary: Tensor) -> Tensor:
        """Return how far each outlier of the pool, as this epoch would see it, is from the boundary, (P,)."""
        known, pool = data.sizes["train"], data.sizes["outliers"]
        observed = self._observe(trainer, module, data, known + torch.arange(pool), trainer.current_epoch)
        parts = [(ids - known, (features.float() @ boundary).abs()) for features, _, ids in observed]
        rows, grades = (gather_rows(torch.cat(part)) for part in zip(*parts, strict=True))
        return grades.new_empty(pool).index_copy_(0, rows, grades).cpu()

    def _observe(
        self, trainer: Trainer, module: OODModule, data: OODDataModule, rows: Tensor, epoch: int
    ) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield penultimate features, labels and ids of this process's share of training rows, as in an epoch."""
        shares = [batch[trainer.global_rank :: trainer.world_size] for batch in rows.split(data.eval_batch_size)]
        for batch in data.given_dataloader(data.training_rows(), shares):
            on_device = trainer.strategy.batch_to_device(data.augment(batch, epoch))
            with torch.no_grad(), trainer.precision_plugin.forward_context():
                features = module(on_device.images).features["penultimate"]
            yield features, on_device.labels, on_device.ids

    def state_dict(self) -> dict[str, Any]:
        """Return what was chosen in which epoch."""
        return {"chosen": self.chosen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was chosen in which epoch."""
        self.chosen = state_dict["chosen"]
