"""Random crops and flips of whole uint8 batches.

What happens to an image is a pure function of (seed, epoch, id): the same on CPU and GPU, on any number of processes,
and after a resume. No random generator is involved.
"""

import torch
from torch import Tensor
from torch.nn import functional


def random_crop(images: Tensor, padding: int, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Pad (B, C, H, W) images with zeros and cut each at a place of its own, to the size it had.

    As torchvision's ``RandomCrop``: both offsets are uniform over 0..2 * padding.
    """
    top = random_integers(2 * padding + 1, ids, seed, epoch, stream=0)
    left = random_integers(2 * padding + 1, ids, seed, epoch, stream=1)
    padded = functional.pad(images, [padding] * 4)
    windows = padded.unfold(2, images.shape[2], 1).unfold(3, images.shape[3], 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def random_flip(images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Mirror each of (B, C, H, W) images left to right, or not, with equal probability."""
    mirrored = random_integers(2, ids, seed, epoch, stream=2).bool()
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def random_integers(bound: int, ids: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """Draw an integer in 0..bound-1 for each of the (B,) ids; ``stream`` tells independent draws apart."""
    key = torch.zeros((), dtype=torch.int64)
    for part in (seed, epoch, stream):
        key = splitmix64(key + part)
    return _shift(splitmix64(ids + key.item()), 33) % bound  # 31 bits: the bias of the remainder is below 1e-7


def splitmix64(values: Tensor) -> Tensor:
    """Hash int64 values, read as 64-bit patterns (Steele, Lea and Flood, OOPSLA 2014).

    >>> f"{splitmix64(torch.tensor(0)).item() % 2**64:X}"
    'E220A8397B1DCDAF'
    """
    values = values - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15, which int64 cannot write
    values = (values ^ _shift(values, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    values = (values ^ _shift(values, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return values ^ _shift(values, 31)


def _shift(values: Tensor, bits: int) -> Tensor:
    """Shift right, filling with zeros: int64 alone would repeat the sign."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)
