import pytest
import torch

from datamodules import plans
from datamodules.plans import BalancedPlan, PairedPlan, Plan


def share(monkeypatch, plan, rank, world_size):
    monkeypatch.setattr(plans, "rank_and_world_size", lambda: (rank, world_size))
    return list(plan)


@pytest.mark.parametrize("length", [1, 7, 283])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("shuffle", [False, True])
def test_ranks_together_see_the_batches_of_one_process(monkeypatch, length, world_size, shuffle):
    plan = Plan(length, batch_size=6, seed=3, shuffle=shuffle)
    plan.set_epoch(2)
    whole = share(monkeypatch, plan, 0, 1)
    shares = [share(monkeypatch, plan, rank, world_size) for rank in range(world_size)]
    assert len(whole) == len(plan) == -(-length // 6)
    assert sorted(torch.cat(whole).tolist()) == list(range(length))
    for rank, batches in enumerate(shares):
        assert len(batches) == len(plan)
        for batch, total in zip(batches, whole, strict=True):
            assert batch.dtype == torch.int64
            assert batch.tolist() == total.tolist()[rank::world_size]


def test_last_batch_may_be_empty_on_a_rank(monkeypatch):
    assert [rows.tolist() for rows in share(monkeypatch, Plan(7, 6), 1, 2)] == [[1, 3, 5], []]


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        plan = Plan(50, 50, seed, shuffle=True)
        plan.set_epoch(epoch)
        torch.rand(3)  # the global state plays no part
        return tuple(next(iter(plan)).tolist())

    assert order(0, 1) == order(0, 1)
    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


def test_drop_last():
    batches = list(Plan(20, 6, shuffle=True, drop_last=True))
    assert [len(rows) for rows in batches] == [6, 6, 6]
    assert len(torch.cat(batches).unique()) == 18


def test_first_skips():
    plan = Plan(20, 6)
    plan.first = 2
    assert [rows[0].item() for rows in plan] == [12, 18]
    assert len(plan) == 4


def test_uneven_training_share_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"64 rows .* by 3 processes"):
        share(monkeypatch, Plan(200, 64, drop_last=True), 0, 3)
    assert len(share(monkeypatch, Plan(200, 64), 0, 3)) == 4
    with pytest.raises(ValueError, match=r"9 rows .* by 2 processes"):
        share(monkeypatch, PairedPlan(40, 20, batch_size=6, ratio=1.5), 0, 2)


def test_a_set_smaller_than_a_batch_is_an_error():
    with pytest.raises(ValueError, match="5 rows does not fill one batch of 6"):
        Plan(5, 6, drop_last=True)
    with pytest.raises(ValueError, match="5 rows does not fill one batch of 6"):
        PairedPlan(5, 100, 6)
    assert len(Plan(5, 6)) == 1
    with pytest.raises(ValueError, match="0 rows"):
        Plan(0, 6)
    with pytest.raises(ValueError, match="batch size 0"):
        Plan(5, 0)


@pytest.mark.parametrize("outliers", [3, 11, 500])
def test_paired_plan(monkeypatch, outliers):
    plan = PairedPlan(100, outliers, batch_size=12, ratio=1.5, seed=1)
    whole = share(monkeypatch, plan, 0, 1)
    assert len(whole) == len(plan) == 8
    known, others = torch.stack([rows[:12] for rows in whole]), torch.cat([rows[12:] for rows in whole])
    assert len(known.unique()) == 96
    assert known.max() < 100
    assert len(others) == 8 * 18
    assert others.min() >= 100
    assert others.max() < 100 + outliers
    for start in range(0, len(others), outliers):  # drawn without replacement until used up
        drawn = others[start : start + outliers]
        assert len(drawn.unique()) == len(drawn)
    if outliers == 11:
        assert others[:11].tolist() != others[11:22].tolist()

    for rank in range(3):
        for batch, total in zip(share(monkeypatch, plan, rank, 3), whole, strict=True):
            total = total.tolist()
            assert batch.tolist() == total[:12][rank::3] + total[12:][rank::3]

    plan.set_epoch(1)
    assert share(monkeypatch, plan, 0, 1)[0].tolist() != whole[0].tolist()


@pytest.mark.parametrize("chosen", [[4], [1, 3, 4, 9], list(range(20, 50))])
def test_a_paired_plan_draws_from_the_chosen_outliers(monkeypatch, chosen):
    plan = PairedPlan(100, 50, batch_size=12, ratio=1.5, seed=1)
    plan.chosen = torch.tensor(chosen)
    whole = share(monkeypatch, plan, 0, 1)
    others = torch.cat([rows[12:] for rows in whole])
    assert set((others - 100).tolist()) == set(chosen)
    assert [len(rows) for rows in whole] == [30] * 8
    for start in range(0, len(others), len(chosen)):  # without replacement until used up
        drawn = others[start : start + len(chosen)]
        assert len(drawn.unique()) == len(drawn)
    for batch, total in zip(share(monkeypatch, plan, 1, 2), whole, strict=True):
        assert batch.tolist() == total[:12][1::2].tolist() + total[12:][1::2].tolist()


def test_paired_plan_without_outliers_is_an_error():
    with pytest.raises(ValueError, match="the set has 0"):
        PairedPlan(100, 0, 10)
    with pytest.raises(ValueError, match=r"10 ID rows at a ratio of 0.01"):
        PairedPlan(100, 5, 10, ratio=0.01)


def uneven_labels(length=997, classes=7):
    """Labels in no order, of classes with different numbers of rows."""
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(length, generator=generator) ** 3 * classes).long()


@pytest.mark.parametrize(
    ("rows", "classes", "batch", "length"),
    [
        (50_000, 10, (8, 8), 781),
        (50_000, 10, (10, 8), 624),
        (50_000, 10, (10, 20), 249),
        (50_000, 100, (20, 20), 124),
        (60_000, 10, (10, 16), 374),
        (129, 4, (4, 8), 4),
        (128, 4, (4, 8), 3),
    ],
)
def test_number_of_balanced_batches(rows, classes, batch, length):
    plan = BalancedPlan(torch.arange(rows) % classes, *batch)
    assert len(plan) == len(list(plan)) == length


@pytest.mark.parametrize("batch", [(2, 2), (3, 8), (7, 5)])
def test_balanced_batches_have_equally_many_rows_of_each_class(batch):
    labels = uneven_labels()
    for rows in BalancedPlan(labels, *batch, seed=4):
        assert rows.dtype == torch.int64
        assert len(rows.unique()) == batch[0] * batch[1]
        assert labels[rows].unique(return_counts=True)[1].tolist() == [batch[1]] * batch[0]


def test_a_class_repeats_no_row_before_all_are_used():
    labels = uneven_labels()
    rows = torch.cat(list(BalancedPlan(labels, 3, 8)))
    most = 0
    for label in range(7):
        drawn, members = rows[labels[rows] == label], (labels == label).nonzero().flatten()
        used = len(members) // 8 * 8  # where fewer than eight would remain, the list begins anew
        passes = drawn.split(used)
        assert all(len(each.unique()) == len(each) for each in passes)
        assert set(drawn.tolist()) <= set(members.tolist())
        if len(passes) > 1:
            assert not torch.equal(passes[0][: len(passes[1])], passes[1])
        most = max(most, len(passes))
    assert most == 4  # the smallest class begins anew three times


def test_classes_are_drawn_uniformly():
    plan = BalancedPlan(torch.arange(30_000) % 10, 3, 2)
    drawn = torch.cat([(rows % 10).unique() for rows in plan])  # label = row % 10
    assert drawn.bincount().float().mean() == len(plan) * 3 / 10
    assert (drawn.bincount() - len(plan) * 0.3).abs().max() < 4 * (len(plan) * 0.3 * 0.7) ** 0.5


def test_a_balanced_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        plan = BalancedPlan(uneven_labels(), 3, 4, seed)
        plan.set_epoch(epoch)
        torch.rand(3)
        return tuple(torch.cat(list(plan)).tolist())

    assert order(0, 1) == order(0, 1)
    assert len({order(seed, epoch) for seed in range(4) for epoch in range(4)}) == 16


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("first", [0, 5])
def test_ranks_take_whole_balanced_batches(monkeypatch, world_size, first):
    plan = BalancedPlan(torch.arange(50_000) % 10, 8, 8, seed=1)
    plan.set_epoch(2)
    whole = share(monkeypatch, plan, 0, 1)
    plan.first = first  # counts the batches of this process
    for rank in range(world_size):
        batches = share(monkeypatch, plan, rank, world_size)
        assert len(plan) == 781 // world_size
        assert len(batches) == 781 // world_size - first
        for batch, expected in zip(batches, whole[rank::world_size][first:], strict=False):
            assert torch.equal(batch, expected)


@pytest.mark.parametrize(
    ("labels", "batch", "message"),
    [
        ([0, 0, 1, 1, 2, 2, 2], (4, 2), r"classes_per_batch must be in 2\.\.3, the number of classes, got 4"),
        ([0, 0, 1, 1, 2, 2, 2], (1, 2), r"classes_per_batch must be in 2\.\.3, .* got 1"),
        ([0, 0, 0, 1, 1, 1, 2, 2], (2, 3), r"images_per_class must be in 2\.\.2, .* smallest class \(2\), got 3"),
        ([0, 0, 0, 1, 1, 1, 2, 2], (2, 1), r"images_per_class must be in 2\.\.2, .* got 1"),
        ([0, 0, -1, 1, 1, -1], (2, 2), "2 have the label -1"),
    ],
)
def test_balanced_batches_that_cannot_be_are_errors(labels, batch, message):
    with pytest.raises(ValueError, match=message):
        BalancedPlan(torch.tensor(labels), *batch)


def test_every_process_needs_a_balanced_batch(monkeypatch):
    plan = BalancedPlan(torch.arange(20) % 4, 4, 2)
    assert len(share(monkeypatch, plan, 1, 2)) == 1
    with pytest.raises(ValueError, match="20 rows make 2 balanced batches of 8, and 3 processes need at least one"):
        share(monkeypatch, plan, 2, 3)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="8 rows make 0 balanced batches"):
        len(BalancedPlan(torch.arange(8) % 4, 4, 2))


def test_an_incomplete_batch_may_be_kept(monkeypatch):
    plan = Plan(50_000, 256, shuffle=True, even=True)
    assert len(plan) == 196
    assert sorted(torch.cat(list(plan)).tolist()) == list(range(50_000))
    paired = list(PairedPlan(50_000, 50_000, 256, drop_last=False))
    assert len(paired) == 196
    assert [int((rows >= 50_000).sum()) for rows in paired] == [256] * 195 + [80]
    assert sorted(torch.cat(paired).tolist()) == list(range(100_000))
    monkeypatch.setattr(plans, "rank_and_world_size", lambda: (1, 4))
    assert [len(rows) for rows in Plan(50_000, 256, even=True)] == [64] * 195 + [20]
    monkeypatch.setattr(plans, "rank_and_world_size", lambda: (1, 32))
    for plan in (Plan(50_000, 256, even=True), PairedPlan(50_000, 50_000, 256, drop_last=False)):
        with pytest.raises(ValueError, match="80 rows of a training batch cannot be shared evenly by 32 processes"):
            iter(plan)
