"""Which ID training images a network that goes on training forgets."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor, nn

from callbacks.processes import evaluating
from callbacks.results import write_csv, write_json
from datamodules.datamodule import OODDataModule
from datamodules.images import ImageSet
from lightning_modules.distributed import gather_rows
from lightning_modules.evidence import Evidence
from lightning_modules.ood_module import OODModule

SHOWN = 24  # images


@dataclass(frozen=True)
class Margins:
    """How clearly a network classifies each of N labelled images.

    Attributes:
        labels: (N,).
        predictions: (N,).
        margins: (N,) logit of the label minus the largest other one; below 0 where the prediction is wrong.
    """

    labels: NDArray[np.int64]
    predictions: NDArray[np.int64]
    margins: NDArray[np.float32]

    @property
    def correct(self) -> NDArray[np.bool_]:
        """(N,) which images are classified correctly."""
        return self.predictions == self.labels


class Forgetting(Callback):
    """Compares the margins of the ID training images, unaugmented, before and after a fine-tuning.

    Before: by the backbone as training finds it; after: by the logits that the scores read. An image is forgotten if
    only the first is right. The folder ``forgotten`` of a run then holds ``samples.csv`` (a line for each image),
    ``summary.json``, and two figures: what the margins of the forgotten ones were, and which images these are.
    """

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what training starts from; a run that goes on has done so."""
        module, folder = _parts(trainer, pl_module)
        if not trainer.strategy.broadcast((folder / "before.npz").is_file()):
            before = measure(trainer, module.backbone)
            if trainer.is_global_zero:
                folder.mkdir(parents=True, exist_ok=True)
                np.savez(folder / "before.npz", **vars(before))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure what came of it, and write both."""
        module, folder = _parts(trainer, pl_module)
        after = measure(trainer, module)
        if not trainer.is_global_zero:
            return
        with np.load(folder / "before.npz") as stored:
            before = Margins(**stored)
        data: OODDataModule = trainer.datamodule  # type: ignore[attr-defined]
        summary = summarize(before, after)
        write_csv(folder / "samples.csv", as_rows(before, after, data.fit_rows, data.classes))
        write_json(folder / "summary.json", summary)
        figures = {"margins": margins_figure(before, after)}
        if summary["forgotten"]:
            figures["images"] = images_figure(before, after, data.sets["fit"], data.classes)
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png", dpi=110)
        rank_zero_info(
            f"{summary['forgotten']} of {summary['images']} ID training images are forgotten, {summary['learned']} are "
            f"learned: {folder}"
        )
        for logger in trainer.loggers:
            numbers = {f"forgotten/{name}": value for name, value in summary.items() if value is not None}
            logger.log_metrics(numbers, trainer.global_step)
            if isinstance(logger, WandbLogger):
                for name in figures:
                    logger.log_image(f"forgotten/{name}", [str(folder / f"{name}.png")])


@torch.no_grad()
def measure(trainer: Trainer, network: nn.Module) -> Margins:
    """Run a network, or a method, in eval mode over the ID training images; gather the processes, in order."""
    data: OODDataModule = trainer.datamodule  # type: ignore[attr-defined]
    columns: list[tuple[Tensor, ...]] = []
    with evaluating(network):
        for batch in data.fit_dataloader():
            images, labels, ids = trainer.strategy.batch_to_device(batch)
            with trainer.precision_plugin.forward_context():
                observed = network(images)
            logits = (observed.logits if isinstance(observed, Evidence) else observed).float()
            own = logits.gather(1, labels[:, None])
            others = logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)
            columns.append((ids, labels, logits.argmax(1), (own - others).squeeze(1)))
    ids, *measured = (gather_rows(torch.cat(column)) for column in zip(*columns, strict=True))
    return Margins(*(column[ids.argsort()].cpu().numpy() for column in measured))


def summarize(before: Margins, after: Margins) -> dict[str, Any]:
    """Count what was forgotten and learned, and compare the margins that the forgotten images had with those of all."""
    forgotten = before.correct & ~after.correct
    return {
        "images": len(before.labels),
        "accuracy_before": float(before.correct.mean()),
        "accuracy_after": float(after.correct.mean()),
        "forgotten": int(forgotten.sum()),
        "learned": int((~before.correct & after.correct).sum()),
        "mean_margin_before": float(before.margins.mean()),
        "mean_margin_after": float(after.margins.mean()),
        "mean_margin_before_of_forgotten": float(before.margins[forgotten].mean()) if forgotten.any() else None,
    }


def as_rows(before: Margins, after: Margins, rows: Tensor, classes: list[str]) -> list[dict[str, Any]]:
    """Lay out a line for each image, the largest loss of margin first; ``rows`` (N,) are their ids in training."""
    fallen = np.argsort(after.margins - before.margins, kind="stable")
    forgotten = before.correct & ~after.correct
    return [
        {
            "id": int(rows[i]),
            "class": classes[before.labels[i]],
            "predicted_before": classes[before.predictions[i]],
            "predicted_after": classes[after.predictions[i]],
            "margin_before": float(before.margins[i]),
            "margin_after": float(after.margins[i]),
            "forgotten": bool(forgotten[i]),
        }
        for i in fallen
    ]


def margins_figure(before: Margins, after: Margins) -> Figure:
    """Draw margins after over before, and how those before are distributed among forgotten and all images."""
    forgotten = before.correct & ~after.correct
    figure = Figure(figsize=(8, 3.6), layout="constrained")
    points, shares = figure.subplots(1, 2)
    for rows, colour, label in ((~forgotten, "tab:grey", "all others"), (forgotten, "tab:red", "forgotten")):
        if rows.any():
            points.scatter(before.margins[rows], after.margins[rows], 4, colour, alpha=0.5, linewidths=0, label=label)
    points.axhline(0, color="black", linewidth=0.6)
    points.axvline(0, color="black", linewidth=0.6)
    points.set(xlabel="margin before (logits)", ylabel="margin after (logits)")
    points.legend(fontsize=7)
    bins = np.linspace(before.margins.min(), before.margins.max(), 41).tolist()
    shares.hist(before.margins, bins, density=True, color="tab:grey", alpha=0.6, label="all")
    if forgotten.any():
        shares.hist(before.margins[forgotten], bins, density=True, color="tab:red", alpha=0.6, label="forgotten")
    shares.set(xlabel="margin before (logits)", yticks=[], title=f"{forgotten.sum()} of {len(forgotten)} forgotten")
    shares.legend(fontsize=7)
    return figure


def images_figure(before: Margins, after: Margins, images: ImageSet, classes: list[str]) -> Figure:
    """Show the forgotten images that lost most, with their class and what they are taken for now."""
    forgotten = np.flatnonzero(before.correct & ~after.correct)
    worst = forgotten[np.argsort((after.margins - before.margins)[forgotten], kind="stable")][:SHOWN]
    columns = min(8, len(worst))
    figure = Figure(figsize=(1.25 * columns, 1.6 * -(-len(worst) // columns)), layout="constrained")
    figure.suptitle(f"{len(worst)} of {len(forgotten)} forgotten images, the greatest loss of margin first", fontsize=8)
    panels: list[Axes] = list(figure.subplots(-(-len(worst) // columns), columns, squeeze=False).flat)
    for panel in panels:
        panel.set_axis_off()
    for panel, row in zip(panels, worst, strict=False):
        pixels = images.read(torch.tensor([row]))[0].permute(1, 2, 0).numpy()
        panel.imshow(pixels.squeeze(), cmap="gray")
        panel.set_title(f"{classes[after.labels[row]]}\ntaken for {classes[after.predictions[row]]}", fontsize=7)
    return figure


def _parts(trainer: Trainer, pl_module: LightningModule) -> tuple[OODModule, Path]:
    if not isinstance(pl_module, OODModule) or not pl_module.num_classes:
        raise ValueError(f"margins are those of classes, {type(pl_module).__name__} has none: leave out Forgetting")
    return pl_module, Path(trainer.default_root_dir) / "forgotten"
