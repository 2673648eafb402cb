"""Images that go through the network: eight scores on six OOD sets, and what gradient scores add.

The count depends on the sizes of the sets alone, so a small network does. One look at the training images fits each of
the eight; ViM, which needs statistics of its own first, would take another. Gradient scores run the network again:
ODIN twice on each image that is scored, for the gradient and after the step. LayeredMahalanobis takes one gradient and
a step for each tap; the held-out images that calibrate it, which are scored as well, take that three times over
together with their adversaries, whose own gradient is one more.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from benchmarks.job import CLASSES, SIZES, counted, patterns, run_ours, settle
from benchmarks.measure import has_peer, print_table
from lightning_modules.scores.layered_mahalanobis import LayeredMahalanobis
from lightning_modules.scores.odin import ODIN

TAPS, HELD_OUT = ("layer1", "penultimate"), 0.2  # of LayeredMahalanobis: layers, share of the training images

Jobs = list[tuple[str, str, Callable[[], Any]]]  # who, which scores, what is counted


def run(quick: bool) -> None:
    """Count and print; ours is an error where it is not the limit."""
    images = patterns({name: round(size / (500 if quick else 100)) for name, size in SIZES.items()})
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = settle(DigitsNet(CLASSES, (3, 32, 32)), images["fit"])
    once, held_out = sum(map(len, images.values())), round(HELD_OUT * len(images["fit"]))
    scored, step = once - len(images["fit"]), 1 + len(TAPS)
    limits = {
        "eight": once,
        "eight, ODIN": once + 2 * scored,
        "eight, LayeredMahalanobis": once + step * (scored + held_out) + (1 + 2 * step) * held_out,
    }
    rows, missed = [], []
    for who, scores, job in our_jobs(network, images) + (peer_jobs(network, images) if has_peer() else []):
        with counted(network) as seen:
            job()
        count, limit, verdict = sum(seen), limits[scores], ""
        if who == "ours":
            verdict = "= limit: met" if count == limit else "= limit: MISSED"
            missed += [f"{scores}: {count} instead of {limit}"] if count != limit else []
        rows.append((who, scores, f"{count}", f"{limit}", f"{count / limit:.3g}", verdict))
    print(f"  {', '.join(f'{name} {len(x)}' for name, x in images.items())}; limit: each image once")
    print_table(("who", "scores", "forwards", "limit", "/ limit", "target"), rows)
    if missed:
        raise RuntimeError(f"ours ran images through the network that need not: {'; '.join(missed)}")


def our_jobs(network: Backbone, images: dict[str, Tensor]) -> Jobs:
    """List what is counted of ours."""
    layers = {"layers": LayeredMahalanobis(TAPS, magnitudes=[0.01])}
    return [
        ("ours", "eight", partial(run_ours, network, images)),
        ("ours", "eight, ODIN", partial(run_ours, network, images, {"odin": ODIN()})),
        ("ours", "eight, LayeredMahalanobis", partial(run_ours, network, images, layers, val_split=HELD_OUT)),
    ]


def peer_jobs(network: Backbone, images: dict[str, Tensor]) -> Jobs:
    """List what is counted of pytorch-ood: with and without one encoder for all, which its cache recognises."""
    from pytorch_ood import detector

    from benchmarks.peer import PatternsBenchmark, detectors, run_peer

    def job(shared: bool, **more: Any) -> Callable[[], Any]:
        return lambda: run_peer(PatternsBenchmark(images), detectors(network, shared) | more)

    return [
        ("pytorch-ood, as documented", "eight", job(False)),
        ("pytorch-ood, one encoder shared by hand", "eight", job(True)),
        ("pytorch-ood, as documented", "eight, ODIN", job(False, odin=detector.ODIN(network))),
    ]
