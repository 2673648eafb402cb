"""Training step and evaluation of ResNet-18 over the bare passes of the same batches.

Ours is all that happens between the starts of two batches of ``Trainer.fit``: forward, backward, optimiser, logging,
and the next batch cropped, mirrored and normalised. Each step is followed by bare ones of the same size on copies of
the network, so that a change of the machine's load meets all. The limit is forward and backward; a loop that learns
needs the optimiser too.
"""

import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from backbones.resnet import ResNet
from benchmarks.images import print_rates
from benchmarks.job import CLASSES, MEAN, STD, Patterns, labels_of, normalize, patterns, quiet, settle
from benchmarks.measure import COLUMNS, Seconds, interleave, print_table, ratio, timing_rows
from datamodules.augmentation import Augmentation
from lightning_modules.classifier import Classifier

SGD = partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
BATCH = 32
SHARE, SLACK = 0.03, 1.5e-3  # ours may take so much longer than the bare step, in parts of it or in seconds


def run(quick: bool) -> None:
    """Measure, print."""
    batches, skipped = (4, 1) if quick else (18, 3)
    images = patterns({"fit": batches * BATCH, "id": 4 * BATCH})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Backbone = DigitsNet(CLASSES, (3, 32, 32)) if quick else ResNet(18, CLASSES)
        settle(network, images["fit"][: 4 * BATCH])
        batch, labels = normalize(images["fit"][:BATCH]), labels_of(images["fit"][:BATCH])
        steps = Steps(
            {"limit": bare_step(network, batch, labels, None), "loop": bare_step(network, batch, labels, SGD)}
        )
        module, data = Classifier(copy.deepcopy(network), SGD), Augmented(images)
        with quiet():
            trainer(steps, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0).fit(module, data)
    seconds = {name: values[skipped:] for name, values in steps.seconds.items()}
    report_steps(seconds, judge=not quick)

    def validate() -> None:
        with quiet():
            trainer().validate(module, data, verbose=False)

    bare = partial(forwards, module.backbone.eval(), images["id"])
    validations = interleave({"limit": bare, "ours": validate}, 1 if quick else 9)
    print_rates(validations, 4 * BATCH, "images evaluated")
    case = f"accuracy of {4 * BATCH} images"
    rows = timing_rows(case, validations, float("inf"), {"": None}, judge=False)
    print_table(COLUMNS[:4], [row[:4] for row in rows])


class Augmented(Patterns):
    """The training images with the usual crop and mirror image, none held out."""

    def __init__(self, images: dict[str, Tensor]) -> None:
        super().__init__(images, batch_size=BATCH, augmentation=Augmentation(crop_padding=4, flip=True))

    def val_dataloader(self) -> Any:
        return self._in_order("id")


class Steps(Callback):
    """Measures each step of the fit, and after it one of each contender."""

    def __init__(self, contenders: dict[str, Callable[[], None]]) -> None:
        self.contenders = contenders
        self.seconds: Seconds = {name: [] for name in ("ours", *contenders)}
        self._start: float | None = None

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._start is not None:
            self.seconds["ours"].append(time.perf_counter() - self._start)
            for name, step in self.contenders.items():
                start = time.perf_counter()
                step()
                self.seconds[name].append(time.perf_counter() - start)
        self._start = time.perf_counter()


def bare_step(network: Backbone, batch: Tensor, labels: Tensor, optimizer: Any) -> Callable[[], None]:
    """Make a function that runs forward and backward on a copy of the network and, if there is one, the optimiser."""
    network = copy.deepcopy(network).train()
    update = None if optimizer is None else optimizer(network.parameters())

    def step() -> None:
        network.zero_grad()
        F.cross_entropy(network(batch), labels).backward()
        if update is not None:
            update.step()

    return step


def trainer(*callbacks: Callback, **options: Any) -> Trainer:
    """Make a trainer that does nothing beside."""
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    silent |= {"enable_model_summary": False, "use_distributed_sampler": False}
    return Trainer(**silent, callbacks=list(callbacks), **options)


@torch.inference_mode()
def forwards(network: Backbone, images: Tensor) -> None:
    """Run the network over the images."""
    for batch in images.split(BATCH):
        network((batch.float() / 255 - MEAN) / STD)


def report_steps(seconds: Seconds, judge: bool) -> None:
    """Print the step, its ratio to the limit, and whether the difference is within what is allowed."""
    print_table(
        COLUMNS[:4], [row[:4] for row in timing_rows(f"step, batch {BATCH}", seconds, 1 + SHARE, {"": None}, judge)]
    )
    step, loop, bare = (statistics.median(seconds[name]) for name in ("ours", "loop", "limit"))
    over_limit = statistics.median(a - b for a, b in zip(seconds["ours"], seconds["limit"], strict=True))
    over_loop = statistics.median(a - b for a, b in zip(seconds["ours"], seconds["loop"], strict=True))
    allowed = max(SHARE * bare, SLACK)
    verdict = "not judged" if not judge else "met" if over_limit <= allowed else "MISSED"
    rates = (f"{who} {BATCH / each:,.0f}" for who, each in (("limit", bare), ("a loop", loop), ("ours", step)))
    print(f"  images trained on per second: {'; '.join(rates)}")
    print(
        f"  over forward and backward {1e3 * over_limit:.2g} ms (allowed {1e3 * allowed:.2g}: {verdict}), "
        f"over a loop with optimiser {1e3 * over_loop:.2g} ms ({ratio(seconds['ours'], seconds['loop'])})"
    )
