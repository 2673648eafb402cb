import pytest
import torch

from datamodules.images import ArrayImages, Rows, WithOutliers


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


def test_rows_tell_themselves_apart():
    whole = images_of(4)
    some = [Rows(whole, torch.tensor(rows)) for rows in ([0, 1], [0, 2], [2, 0])]
    some[0].labels = some[1].labels = some[2].labels = torch.zeros(2, dtype=torch.int64)
    assert len({images.fingerprint() for images in some}) == 3


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


def test_bytes_and_floats_go_together():
    known, outliers = images_of(3), images_of(2)
    mixed = WithOutliers(known, outliers)
    outliers.read = lambda rows: torch.full((len(rows), *outliers.shape), 1.5)
    read = mixed.read(torch.tensor([4, 0, 1]))
    assert read.dtype == torch.float32
    assert (read[0] == 1.5).all()
    torch.testing.assert_close(read[1:], known.images[:2] / 255)
    assert mixed.read(torch.tensor([0])).dtype == torch.float32
