"""Fitting and scoring one Gaussian per class over the bare matrix products, and torch's MultivariateNormal per class.

The limit of the fit is (D, n)(n, D) for each class alone, in float64, that of scoring (B, D)(D, D) for each class
alone, into memory that is there already; factors and inverses, or differences and squares, come on top. As in
CIFAR-100, a class has n = 500 rows, fewer than features, and a jitter makes up for it: the limit then takes 1000 D^2
operations a class, two factors and an inverse 1667 D^2. Ours is fitted in a stream of batches, torch's Gaussians on all
rows of a class at once, with its covariance in float64; they solve with the factor anew at each call.
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from benchmarks.features import Gaussians, evidence, fit, gaussians, queries
from benchmarks.measure import COLUMNS, interleave, mebibytes, peak_growth, print_table, timing_rows
from lightning_modules.scores.class_density import ClassDensity

JITTER = 0.1
PEER = "MultivariateNormal"


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    logging.getLogger(ClassDensity.__module__).setLevel(logging.ERROR)  # samples are few at each fit, as intended
    classes, width, per_class = (5, 16, 10) if quick else (100, 1000, 500)
    drawn = gaussians(classes, width, per_class)
    fits = contenders_of_fit(drawn)
    ours, double = fits["ours"](), fits[PEER]()
    single = [MultivariateNormal(peer.loc.float(), scale_tril=peer.scale_tril.float()) for peer in double]
    print(f"  K={classes} classes, D={width} features, float32, fitted on {classes * per_class} rows")
    rows = []
    for size in (20,) if quick else (50, 200):
        features = queries(drawn, size)
        found, expected = ours.log_likelihoods(evidence(features, classes)), log_prob(double, features.double())
        torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=0)
        torch.testing.assert_close(log_prob(single, features), expected.float(), rtol=1e-4, atol=0)
        contenders = {
            "limit": partial(products, features, ours.whitening, torch.empty_like(features)),
            "ours": partial(ours.log_likelihoods, evidence(features, classes)),
            PEER: partial(log_prob, single, features),
        }
        seconds = interleave(contenders, repetitions=2 if quick else 3)
        rows += timing_rows(f"score, B={size}", seconds, 1.3, {PEER: None}, judge=not quick)
    seconds = interleave(fits, repetitions=2)
    rows += timing_rows(f"fit, N={classes * per_class}", seconds, 6, {PEER: None}, judge=not quick)
    print(f"  same values: ours, {PEER} in float32, {PEER} in float64")
    print_table(COLUMNS, rows)
    scatters = mebibytes(classes * width**2 * 8)
    peaks = (mebibytes(peak_growth(fits["ours"])), mebibytes(peak_growth(fits[PEER])))
    print(f"  memory of the fit, beside K D^2 float64 numbers of {scatters}")
    print_table(("ours, peak", "ours, kept", f"{PEER}, peak"), [(peaks[0], mebibytes(ours.whitening.nbytes), peaks[1])])


def contenders_of_fit(drawn: Gaussians) -> dict[str, Callable[[], Any]]:
    """Make calls that fit each side and return what was fitted; of the limit, nothing."""
    batches = list(drawn.batches())
    features, labels = map(torch.cat, zip(*batches, strict=True))
    classes, width = drawn.means.shape
    by_class = [features[labels == c] for c in range(classes)]
    double, product = by_class[0].double(), torch.empty(width, width, dtype=torch.float64)

    def limit() -> None:
        for _ in range(classes):
            torch.mm(double.T, double, out=product)

    def peer() -> list[MultivariateNormal]:
        jitter = JITTER * torch.eye(width, dtype=torch.float64)
        return [
            MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0) + jitter) for x in map(Tensor.double, by_class)
        ]

    return {
        "limit": limit,
        "ours": lambda: fit(ClassDensity(["penultimate"], jitter=JITTER), batches, classes),
        PEER: peer,
    }


def products(features: Tensor, whitening: Tensor, out: Tensor) -> None:
    """Multiply (B, D) features with each of (K, D, D) matrices."""
    for rows in whitening:
        torch.mm(features, rows.T, out=out)


def log_prob(peers: list[MultivariateNormal], features: Tensor) -> Tensor:
    """Log-likelihoods (B, K) of torch's Gaussians, one for each class."""
    return torch.stack([peer.log_prob(features) for peer in peers], 1)
