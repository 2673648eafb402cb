"""What is forgotten: margins against a loop, files, pictures, two processes."""

import csv
import json

import forked
import numpy as np
import pytest
import torch
from mask_toy import QUIET
from pytorch_lightning import Trainer

from backbones.autoencoders import Autoencoder
from backbones.digits_net import DigitsNet
from callbacks.forgetting import Forgetting, Margins, as_rows, images_figure, margins_figure, summarize
from datamodules.digits import Digits
from lightning_modules.autoencoder import Autoencoder as AutoencoderMethod
from lightning_modules.unleashing_mask import UnleashingMask

CLASSES = ["zero", "one", "two"]


def margins(predictions, values, labels=(0, 1, 2, 0)):
    return Margins(np.array(labels), np.array(predictions), np.array(values, dtype=np.float32))


BEFORE = margins([0, 1, 2, 1], [4.0, 1.0, 3.0, -1.0])
AFTER = margins([0, 2, 2, 0], [3.5, -2.0, 1.0, 0.5])


def test_forgotten_is_what_was_right_and_is_wrong():
    assert summarize(BEFORE, AFTER) == {
        "images": 4,
        "accuracy_before": 0.75,
        "accuracy_after": 0.75,
        "forgotten": 1,
        "learned": 1,
        "mean_margin_before": 1.75,
        "mean_margin_after": 0.75,
        "mean_margin_before_of_forgotten": 1.0,
    }
    assert summarize(BEFORE, BEFORE)["mean_margin_before_of_forgotten"] is None


def test_a_line_for_each_image_the_greatest_loss_first():
    rows = as_rows(BEFORE, AFTER, torch.tensor([10, 20, 30, 40]), CLASSES)
    assert [row["id"] for row in rows] == [20, 30, 10, 40]
    assert rows[0] == {
        "id": 20,
        "class": "one",
        "predicted_before": "one",
        "predicted_after": "two",
        "margin_before": 1.0,
        "margin_after": -2.0,
        "forgotten": True,
    }
    assert not any(row["forgotten"] for row in rows[1:])


class Images:
    def read(self, rows):
        return torch.full((len(rows), 3, 4, 4), 7 * int(rows[0]), dtype=torch.uint8)


def test_pictures_show_the_forgotten():
    figure = images_figure(BEFORE, AFTER, Images(), CLASSES)
    (panel,) = figure.axes
    assert panel.get_title() == "one\ntaken for two"
    assert (panel.images[0].get_array() == 7).all()
    points, shares = margins_figure(BEFORE, AFTER).axes
    assert [len(drawn.get_offsets()) for drawn in points.collections] == [3, 1]
    assert shares.get_title() == "1 of 4 forgotten"


def spoil(network):
    """Let a network confuse two classes after training."""
    with torch.no_grad():
        network.fc.bias[1] += 100.0


def fit(folder, **options):
    torch.manual_seed(0)
    network = DigitsNet(num_classes=6).eval()  # batch-norm stays as it is
    module = UnleashingMask(network, lambda parameters: torch.optim.SGD(parameters, 0.0), floor=0.0)
    module.on_train_end = lambda: spoil(network)
    data = Digits(batch_size=64, mean=[0.5], std=[0.5], fit_limit=50)
    options |= {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    options |= QUIET | {"default_root_dir": folder, "use_distributed_sampler": False}
    trainer = Trainer(callbacks=[Forgetting()], **options)
    trainer.fit(module, datamodule=data)
    return network, data


def test_a_run_tells_what_it_forgot(tmp_path):
    network, data = fit(tmp_path)
    folder = tmp_path / "forgotten"
    with (folder / "samples.csv").open() as file:
        rows = {int(row["id"]): row for row in csv.DictReader(file)}
    assert sorted(rows) == data.fit_rows.tolist()
    assert len(rows) == 50
    images = (data.sets["fit"].read(torch.arange(50)).float() / 255 - 0.5) / 0.5
    after = network.eval()(images).detach()
    network.fc.bias.data[1] -= 100.0
    before = network(images).detach()
    for i, (number, label) in enumerate(zip(data.fit_rows.tolist(), data.sets["fit"].labels.tolist(), strict=True)):
        for logits, column in ((before, "margin_before"), (after, "margin_after")):
            others = [float(logits[i, k]) for k in range(6) if k != label]
            assert float(rows[number][column]) == pytest.approx(float(logits[i, label]) - max(others), abs=1e-4)
        right = [logits[i].argmax() == label for logits in (before, after)]
        assert (rows[number]["forgotten"] == "True") == (right == [True, False])
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["forgotten"] == sum(row["forgotten"] == "True" for row in rows.values()) > 0
    for name in ("margins", "images"):
        assert (folder / f"{name}.png").stat().st_size > 5_000


def in_a_process(folder):
    torch.set_num_threads(1)
    fit(folder, strategy="ddp", devices=2)


def test_two_processes_tell_the_same(tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    fit(tmp_path / "one")
    codes = forked.run(in_a_process, tmp_path / "two", processes=2, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]
    tables = []
    for name in ("one", "two"):
        with (tmp_path / name / "forgotten" / "samples.csv").open() as file:
            tables.append({row["id"]: row for row in csv.DictReader(file)})
    assert tables[0].keys() == tables[1].keys()
    for number, row in tables[0].items():
        for column in ("margin_before", "margin_after"):
            assert float(tables[1][number][column]) == pytest.approx(float(row[column]), abs=1e-4)


def test_without_classes_there_are_no_margins(tmp_path):
    class Plain(Autoencoder):
        def __init__(self):
            super().__init__((1, 8, 8), 4)
            self.inner, self.outer = torch.nn.Linear(64, 4), torch.nn.Linear(4, 64)

        def encode(self, images):
            return self.inner(images.flatten(1))

        def decode(self, latent):
            return self.outer(latent).view(-1, 1, 8, 8)

    module = AutoencoderMethod(Plain(), lambda parameters: torch.optim.SGD(parameters, 0.0))
    trainer = Trainer(default_root_dir=tmp_path, callbacks=[Forgetting()], max_epochs=1, **QUIET)
    with pytest.raises(ValueError, match="Autoencoder has none: leave out Forgetting"):
        trainer.fit(module, datamodule=Digits(batch_size=64, mean=[0.5], std=[0.5]))
