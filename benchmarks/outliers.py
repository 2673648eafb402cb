"""Training steps with outliers over that of plain outlier exposure, and POEM's choice over its bare matrix products.

A step is all that happens between the starts of two batches of ``Trainer.fit``, of ResNet-20 on as many outliers as ID
images. After each come one step of plain outlier exposure, in a loop without Lightning, and the limit: as many bare
forwards and backwards of the batch as the form takes, which are counted while it trains.

POEM chooses once an epoch. The sizes are a fifth of those on CIFAR: 10,000 ID images, the outliers of four epochs and a
pool of 80,000, with the 342 features of its DenseNet; the passes through the network that yield these are not timed.
The limit of the regression are the products Z'Z and Z'y in float64, that of the choice is Zw. The stock formulation
repeats the ID images four times, inverts the precision and draws by an eigendecomposition; it chooses by ``topk``,
which does not say what is chosen of equals.
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from backbones.resnet_option_a import ResNetOptionA
from benchmarks.job import CLASSES, Patterns, normalize, patterns, quiet, settle
from benchmarks.measure import COLUMNS, duration, interleave, print_table, ratio, timing_rows
from benchmarks.training import Steps, trainer
from datamodules.images import ArrayImages
from datamodules.sets import Sets
from lightning_modules.doe import DOE
from lightning_modules.losses.outlier_exposure import EnergyMargins, UniformTarget
from lightning_modules.ood_module import OODModule
from lightning_modules.outlier_exposure import OutlierExposure
from lightning_modules.samplers.thompson import BoundaryRegression, ThompsonSampling, least

SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9, weight_decay=1e-4)
BATCH = 32  # ID images, and as many outliers
REMEMBERED = 4  # epochs, and how often an ID image counts


class Form(NamedTuple):
    make: Callable[[Backbone], OODModule]
    passes: int  # forwards of a batch, and backwards


FORMS = {
    "OE": Form(partial(OutlierExposure, optimizer=SGD), 1),
    "OE with a floor": Form(partial(OutlierExposure, optimizer=SGD, floor=0.5), 1),
    "energy-bounded, POEM": Form(partial(OutlierExposure, optimizer=SGD, outlier_loss=EnergyMargins()), 1),
    "DOE, warming up": Form(partial(DOE, optimizer=SGD, warmup=1), 1),
    "DOE": Form(partial(DOE, optimizer=SGD, warmup=0), 3),
}


class Paired(Patterns):
    """Training images, and as many others as outliers."""

    def __init__(self, images: dict[str, Tensor], outliers: Tensor) -> None:
        super().__init__(images, batch_size=BATCH, outlier_feed="paired")
        self.outliers = ArrayImages(outliers, torch.full((len(outliers),), -1), "outliers")

    def load(self) -> Sets:
        return replace(super().load(), outliers=self.outliers)


def run(quick: bool) -> None:
    """Measure, print."""
    steps(quick)
    choice(quick)


def steps(quick: bool) -> None:
    """Compare the forms' training steps."""
    batches, skipped = (2, 0) if quick else (14, 2)
    images = patterns({"fit": batches * BATCH, "id": BATCH, "outliers": batches * BATCH})
    outliers = images.pop("outliers")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Backbone = DigitsNet(CLASSES, (3, 32, 32)) if quick else ResNetOptionA(20, CLASSES)
        settle(network, images["fit"][: 2 * BATCH])
    batch = normalize(torch.cat([images["fit"][:BATCH], outliers[:BATCH]]))
    rows = []
    for name, form in FORMS.items():
        contenders = {"oe": loop_step(network, batch, 1, SGD), "limit": loop_step(network, batch, form.passes, None)}
        watch, module = Steps(contenders), form.make(copy.deepcopy(network))
        with quiet(), counted(module.backbone) as passes:
            trainer(watch, max_epochs=1, num_sanity_val_steps=0, limit_val_batches=0).fit(
                module, Paired(images, outliers)
            )
        expected = {"forwards": form.passes * batches, "backwards": form.passes * batches}
        if passes != expected:
            raise RuntimeError(f"{name} takes other passes than it says: {passes}, not {expected}")
        seconds = {contender: values[skipped:] for contender, values in watch.seconds.items()}
        over = (str(ratio(seconds["ours"], seconds[contender])) for contender in ("oe", "limit"))
        rows.append((name, f"{form.passes} + {form.passes}", duration(seconds["ours"]), *over))
    print(f"  steps of {BATCH} ID images and {BATCH} outliers, {type(network).__name__}")
    print_table(("form", "forwards + backwards", "a step", "over plain OE", "over the bare passes"), rows)


def loop_step(network: Backbone, batch: Tensor, passes: int, optimizer: Any) -> Callable[[], None]:
    """Make so many forwards and backwards of plain outlier exposure; with an optimiser, its step too."""
    network = copy.deepcopy(network).train()
    update = None if optimizer is None else optimizer(network.parameters())
    labels, uniform = torch.arange(BATCH) % CLASSES, UniformTarget()
    everything = torch.cat([labels, torch.full((BATCH,), -1)])

    def step() -> None:
        for _ in range(passes):
            network.zero_grad()
            logits = network(batch)
            (F.cross_entropy(logits[:BATCH], labels) + uniform(logits, everything)).backward()
        if update is not None:
            update.step()

    return step


@contextmanager
def counted(network: Backbone) -> Iterator[dict[str, int]]:
    """Count the passes through the first convolution, there and back."""
    passes = {"forwards": 0, "backwards": 0}

    def back(gradient: Tensor) -> None:
        passes["backwards"] += 1

    def there(module: nn.Module, inputs: Any, output: Tensor) -> None:
        passes["forwards"] += 1
        output.register_hook(back)

    first = next(module for module in network.modules() if isinstance(module, nn.Conv2d))
    hook = first.register_forward_hook(there)
    try:
        yield passes
    finally:
        hook.remove()


def choice(quick: bool) -> None:
    """Compare the regression and the choice of an epoch."""
    width, known, pool, size = (16, 60, 400, 20) if quick else (342, 10_000, 80_000, 500)
    generator = torch.Generator().manual_seed(0)
    inside, outside, everything = (
        torch.randn(number, width, generator=generator).relu() for number in (known, REMEMBERED * known, pool)
    )
    sampling = ThompsonSampling()
    y_in, y_out = (sampling.targets(torch.full((len(z),), out), 0) for z, out in ((inside, False), (outside, True)))

    def ours() -> tuple[Tensor, Tensor]:
        regression = BoundaryRegression(width)
        for features, targets, weight in ((inside, y_in, REMEMBERED), (outside, y_out, 1)):
            for z, y in zip(features.split(size), targets.split(size), strict=True):
                regression.update(z, y, weight)
        return regression.posterior(sampling.prior_variance, sampling.noise_variance)[0], sampling.draw(
            regression, width, 0, 1
        )

    def stock() -> tuple[Tensor, Tensor]:
        z = torch.cat([inside] * REMEMBERED + [outside]).double()
        y = torch.cat([y_in] * REMEMBERED + [y_out])
        precision = z.T @ z / sampling.noise_variance + torch.eye(width).double() / sampling.prior_variance
        inverse = torch.linalg.inv(precision)
        mean = inverse @ z.T @ y / sampling.noise_variance
        values, vectors = torch.linalg.eigh(sampling.covariance_scale * inverse)
        return mean, mean + vectors @ (values.abs().sqrt() * torch.randn(width).double())

    z, y = torch.cat([inside, outside]).double(), torch.cat([y_in, y_out])
    gram, moment = torch.empty(width, width).double(), torch.empty(width).double()

    def products() -> None:
        torch.mm(z.T, z, out=gram)
        torch.mv(z.T, y, out=moment)

    torch.testing.assert_close(ours()[0], stock()[0], rtol=1e-6, atol=1e-9)
    print("  same values: the posterior's mean of ours, stock")
    repetitions = 1 if quick else 9
    seconds = interleave({"ours": ours, "stock": stock, "limit": products}, repetitions)
    case = f"regression, {known:,} x {REMEMBERED} + {REMEMBERED * known:,} rows"
    table = timing_rows(case, seconds, float("inf"), {"stock": None}, judge=False)

    boundary, distances = sampling.draw(None, width, 0, 0), torch.empty(pool)
    chosen = {
        "ours": lambda: least((everything @ boundary).abs(), known),
        "stock": lambda: (everything @ boundary).abs().topk(known, largest=False).indices,
        "limit": lambda: torch.mv(everything, boundary, out=distances),
    }
    seconds = interleave(chosen, repetitions)
    table += timing_rows(f"choice, {known:,} of {pool:,}", seconds, float("inf"), {"stock": None}, judge=False)
    print_table(COLUMNS[:4] + COLUMNS[5:8], [row[:4] + row[5:8] for row in table])
    total = known + REMEMBERED * known + pool
    print(f"  beside them, {total:,} images pass the network once, in eval mode; an epoch trains on {2 * known:,}")
