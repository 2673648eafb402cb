"""Images into the training step, over the bare copy of their bytes into normalised floats.

Colour images of 32x32 pixels in memory, shuffled, cropped with 4 pixels of padding, mirrored, as normalised floats.
Ours changes whole batches after their transfer to the device, without workers; torchvision changes image by image in a
``DataLoader``, which may have as many workers as ours has threads. The limit selects the rows and does one product and
one sum, into memory that is there already.
"""

import math
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pytorch_lightning.utilities import move_data_to_device
from scipy.stats import chisquare
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler, TensorDataset
from torchvision.transforms import v2

from benchmarks.job import BATCH, CLASSES, MEAN, STD, Patterns, labels_of
from benchmarks.measure import COLUMNS, Seconds, interleave, mebibytes, peak_growth, print_table, timing_rows
from datamodules.augmentation import Augmentation
from datamodules.batch import Batch

SIDE, PADDING = 32, 4
DRAWS = 16 * BATCH  # of an image that has 162 windows, mirrored or not
CPU = torch.device("cpu")
TARGETS = {"cpu": 2.0, "cuda": 5.0}  # times as long as ours that the fastest peer takes


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    images, batches = random_bytes(2 * BATCH if quick else 50_000), 2 if quick else 80
    print(f"  {len(images)} images in memory, a pass takes {batches} batches of {BATCH} at random")
    print(f"  same values: {compare()}")
    for device in [CPU, torch.device("cuda")] if torch.cuda.is_available() else [CPU]:
        passes = {"limit": bare(images, device, batches), "ours": ours(images, device, batches)}
        passes |= peers(images, device, batches)
        seconds = interleave({who: partial(drain, each) for who, each in passes.items()}, 1 if quick else 9)
        print_rates(seconds, batches * BATCH, "images")
        print_table(*table(f"on {device}", seconds, TARGETS[device.type], judge=not quick))
    best = by_speed(seconds)[0]
    rows = [(who, *memory(passes[who])) for who in ("limit", "ours")]
    rows.append((best, *memory(peers(images, device, batches)[best])))
    print(f"  memory of a pass beyond the images, {mebibytes(images.nbytes)}: by how much the resident memory of this")
    print("  process rises at most, and what its workers have for themselves in the end")
    print_table(("who", "this process", "workers"), rows)


def random_bytes(number: int) -> Tensor:
    """Draw uint8 images, (N, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (number, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)


class Pass:
    """Batches on the device: what a loader yields, or the first so many of it, moved there and changed."""

    def __init__(self, loader: Iterable[Any], move: Callable[[Any], Any], batches: int | None = None) -> None:
        self.loader, self.move, self.batches = loader, move, batches

    def __iter__(self) -> Iterator[Any]:
        return map(self.move, islice(self.loader, self.batches))


def drain(batches: Iterable[Any]) -> None:
    """Take all batches and wait for the device."""
    for _ in batches:
        pass
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def bare(images: Tensor, device: torch.device, batches: int) -> Pass:
    """Serve shuffled rows as normalised floats, in an order that is known before and always in the same memory."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    selected = torch.empty((BATCH, *images.shape[1:]), dtype=torch.uint8, pin_memory=device.type == "cuda")
    floats = torch.empty(selected.shape, device=device)
    shift = torch.tensor(-MEAN / STD, device=device)

    def move(rows: Tensor) -> Tensor:
        torch.index_select(images, 0, rows, out=selected)
        return torch.add(shift, floats.copy_(selected.to(device)), alpha=1 / (255 * STD), out=floats)

    return Pass(order.split(BATCH)[:batches], move)


def ours(images: Tensor, device: torch.device, batches: int | None = None, augment: bool = True) -> Pass:
    """Serve ``Batch`` as in training."""
    data = Patterns({"fit": images, "id": images[:CLASSES]})
    data.augmentation = Augmentation(crop_padding=PADDING, flip=True) if augment else Augmentation()
    data.setup()

    def move(batch: Batch) -> Batch:
        return data.on_after_batch_transfer(data.transfer_batch_to_device(batch, device, 0), 0)

    return Pass(data.train_dataloader(), move, batches)


def peers(images: Tensor, device: torch.device, batches: int) -> dict[str, Pass]:
    """Serve each of the ``samples``, with each number of workers."""
    move = partial(move_data_to_device, device=device)
    return {
        f"{kind}, workers={workers}": Pass(sample_loader(rows, BATCH, batches, workers), move)
        for kind, rows in samples(images).items()
        for workers in worker_counts()
    }


class Samples(Dataset[tuple[Tensor, int]]):
    """Transformed images and their labels, one by one."""

    def __init__(self, images: Tensor | np.ndarray, labels: list[int], transform: Callable[[Any], Tensor]) -> None:
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int) -> tuple[Tensor, int]:
        return self.transform(self.images[row]), self.labels[row]


def samples(images: Tensor, augment: bool = True) -> dict[str, Samples]:
    """Transform tensors, and PIL images made of the rows of an array as torchvision's ``CIFAR10`` makes them."""
    changes = [v2.RandomCrop(SIDE, padding=PADDING), v2.RandomHorizontalFlip()] if augment else []
    finish = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([MEAN], [STD])]
    labels, pictures = labels_of(images).tolist(), images.permute(0, 2, 3, 1).contiguous().numpy()
    return {
        "v2 on tensors": Samples(images, labels, v2.Compose([*changes, *finish])),
        "v2 on PIL": Samples(pictures, labels, v2.Compose([Image.fromarray, *changes, v2.PILToTensor(), *finish])),
    }


def sample_loader(rows: Samples | TensorDataset, batch_size: int, batches: int, workers: int) -> DataLoader[Any]:
    """Make torch's loader of so many batches of shuffled rows; its workers stay."""
    return DataLoader(
        rows,
        batch_size,
        sampler=RandomSampler(rows, num_samples=batches * batch_size),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def worker_counts() -> list[int]:
    """List 0, 1, 2, 4, ..., up to the number of threads."""
    return [0, *(2**i for i in range(torch.get_num_threads().bit_length()))]


def compare() -> str:
    """Hold the sides against each other, raise an ``AssertionError`` where they differ, say what was held.

    Unaugmented, all pixels agree. Augmented, copies of one image become the same windows of it, each equally often.
    """
    images = random_bytes(2 * BATCH)
    batches, limit = list(ours(images, CPU, augment=False)), bare(images, CPU, batches=2)
    floats = torch.cat([batch.images for batch in batches])[torch.cat([batch.ids for batch in batches]).argsort()]
    torch.testing.assert_close(torch.cat([batch.clone() for batch in limit]), floats[torch.cat(list(limit.loader))])
    for rows in samples(images, augment=False).values():
        torch.testing.assert_close(in_order(rows), floats)
    copies = images[:1].repeat(DRAWS, 1, 1, 1)
    drawn = {"ours": torch.cat([batch.images for batch in ours(copies, CPU)])}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn |= {kind: in_order(rows) for kind, rows in samples(copies).items()}
    found = {who: each.flatten(1).unique(dim=0, return_counts=True) for who, each in drawn.items()}
    p_values = {}
    for who, (windows, counts) in found.items():
        torch.testing.assert_close(windows, found["ours"][0])
        p_values[who] = chisquare(counts).pvalue
        if p_values[who] < 1e-4:
            raise AssertionError(f"{who}: windows are not equally frequent, p = {p_values[who]:.2g}")
    chances = ", ".join(f"{who} p = {p:.2f}" for who, p in p_values.items())
    return f"unaugmented pixels; the {len(windows)} windows of an image, equally often (chi-squared: {chances})"


def in_order(rows: Samples) -> Tensor:
    """Stack all images of a set."""
    return torch.stack([rows[row][0] for row in range(len(rows))])


def by_speed(seconds: Seconds) -> list[str]:
    """List the peers, the fastest first."""
    return sorted(seconds.keys() - {"limit", "ours"}, key=lambda who: statistics.median(seconds[who]))


def print_rates(seconds: Seconds, served: int, what: str) -> None:
    """Print how many of what each contender serves in a second, by the median."""
    rates = (f"{who} {served / statistics.median(seconds[who]):,.0f}" for who in ("limit", "ours", *by_speed(seconds)))
    print(f"  {what} per second: {'; '.join(rates)}")


def table(
    case: str, seconds: Seconds, target: float | None, judge: bool
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Turn seconds into columns and rows; the target is for the fastest peer, and there is none for ours / limit."""
    best, *others = by_speed(seconds)
    rows = timing_rows(case, seconds, math.inf, {best: target, **dict.fromkeys(others)}, judge)
    return COLUMNS[:4] + COLUMNS[5:], [row[:4] + row[5:] for row in rows]


def memory(batches: Iterable[Any]) -> tuple[str, str]:
    """Measure the peak growth of this process while it takes all batches, and what is private to new workers then."""
    others = set(multiprocessing.active_children())
    growth = peak_growth(partial(drain, batches))
    if growth is None:
        return mebibytes(None), mebibytes(None)
    workers = set(multiprocessing.active_children()) - others
    return mebibytes(growth), mebibytes(sum(map(private, workers))) if workers else "none"


def private(process: BaseProcess) -> int:
    """Return the bytes of resident memory that a process shares with no other."""
    lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Private_"))
