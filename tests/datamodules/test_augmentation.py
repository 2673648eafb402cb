import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import ks_1samp, ks_2samp, uniform
from torchvision.transforms import RandomResizedCrop, RandomRotation, functional, v2

from datamodules.augmentation import (
    Augmentation,
    Windows,
    random_crop,
    random_flip,
    random_integers,
    random_resized_crop,
    random_rotation,
    random_uniform,
    random_windows,
    resized_crop,
    rotate,
    splitmix64,
)

IDS = torch.arange(20_000)
EVERYTHING = Augmentation(rotation=30.0, resized_crop=(0.3, 1.0), crop_padding=2, flip=True)


def random_images(count, *shape):
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def splitmix(value):
    mask = 2**64 - 1
    value = (value + 0x9E3779B97F4A7C15) & mask
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & mask
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & mask
    return value ^ (value >> 31)


def test_splitmix64_is_the_published_one():
    values = torch.tensor([0, 1, -1, 2**62, -(2**63), 2**63 - 1])
    assert [value % 2**64 for value in splitmix64(values).tolist()] == [splitmix(v % 2**64) for v in values.tolist()]
    assert splitmix(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("bound", [2, 9])
def test_draws_are_uniform_and_independent(bound):
    draws = torch.stack([random_integers(bound, IDS, 0, 0, stream) for stream in (0, 1)])
    pairs = torch.bincount(draws[0] * bound + draws[1], minlength=bound**2).double()
    expected = len(IDS) / bound**2
    chi2 = ((pairs - expected) ** 2 / expected).sum()
    freedom = bound**2 - 1
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5


def test_draws_differ_by_seed_epoch_and_stream():
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 2, 0), (2, 0, 0)]
    draws = [random_integers(9, IDS, *key) for key in keys]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert (first == second).double().mean().item() == pytest.approx(1 / 9, abs=0.012)


def test_crop_is_torchvisions_at_the_drawn_offset():
    images = torch.randint(1, 256, (60, 3, 9, 7), dtype=torch.uint8)
    ids = torch.arange(100, 160)
    cropped = random_crop(images, 2, ids, seed=5, epoch=3)
    assert cropped.dtype == torch.uint8
    offsets = set()
    for image, result, i in zip(images, cropped, ids, strict=True):
        top, left = (int(random_integers(5, i[None], 5, 3, stream)) for stream in (0, 1))
        assert torch.equal(result, functional.crop(functional.pad(image, [2, 2]), top, left, 9, 7))
        offsets |= {("top", top), ("left", left)}
    assert len(offsets) == 10


def test_crop_of_another_size_is_cut_anywhere():
    images = torch.arange(1.0, 257.0).view(1, 1, 16, 16).expand(6000, 1, 16, 16)
    cropped = random_crop(images, 2, IDS[:6000], 0, 0, size=8)
    assert cropped.shape == (6000, 1, 8, 8)
    inside = cropped[:, 0, 4, 4].long() - 1  # this pixel is never padding
    top, left = inside // 16 - 2, inside % 16 - 2  # of the window in the padded image
    for offset in (top, left):
        counts = torch.bincount(offset, minlength=13).double()
        assert len(counts) == 13
        assert ((counts - 6000 / 13) ** 2 / (6000 / 13)).sum() < 12 + 4 * 24**0.5
    padded = functional.pad(images[0], [2, 2])
    for i in range(200):
        assert torch.equal(cropped[i], functional.crop(padded, top[i], left[i], 8, 8))


def test_crop_of_its_own_size_is_the_default():
    images, ids = random_images(40, 3, 8, 8), IDS[:40]
    assert torch.equal(random_crop(images, 3, ids, 1, 2, size=8), random_crop(images, 3, ids, 1, 2))


def test_crop_larger_than_the_padded_image():
    with pytest.raises(ValueError, match="13x13 pixels cannot be cut out of images of 8x20 with 2 pixels of padding"):
        random_crop(random_images(2, 1, 8, 20), 2, IDS[:2], 0, 0, size=13)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 15, 20), (3, 9, 4)])
def test_rotation_is_torchvisions_of_pil_images(shape):
    images = random_images(100, *shape)
    degrees = torch.linspace(-180, 180, 100, dtype=torch.float64)
    turned = rotate(images, degrees)
    assert turned.dtype == torch.uint8
    for image, result, angle in zip(images, turned, degrees.tolist(), strict=True):
        pixels = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).squeeze(2).numpy()))
        assert torch.equal(result, v2.functional.pil_to_tensor(v2.functional.rotate(pixels, angle)))
    assert torch.equal(rotate(images / 255, degrees), turned / 255)


def test_rotation_is_nearly_torchvisions_of_tensors():
    images, degrees = random_images(100, 3, 28, 28), torch.linspace(-10, 10, 100, dtype=torch.float64)
    expected = torch.stack([v2.functional.rotate(i, d) for i, d in zip(images, degrees.tolist(), strict=True)])
    assert (rotate(images, degrees) != expected).double().mean() < 1e-3  # pixels that lie on an edge


def test_rotation_keeps_an_image_that_is_not_turned():
    images = random_images(3, 3, 7, 8)
    assert torch.equal(rotate(images, torch.zeros(3, dtype=torch.float64)), images)


def test_random_rotation_draws_angles_as_torchvision():
    images, ids = random_images(3000, 1, 5, 5), IDS[:3000]
    degrees = (2 * random_uniform(ids, 3, 1, stream=3) - 1) * 40
    assert torch.equal(random_rotation(images, 40.0, ids, 3, 1), rotate(images, degrees))
    theirs = [RandomRotation.get_params([-40.0, 40.0]) for _ in range(3000)]
    assert ks_2samp(degrees, theirs).pvalue > 1e-3


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 15, 20), (3, 64, 48)])
def test_resized_crop_is_torchvisions(shape):
    images = random_images(120, *shape)
    windows = random_windows(*shape[1:], (0.01, 1.0), IDS[:120], 0, 0)
    scaled, scaled_floats = resized_crop(images, windows), resized_crop(images / 255, windows)
    assert (scaled.dtype, scaled.is_contiguous()) == (torch.uint8, True)
    assert (scaled_floats.dtype, scaled_floats.is_contiguous()) == (torch.float32, True)
    for i, window in enumerate(zip(*(side.tolist() for side in windows), strict=True)):
        exact = v2.functional.resized_crop(images[i] / 255, *window, size=shape[1:])
        assert torch.allclose(scaled_floats[i], exact, rtol=0, atol=1e-5)
        rounded = v2.functional.resized_crop(images[i], *window, size=shape[1:])
        assert (scaled[i].int() - rounded.int()).abs().max() <= 1
    assert (scaled - scaled_floats * 255).abs().max() < 0.501


def test_resized_crop_sees_nothing_outside_the_window():
    images = torch.full((2, 1, 12, 12), torch.inf)
    images[:, :, 3:8, 4:6] = 0.5
    three, two = torch.tensor([3, 3]), torch.tensor([2, 2])
    assert torch.equal(resized_crop(images, Windows(three, two + 2, two + 3, two)), torch.full((2, 1, 12, 12), 0.5))


def test_resized_crop_of_the_whole_image_keeps_it():
    images = random_images(2, 3, 11, 13)
    whole = Windows(*(torch.tensor([side, side]) for side in (0, 0, 11, 13)))
    assert torch.equal(resized_crop(images, whole), images)
    assert torch.equal(resized_crop(images / 255, whole), images / 255)


@pytest.mark.parametrize(
    ("shape", "scale"),
    [
        ((28, 28), (0.95, 1.0)),
        ((64, 64), (0.08, 1.0)),
        ((20, 48), (0.5, 0.6)),
        ((48, 20), (0.9, 1.0)),
        ((8, 8), (0.004, 0.004)),  # about a quarter of a pixel: most windows would have no height or no width
    ],
)
def test_windows_are_drawn_as_by_torchvision(shape, scale):
    ours = torch.stack(random_windows(*shape, scale, IDS, 0, 0), 1)
    torch.manual_seed(0)
    image, ratio = torch.empty(1, *shape), [3 / 4, 4 / 3]
    theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), ratio) for _ in range(2000)])
    for column, (mine, reference) in enumerate(zip(ours.T, theirs.T, strict=True)):
        assert ks_2samp(mine, reference).pvalue > 1e-3, Windows._fields[column]
    assert ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue > 1e-3
    assert ks_2samp(ours[:, 3] / ours[:, 2], theirs[:, 3] / theirs[:, 2]).pvalue > 1e-3
    assert ours[:, :2].min() >= 0
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor(shape)).all()


@pytest.mark.parametrize(("shape", "share"), [((10, 40), 1.0), ((40, 10), 1.0), ((8, 8), 1e-3)])
def test_a_window_that_never_fits_is_the_greatest_in_the_centre(shape, share):
    window = RandomResizedCrop.get_params(torch.empty(1, *shape), [share, share], [3 / 4, 4 / 3])
    windows = torch.stack(random_windows(*shape, (share, share), IDS[:50], 0, 0), 1)
    assert windows.unique(dim=0).tolist() == [list(window)]


def test_top_and_left_are_independent():
    windows = random_windows(64, 64, (0.2, 0.2), IDS, 0, 0)
    where = torch.stack([windows.top / (65 - windows.height), windows.left / (65 - windows.width)])
    assert torch.corrcoef(where)[0, 1].abs() < 0.03


def test_uniform_draws():
    draws = torch.stack([random_uniform(IDS, 0, 0, stream) for stream in range(100)])
    assert draws.dtype == torch.float64
    assert draws.min() >= 0
    assert draws.max() < 1
    p_values = [ks_1samp(row, uniform.cdf).pvalue for row in draws]  # uniform themselves, if the draws are
    assert ks_1samp(p_values, uniform.cdf).pvalue > 1e-3
    assert (torch.corrcoef(draws) - torch.eye(100)).abs().max() < 0.035
    assert len(draws.unique()) == draws.numel()


def test_flip_mirrors_about_half():
    images = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).expand(1000, 1, 3, 4)
    flipped = random_flip(images, IDS[:1000], 0, 0)
    mirrored = (flipped == functional.hflip(images)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(flipped == images).flatten(1).all(1))
    assert 440 < mirrored.sum() < 560


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_an_image_is_augmented_alike_in_any_batch(dtype):
    images, ids = random_images(301, 3, 13, 11).to(dtype), IDS[:301]
    state = torch.get_rng_state()
    whole = EVERYTHING(images, ids, 1, 4)
    assert (whole.dtype, whole.shape) == (dtype, images.shape)
    for shares in (3, 301):
        for rows in (ids[rank::shares] for rank in range(shares)):
            assert torch.equal(EVERYTHING(images[rows], rows, 1, 4), whole[rows])
    assert EVERYTHING(images[:0], ids[:0], 1, 4).shape == (0, 3, 13, 11)
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_changes_with_seed_epoch_and_id():
    images, ids = random_images(1, 3, 13, 11).expand(200, 3, 13, 11), IDS[:200]
    results = [EVERYTHING(images, *key) for key in ((ids, 0, 0), (ids, 1, 0), (ids, 0, 1), (ids + 200, 0, 0))]
    assert len(torch.cat(results).unique(dim=0)) == 800


def test_augmentation_is_its_parts_in_order():
    images, ids = random_images(30, 3, 12, 12), IDS[:30]
    expected = random_resized_crop(random_rotation(images, 30.0, ids, 1, 4), (0.3, 1.0), ids, 1, 4)
    expected = random_flip(random_crop(expected, 2, ids, 1, 4), ids, 1, 4)
    assert torch.equal(EVERYTHING(images, ids, 1, 4), expected)
    assert torch.equal(Augmentation()(images, ids, 1, 4), images)


def test_bytes_and_floats_are_augmented_alike():
    images, ids = random_images(100, 3, 16, 16), IDS[:100]
    floats = EVERYTHING(images / 255, ids, 0, 0)
    assert (EVERYTHING(images, ids, 0, 0) - floats * 255).abs().max() < 0.501


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rotation": -1.0}, "rotation is the greatest angle in degrees, .* got -1.0"),
        ({"rotation": math.nan}, "got nan"),
        ({"rotation": 181.0}, "got 181.0"),
        ({"resized_crop": (0.0, 1.0)}, "resized_crop is the least and the greatest share of the area, .* got 0.0, 1.0"),
        ({"resized_crop": (0.9, 0.5)}, "got 0.9, 0.5"),
        ({"resized_crop": (0.5, 1.1)}, "got 0.5, 1.1"),
        ({"crop_padding": -1}, "crop_padding must be at least 0, got -1"),
    ],
)
def test_options_that_make_no_sense(options, message):
    with pytest.raises(ValueError, match=message):
        Augmentation(**options)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_gpu_agrees(dtype):
    images, ids = random_images(300, 3, 28, 28).to(dtype), IDS[:300]
    on_gpu = EVERYTHING(images.cuda(), ids.cuda(), 1, 4)
    assert torch.equal(on_gpu.cpu(), EVERYTHING(images, ids, 1, 4))
