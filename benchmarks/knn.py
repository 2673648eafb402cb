"""kNN scoring over the bare matrix product of queries and bank.

The limit is (Q, D)(D, N), into memory that is there already; the selection of the k-th neighbour comes on top.
"""

from functools import partial

import numpy as np
import torch
from sklearn.neighbors import NearestNeighbors
from torch.nn import functional as F

from benchmarks.features import evidence
from benchmarks.measure import COLUMNS, has_peer, interleave, mebibytes, peak_growth, print_table, timing_rows
from lightning_modules.scores.knn import CHUNK, KNN


def run(quick: bool) -> None:
    """Compare values, measure, print."""
    width, neighbour, number = (16, 5, 500) if quick else (512, 50, 50_000)
    generator = torch.Generator().manual_seed(0)
    train = torch.randn(number, width, generator=generator)
    ours = fitted(train, neighbour)
    bank = F.normalize(train)
    sklearn = NearestNeighbors(n_neighbors=neighbour, algorithm="brute").fit(bank.numpy())
    if has_peer():
        from pytorch_ood import detector

        peer = detector.KNN(None, k=neighbour).fit_features(train, torch.zeros(number, dtype=torch.int64))
    print(f"  bank of N={number} rows, D={width} features, k={neighbour}, float32")
    rows = []
    for size in (20,) if quick else (200, 1000):
        features = torch.randn(size, width, generator=generator)
        normalized = F.normalize(features)
        distances = ours(evidence(features, 1)).sqrt().numpy()
        # a brute-force neighbour found in float32 may be one whose distance differs in the sixth digit
        np.testing.assert_allclose(distances, sklearn.kneighbors(normalized.numpy())[0][:, -1], rtol=1e-5)
        contenders = {
            "limit": partial(torch.mm, normalized, bank.T, out=torch.empty(size, number)),
            "ours": partial(ours, evidence(features, 1)),
        }
        if has_peer():
            np.testing.assert_allclose(distances, peer.predict_features(features), rtol=1e-5)
            contenders["pytorch-ood"] = partial(peer.predict_features, features)
        contenders["scikit-learn"] = partial(sklearn.kneighbors, normalized.numpy())
        seconds = interleave(contenders, repetitions=2 if quick else 9)
        targets = {"pytorch-ood": None, "scikit-learn": None}
        rows += timing_rows(f"Q={size}", seconds, 1.2, targets, judge=not quick)
    print("  same values: ours (square root), scikit-learn" + (", pytorch-ood" if has_peer() else ""))
    print_table(COLUMNS, rows)
    memory = []
    batch = evidence(features, 1)
    for rows_kept in (number, 2 * number, 4 * number):
        score = fitted(torch.randn(rows_kept, width, generator=generator), neighbour)
        peak = peak_growth(partial(score, batch))
        memory.append((f"N={rows_kept}", mebibytes(score.bank.nbytes), mebibytes(peak)))
    print(f"  memory of scoring Q={size} at once: bounded by a chunk of Q x {CHUNK} distances, flat in N")
    print_table(("case", "bank (grows by definition)", "peak beyond the bank"), memory)


def fitted(train: torch.Tensor, neighbour: int) -> KNN:
    """Fit ours on (N, D) features."""
    score = KNN(neighbour)
    score.update(evidence(train, 1), torch.zeros(len(train), dtype=torch.int64))
    score.finalize()
    return score
