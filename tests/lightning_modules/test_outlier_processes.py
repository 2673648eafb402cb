"""Outlier exposure on two processes: the training, the perturbation and the boundary of one."""

import os
from pathlib import Path

import forked
import pytest
import torch
from outlier_toy import KNOWN, STEPS, UNKNOWN, Plain, batches, make, train
from pytorch_lightning import Callback

from lightning_modules.doe import DOE
from lightning_modules.losses.outlier_exposure import EnergyMargins
from lightning_modules.outlier_exposure import OutlierExposure

CASES = {
    "oe": (OutlierExposure, {}),
    "energy": (OutlierExposure, {"outlier_loss": EnergyMargins()}),
    # what the processes see in the first step lies on both sides of this floor, see the test
    "floor": (OutlierExposure, {"floor": 1.308}),
    "doe": (DOE, {"warmup": 1, "floor": 1.308}),
}


class Draws(Callback):
    """Seeds each process on its own, as a run does."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        torch.manual_seed(100 * trainer.current_epoch + 10 * batch_idx + trainer.global_rank)


def share(batch, rank, processes):
    """Return what a process gets of a paired batch."""
    images, labels, ids = batch
    rows = torch.cat([torch.arange(KNOWN)[rank::processes], KNOWN + torch.arange(UNKNOWN)[rank::processes]])
    return images[rows].double(), labels[rows], ids[rows]


def fit(case, rank=0, processes=1):
    kind, options = CASES[case]
    module = make(kind, backbone=Plain, **options).double()
    own = {"strategy": "ddp", "devices": processes} if processes > 1 else {}
    data = [share(batch, rank, processes) for batch in batches()]
    options = {"callbacks": [Draws()], "use_distributed_sampler": False, "precision": "64-true"}
    trainer = train(module, 3, data, **own, **options)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    steps = trainer.global_step
    state = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    return {"state": state, "logged": logged, "steps": steps, "perturbation": getattr(module, "perturbation", {})}


def train_all(folder):
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    for case in CASES:
        torch.save(fit(case, rank, 2), folder / f"{case}.{rank}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outliers")
    codes = forked.run(train_all, folder, processes=2, log=folder / "log")
    assert codes == [0, 0], (folder / "log").read_text()[-3000:]
    return folder


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(trained: Path, case):
    alone = fit(case)
    assert alone["steps"] == 3 * STEPS
    for rank in (0, 1):
        found = torch.load(trained / f"{case}.{rank}", weights_only=True)
        assert found["steps"] == alone["steps"]
        assert found["logged"] == pytest.approx(alone["logged"], rel=1e-6)
        for part in ("state", "perturbation"):
            torch.testing.assert_close(found[part], alone[part], rtol=1e-7, atol=1e-9)


def test_the_floor_lies_between_what_the_two_processes_see():
    module = make(backbone=Plain).double()
    losses = []
    for rank in (0, 1):
        images, labels, _ = share(batches()[0], rank, 2)
        logits = module.backbone(images)
        losses.append(float(torch.nn.functional.cross_entropy(logits[labels >= 0], labels[labels >= 0]).detach()))
    assert min(losses) < 1.308 < max(losses), losses
