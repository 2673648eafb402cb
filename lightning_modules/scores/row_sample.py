"""A bounded sample of what streams by, the same on any number of processes."""

import torch
from torch import Tensor

from lightning_modules.distributed import gather_rows, rank, sum_over_processes, world_size


class RowSample:
    """Rows drawn uniformly, without replacement, from all that all processes see, and shuffled.

    Each row gets a random key by its place in the order of the whole data, and those with the least keys stay. So the
    sample depends neither on the batch size nor on the number W of processes, as long as each total batch is dealt out
    like cards, rows r::W to process r, and all call ``update`` equally often, if need be with an empty share.

    Args:
        limit: rows to keep; a process holds twice as many and a batch at most. None = all, merely shuffled.

    Attributes:
        seen: how many rows went by, over all processes.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit, self.seen = limit, 0
        self._generator = torch.Generator().manual_seed(0)
        self._keys: list[Tensor] = []
        self._rows: list[Tensor] = []

    def update(self, rows: Tensor) -> None:
        """Take in this process's share of a batch, (B, ...); B may be 0."""
        total = int(sum_over_processes(torch.tensor(len(rows), device=rows.device)))
        keys = torch.rand(total, dtype=torch.float64, generator=self._generator)[rank() :: world_size()]
        if len(keys) != len(rows):
            raise RuntimeError(
                f"process {rank()} of {world_size()} brings {len(rows)} of the {total} rows of a batch; "
                f"were they dealt out one by one, it would bring {len(keys)}"
            )
        self.seen += total
        self._keys.append(keys.to(rows.device))
        self._rows.append(rows)
        if self.limit is not None and sum(map(len, self._keys)) > 2 * self.limit:
            keys, order = torch.cat(self._keys).topk(self.limit, largest=False)
            self._keys, self._rows = [keys], [torch.cat(self._rows)[order]]

    def reduce(self) -> Tensor:
        """Return the (at most ``limit``, ...) rows, in order of their keys: the same on every process."""
        keys, rows = gather_rows(torch.cat(self._keys)), gather_rows(torch.cat(self._rows))
        return rows[keys.argsort()[: self.limit]]
