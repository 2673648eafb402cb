import pytest
import torch

from datamodules import plans
from datamodules.plans import PairedPlan, Plan


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


def test_paired_plan_without_outliers_is_an_error():
    with pytest.raises(ValueError, match="the set has 0"):
        PairedPlan(100, 0, 10)
    with pytest.raises(ValueError, match=r"10 ID rows at a ratio of 0.01"):
        PairedPlan(100, 5, 10, ratio=0.01)
