import pytest
import torch
from torch.nn import functional

from datamodules.images import ArrayImages
from datamodules.outliers import OutlierPool, RandomWindows, consecutive


def images(length, size=8):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(1, 256, (length, 3, size, size), dtype=torch.uint8, generator=generator)
    return ArrayImages(pixels, torch.full((length,), -1), "others")


def rows_of(chosen, whole):
    where = {image.numpy().tobytes(): row for row, image in enumerate(whole.images)}
    return [where[image.numpy().tobytes()] for image in chosen.read(torch.arange(len(chosen)))]


def test_a_limit_draws_at_random_without_replacement():
    whole = images(50)
    rows = rows_of(OutlierPool("others", limit=20).choose(whole, 0), whole)
    assert rows == sorted(set(rows))
    assert len(rows) == 20
    assert rows_of(OutlierPool("others", limit=20).choose(whole, 0), whole) == rows
    assert rows_of(OutlierPool("others", limit=20).choose(whole, 1), whole) != rows
    assert OutlierPool("others").choose(whole, 0) is whole


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


def test_a_limit_draws_from_the_pool():
    whole = images(40)
    pool = rows_of(OutlierPool("others", pool=10).choose(whole, 3), whole)
    drawn = rows_of(OutlierPool("others", pool=10, limit=6).choose(whole, 3), whole)
    assert len(pool) == 10
    assert len(drawn) == 6
    assert set(drawn) < set(pool)


@pytest.mark.parametrize(("option", "offered"), [("pool", 12), ("limit", 12)])
def test_more_than_there_is(option, offered):
    with pytest.raises(ValueError, match=f"{option}=13, but others offers only {offered} images"):
        OutlierPool("others", **{option: 13}).choose(images(12), 0)
    with pytest.raises(ValueError, match="limit=5, but others offers only 4 images"):
        OutlierPool("others", pool=4, limit=5).choose(images(12), 0)
    with pytest.raises(ValueError, match=f"{option} must be at least 1, got 0"):
        OutlierPool("others", **{option: 0})


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
