"""Exact reductions over processes; without a process group each returns what it was given."""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes of the current group, 1 without one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process in its group, 0 without one."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_processes(tensor: Tensor) -> Tensor:
    """Add up a tensor of the same shape on every process."""
    if world_size() > 1:
        tensor = tensor.contiguous().clone()
        dist.all_reduce(tensor)
    return tensor


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate the (n_r, ...) rows of every process, in rank order; any n_r may be 0."""
    if world_size() == 1:
        return rows
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    most = max(int(count) for count in counts)
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: len(rows)] = rows
    shares = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(shares, padded)
    return torch.cat([share[: int(count)] for share, count in zip(shares, counts, strict=True)])


def mean_over_processes(tensor: Tensor) -> Tensor:
    """Average a tensor of the same shape over processes, as averaged gradients are."""
    return sum_over_processes(tensor) / world_size()


def first_process(tensor: Tensor) -> Tensor:
    """Return the first process's values, in place of those of a tensor of the same shape on every process."""
    if world_size() > 1:
        tensor = tensor.contiguous().clone()
        dist.broadcast(tensor, 0)
    return tensor
