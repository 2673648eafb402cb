import pytest
import torch

from lightning_modules.scores import row_sample
from lightning_modules.scores.row_sample import RowSample


def sample(rows, limit, batch):
    sampled = RowSample(limit)
    for part in rows.split(batch):
        sampled.update(part)
    return sampled


@pytest.mark.parametrize("batch", [1, 7, 16, 1000])
def test_rows_with_the_least_keys_whatever_the_batch(batch):
    rows = torch.arange(1000.0)
    keys = torch.rand(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(sample(rows, 20, batch).reduce(), rows[keys.argsort()[:20]])
    assert torch.equal(sample(rows, None, batch).reduce(), rows[keys.argsort()])


def test_every_row_is_as_likely():
    drawn = sample(torch.arange(10_000.0), 2000, 64).reduce()
    assert len(drawn.unique()) == 2000
    counts = torch.histc(drawn, 10, 0, 10_000)
    assert (counts - 200).abs().max() < 60


def test_memory_does_not_grow_with_the_data():
    sampled = RowSample(10)
    for _ in range(300):
        sampled.update(torch.zeros(8, 3))
        assert sum(map(len, sampled._rows)) <= 2 * 10 + 8
    assert sampled.seen == 2400


def test_a_share_that_was_not_dealt_out_is_refused(monkeypatch):
    monkeypatch.setattr(row_sample, "world_size", lambda: 2)
    monkeypatch.setattr(row_sample, "sum_over_processes", lambda tensor: tensor + 3)
    monkeypatch.setattr(row_sample, "rank", lambda: 1)
    RowSample(5).update(torch.zeros(2, 1))
    with pytest.raises(RuntimeError, match=r"process 1 of 2 brings 4 of the 7 rows of a batch.* it would bring 3"):
        RowSample(5).update(torch.zeros(4, 1))
