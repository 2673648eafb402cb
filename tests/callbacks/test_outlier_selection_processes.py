"""POEM's selection on two processes: the regression, and so the outliers, of one."""

import os

import forked
import pytest
import torch
from test_outlier_selection import COUNT, Pixels, expected, train
from torch import nn

from backbones.digits_net import DigitsNet
from callbacks.outlier_selection import OutlierSelection

EPOCHS = 4


class Plain(DigitsNet):
    """Without batch-norm, which sees the images of its own process alone."""

    def __init__(self):
        super().__init__(num_classes=3)
        for module in list(self.modules()):
            for name, part in module.named_children():
                if isinstance(part, nn.BatchNorm2d):
                    setattr(module, name, nn.Identity())


class Recorder(OutlierSelection):
    def __init__(self):
        super().__init__(COUNT)
        self.sums, self.everything = [], {}

    def _regress(self, *args):
        regression = super()._regress(*args)
        self.sums.append((regression.gram, regression.moment, *regression.posterior(20.0, 0.5)))
        return regression

    def on_train_epoch_start(self, trainer, pl_module):
        super().on_train_epoch_start(trainer, pl_module)
        self.everything[trainer.current_epoch] = self.chosen[trainer.current_epoch]


def fit(backbone=None, **options):
    torch.manual_seed(0)
    network = {} if backbone is None else {"backbone": backbone()}
    selection, watch, _ = train(EPOCHS, Recorder(), Pixels(), **network, **options)
    return {"sums": selection.sums, "chosen": selection.everything, "networks": watch.networks}


def both(folder):
    rank = int(os.environ["LOCAL_RANK"])
    torch.set_num_threads(1)
    options = {"strategy": "ddp", "devices": 2}
    torch.save(fit(Plain, **options), folder / f"plain.{rank}")
    torch.save(fit(**options), folder / f"batch-norm.{rank}")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("selection")
    codes = forked.run(both, folder, processes=2, log=folder / "log")
    assert codes == [0, 0], (folder / "log").read_text()[-3000:]
    return lambda name: [torch.load(folder / f"{name}.{rank}", weights_only=True) for rank in (0, 1)]


def test_two_processes_have_the_regression_of_one(trained):
    alone = fit(Plain)
    assert len(alone["sums"]) == EPOCHS - 1
    for found in trained("plain"):
        torch.testing.assert_close(found["sums"], alone["sums"], rtol=1e-4, atol=1e-4)
        assert {epoch: rows.tolist() for epoch, rows in found["chosen"].items()} == {
            epoch: rows.tolist() for epoch, rows in alone["chosen"].items()
        }


def test_processes_choose_alike_though_their_batch_norm_does_not_agree(trained):
    first, second = trained("batch-norm")
    statistics = [name for name in first["networks"][-1] if "running" in name]
    assert any(not torch.equal(first["networks"][-1][name], second["networks"][-1][name]) for name in statistics)
    data = Pixels()
    data.setup("fit")
    for epoch in range(1, EPOCHS):
        chosen = {past: rows for past, rows in first["chosen"].items() if past < epoch}
        assert first["chosen"][epoch].tolist() == expected(first["networks"][epoch], data, chosen, epoch)
        assert second["chosen"][epoch].tolist() == first["chosen"][epoch].tolist()
