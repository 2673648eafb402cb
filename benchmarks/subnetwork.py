"""A training step of a subnetwork over one of its whole network, and the choice of its masks over a full sort.

A step is forward, cross-entropy and backward in train mode, without optimiser; the masks are chosen anew in each. The
limit is a step of the whole network, all of whose weights learn. What a mask adds to it depends on the weights alone:
in batches of 256, as in the settings, it counts for less than here.

The limit of a mask is a pass that compares all magnitudes with a threshold that is known. The peers find the same mask
by a sort of all of them and by ``topk``, which a GPU uses. Sizes are those of the largest layers of
DenseNet-BC-100-12, WRN-40-4, and ResNet-18.
"""

import math
from collections.abc import Callable, Sequence
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.densenet import DenseNet
from backbones.resnet import ResNet
from backbones.resnet_option_a import ResNetOptionA
from backbones.subnetwork import Subnetwork, kept, maskable, top_mask
from benchmarks.measure import COLUMNS, duration, interleave, print_table, timing_rows

KEEP, KEEPS = 0.8, (0.8, 0.965)  # of a subnetwork that learns; and of the estimate of its floor
TO_DENSE = 1.15
CLASSES = 10


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    print(f"  a step, keep {KEEP}, float32, without optimiser")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = [row for case in networks(quick) for row in step_rows(*case, quick)]
    print("  same values: losses and gradients of a subnetwork, and of the network that it is")
    print_table((*COLUMNS[:5], "masks alone"), rows)
    rows = [
        row
        for size in ((900,) if quick else (45_000, 589_824, 2_359_296))
        for keep in KEEPS
        for row in mask_rows(size, keep, quick)
    ]
    print("  same values: masks of ours and peers")
    print_table(COLUMNS[:4] + COLUMNS[5:8], [row[:4] + row[5:8] for row in rows])


def networks(quick: bool) -> list[tuple[str, Backbone, int]]:
    """Name networks, and the batch of each."""
    if quick:
        return [("DenseNet-10", DenseNet(CLASSES, 10, input_shape=(3, 8, 8), dropout=0.3, affine=False), 2)]
    densenet = DenseNet(CLASSES, dropout=0.3, affine=False)
    return [
        ("DenseNet-BC-100-12", densenet, 32),
        ("ResNet-20", ResNetOptionA(20, CLASSES), 64),
        ("ResNet-18", ResNet(18, CLASSES), 32),
    ]


def step_rows(name: str, network: Backbone, batch: int, quick: bool) -> list[tuple[str, ...]]:
    """Compare and measure the steps of a network: a row where scores alone learn, one where weights do, too."""
    images, labels = torch.randn(batch, *network.input_shape), torch.randint(CLASSES, (batch,))
    for keep in (1.0, KEEP):
        compare(network, Subnetwork(network, keep, 0), images, labels)
    frozen, trained = deepcopy(network).requires_grad_(False), network
    subnetwork = Subnetwork(network, KEEP, 0)
    scores = list(subnetwork.parameters())
    dense = deepcopy(network)
    seconds = interleave(
        {
            "limit": partial(step, dense, list(dense.parameters()), images, labels),
            "frozen": partial(step, partial(logits, subnetwork, frozen), scores, images, labels),
            "trained": partial(
                step, partial(logits, subnetwork, trained), [*scores, *trained.parameters()], images, labels
            ),
            "masks": lambda: [top_mask(each, KEEP) for each in scores],
        },
        repetitions=1 if quick else 7,
    )
    rows = []
    for learned, what in (("frozen", "scores learn"), ("trained", "weights, too")):
        sides = {"ours": seconds[learned], "limit": seconds["limit"]}
        ((*cells, _, _, _, _),) = timing_rows(f"{name}, B={batch}: {what}", sides, TO_DENSE, {"": None}, not quick)
        rows.append((*cells, duration(seconds["masks"])))
    return rows


def logits(subnetwork: Subnetwork, network: Backbone, images: Tensor) -> Tensor:
    """Return the (B, K) logits of a subnetwork."""
    return subnetwork(network, images)[0]


def step(
    network: Callable[[Tensor], Tensor], learned: Sequence[Tensor], images: Tensor, labels: Tensor
) -> tuple[Tensor, ...]:
    """Return the loss of a batch and its gradients."""
    loss = F.cross_entropy(network(images), labels)
    return loss.detach(), *torch.autograd.grad(loss, learned)


def compare(network: Backbone, subnetwork: Subnetwork, images: Tensor, labels: Tensor) -> None:
    """Raise an ``AssertionError`` where losses or gradients are not those of the network that the subnetwork is."""
    alone = subnetwork.extract(network)
    scores, weights = list(subnetwork.parameters()), [weight for _, weight in maskable(network)]
    with torch.random.fork_rng():  # the same dropout for both
        loss, *gradients = step(partial(logits, subnetwork, network), scores + weights, images, labels)
    expected_loss, *effective = step(alone, [weight for _, weight in maskable(alone)], images, labels)
    expected = [grad * weight * each.sign() for grad, weight, each in zip(effective, weights, scores, strict=True)]
    expected += [grad * top_mask(each, subnetwork.keep) for grad, each in zip(effective, scores, strict=True)]
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close(gradients, expected)


def mask_rows(size: int, keep: float, quick: bool) -> list[tuple[str, ...]]:
    """Compare and measure the masks of so many scores, no two of the same magnitude."""
    generator = torch.Generator().manual_seed(0)
    scores = 1.0 + torch.randperm(size, generator=generator)
    scores *= torch.randint(2, (size,), generator=generator) * 2 - 1
    threshold, magnitudes, mask = size - kept(size, keep), torch.empty(size), torch.empty(size)
    choices = {"ours": top_mask, "sort": by_sort, "topk": by_topk}
    contenders: dict[str, Callable[[], Tensor]] = {n: partial(choose, scores, keep) for n, choose in choices.items()}
    contenders["limit"] = lambda: torch.gt(torch.abs(scores, out=magnitudes), threshold, out=mask)
    mask_of_ours, *others = (call() for call in contenders.values())
    for other in others:
        torch.testing.assert_close(other, mask_of_ours, rtol=0, atol=0)
    seconds = interleave(contenders, repetitions=1 if quick else 9)
    peers = dict.fromkeys(name for name in choices if name != "ours")
    return timing_rows(f"a mask, N={size:,}, keep {keep}", seconds, math.inf, peers, judge=False)


def by_sort(scores: Tensor, keep: float) -> Tensor:
    """Order all magnitudes."""
    magnitudes = scores.abs()
    mask = torch.ones_like(magnitudes)
    mask[magnitudes.argsort()[: len(mask) - kept(len(mask), keep)]] = 0
    return mask


def by_topk(scores: Tensor, keep: float) -> Tensor:
    """Select the magnitudes that are dropped."""
    magnitudes = scores.abs()
    mask = torch.ones_like(magnitudes)
    mask[magnitudes.topk(len(mask) - kept(len(mask), keep), largest=False, sorted=False).indices] = 0
    return mask
