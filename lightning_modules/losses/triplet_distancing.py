"""The metric loss of the variational and metric latent space: triplets, and a distance that classes shall keep.

Dinari and Freifeld, "Variational- and Metric-based Deep Latent Space for Out-of-Distribution Detection", UAI 2022.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from pytorch_metric_learning.distances import BaseDistance, LpDistance
from pytorch_metric_learning.reducers import BaseReducer
from torch import Tensor, nn

from lightning_modules.scores.score import widen


class MetricLoss(NamedTuple):
    """A loss and what it is made of; all are scalars, and only ``loss`` has a gradient.

    Attributes:
        loss: the sum of the next two.
        triplet: what the triplet hinge contributes.
        distancing: what the distancing hinge contributes.
        active: share of the triplets whose loss is above 0; 0 where there is none.
    """

    loss: Tensor
    triplet: Tensor
    distancing: Tensor
    active: Tensor


class EuclideanDistance(LpDistance):
    """Euclidean distances of a batch, each from the difference of its two embeddings.

    The library goes by way of a matrix product, where the squares of long embeddings cancel: of norm 33, two of one
    class appear up to a thousandth too near or too far in float32, and each is 0.02 away from itself.

    Args:
        normalize_embeddings: measure between embeddings of unit length, at most 2 apart. So do the authors: it is the
            library's default. Beyond 2 the distancing margin then no longer matters.
    """

    def __init__(self, normalize_embeddings: bool = False) -> None:
        super().__init__(normalize_embeddings=normalize_embeddings)

    def compute_mat(self, query_emb: Tensor, ref_emb: Tensor) -> Tensor:
        """Return (B, B') distances of (B, L) and (B', L) embeddings."""
        return torch.cdist(query_emb, ref_emb, compute_mode="donot_use_mm_for_euclid_dist")


class NonZeroMean(BaseReducer):
    """The library's ``AvgNonZeroReducer`` for losses of at least 0, without its copy of those above 0."""

    def element_reduction(self, losses: Tensor, *_: object) -> Tensor:
        """Average the (T,) losses that are not 0; 0 with a live graph where all are."""
        return losses.sum() / losses.count_nonzero().clamp(min=1)


class TripletDistancingLoss(nn.Module):
    """max(0, d(a, p) - d(a, n) + triplet_margin) + max(0, margin - d(a, n)), averaged over the triplets above 0.

    A triplet is an anchor a, another embedding p of its class, and an embedding n of another class. Their distances are
    laid out as (A, P, 1) and (A, 1, N) and broadcast, so that no triplet is ever looked up.

    Args:
        distance: of ``pytorch_metric_learning.distances``; None = Euclidean, of embeddings as they are.
        reducer: of ``pytorch_metric_learning.reducers``, each triplet an element that belongs to its anchor;
            None = the mean of those above 0.
        triplet_margin: how much nearer than another class the own class shall be.
    """

    def __init__(
        self, distance: BaseDistance | None = None, reducer: BaseReducer | None = None, triplet_margin: float = 0.1
    ) -> None:
        super().__init__()
        self.distance = EuclideanDistance() if distance is None else distance
        self.reducer = NonZeroMean() if reducer is None else reducer
        self.triplet_margin = triplet_margin
        if self.distance.is_inverted:
            raise ValueError(f"margins are distances, but {type(self.distance).__name__} grows with similarity")

    def forward(self, embeddings: Tensor, labels: Tensor, margin: float) -> MetricLoss:
        """Compute the loss in float32 or wider.

        Args:
            embeddings: (B, L).
            labels: (B,).
            margin: how far apart embeddings of different classes shall be, see ``distancing_margin``.

        Returns:
            The loss and its parts; 0 with a live graph where the batch holds no triplet.

        Raises:
            ValueError: an embedding is not finite. Its triplets would count as inactive, its gradient as NaN.
        """
        if lost := int((~embeddings.isfinite()).any(1).sum()):
            raise ValueError(f"{lost} of {len(embeddings)} embeddings are not finite: the training has diverged")
        embeddings = widen(embeddings)
        losses, anchors, sums = [], [], embeddings.new_zeros(2)
        for rows, positives, negatives in gather(self.distance(embeddings), labels):
            triplet = (positives[:, :, None] + (self.triplet_margin - negatives)[:, None]).relu_()
            distancing = (margin - negatives).relu()
            both = (triplet + distancing[:, None]).flatten(1)
            losses.append(both.flatten())
            anchors.append(rows[:, None].expand_as(both).flatten())
            sums += torch.stack([triplet.detach().sum(), positives.shape[1] * distancing.detach().sum()])
        if not losses:
            return MetricLoss(embeddings.sum() * 0, *embeddings.new_zeros(3))
        elements = _join(losses)
        table = {"losses": elements, "indices": _join(anchors), "reduction_type": "element"}
        loss = self.reducer({"loss": table}, embeddings, labels)
        triplet, distancing = loss.detach() * sums / sums.sum().clamp(min=torch.finfo(sums.dtype).tiny)
        return MetricLoss(loss, triplet, distancing, elements.count_nonzero() / len(elements))


def gather(distances: Tensor, labels: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield for each frequency of classes, one alone where the batch is balanced, the distances that triplets need.

    Args:
        distances: (B, B).
        labels: (B,).

    Returns:
        Of each frequency the rows (A,) of the anchors whose classes have it, their distances (A, P) from the others of
        their class, and those (A, N) from the other classes. Frequencies without a triplet are left out.
    """
    same = labels[:, None] == labels
    sizes = same.sum(1)
    others = same.clone().fill_diagonal_(False)
    for size in sizes.unique().tolist():
        if 1 < size < len(labels):
            chosen = sizes == size
            positives = distances[chosen[:, None] & others].view(-1, size - 1)
            negatives = distances[chosen[:, None] & ~same].view(-1, len(labels) - size)
            yield chosen.nonzero()[:, 0].int(), positives, negatives


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)  # cat would copy a single part, too


def distancing_margin(epoch: int, first_epoch: int, final: float, jump: float = 1.0, start: float = 0.15) -> float:
    """Return how far apart classes shall be in an epoch: it grows in steps, until it is above ``final``.

    Args:
        epoch: counted from 0.
        first_epoch: at its beginning the first step is made, and another one in each epoch after.
        final: in an epoch that begins with more than this, no further step is made.
        jump: length of a step.
        start: where it begins.

    Raises:
        ValueError: a jump that is not positive.

    >>> [distancing_margin(epoch, first_epoch=10, final=32) for epoch in (9, 10, 40, 41, 500)]
    [0.15, 1.15, 31.15, 32.15, 32.15]
    """
    if jump <= 0:
        raise ValueError(f"the margin grows by jumps that must be positive, got {jump}")
    steps = math.floor((final - start) / jump + 1e-9) + 1  # 0.3 / 0.1 is a little less than 3
    return start + jump * min(max(0, epoch - first_epoch + 1), max(0, steps))
