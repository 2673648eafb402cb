import pytest
import torch

from datamodules.splits import OODSubset, Subset, draw, draw_labels, open_set, relabel, stratified_split


def test_a_random_subset_is_drawn_without_replacement_and_repeats_differ():
    first, second, third = OODSubset("random", 20, 3).draw(100, seed=0)
    for rows in (first, second, third):
        assert rows.tolist() == sorted(set(rows.tolist()))
        assert len(rows) == 20
        assert 0 <= rows.min() <= rows.max() < 100
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    again = OODSubset("random", 20, 3).draw(100, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(again, (first, second, third), strict=True))
    assert not torch.equal(OODSubset("random", 20).draw(100, seed=1)[0], first)


def test_every_row_is_drawn_equally_often():
    counts = torch.cat(OODSubset("random", 5, 4000).draw(10, seed=0)).bincount(minlength=10)
    assert (counts - 2000).abs().max() < 4 * (4000 * 0.5 * 0.5) ** 0.5


def test_first_and_all():
    assert [rows.tolist() for rows in OODSubset("first", 3).draw(10, 0)] == [[0, 1, 2]]
    assert [rows.tolist() for rows in OODSubset().draw(3, 0)] == [[0, 1, 2]]


@pytest.mark.parametrize("subset", [OODSubset("first", 5), OODSubset("random", 5, 3)])
@pytest.mark.parametrize("length", [4, 5])
def test_a_set_that_is_not_larger_is_used_whole_and_once(subset, length):
    assert [rows.tolist() for rows in subset.draw(length, 0)] == [list(range(length))]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("all", 5), "'all' takes neither count nor id_per_ood, got count=5"),
        (("first", None), "'first' takes a count or id_per_ood of at least 1, got count=None"),
        (("random", 0), "at least 1, got count=0"),
        (("random", 5, 1, 5), "at least 1, got count=5, id_per_ood=5"),
        (("first", 5, 2), "repeats=2 with rule 'first'; only 'random' repeats"),
        (("random", 5, 0), "repeats=0 with rule 'random'"),
    ],
)
def test_subsets_that_make_no_sense(arguments, message):
    with pytest.raises(ValueError, match=message):
        OODSubset(*arguments)


@pytest.mark.parametrize("fraction", [0, -0.1, 1.5])
def test_a_fraction_is_a_share(fraction):
    with pytest.raises(ValueError, match=f"0 < fraction <= 1, got {fraction}"):
        Subset(fraction)


def test_rows_are_drawn_in_order():
    rows = draw(50, 10, 3)
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(draw(50, 10, 3), rows)
    assert not torch.equal(draw(50, 10, 4), rows)


def test_labels_are_drawn_by_seed_and_sorted():
    classes = [str(label) for label in range(20)]
    draws = [draw_labels(classes, 5, seed) for seed in range(30)]
    assert all(labels == sorted(set(labels)) and len(labels) == 5 for labels in draws)
    assert len({tuple(labels) for labels in draws}) > 25
    assert set().union(*draws) == set(range(20))
    assert draw_labels(classes, 20, 0) == list(range(20))


@pytest.mark.parametrize("count", [1, 0, 21])
def test_impossible_numbers_of_labels(count):
    with pytest.raises(ValueError, match=rf"num_labels must be in 2\.\.20.*got {count}"):
        draw_labels([""] * 20, count, 0)


def test_the_first_classes_are_known():
    assert open_set(["a", "b", "c"], 2) == [0, 1]
    for known in (0, 3, 4, -1):
        with pytest.raises(ValueError, match=f"known={known}: .*3 classes.*1..2"):
            open_set(["a", "b", "c"], known)


def test_kept_labels_are_numbered_anew():
    labels = torch.tensor([5, 0, 3, -1, 5, 2])
    rows, renumbered = relabel(labels, [0, 3, 5])
    assert rows.tolist() == [0, 1, 2, 4]
    assert renumbered.tolist() == [2, 0, 1, -1, 2, -1]
    rows, renumbered = relabel(labels, [7])
    assert rows.tolist() == []
    assert set(renumbered.tolist()) == {-1}
    assert relabel(torch.empty(0, dtype=torch.int64), [0])[0].tolist() == []


def test_a_fraction_of_a_class_that_is_too_small_names_the_option():
    with pytest.raises(ValueError, match=r"class 'a'.*change the fraction"):
        stratified_split(torch.zeros(3, dtype=torch.int64), 0.01, 0, ["a"], "the fraction")


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
    with pytest.raises(ValueError, match=f"{share} is {count} of the 10 images of class 'cat'.*val_split"):
        stratified_split(labels, share, 0, ["dog", "cat"])


def test_a_share_of_the_id_images():
    assert OODSubset("first", id_per_ood=5).resolve(10_000) == OODSubset("first", 2_000)
    assert OODSubset("random", repeats=3, id_per_ood=5).resolve(4_999) == OODSubset("random", 999, 3)
    assert OODSubset("first", id_per_ood=5).resolve(3) == OODSubset("first", 1)
    assert OODSubset().resolve(10) == OODSubset()
