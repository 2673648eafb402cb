import pytest
import torch
from torch.nn import functional

from datamodules.images import ArrayImages, Rows
from datamodules.outliers import OutlierPool, RandomWindows, consecutive, draw_outliers


def images(length, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (length, 3, size, size), dtype=torch.uint8, generator=generator)
    return ArrayImages(pixels, torch.full((length,), -1), "others")


def rows_of(chosen, whole):
    where = {image.numpy().tobytes(): row for row, image in enumerate(whole.images)}
    return [where[image.numpy().tobytes()] for image in chosen.read(torch.arange(len(chosen)))]


def drawn(whole, count=None, seed=0, **known):
    chosen, removed = draw_outliers(whole, known, count, seed, lambda images: images)
    return rows_of(chosen, whole), removed


def test_outliers_are_drawn_at_random_without_replacement():
    whole = images(50)
    rows, removed = drawn(whole, 20)
    assert rows == sorted(set(rows))
    assert (len(rows), removed) == (20, {})
    assert drawn(whole, 20) == (rows, {})
    assert drawn(whole, 20, seed=1) != (rows, {})
    assert draw_outliers(whole, {}, None, 0, lambda images: images) == (whole, {})


def test_each_outlier_is_drawn_as_often_as_any_other():
    whole, counts = images(10), torch.zeros(10)
    for seed in range(400):
        counts[drawn(whole, 3, seed)[0]] += 1
    assert (counts - 120).abs().max() < 40  # a standard deviation is 9


def test_id_images_among_the_outliers_are_replaced_and_counted():
    whole = images(30)
    train, test = Rows(whole, torch.arange(8)), Rows(whole, torch.arange(5, 12))
    rows, removed = drawn(whole, None, train=train, id=test)
    assert rows == list(range(12, 30))
    assert removed == {"train": 8, "id": 7}  # three of them are in both
    for seed in range(20):
        rows, removed = drawn(whole, 15, seed, train=train, id=test)
        assert len(set(rows)) == 15
        assert min(rows) >= 12
        assert removed.get("train", 0) <= 8
    assert drawn(whole, 18, train=train, id=test)[0] == list(range(12, 30))


def test_only_what_is_drawn_is_read(monkeypatch):
    whole, read = images(1000), []
    monkeypatch.setattr(ArrayImages, "read", lambda self, rows: read.append(len(rows)) or self.images[rows])
    draw_outliers(whole, {"id": images(1, size=4)}, 10, 0, lambda images: images)
    assert sum(read) == 11


def test_fewer_outliers_than_are_to_be_drawn():
    whole = images(12)
    with pytest.raises(ValueError, match=r"^num_outliers=13, but only 12 are left of others, which has 12 images$"):
        drawn(whole, 13)
    with pytest.raises(
        ValueError, match=r"only 9 are left of others, which has 12 images, 3 of them also images of id$"
    ):
        drawn(whole, 10, id=Rows(whole, torch.arange(3)))
    with pytest.raises(
        ValueError, match=r"^no outliers are left of others, which has 12 images, 12 of them also images of id$"
    ):
        drawn(whole, None, id=whole)


def test_a_pool_is_consecutive_and_goes_on_from_the_beginning():
    starts = []
    for seed in range(200):
        rows = consecutive(10, 7, seed).tolist()
        assert rows == [(rows[0] + step) % 10 for step in range(7)]
        starts.append(rows[0])
    assert set(starts) == set(range(10))


def test_a_pool_does_not_start_among_the_first_10_000():
    starts = [int(consecutive(12_000, 1, seed)) for seed in range(300)]
    assert 10_000 <= min(starts) < 10_100
    assert 11_900 < max(starts) < 12_000


def test_the_pool_of_a_set_and_seed():
    whole = images(40)
    pool = rows_of(OutlierPool("others", pool=10).choose(whole, 3), whole)
    assert pool == sorted(consecutive(40, 10, 3).tolist())
    assert OutlierPool("others").choose(whole, 0) is whole
    assert OutlierPool("others", pool=40).choose(whole, 0) is whole
    with pytest.raises(ValueError, match="pool=41, but others offers only 40 images"):
        OutlierPool("others", pool=41).choose(whole, 0)
    with pytest.raises(ValueError, match="pool must be at least 1, got 0"):
        OutlierPool("others", pool=0)


def test_windows_are_cut_from_the_padded_image_and_stay_the_same():
    whole = images(400, 8)
    windows = RandomWindows(whole, 4, 2, seed=0)
    assert windows.shape == (3, 4, 4)
    whole.origin = "ImageNet"
    assert RandomWindows(whole, 4, 2, seed=0).origin == "ImageNet"
    assert windows.final
    assert not whole.final
    cut = windows.read(torch.arange(400))
    padded = functional.pad(whole.images, [2] * 4)
    offsets, mirrored = [], 0
    for image, source in zip(cut, padded, strict=True):
        places = [
            (top, left, flip)
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
            if torch.equal(source[:, top : top + 4, left : left + 4], image.flip(2) if flip else image)
        ]
        assert places
        offsets += [place[:2] for place in places[:1]]
        mirrored += places[0][2]
    assert {top for top, _ in offsets} == {left for _, left in offsets} == set(range(9))
    assert 150 < mirrored < 250
    assert torch.equal(windows.read(torch.tensor([7, 3, 7])), cut[[7, 3, 7]])
    assert not torch.equal(RandomWindows(whole, 4, 2, seed=1).read(torch.arange(400)), cut)
    prints = {RandomWindows(whole, *options).fingerprint() for options in ((4, 2, 0), (4, 2, 1), (4, 1, 0), (5, 2, 0))}
    assert len(prints | {whole.fingerprint()}) == 5
