"""How images of any size and colour become images of one shape."""

from pathlib import Path
from typing import BinaryIO, Literal, NamedTuple

import numpy as np
from PIL import Image

Resize = Literal["squash", "crop", "pad", "window", "imagenet"]
MODES = {1: "L", 3: "RGB"}


class Fit(NamedTuple):
    """What images are made to be.

    Attributes:
        shape: (C, H, W), C being 3 (RGB) or 1 (grey).
        resize: how those of another size are brought to it, see ``fit_size``; ``None``: they are an error.
    """

    shape: tuple[int, int, int]
    resize: Resize | None = None


def read_image(file: Path | BinaryIO, fit: Fit, name: str | None = None) -> np.ndarray:
    """Decode a file to uint8 (H, W, 3), or (H, W) for one channel; ``ValueError`` naming it if that fails.

    An alpha channel is dropped.
    """
    try:
        with Image.open(file) as image:
            return fit_image(image, fit)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot use image {name or file}: {error}") from error


def fit_image(image: Image.Image, fit: Fit) -> np.ndarray:
    """Convert one image to uint8 (H, W, 3), or (H, W) for one channel."""
    if image.mode.startswith(("I", "F")):
        raise ValueError(f"pixels are of mode {image.mode}, not 8 bits a channel")
    return np.array(fit_size(image.convert(MODES[fit.shape[0]]), fit.shape[1:], fit.resize))


def fit_arrays(images: np.ndarray, fit: Fit, source: str) -> np.ndarray:
    """Convert uint8 (N, H, W, C) images, C = 1 or 3, all of them; ``source`` is named where that fails."""
    channels, height, width = fit.shape
    if images.shape[1:] == (height, width, channels) and fit.resize != "imagenet":
        return images
    fitted = np.empty((len(images), height, width, channels), dtype=np.uint8)
    for row, pixels in enumerate(images):
        try:
            image = fit_image(Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[..., 0]), fit)
        except ValueError as error:
            raise ValueError(f"{source}, row {row}: {error}") from error
        fitted[row] = image.reshape(fitted.shape[1:])
    return fitted


def fit_size(image: Image.Image, size: tuple[int, int], resize: Resize | None) -> Image.Image:
    """Bring an image to ``size`` (H, W).

    ``squash`` scales each side by itself; ``crop`` scales until the image covers the size and cuts out the centre;
    ``imagenet`` does so with 256/224 of the size, as is usual for ImageNet; ``window`` cuts out the centre and scales
    nothing; ``pad`` puts the unscaled image on a black ground, centred. Scaling is bilinear with antialiasing.
    """
    height, width = size
    if resize == "imagenet":
        return _window(_cover(image, round(height * 256 / 224), round(width * 256 / 224)), height, width)
    if (image.height, image.width) == (height, width):
        return image
    if resize == "squash":
        return image.resize((width, height), Image.Resampling.BILINEAR)
    if resize == "crop":
        return _window(_cover(image, height, width), height, width)
    if resize == "window" and image.height >= height and image.width >= width:
        return _window(image, height, width)
    if resize == "pad" and image.height <= height and image.width <= width:
        ground = Image.new(image.mode, (width, height))
        ground.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return ground
    reasons = {"pad": "; padding cannot shrink it", "window": "; a window cannot enlarge it"}
    raise ValueError(
        f"it is {image.height}x{image.width} (HxW), {height}x{width} is wanted"
        + reasons.get(resize or "", "; say how with resize: squash, crop, pad or window")
    )


def _cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Scale an image, keeping its proportions, until it just covers the size."""
    if image.width * height >= image.height * width:
        return image.resize((image.width * height // image.height, height), Image.Resampling.BILINEAR)
    return image.resize((width, image.height * width // image.width), Image.Resampling.BILINEAR)


def _window(image: Image.Image, height: int, width: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
