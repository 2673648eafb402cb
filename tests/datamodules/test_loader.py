import pytest
import torch
from torch.utils.data import Dataset, RandomSampler

from datamodules import plans
from datamodules.batch import Batch
from datamodules.loader import Loader
from datamodules.plans import Plan


class Squares(Dataset):
    def __init__(self):
        self.read = []

    def __getitem__(self, rows):
        self.read.append(rows.tolist())
        return Batch(rows**2, rows % 2, rows)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_one_read_for_each_batch_and_empty_ones_too(monkeypatch, num_workers):
    monkeypatch.setattr(plans, "rank_and_world_size", lambda: (1, 2))
    dataset = Squares()
    loader = Loader(dataset, sampler=Plan(7, 3), num_workers=num_workers)
    batches = list(loader)
    assert len(batches) == len(loader) == 3
    assert all(isinstance(batch, Batch) for batch in batches)
    assert [batch.images.tolist() for batch in batches] == [[1], [16], []]
    assert dataset.read == ([] if num_workers else [[1], [4], []])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_restored_loader_continues_without_loading_what_was_handed_out(num_workers):
    def loader():
        return Loader(Squares(), sampler=Plan(20, 4, shuffle=True), num_workers=num_workers)

    whole = [batch.ids.tolist() for batch in loader()]
    interrupted = loader()
    assert interrupted.state_dict() == {"epoch": 0, "batches": 0}
    iterator = iter(interrupted)
    assert [next(iterator).ids.tolist() for _ in range(3)] == whole[:3]
    state = interrupted.state_dict()
    assert state == {"epoch": 0, "batches": 3}

    restored = loader()
    restored.load_state_dict(state)
    assert restored.state_dict() == state
    assert len(restored) == 5
    assert [batch.ids.tolist() for batch in restored] == whole[3:]
    assert restored.dataset.read == ([] if num_workers else whole[3:])
    assert restored.state_dict() == {"epoch": 0, "batches": 0}
    assert [batch.ids.tolist() for batch in restored] == whole


def test_the_epoch_may_be_set_after_the_iterator_is_made():
    def orders(loader):
        return [batch.ids.tolist() for batch in loader]

    loader = Loader(Squares(), sampler=Plan(20, 4, shuffle=True))
    loader.sampler.set_epoch(3)
    third = orders(loader)

    loader = Loader(Squares(), sampler=Plan(20, 4, shuffle=True))
    loader.load_state_dict({"epoch": 3, "batches": 2})
    iterator = iter(loader)
    loader.sampler.set_epoch(3)
    assert orders(iterator) == third[2:]

    loader.load_state_dict({"epoch": 2, "batches": 2})  # that epoch is over
    assert orders(loader) == third


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_abandoned_epoch_leaves_no_trace(num_workers):
    loader = Loader(
        Squares(), sampler=Plan(20, 4, shuffle=True), num_workers=num_workers, persistent_workers=num_workers > 0
    )
    state = torch.get_rng_state()
    next(iter(loader))
    loader.sampler.set_epoch(1)
    assert sorted(torch.cat([batch.ids for batch in loader]).tolist()) == list(range(20))
    assert torch.equal(torch.get_rng_state(), state)


def test_another_sampler_is_an_error():
    with pytest.raises(ValueError, match=r"RandomSampler is not a plan .*use_distributed_sampler=False"):
        Loader(Squares(), sampler=RandomSampler(range(3)))
