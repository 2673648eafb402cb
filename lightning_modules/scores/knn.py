"""Distance to the k-th nearest training feature."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.distributed import gather_rows
from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import Score, read_tap

CHUNK = 16384  # bank rows compared at a time: bounds the memory of a batch to B x CHUNK numbers


def kth_neighbour(queries: Tensor, bank: Tensor, k: int) -> Tensor:
    """Index (B,) of the bank's k-th nearest row to each query, (B, D) against (N, D)."""
    distances = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), CHUNK):
        rows = bank[start : start + CHUNK]
        norms = torch.linalg.vector_norm(rows, dim=1).square()
        near, index = torch.addmm(norms, queries, rows.T, alpha=-2).topk(min(k, len(rows)), largest=False)
        distances, indices = torch.cat([distances, near], 1), torch.cat([indices, start + index], 1)
        distances, order = distances.topk(min(k, distances.shape[1]), largest=False)
        indices = indices.gather(1, order)
    return indices[:, -1]


class KNN(Score):
    """Squared L2 distance from the L2-normalised features to the k-th nearest of the training data's, in [0, 4].

    Higher = more OOD. Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022. A zero
    vector stays zero.

    Args:
        k: which neighbour, 1 = the nearest; at most the number of training images.
        tap: the features.

    Attributes:
        bank: (N, D) normalised training features, the one fitted state here that grows with the data.
    """

    passes = 1
    bank: Tensor

    def __init__(self, k: int = 50, tap: str = "penultimate") -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k counts neighbours from 1, it cannot be {k}")
        self.k, self.tap, self.taps = k, tap, frozenset({tap})
        self._rows: list[Tensor] = []
        self.register_buffer("bank", torch.empty(0))

    def _embed(self, evidence: Evidence) -> Tensor:
        return F.normalize(read_tap(evidence, self.tap).to(self.bank.dtype), dim=1)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Keep a batch's features."""
        self._rows.append(self._embed(evidence).detach())

    def _finalize(self) -> None:
        if not self._rows:
            raise RuntimeError("KNN has seen no training data: call update before finalize")
        bank = gather_rows(torch.cat(self._rows)).to(self.bank)
        if self.k > len(bank):
            raise ValueError(f"KNN looks for neighbour k={self.k} among only {len(bank)} training images")
        self.bank, self._rows = bank, []

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        queries = self._embed(evidence)
        # Expanded squares find the neighbour but cancel close to it; its distance comes from the difference.
        return (queries - self.bank[kth_neighbour(queries, self.bank, self.k)]).square().sum(1)
