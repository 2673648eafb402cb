"""Distance to the k-th nearest training feature."""

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.distributed import gather_rows
from lightning_modules.evidence import Evidence
from lightning_modules.scores.row_sample import RowSample
from lightning_modules.scores.score import Score, read_tap

CHUNK = 16000  # bank rows compared at a time: bounds the memory of a batch to B x CHUNK numbers; 2^14 thrashes caches
FOLD = 16


def smallest(values: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and indices of the k smallest of each row of (B, N), in any order: (B, k) both.

    Folded into a table of FOLD rows, all of them lie in the k columns with the least minima. To find these takes one
    vectorised pass; a selection from all N takes several times as long.
    """
    width = values.shape[1]
    if width % FOLD or width // FOLD <= k:
        return values.topk(min(k, width), largest=False, sorted=False)
    table = values.unflatten(1, (FOLD, -1))
    columns = table.amin(1).topk(k, largest=False, sorted=False).indices
    candidates = table.gather(2, columns[:, None].expand(-1, FOLD, -1)).flatten(1)
    least, index = candidates.topk(k, largest=False, sorted=False)
    return least, index // k * (width // FOLD) + columns.gather(1, index % k)


def kth_neighbour(queries: Tensor, bank: Tensor, norms: Tensor, k: int) -> Tensor:
    """Index (B,) of the bank's k-th nearest row to each query; (B, D) against (N, D) of squared norms (N,)."""
    memory = queries.new_empty(len(queries) * min(CHUNK, len(bank)))
    distances = queries.new_empty(len(queries), 0)
    indices = torch.empty(len(queries), 0, dtype=torch.int64, device=queries.device)
    for start in range(0, len(bank), CHUNK):
        rows = bank[start : start + CHUNK]
        chunk = memory[: len(queries) * len(rows)].view(len(queries), len(rows))
        torch.addmm(norms[start : start + CHUNK], queries, rows.T, alpha=-2, out=chunk)
        near, index = smallest(chunk, k)
        distances, indices = torch.cat([distances, near], 1), torch.cat([indices, start + index], 1)
    order = distances.topk(k, largest=False).indices
    return indices.gather(1, order)[:, -1]


class KNN(Score):
    """Squared L2 distance from the L2-normalised features to the k-th nearest of the training data's, in [0, 4].

    Higher = more OOD. Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022. A zero
    vector stays zero.

    Args:
        k: which neighbour, 1 = the nearest; at most the number of training images.
        tap: the features.
        subsample: keep at most n = ``subsample`` of the N training images, drawn uniformly, and then take the neighbour
            round(k n / N), at least the nearest. None = keep all.

    Attributes:
        bank: (n, D) normalised training features, the one fitted state here that grows with the data: n is N, or
            ``subsample`` where that is less. In float32 it takes 4 n D bytes.
        norms: (n,) squared lengths of its rows: 1 but for rounding, or 0.
        neighbour: which neighbour in the bank.
    """

    passes = 1
    bank: Tensor
    norms: Tensor
    neighbour: Tensor

    def __init__(self, k: int = 50, tap: str = "penultimate", subsample: int | None = None) -> None:
        super().__init__()
        if k < 1:
            raise ValueError(f"k counts neighbours from 1, it cannot be {k}")
        if subsample is not None and subsample < 1:
            raise ValueError(f"a subsample has at least 1 training image, not {subsample}")
        self.k, self.tap, self.taps, self.subsample = k, tap, frozenset({tap}), subsample
        self._rows: list[Tensor] = []
        self._sample = RowSample(subsample)
        for name in ("bank", "norms"):
            self.register_buffer(name, torch.empty(0))
        self.register_buffer("neighbour", torch.tensor(k))

    def _embed(self, evidence: Evidence) -> Tensor:
        return F.normalize(read_tap(evidence, self.tap).to(self.bank.dtype), dim=1)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Keep a batch's features, or a sample of them."""
        rows = self._embed(evidence).detach()
        if self.subsample is None:
            self._rows.append(rows)
        else:
            self._sample.update(rows)

    def _finalize(self) -> None:
        if not self._rows and not self._sample.seen:
            raise RuntimeError("KNN has seen no training data: call update before finalize")
        bank = (gather_rows(torch.cat(self._rows)) if self.subsample is None else self._sample.reduce()).to(self.bank)
        images = len(bank) if self.subsample is None else self._sample.seen
        if self.k > images:
            raise ValueError(f"KNN looks for neighbour k={self.k} among only {images} training images")
        if not bank.isfinite().all():
            raise ValueError("the training features hold NaN or infinity")
        self.bank, self.norms = bank, bank.square().sum(1)
        self.neighbour.fill_(max(1, round(self.k * len(bank) / images)))
        self._rows, self._sample = [], RowSample(self.subsample)

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        queries = self._embed(evidence)
        # Expanded squares find the neighbour but cancel close to it; its distance comes from the difference.
        index = kth_neighbour(queries.detach(), self.bank, self.norms, int(self.neighbour))
        return (queries - self.bank[index]).square().sum(1)
