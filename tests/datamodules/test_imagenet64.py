import io
import multiprocessing
import os
import pickle
import time

import numpy as np
import pytest
import torch

from datamodules import imagenet64
from datamodules.imagenet64 import join_batches

RANDOM = np.random.default_rng(0)


def batch(count, first_label=1):
    data = RANDOM.integers(0, 256, (count, 3 * 64 * 64), dtype=np.uint8)
    return {"data": data, "labels": list(range(first_label, first_label + count)), "mean": data.mean(axis=0)}


def write(path, content, protocol=3):
    path.write_bytes(pickle.dumps(content, protocol))


@pytest.fixture
def batches(tmp_path):
    contents = [batch(3), batch(2, first_label=999)]
    for number, content in enumerate(contents, 1):
        write(tmp_path / f"train_data_batch_{number}", content)
    return contents


def test_batches_become_one_array(tmp_path, batches):
    path, labels = join_batches(tmp_path)
    images = np.load(path)
    assert path == tmp_path / "images.npy"
    assert images.shape == (5, 64, 64, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == [0, 1, 2, 998, 999]
    assert labels.dtype == torch.int64
    for row, data in enumerate(np.concatenate([content["data"] for content in batches])):
        red, green, blue = data.reshape(3, 64, 64)
        assert np.array_equal(images[row], np.stack([red, green, blue], axis=2))
    assert {file.name for file in tmp_path.iterdir()} == {
        *(f"train_data_batch_{number}" for number in (1, 2)),
        *("images.npy", "labels.npz", "images.lock"),
    }


def test_long_batches_are_written_in_pieces(tmp_path, batches, monkeypatch):
    whole = np.load(join_batches(tmp_path)[0])
    (tmp_path / "labels.npz").unlink()
    monkeypatch.setattr(imagenet64, "CHUNK", 2)
    assert np.array_equal(np.load(join_batches(tmp_path)[0]), whole)


def test_they_are_joined_once(tmp_path, batches):
    path, labels = join_batches(tmp_path)
    made = path.stat()
    assert torch.equal(join_batches(tmp_path)[1], labels)
    assert path.stat() == made
    write(tmp_path / "train_data_batch_3", batch(1))
    assert join_batches(tmp_path)[1].tolist() == [0, 1, 2, 998, 999, 0]
    assert len(np.load(path)) == 6
    for number in (1, 2, 3):
        (tmp_path / f"train_data_batch_{number}").unlink()
    assert len(join_batches(tmp_path)[1]) == 6


def join_and_report(folder, barrier, reports):
    barrier.wait()
    reports.put(join_batches(folder)[1].tolist())


def test_processes_wait_for_each_other(tmp_path, batches, monkeypatch):
    join = imagenet64._join

    def slow_join(*args):
        with (tmp_path / "calls").open("a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(0.3)
        return join(*args)

    monkeypatch.setattr(imagenet64, "_join", slow_join)
    context = multiprocessing.get_context("fork")
    barrier, reports = context.Barrier(2), context.Queue()
    processes = [context.Process(target=join_and_report, args=(tmp_path, barrier, reports)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [reports.get(timeout=30) for _ in processes] == [[0, 1, 2, 998, 999]] * 2
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert len((tmp_path / "calls").read_text().splitlines()) == 1


def test_nothing_is_left_of_a_failure(tmp_path, batches):
    write(tmp_path / "train_data_batch_2", "text")
    with pytest.raises(ValueError, match=r"train_data_batch_2 must hold a dict .* it holds str"):
        join_batches(tmp_path)
    assert not list(tmp_path.glob("unfinished*"))
    assert not (tmp_path / "images.npy").exists()
    write(tmp_path / "train_data_batch_2", batches[1])
    assert len(join_batches(tmp_path)[1]) == 5


def test_missing_batches_are_errors(tmp_path, batches):
    write(tmp_path / "train_data_batch_4", batch(1))
    with pytest.raises(FileNotFoundError, match=r"no file .*train_data_batch_3, though there is train_data_batch_4"):
        join_batches(tmp_path)
    for number in (1, 2, 4):
        (tmp_path / f"train_data_batch_{number}").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*train_data_batch_1"):
        join_batches(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"data": np.zeros((3, 12288))}, r"data must be uint8 of shape \(N, 12288\), it is float64"),
        ({"data": np.zeros((3, 3072), dtype=np.uint8)}, r"it is uint8 \(3, 3072\)"),
        ({"labels": [1, 2]}, r"labels must be 3 integers 1\.\.1000"),
        ({"labels": [0, 1, 2]}, "1..1000"),
        ({"labels": [1, 2, 1001]}, "1..1000"),
        ({"labels": ["a", "b", "c"]}, "1..1000"),
    ],
)
def test_wrong_batches_are_errors(tmp_path, change, message):
    write(tmp_path / "train_data_batch_1", batch(3) | change)
    with pytest.raises(ValueError, match=f"train_data_batch_1: .*{message}"):
        join_batches(tmp_path)


def test_damaged_files_are_errors(tmp_path, batches):
    path = tmp_path / "train_data_batch_1"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[: len(whole) // 2]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="train_data_batch_1 cannot be read as a pickle of plain arrays"):
            join_batches(tmp_path)
    path.write_bytes(whole)
    join_batches(tmp_path)
    (tmp_path / "labels.npz").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"labels\.npz is damaged; delete it, and it is made again"):
        join_batches(tmp_path)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("spelling", [b"numpy.core", b"numpy._core"])
def test_every_spelling_of_arrays_is_read(tmp_path, spelling, protocol):
    content = batch(2)
    pickled = pickle.dumps(content, protocol)
    assert b"numpy._core" in pickled
    if protocol < 4:  # later ones write how long names are
        pickled = pickled.replace(b"numpy._core", spelling)
    (tmp_path / "train_data_batch_1").write_bytes(pickled)
    path, labels = join_batches(tmp_path)
    assert np.array_equal(np.load(path).transpose(0, 3, 1, 2).reshape(2, -1), content["data"])
    assert labels.tolist() == [0, 1]


def test_python_2_is_read(tmp_path):
    content = batch(1)
    # what Python 2 writes: its str, which are bytes, for the keys, for the pixels and within the type of the array
    strings = [b"data", b"b", b"u1", b"|"]
    data, code, kind, order = (b"U" + bytes([len(string)]) + string for string in strings)
    pixels = b"T" + (12288).to_bytes(4, "little") + content["data"].tobytes()
    pickled = (
        b"\x80\x02}(" + data + b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85" + code + b"tR"
        b"(K\x01K\x01M\x00\x30\x86cnumpy\ndtype\n(" + kind + b"K\x00K\x01tR(K\x03" + order + b"NNN"
        b"J\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89" + pixels + b"tbU\x06labels]K\x07au."
    )
    assert set(pickle.loads(pickled, encoding="latin1")) == {"data", "labels"}
    (tmp_path / "train_data_batch_1").write_bytes(pickled)
    path, labels = join_batches(tmp_path)
    assert np.array_equal(np.load(path).transpose(0, 3, 1, 2).reshape(1, -1), content["data"])
    assert labels.tolist() == [6]


class Evil:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("evil", "name"),
    [
        (Evil(os.mkdir, "{folder}/owned"), "posix.mkdir"),
        (Evil(eval, "1"), "builtins.eval"),
        (Evil(np.load, "x"), r"numpy.*load"),
        (io.BytesIO(b""), "_io.BytesIO"),
    ],
)
def test_what_is_no_array_is_refused(tmp_path, evil, name):
    if isinstance(evil, Evil):
        evil.call = evil.call[0], tuple(arg.format(folder=tmp_path) for arg in evil.call[1])
    write(tmp_path / "train_data_batch_1", batch(1) | {"more": evil})
    with pytest.raises(ValueError, match=f"train_data_batch_1 .*it asks for {name}, which no array needs"):
        join_batches(tmp_path)
    assert not (tmp_path / "owned").exists()
