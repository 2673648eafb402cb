import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from datamodules.images import ArrayImages, Rows, WithOutliers, fit_size, stratified_split


def images_of(length, start=0):
    pixels = torch.arange(start, start + length).view(-1, 1, 1, 1).expand(length, 3, 4, 4).to(torch.uint8)
    return ArrayImages(pixels, torch.arange(length) % 2, f"from {start}")


def test_arrays_are_read_by_rows():
    batch = images_of(10)[torch.tensor([7, 2])]
    assert batch.images.shape == (2, 3, 4, 4)
    assert batch.images[:, 0, 0, 0].tolist() == [7, 2]
    assert batch.labels.tolist() == [1, 0]
    assert batch.ids.tolist() == [7, 2]
    assert images_of(10).shape == (3, 4, 4)
    assert images_of(10)[torch.arange(0)].images.shape == (0, 3, 4, 4)


def test_rows_count_from_zero():
    rows = Rows(images_of(10), torch.tensor([3, 8, 9]))
    batch = rows[torch.tensor([2, 0])]
    assert len(rows) == 3
    assert batch.images[:, 0, 0, 0].tolist() == [9, 3]
    assert batch.labels.tolist() == [1, 1]
    assert batch.ids.tolist() == [2, 0]


def test_outliers_follow_the_id_images():
    both = WithOutliers(images_of(4), images_of(3, start=100))
    batch = both[torch.tensor([5, 0, 6, 3])]
    assert len(both) == 7
    assert batch.images[:, 0, 0, 0].tolist() == [101, 0, 102, 3]
    assert batch.labels.tolist() == [-1, 0, -1, 1]
    assert batch.ids.tolist() == [5, 0, 6, 3]
    assert both[torch.arange(0)].images.shape == (0, 3, 4, 4)


def test_fingerprints_tell_sets_apart():
    images = images_of(10)
    pixels = images.images.clone()
    pixels[9, 2, 3, 3] += 1
    sets = [
        images,
        ArrayImages(pixels, images.labels, ""),
        ArrayImages(images.images.view(10, 3, 2, 8), images.labels, ""),
        images.as_outliers(),
        Rows(images, torch.arange(9)),
        Rows(images, torch.arange(1, 10)),
        WithOutliers(images, images),
    ]
    assert len({each.fingerprint() for each in sets}) == len(sets)
    assert len(images.fingerprint()) == 64
    assert images_of(10).fingerprint() == images.fingerprint()


def test_wrong_arrays_are_errors():
    with pytest.raises(ValueError, match=r"here: images must be uint8 .* torch.float32 \(2, 3, 4, 4\)"):
        ArrayImages(torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "here")
    with pytest.raises(ValueError, match=r"here: 2 images .* \(3,\)"):
        ArrayImages(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "here")


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


def test_split_is_stratified_and_seeded():
    labels = torch.tensor([0] * 40 + [1] * 20 + [2] * 10)[torch.randperm(70, generator=torch.manual_seed(0))]
    kept, held_out = stratified_split(labels, 0.3, 0, ["a", "b", "c"])
    assert torch.bincount(labels[held_out]).tolist() == [12, 6, 3]
    assert sorted(torch.cat([kept, held_out]).tolist()) == list(range(70))
    for rows in (kept, held_out):
        assert rows.tolist() == sorted(rows.tolist())
    assert torch.equal(stratified_split(labels, 0.3, 0, ["a", "b", "c"])[1], held_out)
    assert not torch.equal(stratified_split(labels, 0.3, 1, ["a", "b", "c"])[1], held_out)


@pytest.mark.parametrize(("share", "count"), [(0.01, 0), (0.99, 10)])
def test_split_that_empties_a_class_is_an_error(share, count):
    labels = torch.tensor([0] * 400 + [1] * 10)
    with pytest.raises(ValueError, match=f"{share} would hold out {count} of the 10 images of class 'cat'.*val_split"):
        stratified_split(labels, share, 0, ["dog", "cat"])
