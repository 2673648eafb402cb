import pytest
import torch
from torchvision.transforms import functional

from datamodules.augmentation import random_crop, random_flip, random_integers, splitmix64

IDS = torch.arange(20_000)


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


def test_flip_mirrors_about_half():
    images = torch.arange(12, dtype=torch.uint8).view(1, 1, 3, 4).expand(1000, 1, 3, 4)
    flipped = random_flip(images, IDS[:1000], 0, 0)
    mirrored = (flipped == functional.hflip(images)).flatten(1).all(1)
    assert torch.equal(mirrored, ~(flipped == images).flatten(1).all(1))
    assert 440 < mirrored.sum() < 560


def test_an_image_is_augmented_alike_in_any_batch():
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)

    def augment(rows):
        return random_flip(random_crop(images[rows], 2, rows, 1, 4), rows, 1, 4)

    state = torch.get_rng_state()
    whole = augment(torch.arange(30))
    for rank in range(3):
        rows = torch.arange(30)[rank::3]
        assert torch.equal(augment(rows), whole[rows])
    assert augment(torch.arange(0)).shape == (0, 1, 8, 8)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.gpu
def test_gpu_agrees():
    images = torch.randint(0, 256, (300, 3, 8, 8), dtype=torch.uint8)
    ids = IDS[:300]
    on_gpu = random_flip(random_crop(images.cuda(), 2, ids.cuda(), 1, 4), ids.cuda(), 1, 4)
    assert torch.equal(on_gpu.cpu(), random_flip(random_crop(images, 2, ids, 1, 4), ids, 1, 4))
