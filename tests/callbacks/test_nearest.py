"""The search of nearest rows, chunk by chunk, against all distances at once."""

import numpy as np
import pytest
import torch

from callbacks.nearest import nearest_of_class


def by_brute_force(features, classes, known):
    """Find the nearest rows from all differences, in float64; the first of equal ones."""
    points, classes, found = features.double().numpy(), classes.numpy(), []
    for query in range(known, len(points)):
        candidates = np.flatnonzero(classes[:known] == classes[query])
        candidates = candidates if len(candidates) else np.arange(known)
        distances = ((points[candidates] - points[query]) ** 2).sum(1)
        found.append(candidates[np.flatnonzero(distances == distances.min())[0]])
    return found


def search(features, classes, known, **options):
    found = nearest_of_class(lambda rows: features[rows], classes, known, **options)
    assert found.dtype == torch.int64
    return found.tolist()


def draw(length, width=8, classes=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (length,), generator=generator)
    return torch.randn(length, width, generator=generator).relu(), labels


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 64, 199, 200, 2048])
def test_the_search_equals_brute_force(chunk):
    features, classes = draw(300)
    expected = by_brute_force(features, classes, 200)
    assert search(features, classes, 200, chunk=chunk) == expected
    assert torch.equal(classes[expected], classes[200:])
    everywhere = by_brute_force(features, torch.zeros(300), 200)
    assert sum(a != b for a, b in zip(everywhere, expected, strict=True)) > 30  # the class decides on many


def test_the_search_is_the_same_in_one_chunk_as_by_default():
    features, classes = draw(5000, 4)
    found = search(features, classes, 4500)
    assert found == by_brute_force(features, classes, 4500) == search(features, classes, 4500, chunk=10_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 100.0, -1e4])
@pytest.mark.parametrize("chunk", [50, 2048])
def test_rows_that_are_close_together_and_far_from_0_are_told_apart(offset, dtype, chunk):
    rows, labels = draw(700, 512, classes=1)
    step = np.spacing(np.float32(abs(offset) or 1.0)) * 4
    close = (offset + float(step) * rows).to(dtype)
    assert search(close, labels, 600, chunk=chunk) == by_brute_force(close, labels, 600)


@pytest.mark.parametrize("chunk", [20, 50, 2048])
def test_rows_that_are_far_from_the_first_ones_are_told_apart(chunk):
    """Whatever point distances are reckoned from, it is far from most."""
    rows, labels = draw(400, 512, classes=1)
    steps = torch.randint(-2, 3, rows.shape, generator=torch.Generator().manual_seed(1))
    far = 1e6 + steps * float(np.spacing(np.float32(1e6)))
    far[:50] = rows[:50]
    far[350:380] = far[100:130] + 0  # found exactly
    assert search(far.float(), labels, 350, chunk=chunk) == by_brute_force(far.float(), labels, 350)


@pytest.mark.parametrize("chunk", [1, 2, 5, 8, 30, 2048])
def test_of_equal_ones_it_is_the_first(chunk):
    features, classes = draw(20, 6, classes=2)
    known = torch.cat([features, features.flip(0), features])
    labels = torch.cat([classes, classes.flip(0), classes])
    queries = features + 1e-3
    everything, everyone = torch.cat([known, queries]), torch.cat([labels, classes])
    found = search(everything, everyone, 60, chunk=chunk)
    assert found == by_brute_force(everything, everyone, 60)
    assert max(found) < 20


@pytest.mark.parametrize("chunk", [1, 3, 2048])
def test_on_both_sides_at_the_same_distance_the_first_is_found(chunk):
    values = torch.tensor([1.0, -1.0, -1.0, 1.0, 2.0, 0.0, 0.0])[:, None]
    assert search(values, torch.tensor([1, 0, 0, 1, 0, 0, 1]), 5, chunk=chunk) == [1, 0]
    assert search(values.flip(1), torch.zeros(7, dtype=torch.int64), 5, chunk=chunk) == [0, 0]


@pytest.mark.parametrize("chunk", [1, 4, 2048])
def test_where_all_rows_are_the_same_each_finds_the_first_of_its_class(chunk):
    features, classes = torch.full((40, 512), 1 / 3), torch.arange(40) * 3 % 5
    assert search(features, classes, 30, chunk=chunk) == [classes[:30].tolist().index(label) for label in classes[30:]]


@pytest.mark.parametrize("chunk", [1, 3, 2048])
def test_a_class_of_one_row_finds_that_and_a_class_without_any_the_nearest_of_all(chunk):
    features, classes = draw(60, 3, classes=2)
    classes[17], classes[50:54], classes[54:] = 7, 7, 9
    found = search(features, classes, 50, chunk=chunk)
    assert found == by_brute_force(features, classes, 50)
    assert found[:4] == [17] * 4
    assert len({int(classes[row]) for row in found[4:]}) > 1


def test_outliers_find_no_outliers():
    features, classes = draw(40, 3, classes=1)
    features[20:] = features[39]
    found = search(features, classes, 20, chunk=6)
    assert len(set(found)) == 1
    assert max(found) < 20
    assert found == by_brute_force(features, classes, 20)


def test_the_last_known_row_is_found():
    features, classes = draw(30, 3, classes=2)
    features[20:], classes[20:] = features[19], classes[19]
    assert search(features, classes, 20) == [19] * 10
    classes[20:] = 7  # of which there is none
    assert search(features, classes, 20) == [19] * 10


def test_without_outliers_nothing_is_found():
    features, classes = draw(20)
    assert search(features, classes, 20) == []


@pytest.mark.parametrize("chunk", [1, 10, 33])
def test_no_more_rows_are_read_than_a_chunk_at_once(chunk):
    features, classes = draw(300, classes=2)
    sizes = []
    nearest_of_class(lambda rows: sizes.append(len(rows)) or features[rows], classes, 250, chunk=chunk)
    assert max(sizes) == chunk
    assert len(sizes) > 250 / chunk
