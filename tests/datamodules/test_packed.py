import io
import logging
import multiprocessing
import os
import pickle
import signal
import time

import lmdb
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import functional

from datamodules import packed
from datamodules.fitting import Fit
from datamodules.images import FolderImages, Rows
from datamodules.packed import LMDBImages, MappedImages, PackedImages, pack

RANDOM = np.random.default_rng(0)


def write_array(path, count=10, size=(8, 8)):
    images = RANDOM.integers(0, 256, (count, *size, 3), dtype=np.uint8)
    np.save(path, images)
    return images


def encoded(image, kind="png"):
    file = io.BytesIO()
    Image.fromarray(image).save(file, kind)
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


def write_folder(path, count=9):
    """Write images whose files all have one size; return them."""
    path.mkdir(parents=True, exist_ok=True)
    images = RANDOM.integers(0, 256, (count, 8, 6, 3), dtype=np.uint8)
    for row, image in enumerate(images):
        Image.fromarray(image).save(path / f"{row}.bmp")
        os.utime(path / f"{row}.bmp", ns=(0, 0))
    return images


def read_folder(path, count=9):
    images = FolderImages(path, [f"{row}.bmp" for row in range(count)], torch.arange(count) % 4, Fit((3, 8, 6)))
    images.source, images.origin, images.classes = "scenes", "somewhere", ["a", "b", "c", "d"]
    return images


@pytest.fixture
def sets(tmp_path, databases):
    write_folder(tmp_path / "files")
    folder, database = read_folder(tmp_path / "files"), LMDBImages(databases[0], Fit((3, 8, 8)), "scenes")
    return {
        "folder": folder,
        "rows": Rows(folder, torch.tensor([7, 2, 5, 0])),
        "database": database,
        "rows of rows": Rows(Rows(database, torch.tensor([4, 1, 0, 3])), torch.tensor([3, 1, 0, 2])),
        "outliers": folder.as_outliers(),
        "grey": FolderImages(folder.root, folder.names, folder.labels, Fit((1, 4, 4), "squash"), invert=True),
    }


@pytest.mark.parametrize("kind", ["folder", "rows", "database", "rows of rows", "outliers", "grey"])
def test_a_packed_set_is_the_same_set(tmp_path, sets, kind):
    images = sets[kind]
    found = pack(images, tmp_path / "packed")
    assert isinstance(found, PackedImages)
    assert [(file.suffix, len(file.stem)) for file in sorted((tmp_path / "packed").iterdir())] == [
        (".lock", 64),
        (".npy", 64),
    ]
    for name in ("shape", "source", "origin", "classes", "final"):
        assert getattr(found, name) == getattr(images, name)
    for one, other in ((found, images), (found.as_outliers(), images.as_outliers())):
        rows = torch.tensor([3, 0, 2, 2])
        assert len(one) == len(other)
        assert all(torch.equal(*parts) for parts in zip(one[rows], other[rows], strict=True))
        assert one[rows].images.is_contiguous()
        assert one.fingerprint() == other.fingerprint()
        some, others = Rows(one, rows), Rows(other, rows)
        assert some.fingerprint() == others.fingerprint()
        assert torch.equal(some.read(torch.tensor([1, 3])), others.read(torch.tensor([1, 3])))
    assert found.read(torch.arange(0)).shape == (0, *images.shape)
    same_in_workers(found)


def test_a_packed_set_is_mapped_not_read(tmp_path):
    write_folder(tmp_path / "files")
    images = Rows(read_folder(tmp_path / "files"), torch.arange(9).repeat(300))
    found = pack(images, tmp_path / "packed", num_workers=2)
    rows = torch.tensor([2699, 5, 1300])
    assert torch.equal(found.read(rows), images.read(rows))
    assert isinstance(found._mapped, np.memmap)
    assert np.load(found.path).shape == (2700, 3, 8, 6)
    assert len(pickle.dumps(found)) < found.path.stat().st_size / 5


def test_images_are_packed_once(tmp_path, sets, monkeypatch):
    first = [pack(images, tmp_path / "packed") for images in sets.values()]
    paths = [images.path for images in first]
    assert paths[0] == paths[4]  # labels make no difference
    assert len(set(paths)) == 5
    monkeypatch.setattr(packed, "_decode", None)
    for images, path in zip(sets.values(), paths, strict=True):
        assert pack(images, tmp_path / "packed").path == path


def test_an_edited_image_is_noticed(tmp_path):
    write_folder(tmp_path / "files")
    before = read_folder(tmp_path / "files")
    assert not pack(before, tmp_path / "packed").read(torch.tensor([4])).eq(7).all()
    size = (tmp_path / "files/4.bmp").stat().st_size
    Image.fromarray(np.full((8, 6, 3), 7, dtype=np.uint8)).save(tmp_path / "files/4.bmp")
    after = read_folder(tmp_path / "files")
    assert (tmp_path / "files/4.bmp").stat().st_size == size
    assert after.fingerprint() == before.fingerprint()
    for images, row in ((after, 4), (Rows(after, torch.tensor([0, 4])), 1)):
        assert pack(images, tmp_path / "packed").read(torch.tensor([row])).eq(7).all()


def test_an_edited_database_is_noticed(tmp_path):
    made = []
    for shade in (3, 7):
        write_lmdb(tmp_path / "scenes", {b"a": encoded(np.full((8, 8, 3), shade, dtype=np.uint8), "bmp")})
        images = LMDBImages([tmp_path / "scenes"], Fit((3, 8, 8)), "scenes")
        made.append(images.fingerprint())
        assert pack(images, tmp_path / "packed").read(torch.tensor([0])).eq(shade).all()
    assert made[0] == made[1]


def test_folders_that_look_alike_are_not_taken_for_each_other(tmp_path):
    for name in ("train", "test"):
        expected = write_folder(tmp_path / name)
        found = pack(read_folder(tmp_path / name), tmp_path / "packed")
        assert np.array_equal(found.read(torch.arange(9)).permute(0, 2, 3, 1), expected)


@pytest.mark.parametrize("damage", ["empty", "header", "short", "long", "other", "text"])
def test_a_damaged_array_is_made_anew(tmp_path, caplog, damage):
    write_folder(tmp_path / "files")
    images = read_folder(tmp_path / "files")
    path = pack(images, tmp_path / "packed").path
    whole = path.read_bytes()
    np.save(tmp_path / "other.npy", np.zeros((9, 3, 8, 6), dtype=np.int8))
    other = (tmp_path / "other.npy").read_bytes()
    path.write_bytes(
        {"empty": b"", "header": whole[:100], "short": whole[:-1], "long": whole + b"0", "other": other, "text": b"x"}[
            damage
        ]
    )
    with caplog.at_level(logging.WARNING):
        found = pack(read_folder(tmp_path / "files"), tmp_path / "packed")
    warned = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert warned == [f"{path} is damaged and made anew"]
    assert path.read_bytes() == whole
    assert torch.equal(found.read(torch.arange(9)), images.read(torch.arange(9)))


def test_nothing_is_left_of_a_failed_decoding(tmp_path):
    write_folder(tmp_path / "files")
    (tmp_path / "files/8.bmp").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"cannot use image .*8\.bmp"):
        pack(read_folder(tmp_path / "files"), tmp_path / "packed")
    assert {file.suffix for file in (tmp_path / "packed").iterdir()} == {".lock"}


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path):
    write_folder(tmp_path / "files")
    (tmp_path / "packed").write_text("not a folder")
    with pytest.raises(OSError, match="packed"):
        pack(read_folder(tmp_path / "files"), tmp_path / "packed")


def pack_slowly(images, folder, calls, seconds, reports):
    def read(rows):
        calls.put(os.getpid())
        time.sleep(seconds)
        return FolderImages.read(images, rows)

    images.read = read
    records = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    packed.logger.addHandler(handler)
    packed.logger.setLevel(logging.INFO)
    found = pack(images, folder)
    reports.put((found.fingerprint(), found.read(torch.arange(len(images))).numpy().tobytes(), records))


@pytest.fixture
def start(tmp_path):
    """Start a process that packs the folder; it says when it decodes, and what it made."""
    context = multiprocessing.get_context("fork")
    processes, calls, reports = [], context.Queue(), context.Queue()

    def begin(images, seconds):
        processes.append(
            context.Process(target=pack_slowly, args=(images, tmp_path / "packed", calls, seconds, reports))
        )
        processes[-1].start()
        return processes[-1], calls, reports

    yield begin
    for process in processes:
        process.kill()
        process.join()


def test_processes_wait_for_the_first(tmp_path, start, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK", 3)
    expected = write_folder(tmp_path / "files").transpose(0, 3, 1, 2).tobytes()
    images = read_folder(tmp_path / "files")
    for _ in range(2):
        _, calls, reports = start(images, 0.2)
    made = [reports.get(timeout=30) for _ in range(2)]
    assert {(fingerprint, content) for fingerprint, content, _ in made} == {(images.fingerprint(), expected)}
    assert len({calls.get(timeout=5) for _ in range(3)}) == 1
    assert calls.empty()
    said = sorted(records[0] for _, _, records in made)
    assert said[0].startswith("decoding the 9 images of scenes, this once, into ")
    assert said[1] == "waiting for another process that decodes scenes"


def test_a_killed_process_leaves_nothing_that_counts(tmp_path, start, monkeypatch):
    monkeypatch.setattr(packed, "CHUNK", 1)
    expected = write_folder(tmp_path / "files").transpose(0, 3, 1, 2)
    images = read_folder(tmp_path / "files")
    process, calls, _ = start(images, 0.1)
    for _ in range(4):
        calls.get(timeout=30)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert {file.suffix for file in (tmp_path / "packed").iterdir()} == {".lock", ".part"}
    assert np.array_equal(pack(images, tmp_path / "packed").read(torch.arange(9)), expected)
    assert {file.suffix for file in (tmp_path / "packed").iterdir()} == {".lock", ".npy"}
