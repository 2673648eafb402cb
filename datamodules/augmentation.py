"""Random changes of whole batches of training images.

What happens to an image is a pure function of (seed, epoch, id): the same on CPU and GPU, on any number of processes,
and after a resume. No random generator is involved, and pixels are found by integer arithmetic: the last bit of a
cosine decides nothing.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

MAX_ASPECT_RATIO = 4 / 3  # of the window of a resized crop: width to height, or height to width
ATTEMPTS = 10  # to draw a window that fits into the image


@dataclass(frozen=True)
class Augmentation:
    """What is done to training images, in this order.

    Attributes:
        rotation: images are turned by up to so many degrees either way; 0: not at all.
        resized_crop: least and greatest share of the area of an image that a random window of it has, which is scaled
            to the size of the image; ``None``: no such crop.
        crop_padding: zero pixels around an image before a window of its size is cut out at random; 0: no such crop.
        flip: whether images are mirrored left to right at random.
    """

    rotation: float = 0.0
    resized_crop: tuple[float, float] | None = None
    crop_padding: int = 0
    flip: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.rotation <= 180:
            raise ValueError(f"rotation is the greatest angle in degrees, 0 <= rotation <= 180, got {self.rotation}")
        if self.resized_crop is not None:
            low, high = self.resized_crop
            if not 0 < low <= high <= 1:
                raise ValueError(
                    "resized_crop is the least and the greatest share of the area, 0 < least <= greatest <= 1, got "
                    f"{low}, {high}"
                )
        if self.crop_padding < 0:
            raise ValueError(f"crop_padding must be at least 0, got {self.crop_padding}")

    def __call__(self, images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
        """Augment (B, C, H, W) images, uint8 or float32 with 1 for white; (B,) ids say which they are."""
        if self.rotation:
            images = random_rotation(images, self.rotation, ids, seed, epoch)
        if self.resized_crop is not None:
            images = random_resized_crop(images, self.resized_crop, ids, seed, epoch)
        if self.crop_padding:
            images = random_crop(images, self.crop_padding, ids, seed, epoch)
        return random_flip(images, ids, seed, epoch) if self.flip else images


def random_rotation(images: Tensor, limit: float, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Turn each of (B, C, H, W) images by an angle of its own, uniform over -limit..limit degrees."""
    return rotate(images, (2 * random_uniform(ids, seed, epoch, stream=3) - 1) * limit)


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn (B, C, H, W) images counter-clockwise about their centres by (B,) degrees, float64.

    A pixel is the one nearest to where it comes from, and 0 where that lies outside: to the bit what torchvision's
    ``rotate`` does by default to PIL images, which also reckons in 1/65536 of a pixel.
    """
    height, width = images.shape[2:]
    angles = torch.deg2rad(degrees).view(-1, 1, 1)
    cos, sin = angles.cos(), angles.sin()
    x, y = 0.5 - width / 2, 0.5 - height / 2  # of the first pixel, seen from the centre
    columns, rows = (torch.arange(side, device=images.device) for side in (width, height))
    rows = rows[:, None]
    from_column = (_fixed(width / 2 + x * cos - y * sin) + _fixed(cos) * columns - _fixed(sin) * rows) >> 16
    from_row = (_fixed(height / 2 + x * sin + y * cos) + _fixed(sin) * columns + _fixed(cos) * rows) >> 16
    inside = ((from_column >= 0) & (from_column < width) & (from_row >= 0) & (from_row < height))[:, None]
    places = torch.where(inside, (from_row * width + from_column)[:, None], 0)
    turned = images.flatten(2).take_along_dim(places.flatten(2), 2).view_as(images)
    return torch.where(inside, turned, 0)


def _fixed(values: Tensor) -> Tensor:
    return (values * 65536).round().long()


class Windows(NamedTuple):
    """A window of each image: its first row and column, and its size, each (B,) int64."""

    top: Tensor
    left: Tensor
    height: Tensor
    width: Tensor


def random_resized_crop(images: Tensor, scale: tuple[float, float], ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Scale a random window of each of (B, C, H, W) images to the size of the image."""
    height, width = images.shape[2:]
    return resized_crop(images, random_windows(height, width, scale, ids, seed, epoch))


def random_windows(height: int, width: int, scale: tuple[float, float], ids: Tensor, seed: int, epoch: int) -> Windows:
    """Draw a window for each of the (B,) ids, as torchvision's ``RandomResizedCrop``.

    Its share of the area is uniform over ``scale``, the logarithm of its aspect ratio over that of 3/4..4/3. The first
    of ten that fits into the image is taken; where none does, the greatest in the centre.
    """
    heights = torch.full_like(ids, min(height, round(width * MAX_ASPECT_RATIO)))
    widths = torch.full_like(ids, min(width, round(height * MAX_ASPECT_RATIO)))
    drawn = torch.zeros_like(ids, dtype=torch.bool)
    for attempt in reversed(range(ATTEMPTS)):
        share, shape = (random_uniform(ids, seed, epoch, stream=6 + 2 * attempt + i) for i in range(2))
        area = (scale[0] + (scale[1] - scale[0]) * share) * height * width
        aspect_ratio = ((2 * shape - 1) * math.log(MAX_ASPECT_RATIO)).exp()
        high, wide = (area / aspect_ratio).sqrt().round().long(), (area * aspect_ratio).sqrt().round().long()
        fits = (high > 0) & (high <= height) & (wide > 0) & (wide <= width)
        heights, widths, drawn = torch.where(fits, high, heights), torch.where(fits, wide, widths), drawn | fits
    top, left = (
        torch.where(drawn, random_integers(room + 1, ids, seed, epoch, stream), room // 2)
        for room, stream in ((height - heights, 4), (width - widths, 5))
    )
    return Windows(top, left, heights, widths)


def resized_crop(images: Tensor, windows: Windows) -> Tensor:
    """Scale a window of each of (B, C, H, W) images to the size of the image, bilinearly.

    As torchvision's ``resized_crop`` of tensors: nothing outside the window is seen; uint8 is rounded once, at the end.
    """
    rows = _stretch(images.permute(0, 2, 3, 1), windows.top, windows.height)
    scaled = _stretch(rows.transpose(1, 2), windows.left, windows.width).permute(0, 3, 2, 1)
    return (scaled if images.is_floating_point() else scaled.round_().to(images.dtype)).contiguous()


def _stretch(images: Tensor, first: Tensor, length: Tensor) -> Tensor:
    """Scale a piece of dimension 1 of each of the images to the whole of it, linearly; return float32."""
    side = images.shape[1]
    # where pixels come from, in 1/(2 * side) of a pixel after the centre of the piece's first
    places = ((2 * torch.arange(side, device=images.device) + 1) * length[:, None] - side).clamp(min=0)
    lower = places // (2 * side)
    upper = torch.minimum(lower + 1, length[:, None] - 1)
    share = (places % (2 * side)).float() * (0.5 / side)
    batch = torch.arange(len(images), device=images.device)[:, None]
    below, above = (images[batch, first[:, None] + pixels].float() for pixels in (lower, upper))
    # in place: fresh memory costs more than arithmetic; not lerp: it rounds otherwise on a GPU
    return below.add_(above.sub_(below).mul_(share[:, :, None, None]))


def random_crop(images: Tensor, padding: int, ids: Tensor, seed: int, epoch: int, size: int | None = None) -> Tensor:
    """Pad (B, C, H, W) images with zeros and cut each at a place of its own.

    As torchvision's ``RandomCrop``: both offsets are uniform over 0..H + 2 * padding - size. ``size`` is the side of
    the window, that of the image where not given; ``ValueError`` where it is larger than the padded image.
    """
    padded = functional.pad(images, [padding] * 4)
    height, width = images.shape[2:] if size is None else (size, size)
    room = [padded.shape[2] - height, padded.shape[3] - width]
    if min(room) < 0:
        raise ValueError(
            f"a window of {height}x{width} pixels cannot be cut out of images of {images.shape[2]}x{images.shape[3]} "
            f"with {padding} pixels of padding"
        )
    top, left = (random_integers(room[axis] + 1, ids, seed, epoch, stream=axis) for axis in range(2))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)
    return windows[torch.arange(len(images), device=images.device), :, top, left]


def random_flip(images: Tensor, ids: Tensor, seed: int, epoch: int) -> Tensor:
    """Mirror each of (B, C, H, W) images left to right, or not, with equal probability."""
    mirrored = random_integers(2, ids, seed, epoch, stream=2).bool()
    return torch.where(mirrored.view(-1, 1, 1, 1), images.flip(3), images)


def random_integers(bound: int | Tensor, ids: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """Draw an integer in 0..bound-1 for each of the (B,) ids; ``stream`` tells independent draws apart."""
    return _shift(_random_bits(ids, seed, epoch, stream), 33) % bound  # of 31 bits: the remainder's bias is below 1e-7


def random_uniform(ids: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    """Draw a float64 in [0, 1) for each of the (B,) ids; ``stream`` as for ``random_integers``."""
    return _shift(_random_bits(ids, seed, epoch, stream), 11).double() * 2.0**-53


def _random_bits(ids: Tensor, seed: int, epoch: int, stream: int) -> Tensor:
    return splitmix64(ids + _key(seed, epoch, stream))


@lru_cache
def _key(seed: int, epoch: int, stream: int) -> int:
    key = torch.zeros((), dtype=torch.int64)
    for part in (seed, epoch, stream):
        key = splitmix64(key + part)
    return int(key)


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
