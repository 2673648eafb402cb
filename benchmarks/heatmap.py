"""A heatmap decoder's training step over its bare passes; pairing of outliers over the bare matrix products.

A step is all that happens between the starts of two batches of ``Trainer.fit``: evidence from the feature cache, images
and targets, forward, loss, backward, optimiser, logging. The encoder does not run. After each come the limit, forward,
loss and backward of the decoder on one batch that is there, and the same with the optimiser.

Pairing finds for each of 10,000 outliers the nearest of 50,000 ID rows of 512 features among those of its class, one of
ten. The limit is a matrix product for each class in float64; scikit-learn's search stands beside it.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch
from sklearn.metrics import pairwise_distances_argmin
from torch import Tensor

from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from backbones.heatmap_decoder import HeatmapDecoder
from backbones.resnet_option_a import ResNetOptionA
from benchmarks.job import CLASSES, Patterns, patterns, quiet, settle
from benchmarks.measure import COLUMNS, duration, interleave, mebibytes, peak_growth, print_table, ratio, timing_rows
from benchmarks.training import Steps, trainer
from callbacks.frozen_features import FrozenFeatures
from callbacks.nearest import CHUNK, nearest_of_class
from callbacks.pairing import Pairing
from datamodules.images import ArrayImages
from datamodules.sets import Sets
from lightning_modules.heatmap import Heatmap
from lightning_modules.losses.target_image import target_image_loss

ADAM = partial(torch.optim.Adam, lr=2e-4, betas=(0.5, 0.999))
BATCH = 200
WIDTHS = (256, 128, 64, 32)


class Mixed(Patterns):
    """Training images, and a fifth as many others as outliers among them."""

    def __init__(self, images: dict[str, Tensor], outliers: Tensor, batch_size: int) -> None:
        super().__init__(images, batch_size=batch_size, outlier_feed="mixed")
        self.outliers = ArrayImages(outliers, torch.full((len(outliers),), -1), "outliers")

    def load(self) -> Sets:
        return replace(super().load(), outliers=self.outliers)


def run(quick: bool) -> None:
    """Measure, print."""
    step(quick)
    pairing(quick)


def step(quick: bool) -> None:
    """Compare a training step with its bare passes."""
    size, batches, skipped = (12, 2, 0) if quick else (BATCH, 18, 3)
    images = patterns({"fit": batches * size * 5 // 6, "id": size, "outliers": batches * size // 6})
    outliers = images.pop("outliers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Backbone = DigitsNet(CLASSES, (3, 32, 32)) if quick else ResNetOptionA(20, CLASSES)
        settle(network, images["fit"][: 2 * size])
        decoder = HeatmapDecoder(network.num_features, CLASSES, 128, WIDTHS)
    contenders = {"limit": bare_step(decoder, size, None), "loop": bare_step(decoder, size, ADAM)}
    watch, module = Steps(contenders), Heatmap(network, copy.deepcopy(decoder), ADAM)
    with TemporaryDirectory() as folder, quiet():
        callbacks = [FrozenFeatures(folder=folder), Pairing(), watch]
        trainer(*callbacks, max_epochs=1, limit_val_batches=0).fit(module, Mixed(images, outliers, size))
    seconds = {contender: values[skipped:] for contender, values in watch.seconds.items()}
    over = (str(ratio(seconds["ours"], seconds[contender])) for contender in ("limit", "loop"))
    row = (f"step, batch {size}, decoder {'-'.join(map(str, WIDTHS))}", duration(seconds["ours"]), *over)
    print_table(("case", "ours", "over forward and backward", "over these and the optimiser"), [row])


def bare_step(decoder: HeatmapDecoder, size: int, optimizer: Any) -> Callable[[], None]:
    """Make a function that runs forward, loss and backward on a copy of the decoder, and the optimiser if given."""
    decoder = copy.deepcopy(decoder).train()
    update = None if optimizer is None else optimizer(decoder.parameters())
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(size, decoder.num_features, generator=generator)
    images, targets = (2 * torch.rand(size, *decoder.shape, generator=generator) - 1 for _ in range(2))
    classes = torch.arange(size) % CLASSES

    def bare() -> None:
        decoder.zero_grad()
        target_image_loss(images + decoder(features, classes), targets).backward()
        if update is not None:
            update.step()

    return bare


def pairing(quick: bool) -> None:
    """Compare the search with the products that it needs, and see what memory it takes."""
    known, outliers, width = (300, 60, 16) if quick else (50_000, 10_000, 512)
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(known + outliers, width, generator=generator).relu()
    classes = torch.randint(0, CLASSES, (len(rows),), generator=generator)
    members = [(classes == label).nonzero().flatten() for label in range(CLASSES)]
    parts = [(rows[m[m >= known]], rows[m[m < known]]) for m in members]
    blocks = [(queries.double(), candidates.double()) for queries, candidates in parts]

    def ours() -> Tensor:
        return nearest_of_class(lambda chosen: rows[chosen], classes, known)

    def stock() -> Tensor:
        found = torch.empty(outliers, dtype=torch.int64)
        for m, (queries, candidates) in zip(members, parts, strict=True):
            nearest = pairwise_distances_argmin(queries.numpy(), candidates.numpy())
            found[m[m >= known] - known] = m[m < known][torch.from_numpy(nearest)]
        return found

    def limit() -> None:
        for queries, candidates in blocks:
            queries @ candidates.T

    assert torch.equal(ours(), stock())
    print("  same pairs: ours, scikit-learn")
    seconds = interleave({"ours": ours, "scikit-learn": stock, "limit": limit}, 1 if quick else 5)
    case = f"{outliers:,} outliers, {known:,} ID rows of {width}, {CLASSES} classes"
    table = timing_rows(case, seconds, float("inf"), {"scikit-learn": None}, judge=False)
    print_table(COLUMNS[:4] + COLUMNS[5:8], [row[:4] + row[5:8] for row in table])
    for chunk in (CHUNK // 4, CHUNK):
        growth = peak_growth(partial(nearest_of_class, lambda chosen: rows[chosen], classes, known, chunk))
        print(f"  memory with chunks of {chunk:,}: {mebibytes(growth)}, beside {mebibytes(rows.nbytes)} of features")
