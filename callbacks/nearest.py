"""Exact search of nearest rows, in bounded memory."""

from collections.abc import Callable

import torch
from torch import Tensor

CHUNK = 2048  # rows that are compared with as many others at once
ROUNDING = 1e-12  # of a product in float64, relative to the squared lengths of its rows


def nearest_of_class(
    read: Callable[[Tensor], Tensor],
    classes: Tensor,
    known: int,
    chunk: int = CHUNK,
    device: torch.device | None = None,
) -> Tensor:
    """Find, for each row behind the first ``known``, the nearest of those that has its class.

    Nearest by Euclidean distance, of equal ones the first. Where no known row has the class, it is the nearest of all.

    Args:
        read: returns the features (n, D) of (n,) rows.
        classes: (N,), of all rows.
        known: how many rows may be found.
        chunk: so many rows are in memory at a time, twice.
        device: where to compute; of a kind that knows float64.

    Returns:
        (N - known,) int64.
    """
    found = torch.empty(len(classes) - known, dtype=torch.int64)
    for label in classes[known:].unique():
        queries = (classes[known:] == label).nonzero().flatten()
        candidates = (classes[:known] == label).nonzero().flatten()
        if not len(candidates):
            candidates = torch.arange(known)
        for some in queries.split(chunk):
            found[some] = candidates[_nearest(read, known + some, candidates, chunk, device)]
    return found


def _nearest(
    read: Callable[[Tensor], Tensor], queries: Tensor, candidates: Tensor, chunk: int, device: torch.device | None
) -> Tensor:
    """Return which of the candidates each query is nearest to, (Q,)."""
    centre = read(candidates[:chunk]).to(device, torch.float64).mean(0)  # short rows round less
    points = read(queries).to(device, torch.float64)
    shifted = points - centre
    lengths = shifted.square().sum(1)
    least, found = points.new_full((len(points),), torch.inf), torch.zeros_like(queries, device=device)
    for start in range(0, len(candidates), chunk):
        others = read(candidates[start : start + chunk]).to(device, torch.float64)
        moved = others - centre
        squares = moved.square().sum(1)
        distances = (lengths[:, None] + squares).addmm_(shifted, moved.T, alpha=-2)
        # Products narrow the choice, and differences decide: of what is equal, they are equal.
        margin = ROUNDING * (lengths + squares.amax())
        close = distances <= (torch.minimum(least, distances.amin(1)) + margin)[:, None]
        for rows, columns in zip(*(part.split(chunk) for part in close.nonzero(as_tuple=True)), strict=True):
            exact = (points[rows] - others[columns]).square().sum(1)
            best = torch.full_like(least, torch.inf).scatter_reduce_(0, rows, exact, "amin")
            first = torch.full_like(found, len(others)).scatter_reduce_(
                0, rows, columns.masked_fill(exact > best[rows], len(others)), "amin"
            )
            nearer = best < least
            least, found = torch.where(nearer, best, least), torch.where(nearer, start + first, found)
    return found.cpu()
