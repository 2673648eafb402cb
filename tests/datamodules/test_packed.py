import io
import pickle

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional

from datamodules.fitting import Fit
from datamodules.packed import LMDBImages, MappedImages

RANDOM = np.random.default_rng(0)


def write_array(path, count=10, size=(8, 8)):
    images = RANDOM.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    np.save(path, images)
    return images


def encoded(image):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def write_lmdb(path, values):
    with lmdb.open(str(path), map_size=1 << 20) as database, database.begin(write=True) as transaction:
        for key, value in values.items():
            transaction.put(key, value)


@pytest.fixture
def databases(tmp_path):
    """Two databases, written in another order than that of their keys; their images in the order of the keys."""
    images = RANDOM.integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    write_lmdb(tmp_path / "first", {b"long key": encoded(images[1]), b"a": encoded(images[0])})
    write_lmdb(tmp_path / "second", {key: encoded(images[row]) for key, row in ((b"c", 4), (b"b", 3), (b"a", 2))})
    return [tmp_path / "first", tmp_path / "second"], images


def same_in_workers(images):
    """Whether what workers read, as they are forked and from a pickle, is what the process itself reads."""
    batches = [torch.tensor(rows) for rows in ([3, 0, 3], [1], [], [2, 1])]
    expected = [images.read(rows.long()) for rows in batches]
    for received in (images, pickle.loads(pickle.dumps(images))):
        loader = DataLoader(received, sampler=[rows.long() for rows in batches], batch_size=None, num_workers=2)
        for _ in range(2):
            assert all(torch.equal(batch.images, e) for batch, e in zip(loader, expected, strict=True))
        assert all(torch.equal(received.read(rows.long()), e) for rows, e in zip(batches, expected, strict=True))


def test_an_array_is_mapped_not_read(tmp_path):
    expected = write_array(tmp_path / "images.npy", 2000)
    images = MappedImages(tmp_path / "images.npy", Fit((3, 8, 8)))
    assert len(images) == 2000
    assert set(images.labels.tolist()) == {-1}
    rows = torch.tensor([1999, 0, 7, 7])
    read = images.read(rows)
    assert np.array_equal(read.permute(0, 2, 3, 1), expected[rows])
    assert read.is_contiguous()
    assert isinstance(images._mapped, np.memmap)
    assert len(pickle.dumps(images)) < expected.nbytes / 10
    assert images.read(torch.arange(0)).shape == (0, 3, 8, 8)


def test_rows_of_an_array_are_fitted_when_read(tmp_path):
    expected = write_array(tmp_path / "images.npy", size=(16, 12))
    images = MappedImages(tmp_path / "images.npy", Fit((3, 8, 8), "squash"))
    assert np.array_equal(
        images.read(torch.tensor([4]))[0].permute(1, 2, 0), functional.resize(Image.fromarray(expected[4]), [8, 8])
    )
    grey = MappedImages(tmp_path / "images.npy", Fit((1, 16, 12)))
    assert np.array_equal(grey.read(torch.tensor([4]))[0, 0], Image.fromarray(expected[4]).convert("L"))
    with pytest.raises(ValueError, match=r"images.npy, row 0: it is 16x12 \(HxW\), 8x8 is wanted; say how"):
        MappedImages(tmp_path / "images.npy", Fit((3, 8, 8)))


def test_fingerprints_of_arrays(tmp_path):
    pixels = write_array(tmp_path / "images.npy")

    def fingerprint(**kwargs):
        return MappedImages(tmp_path / "images.npy", **{"fit": Fit((3, 8, 8))} | kwargs).fingerprint()

    first = fingerprint()
    assert first == fingerprint()
    others = [
        fingerprint(fit=Fit((1, 8, 8))),
        fingerprint(fit=Fit((3, 8, 8), "imagenet")),
        fingerprint(labels=torch.zeros(10, dtype=torch.int64)),
    ]
    pixels[9, 7, 7, 2] += 1
    np.save(tmp_path / "images.npy", pixels)
    others.append(fingerprint())
    np.save(tmp_path / "images.npy", pixels[:9])
    others.append(fingerprint())
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 8, 8, 3)), r"uint8 .* float64 \(4, 8, 8, 3\)"),
        (np.zeros((4, 3, 8, 8), dtype=np.uint8), r"\(N, H, W, C\), C = 1 or 3; .* \(4, 3, 8, 8\)"),
        (np.zeros((4, 8, 8), dtype=np.uint8), r"these are uint8 \(4, 8, 8\)"),
        (np.array([{}]), "cannot be read as an .npy array"),
    ],
)
def test_other_arrays_are_errors(tmp_path, array, message):
    np.save(tmp_path / "images.npy", array)
    with pytest.raises(ValueError, match=rf"images\.npy.*{message}"):
        MappedImages(tmp_path / "images.npy", Fit((3, 8, 8)))


def test_damaged_arrays_are_errors(tmp_path):
    path = tmp_path / "images.npy"
    with pytest.raises(FileNotFoundError, match=r"no file .*images\.npy"):
        MappedImages(path, Fit((3, 8, 8)))
    write_array(path)
    with pytest.raises(ValueError, match="holds 10 images, but there are 9 labels"):
        MappedImages(path, Fit((3, 8, 8)), torch.zeros(9, dtype=torch.int64))
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:50], whole[:-1]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.npy cannot be read as an \.npy array"):
            MappedImages(path, Fit((3, 8, 8)))


def test_databases_are_read_in_the_order_of_their_keys(databases):
    paths, expected = databases
    images = LMDBImages(paths, Fit((3, 8, 8)), "scenes")
    assert images.labels.tolist() == [0, 0, 1, 1, 1]
    assert images.labels.dtype == torch.int64
    rows = torch.tensor([4, 0, 2, 4, 1, 3])
    read = images.read(rows)
    assert np.array_equal(read.permute(0, 2, 3, 1), expected[rows])
    assert read.is_contiguous()
    assert images.read(torch.arange(0)).shape == (0, 3, 8, 8)
    fitted = LMDBImages(paths, Fit((1, 4, 4), "squash"), "scenes").read(torch.tensor([3]))
    assert np.array_equal(fitted[0, 0], functional.resize(Image.fromarray(expected[3]).convert("L"), [4, 4]))


def test_fingerprints_of_databases(databases):
    paths, expected = databases

    def fingerprint(paths=paths, resize="crop"):
        return LMDBImages(paths, Fit((3, 8, 8), resize), "scenes").fingerprint()

    first = fingerprint()
    assert fingerprint() == first
    others = [fingerprint(paths[::-1]), fingerprint(resize="squash")]
    write_lmdb(paths[0], {b"a": encoded(expected[0]) + b"0"})
    others.append(fingerprint())
    write_lmdb(paths[1], {b"d": encoded(expected[0])})
    others.append(fingerprint())
    assert len({first, *others}) == 5


@pytest.mark.parametrize("kind", ["array", "database"])
def test_workers_read_the_same(tmp_path, databases, kind):
    if kind == "array":
        write_array(tmp_path / "images.npy")
        same_in_workers(MappedImages(tmp_path / "images.npy", Fit((3, 8, 8))))
    else:
        same_in_workers(LMDBImages(databases[0], Fit((3, 8, 8)), "scenes"))


def test_one_database_may_serve_two_sets(databases):
    images = LMDBImages(databases[0], Fit((3, 8, 8)), "scenes")
    outliers = images.as_outliers()
    rows = torch.tensor([4, 1])
    assert torch.equal(images[rows].images, outliers[rows].images)
    assert outliers[rows].labels.tolist() == [-1, -1]


def test_damaged_databases_are_errors(tmp_path, databases):
    paths, _ = databases
    images = LMDBImages(paths, Fit((3, 8, 8)), "scenes")
    with pytest.raises(FileNotFoundError, match=r"no database .*third/data\.mdb"):
        LMDBImages([*paths, tmp_path / "third"], Fit((3, 8, 8)), "scenes")
    write_lmdb(paths[0], {b"a": b"text"})
    with pytest.raises(ValueError, match=r"cannot use image a in .*first"):
        images.read(torch.tensor([0]))
    write_lmdb(paths[1], {b"b": encoded(np.zeros((9, 8, 3), dtype=np.uint8))})
    with pytest.raises(ValueError, match=r"cannot use image b in .*second: it is 9x8 \(HxW\), 8x8 is wanted"):
        images.read(torch.tensor([3]))
    with lmdb.open(str(paths[1])) as database, database.begin(write=True) as transaction:
        transaction.delete(b"b")
    with pytest.raises(ValueError, match=r"there is no b in .*second any more"):
        images.read(torch.tensor([3]))
    (paths[0] / "data.mdb").write_bytes(b"text" * 4096)
    with pytest.raises(ValueError, match="first cannot be read as an LMDB"):
        LMDBImages(paths, Fit((3, 8, 8)), "scenes")
