import numpy as np
import pytest
from PIL import Image
from torchvision.transforms import functional

from datamodules.fitting import Fit, fit_arrays, fit_image, fit_size, read_image


def photograph(height, width):
    pixels = np.random.default_rng(height * width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("width", [20, 33, 47, 90])
@pytest.mark.parametrize("height", [20, 33, 61])
def test_sizes_are_torchvisions(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    squashed = functional.resize(image, [20, 20])
    assert np.array_equal(fit_size(image, (20, 20), "squash"), squashed)
    cropped = functional.center_crop(functional.resize(image, 20), [20, 20])
    assert np.array_equal(fit_size(image, (20, 20), "crop"), cropped)
    if width < 64:
        padded = np.asarray(fit_size(image, (64, 64), "pad"))
        top, left = (64 - height) // 2, (64 - width) // 2
        assert np.array_equal(padded[top : top + height, left : left + width], pixels)
        assert padded.sum(dtype=np.int64) == pixels.sum(dtype=np.int64)


def test_crop_to_a_size_that_is_not_square():
    image = Image.fromarray(np.zeros((50, 30, 3), dtype=np.uint8))
    assert fit_size(image, (20, 40), "crop").size == (40, 20)
    assert fit_size(image, (40, 10), "crop").size == (10, 40)


def test_sizes_that_do_not_fit_are_errors():
    image = Image.fromarray(np.zeros((50, 30), dtype=np.uint8))
    assert fit_size(image, (50, 30), None) is image
    with pytest.raises(ValueError, match=r"50x30 \(HxW\), 32x32 is wanted; say how"):
        fit_size(image, (32, 32), None)
    with pytest.raises(ValueError, match="padding cannot shrink"):
        fit_size(image, (32, 32), "pad")
    with pytest.raises(ValueError, match="a window cannot enlarge"):
        fit_size(image, (64, 20), "window")


@pytest.mark.parametrize(("height", "width"), [(300, 400), (400, 300), (224, 224), (100, 80), (256, 500)])
def test_imagenet_is_scaled_to_256_and_cut_to_224(height, width):
    image = photograph(height, width)
    expected = functional.center_crop(functional.resize(image, 256), [224, 224])
    assert np.array_equal(fit_size(image, (224, 224), "imagenet"), expected)


@pytest.mark.parametrize(("height", "width"), [(36, 36), (32, 36), (37, 40), (32, 32)])
def test_a_window_is_the_unscaled_centre(height, width):
    image = photograph(height, width)
    assert np.array_equal(fit_size(image, (32, 32), "window"), functional.center_crop(image, [32, 32]))


def test_the_frame_of_a_cropped_archive_is_not_in_the_window():
    framed = np.zeros((36, 36, 3), dtype=np.uint8)
    framed[2:34, 2:34] = 255
    assert np.asarray(fit_size(Image.fromarray(framed), (32, 32), "window")).min() == 255


def test_colours():
    grey = np.arange(64, dtype=np.uint8).reshape(1, 8, 8, 1)
    assert np.array_equal(fit_arrays(grey, Fit((3, 8, 8)), "grey"), np.repeat(grey, 3, axis=3))
    colour = np.stack([np.full((8, 8), value) for value in (250, 30, 90)], axis=2).astype(np.uint8)[None]
    luma = round(0.299 * 250 + 0.587 * 30 + 0.114 * 90)
    made_grey = fit_arrays(colour, Fit((1, 8, 8)), "colour")
    assert made_grey.shape == (1, 8, 8, 1)
    assert abs(int(made_grey[0, 0, 0, 0]) - luma) <= 1


def test_arrays_and_files_become_the_same_images():
    image = photograph(224, 224)
    for resize in ("squash", "crop", "window", "pad", "imagenet", None):
        fit = Fit((3, 224, 224), resize)
        assert np.array_equal(fit_arrays(np.asarray(image)[None], fit, "x")[0], fit_image(image, fit))


def test_arrays_that_fit_are_not_touched():
    images = np.zeros((4, 8, 8, 3), dtype=np.uint8)
    assert fit_arrays(images, Fit((3, 8, 8)), "x") is images


def test_arrays_that_do_not_fit_name_the_row():
    with pytest.raises(ValueError, match=r"x, row 0: it is 8x8 \(HxW\), 4x4 is wanted"):
        fit_arrays(np.zeros((4, 8, 8, 3), dtype=np.uint8), Fit((3, 4, 4)), "x")


def test_sixteen_bits_are_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), dtype=np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png: pixels are of mode I;16, not 8 bits"):
        read_image(tmp_path / "deep.png", Fit((1, 8, 8)))
