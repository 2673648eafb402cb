"""Learning rates: stepped once where they should be, and the same after a resume."""

import pytest
import torch
from pytorch_lightning import Callback, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ReduceLROnPlateau
from torch.optim.lr_scheduler import CosineAnnealingLR, MultiStepLR, OneCycleLR

from backbones.digits_net import DigitsNet
from datamodules.digits import Digits
from lightning_modules.classifier import Classifier

EPOCHS = 6
BATCHES = 5  # of an epoch of these digits


def plateau(optimizer):
    # an accuracy never rises by 1: after one epoch of patience each epoch counts as bad
    return ReduceLROnPlateau(optimizer, "val/accuracy", mode="max", patience=1, threshold=1.0, threshold_mode="abs")


SCHEDULES = {
    "cosine": (lambda optimizer: CosineAnnealingLR(optimizer, EPOCHS), "epoch"),
    "multistep": (lambda optimizer: MultiStepLR(optimizer, [2, 4]), "epoch"),
    "onecycle": (lambda optimizer: OneCycleLR(optimizer, 0.1, EPOCHS * BATCHES), "step"),
    "plateau": (plateau, "epoch"),
}


class Rates(Callback):
    def __init__(self):
        self.rates = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def fit(folder, name, epochs, resume=None, val_split=0.15):
    scheduler, interval = SCHEDULES[name]
    torch.manual_seed(0)
    module = Classifier(
        DigitsNet(num_classes=6), lambda parameters: torch.optim.SGD(parameters, 0.1), scheduler, interval
    )
    data = Digits(batch_size=100, val_split=val_split, mean=[0.5], std=[0.5])
    rates = Rates()
    last = ModelCheckpoint(folder, filename="last", save_on_train_epoch_end=True, enable_version_counter=False)
    options = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = Trainer(max_epochs=epochs, callbacks=[rates, last], num_sanity_val_steps=0, **options)
    trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    return rates.rates


@pytest.mark.parametrize("name", SCHEDULES)
def test_rates_are_those_of_the_schedule_and_of_a_resumed_run(tmp_path, name):
    whole = fit(tmp_path, name, EPOCHS)
    assert len(whole) == EPOCHS * BATCHES
    if name == "plateau":
        expected = [0.1] * 2 + [0.1, 0.01, 0.01, 0.001]
    else:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
        scheduler, expected = SCHEDULES[name][0](optimizer), []
        for _ in range(EPOCHS if name != "onecycle" else EPOCHS * BATCHES):
            expected.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            scheduler.step()
    assert whole[:: 1 if name == "onecycle" else BATCHES] == pytest.approx(expected)

    for cut in (1, 2, 3, 4):
        first = fit(tmp_path / str(cut), name, cut)
        assert first + fit(tmp_path / str(cut), name, EPOCHS, tmp_path / str(cut) / "last.ckpt") == whole, cut


def test_a_plateau_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"plateau of val/accuracy, which was not logged .* held out \(val_split\)"):
        fit(tmp_path, "plateau", 1, val_split=0)


@pytest.mark.parametrize(("name", "made_for", "has"), [("cosine", "6 epochs", 2), ("onecycle", "30 steps", 10)])
def test_a_schedule_for_a_longer_run_is_named(tmp_path, caplog, name, made_for, has):
    fit(tmp_path, name, 2)
    assert f"is made for {made_for}, and the run has {has}" in caplog.text
    caplog.clear()
    fit(tmp_path, name, EPOCHS)
    assert "is made for" not in caplog.text


@pytest.mark.parametrize(("name", "made_for", "has"), [("cosine", "6 epochs", 7), ("onecycle", "30 steps", 35)])
def test_a_schedule_that_ends_before_the_run_is_refused_at_its_start(tmp_path, name, made_for, has):
    with pytest.raises(ValueError, match=f"made for {made_for}, and the run has {has}: make it"):
        fit(tmp_path, name, 7)
    assert not list(tmp_path.iterdir())
