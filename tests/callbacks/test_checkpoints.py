"""Epochs of checkpoints; the first one is written once."""

import pytest
import torch
from mask_toy import QUIET, Net, loader, make
from pytorch_lightning import Trainer

from callbacks.checkpoints import FirstCheckpoint, LastCheckpoint, epoch_of


@pytest.mark.parametrize(("content", "epoch"), [((0, 0), -1), ((0, 5), 0), ((3, 20), 3)])
def test_epochs_count_from_0_and_before_the_first_step_is_none(tmp_path, content, epoch):
    torch.save({"epoch": content[0], "global_step": content[1]}, tmp_path / "some.ckpt")
    assert epoch_of(tmp_path / "some.ckpt") == epoch


def test_the_first_checkpoint_is_what_the_run_started_from(tmp_path):
    def train(epochs, checkpoint=None):
        module = make(Net())
        callbacks = [
            FirstCheckpoint(tmp_path / "first.ckpt"),
            LastCheckpoint(dirpath=tmp_path, filename="last", enable_version_counter=False),
        ]
        Trainer(max_epochs=epochs, limit_val_batches=0, callbacks=callbacks, **QUIET).fit(
            module, loader(), loader(), ckpt_path=checkpoint, weights_only=True
        )

    torch.manual_seed(3)
    start = Net().state_dict()
    torch.manual_seed(3)
    train(1)
    written = (tmp_path / "first.ckpt").read_bytes()
    state = torch.load(tmp_path / "first.ckpt", weights_only=True)["state_dict"]
    assert all(torch.equal(state[f"backbone.{name}"], value) for name, value in start.items())
    train(2, tmp_path / "last.ckpt")
    assert (tmp_path / "first.ckpt").read_bytes() == written
    assert (epoch_of(tmp_path / "first.ckpt"), epoch_of(tmp_path / "last.ckpt")) == (-1, 1)
