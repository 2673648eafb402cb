"""Pictures of what a method would change about test images: images above their heatmaps, all on one scale."""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning import Trainer
from torch import Tensor

from callbacks.nearest import nearest_of_class
from datamodules.datamodule import OODDataModule
from datamodules.images import to_float
from lightning_modules.distributed import gather_rows
from lightning_modules.evidence import Evidence
from lightning_modules.ood_module import OODModule

QUANTILE = 0.99  # of the OOD pixels that are shown, where the scale of colours ends
INCH, LABELS = 0.9, 0.5  # side of a picture, and what labels at the left take beyond their margin
Pictures = NDArray[np.floating]


@dataclass(frozen=True)
class Heatmaps:
    """Which test images to draw with their heatmaps, and what else.

    Colours begin at 0 and end at a quantile of the OOD maps that are shown; they are the same in the whole picture.

    Attributes:
        images: how many of each set, spread over it.
        signed: add the map with its signs, as a change of colour on the same scale; grey = none.
        reconstruction: add the image with the map added to it.
        paired: add the ID training image that is nearest to the image, in the features of the same predicted class, as
            for outliers in training; this takes a pass over the ID training images.
    """

    images: int = 8
    signed: bool = False
    reconstruction: bool = False
    paired: bool = False

    def __post_init__(self) -> None:
        if self.images < 1:
            raise ValueError(f"heatmaps: at least 1 of the images of each set must be shown, got {self.images}")


class HeatmapSample:
    """Keeps maps of the chosen images as the batches of an evaluation pass by, and draws them.

    Args:
        options: which, and how.
        sizes: number of images of ``id`` and of each OOD set.
    """

    def __init__(self, options: Heatmaps, sizes: Mapping[str, int]) -> None:
        self.options = options
        self.chosen = {name: spread(size, options.images) for name, size in sizes.items()}
        self._rows: dict[str, list[tuple[Tensor, ...]]] = defaultdict(list)
        self.neighbours: dict[str, Tensor] = {}  # row of the paired ID training image of each

    def add(self, split: str, ids: Tensor, evidence: Evidence) -> None:
        """Take in the (B,) images of a batch of any split, whose evidence has maps."""
        if split in self.chosen and evidence.maps is not None:
            shown = torch.isin(ids, self.chosen[split].to(ids.device))
            classes = evidence.logits.argmax(1) if evidence.logits.shape[1] else torch.zeros_like(ids)
            parts = (ids, evidence.maps, evidence.features["penultimate"], classes)
            self._rows[split].append(tuple(part[shown].detach() for part in parts))

    def gather(self, trainer: Trainer, module: OODModule, data: OODDataModule) -> int:
        """Join the rows of all processes, in order of their ids, and pair them if asked.

        Returns:
            How many images were looked at to pair them.
        """
        self.maps: dict[str, Pictures] = {}
        features, classes = {}, {}
        for split in self._rows:
            columns = [gather_rows(torch.cat(column)) for column in zip(*self._rows[split], strict=True)]
            order = columns[0].argsort()
            _, maps, features[split], classes[split] = (column[order] for column in columns)
            self.maps[split] = maps.float().cpu().numpy()
        if not self.options.paired or not features:
            return 0
        points, labels = (torch.cat(list(part.values())) for part in (features, classes))
        found, images = neighbours(trainer, module, data, points, labels)
        parts = found.split([len(rows) for rows in features.values()])
        self.neighbours = dict(zip(features, parts, strict=True))
        return images

    def figure(self, data: OODDataModule) -> Figure:
        """Draw all sets, one below the other."""
        columns: dict[str, dict[str, Pictures]] = {}
        end = scale_end(self.maps)
        for split, maps in self.maps.items():
            images = pictures(data, split, self.chosen[split][: len(maps)])
            rows = {"image": images, "heatmap": np.abs(maps).max(1)}
            if self.options.signed:
                rows["signed"] = channels_last(maps) / (2 * end) + 0.5
            if self.options.reconstruction:
                rows["reconstruction"] = images + channels_last(maps) / 2  # black to white is 2 in a map, 1 here
            if self.options.paired:
                rows["paired"] = pictures(data, "fit", self.neighbours[split])
            columns[split] = rows
        return heatmap_figure(columns, end)


def spread(size: int, count: int) -> Tensor:
    """Choose rows of a set, spread evenly over it.

    >>> spread(10, 4)
    tensor([0, 2, 5, 7])
    """
    count = min(size, count)
    return torch.arange(count) * size // count


def scale_end(maps: Mapping[str, Pictures], quantile: float = QUANTILE) -> float:
    """Return where the colours of (n, C, H, W) maps of ``id`` and OOD sets end; 1 where all OOD maps are 0."""
    shown = [np.abs(values).max(1).ravel() for split, values in maps.items() if split != "id"]
    end = float(np.quantile(np.concatenate(shown), quantile)) if shown else 0.0
    return end or 1.0


def pictures(data: OODDataModule, split: str, rows: Tensor) -> Pictures:
    """Read images as they are before any normalisation, (n, H, W, C) in [0, 1]."""
    return channels_last(to_float(data.sets[split].read(rows)).numpy())


def channels_last(images: Pictures) -> Pictures:
    """Turn (n, C, H, W) into (n, H, W, C)."""
    return images.transpose(0, 2, 3, 1)


def neighbours(
    trainer: Trainer, module: OODModule, data: OODDataModule, features: Tensor, classes: Tensor
) -> tuple[Tensor, int]:
    """Look through the ID training images for those that outliers with some features would be paired with.

    The features of all training images are in memory, on every process.

    Returns:
        (n,) rows of ``fit``; and the number of images seen.
    """
    seen = []
    for batch in data.fit_dataloader():
        images, _, ids = trainer.strategy.batch_to_device(batch)
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            evidence = module(images)
        seen.append((ids, evidence.features["penultimate"], evidence.logits.argmax(1)))
    ids, known, predicted = (gather_rows(torch.cat(column)) for column in zip(*seen, strict=True))
    order = ids.argsort()
    points, labels = (torch.cat(parts).cpu() for parts in ((known[order], features), (predicted[order], classes)))
    return nearest_of_class(lambda rows: points[rows], labels, len(ids)), len(ids)


def heatmap_figure(sets: Mapping[str, Mapping[str, Pictures]], end: float) -> Figure:
    """Draw images (n, H, W, C) and heatmaps (n, H, W) of each set, a row of pictures for each of its parts.

    Args:
        sets: name -> part -> pictures; the part ``heatmap`` is drawn in colours from 0 to ``end``.
        end: see above; the caption says it.
    """
    rows = [(name, part, shown) for name, parts in sets.items() for part, shown in parts.items()]
    width = max(len(shown) for _, _, shown in rows)
    inches = max(INCH * width + 2.2, 5.5), INCH * len(rows) + 0.25 * len(sets) + 0.6
    figure, labels = Figure(figsize=inches), LABELS / inches[0]
    figure.set_layout_engine("constrained", rect=(labels, 0, 1 - labels, 1))
    grid = figure.subplots(len(rows), width, squeeze=False)
    for panels, (name, part, shown) in zip(grid, rows, strict=True):
        for panel in panels:
            panel.set_axis_off()
        for panel, picture in zip(panels, shown, strict=False):
            if part == "heatmap":
                drawn = panel.imshow(picture, vmin=0, vmax=end, cmap="inferno", interpolation="nearest")
            else:
                picture = np.repeat(picture, 3, 2) if picture.shape[2] == 1 else picture
                panel.imshow(picture.clip(0, 1), interpolation="nearest")
        if part == "image":
            panels[0].set_title("ID" if name == "id" else name, loc="left", fontsize=9, fontweight="bold")
        panels[0].text(-0.08, 0.5, part, transform=panels[0].transAxes, ha="right", va="center", fontsize=8)
    figure.colorbar(drawn, ax=grid, shrink=min(1.0, 4 / len(rows)), label="largest change of a channel", pad=0.02)
    figure.suptitle(f"one scale for all: 0 to {end:.3g}, {QUANTILE:.1%} of the OOD pixels shown lie below", fontsize=9)
    return figure
