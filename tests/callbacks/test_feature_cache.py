import json

import numpy as np
import pytest

from callbacks.feature_cache import ArrayFile, FeatureCache

LENGTH, CHUNK = 50, 8  # 7 chunks, the last of 2 rows
WIDTHS = {"logits": 3, "features.penultimate": 5}


def make(root, **kwargs):
    arguments = {"identity": {"weights": "a"}, "length": LENGTH, "widths": WIDTHS, "chunk": CHUNK}
    return FeatureCache(root, **(arguments | kwargs))


def values(dtype="float32"):
    random = np.random.default_rng(0)
    return {name: random.standard_normal((LENGTH, width)).astype(dtype) for name, width in WIDTHS.items()}


def fill(cache, chunks, dtype="float32"):
    for chunk in chunks:
        rows = cache.rows(chunk).numpy()
        cache.write(chunk, {name: array[rows] for name, array in values(dtype).items()})


@pytest.fixture
def full(tmp_path):
    cache = make(tmp_path)
    cache.prepare()
    fill(cache, range(7))
    return cache


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_come_back_as_they_were_written(tmp_path, dtype):
    cache = make(tmp_path, dtype=dtype)
    cache.prepare()
    assert cache.missing() == list(range(7))
    fill(cache, [6, 2, 0, 1, 5, 4, 3], dtype)
    again = make(tmp_path, dtype=dtype)
    again.prepare()
    assert again.missing() == []
    mapped = again.open()
    for name, expected in values(dtype).items():
        assert np.array_equal(mapped[name], expected)
        assert np.array_equal(np.load(cache.folder / f"{name}.npy"), expected)  # any tool can read it
        assert isinstance(mapped[name], np.memmap)
        assert not mapped[name].flags.writeable
    assert again.nbytes == sum(array.nbytes for array in values(dtype).values())


def test_what_is_written_is_not_missing(tmp_path):
    cache = make(tmp_path)
    cache.prepare()
    fill(cache, [0, 6, 3])
    again = make(tmp_path)
    again.prepare()
    assert again.missing() == [1, 2, 4, 5]


def test_the_order_of_the_arrays_does_not_matter(full, tmp_path):
    again = make(tmp_path, widths=dict(reversed(WIDTHS.items())))
    again.prepare()
    assert again.missing() == []


@pytest.mark.parametrize("name", WIDTHS)
@pytest.mark.parametrize("chunk", [0, 3, 6])
def test_a_flipped_bit_costs_its_chunk(full, name, chunk):
    path = full.folder / f"{name}.npy"
    content = bytearray(path.read_bytes())
    row = chunk * CHUNK + 1
    content[len(content) - (LENGTH - row) * WIDTHS[name] * 4 + 2] ^= 1
    path.write_bytes(content)
    full.prepare()
    assert full.missing() == [chunk]
    fill(full, [chunk])
    assert full.missing() == []


def damage_cut_short(path):
    path.write_bytes(path.read_bytes()[: -(50 - 3 * 8 - 4) * 5 * 4])  # in the middle of chunk 3


def damage_deleted(path):
    path.unlink()


def damage_header(path):
    path.write_bytes(b"\0" * 40 + path.read_bytes()[40:])


def damage_longer(path):
    path.write_bytes(path.read_bytes() + b"more")


@pytest.mark.parametrize(
    ("damage", "missing"),
    [(damage_cut_short, [3, 4, 5, 6]), (damage_deleted, list(range(7))), (damage_header, []), (damage_longer, [])],
)
def test_a_damaged_file_costs_the_chunks_that_are_gone(full, damage, missing):
    damage(full.folder / "features.penultimate.npy")
    full.prepare()
    assert full.missing() == missing
    fill(full, missing)
    for name, expected in values().items():
        assert np.array_equal(np.load(full.folder / f"{name}.npy"), expected)


@pytest.mark.parametrize("content", [b"", b"nonsense" * 40])
def test_damaged_checksums_cost_time_and_nothing_else(full, content):
    (full.folder / "checksums.npy").write_bytes(content)
    full.prepare()
    assert full.missing() == list(range(7))


@pytest.mark.parametrize("until", [1, 2])
def test_a_chunk_counts_only_when_all_of_it_is_written(tmp_path, monkeypatch, until):
    cache = make(tmp_path)
    cache.prepare()
    fill(cache, [0, 1])
    write, calls = ArrayFile.write, []

    def killed(array, first, rows):
        calls.append(array)
        if len(calls) > until:
            raise KeyboardInterrupt
        write(array, first, rows)

    monkeypatch.setattr(ArrayFile, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        fill(cache, [2])
    assert cache.missing() == [2, 3, 4, 5, 6]


def test_rows_of_zeros_are_not_taken_for_missing_ones(tmp_path):
    cache = make(tmp_path)
    cache.prepare()
    cache.write(0, {name: np.zeros((CHUNK, width), dtype=np.float32) for name, width in WIDTHS.items()})
    assert cache.missing() == [1, 2, 3, 4, 5, 6]


def test_the_folder_follows_from_all_that_matters(tmp_path):
    others = [
        {"identity": {"weights": "b"}},
        {"identity": {}},
        {"length": 51},
        {"widths": {"logits": 3}},
        {"dtype": "float16"},
        {"chunk": 16},
    ]
    assert make(tmp_path).folder == make(tmp_path).folder
    assert len({make(tmp_path, **other).folder for other in ({}, *others)}) == 7


def test_a_folder_that_is_about_something_else_is_refused(full):
    path = full.folder / "meta.json"
    meta = json.loads(path.read_text())
    assert meta["weights"] == "a"
    path.write_text(json.dumps(meta | {"weights": "b", "mean": 0}))
    with pytest.raises(ValueError, match=r"meta\.json is not about what is wanted.*: weights, mean differ; remove"):
        full.prepare()
    for damage in ("{", ""):
        path.write_text(damage)
        full.prepare()
        assert json.loads(path.read_text()) == meta
    assert full.missing() == []


@pytest.mark.parametrize("wrong", [np.zeros((8, 4), np.float32), np.zeros((7, 5), np.float32), np.zeros((8, 5))])
def test_other_rows_are_refused(full, wrong):
    rows = {"logits": np.zeros((8, 3), np.float32), "features.penultimate": wrong}
    with pytest.raises(ValueError, match=r"chunk 1 of .*penultimate\.npy is float32 \(8, 5\), not"):
        full.write(1, rows)
