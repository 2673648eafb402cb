"""A step of the triplet and distancing loss, over the library's own indices of all triplets.

A step is the loss and its gradient, for balanced batches of classes x samples as in the settings for CIFAR-100 and
MNIST: while all triplets are active, when some are, and when none is any more. The stock formulation is what
pytorch-metric-learning offers: indices of all triplets of each batch, look-ups by three long lists, and a reducer that
copies what is active. The last of these is also measured with ours. The limit are the bare distances, there and back,
and one pass over as many numbers as there are triplets; that of memory are these numbers.
"""

import math
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from pytorch_metric_learning.distances import LpDistance
from pytorch_metric_learning.reducers import AvgNonZeroReducer
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_triplets_indices
from torch import Tensor

from benchmarks.measure import COLUMNS, interleave, mebibytes, peak_growth, print_table, timing_rows
from lightning_modules.losses.triplet_distancing import EuclideanDistance, TripletDistancingLoss

Loss = Callable[[Tensor, Tensor, float], Tensor]

MARGIN = 32.15
DISTANCES = (0.5, 1.0, 2.0)  # of two classes on average, in units of the margin


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    sizes = ((3, 4, 8, None),) if quick else ((20, 20, 64, 3), (10, 16, 32, None))
    ours, with_reducer = TripletDistancingLoss(), TripletDistancingLoss(reducer=AvgNonZeroReducer())
    losses: dict[str, Loss] = {
        "ours": lambda *batch: ours(*batch).loss,
        "stock": stock,
        "ours, stock reducer": lambda *batch: with_reducer(*batch).loss,
    }
    print(f"  margin {MARGIN}, float32")
    times, peaks = [], []
    for classes, samples, width, target in sizes:
        shape = (classes * samples, samples - 1, (classes - 1) * samples)
        for distance in DISTANCES[: 1 if quick else None]:
            embeddings, labels = draw(classes, samples, width, distance * MARGIN)
            compare(losses, embeddings, labels)
            share = float(ours(embeddings, labels, MARGIN).active)
            case = f"{classes} x {samples}, L={width}, {share:.0%} of {math.prod(shape):,} active"
            steps = {name: partial(step, loss, embeddings, labels) for name, loss in losses.items()}
            contenders = {**steps, "limit": bare(embeddings, shape)}
            seconds = interleave(contenders, repetitions=1 if quick else 9)
            peers = {"stock": target, "ours, stock reducer": None}
            times += timing_rows(case, seconds, math.inf, peers, judge=not quick)
            peaks.append((case, mebibytes(4 * math.prod(shape)), *(peak(call) for call in steps.values())))
    print("  same values: losses and gradients of ours, stock")
    print_table(COLUMNS[:4] + COLUMNS[5:], [row[:4] + row[5:] for row in times])
    print_table(("peak memory", "limit", *losses), peaks)


def draw(classes: int, samples: int, width: int, distance: float) -> tuple[Tensor, Tensor]:
    """Return embeddings (B, L), shuffled, of classes that are on average so far from each other, and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(classes, width, generator=generator) * distance / math.sqrt(2 * width)
    labels = torch.arange(classes).repeat(samples)[torch.randperm(classes * samples, generator=generator)]
    embeddings = centres[labels] + 0.1 * torch.randn(len(labels), width, generator=generator)
    return embeddings.requires_grad_(), labels


def stock(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """The loss as the library would have it."""
    anchors, positives, negatives = indices = get_all_triplets_indices(labels)
    distances = LpDistance(normalize_embeddings=False)(embeddings)
    near, far = distances[anchors, positives], distances[anchors, negatives]
    losses = (near - far + 0.1).relu() + (margin - far).relu()
    triplets = {"losses": losses, "indices": indices, "reduction_type": "triplet"}
    loss: Tensor = AvgNonZeroReducer()({"loss": triplets}, embeddings, labels)
    return loss


def step(loss: Loss, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return a loss and its gradient (B, L)."""
    value = loss(embeddings, labels, MARGIN)
    return value.detach(), torch.autograd.grad(value, embeddings)[0]


def compare(losses: dict[str, Loss], embeddings: Tensor, labels: Tensor) -> None:
    """Raise an ``AssertionError`` where losses or gradients differ by more than the stock distances err."""
    (value, gradient), *others = (step(loss, embeddings, labels) for loss in losses.values())
    for other, other_gradient in others:
        torch.testing.assert_close(other, value, rtol=1e-4, atol=0)
        torch.testing.assert_close(other_gradient, gradient, rtol=0, atol=1e-3 * float(gradient.abs().amax()))


def bare(embeddings: Tensor, shape: tuple[int, int, int]) -> Callable[[], None]:
    """Make a call that computes exact distances, goes back through them, and writes numbers of the shape once."""
    anchors, positives, negatives = shape
    near, far, hinges = torch.ones(anchors, positives, 1), torch.ones(anchors, 1, negatives), torch.empty(shape)
    distance = EuclideanDistance()

    def call() -> None:
        distances = distance(embeddings)
        torch.sub(near, far, out=hinges)
        torch.autograd.grad(distances.sum(), embeddings)

    return call


def peak(call: Callable[[], object]) -> str:
    """Write by how much memory rises, in the median of five calls."""
    growths = [peak_growth(call) for _ in range(5)]
    return mebibytes(None if None in growths else median(growths))
