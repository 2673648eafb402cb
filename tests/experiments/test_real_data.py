"""A user's own network and arrays, from YAML alone, against numbers measured by independent code.

``OOD_TEST_DATA`` names a folder with real arrays and a trained CIFAR-10 ResNet-20 (see ``FILES``); without it
these tests are skipped. The reference: accuracy 91.5% on 1,000 test images; AUROC of MSP and of the energy (T = 1).
"""

import json
import os
from pathlib import Path

import pytest
import yaml

from experiments.__main__ import main

DATA = os.environ.get("OOD_TEST_DATA")
FILES = {
    "train": "cifar10_train_lossless_4000.npz",
    "test": "cifar10_test_lossless_1000.npz",
    "weights": "checkpoints/resnet20-12fca82f.th",
}
OOD = {  # name: file, options, AUROC of MSP, of the energy
    "tinyimagenet_resize": ("tinyimagenet_val_resize32_2000.npz", {"group": "near"}, 86.1, 88.6),
    "tinyimagenet_crop": ("tinyimagenet_val_crop32_2000.npz", {"group": "near"}, 89.5, 93.9),
    "dtd10": ("dtd10_resize32_1200.npz", {}, 88.0, 89.8),
    "miniplaces": ("miniplaces_val_resize32_2000.npz", {}, 88.0, 91.5),
    "mnist": ("mnist_test_10000.npz", {"resize": "pad", "channels": 3, "limit": 2000}, 91.5, 97.6),
}
pytestmark = pytest.mark.skipif(DATA is None, reason="OOD_TEST_DATA names no folder with the real CIFAR-10 arrays")


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder, data = tmp_path_factory.mktemp("real"), Path(DATA)
    config = {
        "model": {
            "class_path": "lightning_modules.classifier.Classifier",
            "init_args": {
                "backbone": {
                    "class_path": "backbones.resnet_option_a.ResNetOptionA",
                    "init_args": {"depth": 20, "num_classes": 10, "weights": str(data / FILES["weights"])},
                },
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            },
        },
        "data": {
            "class_path": "datamodules.arrays.Arrays",
            "init_args": {
                "train": str(data / FILES["train"]),
                "test": str(data / FILES["test"]),
                "ood": {name: {"path": str(data / file)} | options for name, (file, options, *_) in OOD.items()},
                "batch_size": 128,
                "mean": [0.485, 0.456, 0.406],
                "std": [0.229, 0.224, 0.225],
            },
        },
        "evaluation": {"bootstrap": 200},
    }
    (folder / "own").mkdir()
    (folder / "own" / "resnet20.yaml").write_text(yaml.safe_dump(config))
    arguments = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.cli.CHECKPOINTS", folder)
        assert main(["test", "--config", str(folder / "own" / "resnet20.yaml"), *arguments]) == 0
    return json.loads((folder / "own" / "resnet20" / "seed0" / "results.json").read_text())


def test_accuracy(results):
    assert 100 * results["id_accuracy"] == pytest.approx(91.5, abs=0.1)


@pytest.mark.parametrize("ood_set", OOD)
@pytest.mark.parametrize("score", ["msp", "energy"])
def test_auroc(results, ood_set, score):
    (row,) = [row for row in results["rows"] if (row["ood_set"], row["score"]) == (ood_set, score)]
    expected = OOD[ood_set][2 if score == "msp" else 3]
    assert 100 * row["auroc"] == pytest.approx(expected, abs=0.1)
