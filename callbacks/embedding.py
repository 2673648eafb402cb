"""Pictures of a feature space: images as points, by principal components and by t-SNE."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning.utilities import rank_zero_warn
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from torch import Tensor

from datamodules.splits import draw
from lightning_modules.distributed import gather_rows
from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import read_tap

TAB20 = colormaps["tab20"](range(20))
PALETTE = np.delete(np.concatenate([TAB20[::2], TAB20[1::2]]), [7, 17], axis=0)  # strong, then pale; grey is for OOD
MARKERS = "x+1|2_34"  # of OOD sets, in turn


@dataclass(frozen=True)
class Embedding:
    """Which features to draw, of how many test images, and how.

    Half of the images are ID, the other half is shared equally by the OOD sets; a set that is smaller has fewer. The ID
    training images are not shown: an evaluation need not see them.

    Attributes:
        tap: the features, by name.
        points: images in a picture, at most.
        perplexity: of t-SNE (van der Maaten and Hinton, 2008), about how many neighbours an image has.
        seed: decides which images, and whatever else is left to chance.
    """

    tap: str
    points: int = 5000
    perplexity: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.perplexity < self.points:
            raise ValueError(
                "an embedding takes a perplexity of at least 1 and more points than that; "
                f"these are {self.perplexity} and {self.points}"
            )

    def choose(self, sizes: Mapping[str, int]) -> dict[str, Tensor]:
        """Draw the ids of the images to show, from the number of images of ``id`` and of each OOD set.

        Raises:
            ValueError: they are no more than the perplexity.

        >>> Embedding("latent", points=6, perplexity=2.0).choose({"id": 2, "svhn": 9})
        {'id': tensor([0, 1]), 'svhn': tensor([4, 5, 7])}
        """
        share = {name: self.points // 2 if name == "id" else self.points // (2 * (len(sizes) - 1)) for name in sizes}
        chosen = {name: draw(size, min(size, share[name]), self.seed) for name, size in sizes.items()}
        if (total := sum(map(len, chosen.values()))) <= self.perplexity:
            raise ValueError(
                f"t-SNE with a perplexity of {self.perplexity:g} takes more than {self.perplexity:g} images, and the "
                f"embedding shows {total}: choose a smaller perplexity, or give the test more images"
            )
        return chosen


class FeatureSample:
    """Keeps the features of the chosen images as the batches of an evaluation pass by, and draws them.

    Args:
        embedding: which features, of how many images.
        sizes: number of images of ``id`` and of each OOD set.
    """

    def __init__(self, embedding: Embedding, sizes: Mapping[str, int]) -> None:
        self.embedding = embedding
        self.chosen = embedding.choose(sizes)
        self._rows: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = defaultdict(list)

    def add(self, split: str, ids: Tensor, labels: Tensor, evidence: Evidence) -> None:
        """Take in the (B,) images of a batch of any split.

        Raises:
            ValueError: the evidence lacks the tap, or has a single feature there.
        """
        features = read_tap(evidence, self.embedding.tap)
        if features.shape[1] < 2:
            raise ValueError(f"tap {self.embedding.tap} has a single feature, which makes no picture of two dimensions")
        if split in self.chosen:
            shown = torch.isin(ids, self.chosen[split].to(ids.device))
            self._rows[split].append((ids[shown], labels[shown], features[shown].detach()))

    def gather(self) -> None:
        """Join the rows of all processes, in order of their ids."""
        self.features, self.labels = {}, {}
        for split in self.chosen:
            ids, labels, features = (
                gather_rows(torch.cat(column)).cpu().numpy() for column in zip(*self._rows[split], strict=True)
            )
            order = np.argsort(ids)
            self.features[split], self.labels[split] = features[order].astype(np.float64), labels[order]

    def figures(self, classes: Sequence[str]) -> dict[str, Figure]:
        """Draw ``embedding_pca`` and ``embedding_tsne``; nothing, with a warning, where features are unfit.

        Args:
            classes: names of the ID classes.
        """
        tap, perplexity, seed = self.embedding.tap, self.embedding.perplexity, self.embedding.seed
        splits = np.repeat(list(self.features), [len(rows) for rows in self.features.values()])
        features, labels = (np.concatenate(list(part.values())) for part in (self.features, self.labels))
        finite = np.isfinite(features).all(1)
        if not finite.all():
            rank_zero_warn(
                f"the pictures of tap {tap} leave {(~finite).sum()} images out, whose features are not finite"
            )
            features, labels, splits = features[finite], labels[finite], splits[finite]
        if len(features) <= perplexity or not np.ptp(features, axis=0).any():
            rank_zero_warn(f"there is no picture of tap {tap}: its features are all the same, or few are finite")
            return {}
        pca = PCA(min(50, *features.shape), random_state=seed)
        components = pca.fit_transform(features)
        tsne = TSNE(perplexity=perplexity, random_state=seed).fit_transform(components)
        by_pca = embedding_figure(components[:, :2], labels, splits, classes)
        shares = [f"{share:.0%} of the variance" for share in pca.explained_variance_ratio_[:2]]
        by_pca.axes[0].set(title=f"principal components of {tap}", xlabel=shares[0], ylabel=shares[1])
        by_tsne = embedding_figure(tsne, labels, splits, classes)
        by_tsne.axes[0].set(title=f"t-SNE of {tap}, perplexity {perplexity:g}")
        return {"embedding_pca": by_pca, "embedding_tsne": by_tsne}


def embedding_figure(
    points: NDArray[np.floating], labels: NDArray[np.int64], splits: NDArray[np.str_], classes: Sequence[str]
) -> Figure:
    """Draw (N, 2) points: those of ``id`` coloured by class, those of OOD sets in grey, a marker for each set.

    Up to 18 classes are named in the legend; more are a scale of colours, in their order.
    """
    figure = Figure(figsize=(8, 6), layout="constrained")
    panel, known = figure.subplots(), splits == "id"
    if len(classes) > len(PALETTE):
        dots = panel.scatter(
            points[known, 0], points[known, 1], s=9, c=labels[known], cmap="turbo", linewidth=0, zorder=2
        )
        figure.colorbar(dots, label="class", pad=0.01)
    else:
        for label, (name, colour) in enumerate(zip(classes, PALETTE, strict=False)):
            rows = points[known & (labels == label)]
            panel.scatter(rows[:, 0], rows[:, 1], s=9, color=colour, linewidth=0, label=name, zorder=2)
    ood_sets = [name for name in dict.fromkeys(splits.tolist()) if name != "id"]
    greys = np.linspace(0.1, 0.6, len(ood_sets)).astype(str)
    for name, marker, grey in zip(ood_sets, cycle(MARKERS), greys, strict=False):
        rows = points[splits == name]
        panel.scatter(
            rows[:, 0], rows[:, 1], s=14, marker=marker, color=grey, alpha=0.7, linewidth=0.7, label=name, zorder=1
        )
    panel.set(xticks=[], yticks=[])
    panel.set_aspect("equal", adjustable="datalim")  # distances are what it shows
    figure.legend(loc="outside right upper", fontsize=8, markerscale=1.5, frameon=False)
    return figure
