"""A user's own network and arrays, from YAML alone, against numbers measured by independent code.

``OOD_TEST_DATA`` names a folder with real arrays and a trained CIFAR-10 ResNet-20 (see ``FILES``); without it
these tests are skipped. The reference: accuracy 91.5% on 1,000 test images; AUROC of MSP and of the energy (T = 1).
"""

import hashlib
import json
import os
import pickle
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import CIFAR10

from datamodules.catalogue import ENTRIES
from datamodules.public import MNIST
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
SPLITS = {"train": "train", "t10k": "test"}
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


def write_cifar10(folder, patch):
    """Write the arrays as CIFAR-10's Python pickles, which are then fewer images than the official ones."""
    base = folder / "cifar10" / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return [name, hashlib.md5((base / name).read_bytes()).hexdigest()]

    def rows(images):
        return images.transpose(0, 3, 1, 2).reshape(len(images), -1)

    arrays = {split: np.load(Path(DATA) / FILES[split]) for split in ("train", "test")}
    images, labels = (np.split(arrays["train"][key], 5) for key in ("images", "labels"))
    batches = [write(f"data_batch_{i + 1}", {"data": rows(images[i]), "labels": labels[i].tolist()}) for i in range(5)]
    test = write("test_batch", {"data": rows(arrays["test"]["images"]), "labels": arrays["test"]["labels"].tolist()})
    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = write("batches.meta", {"label_names": names})
    patch.setattr(CIFAR10, "train_list", batches)
    patch.setattr(CIFAR10, "test_list", [test])
    patch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    for name, count in (("cifar10", 1000), ("cifar10_train", 4000)):
        patch.setitem(ENTRIES, name, replace(ENTRIES[name], count=count))


def test_the_public_module_gives_what_the_arrays_give(results, tmp_path, monkeypatch):
    write_cifar10(tmp_path / "data", monkeypatch)
    config = results["configuration"]
    data = {
        "class_path": "datamodules.public.CIFAR",
        "init_args": {
            "root": str(tmp_path / "data"),
            "protocol": "unleashing_mask",
            "mean": [0.485, 0.456, 0.406],
            "std": [0.229, 0.224, 0.225],
            "ood": ["tinyimagenet_resize", "mnist_padded"],
            "own": {
                "tinyimagenet_resize": {"path": str(Path(DATA) / OOD["tinyimagenet_resize"][0]), "group": "near"},
                "mnist_padded": {"path": str(Path(DATA) / OOD["mnist"][0]), "resize": "pad"},
            },
            "ood_subset": {"rule": "first", "count": 2000},
            "batch_size": 128,
        },
    }
    (tmp_path / "own").mkdir()
    own = {"model": config["model"], "data": data, "evaluation": {"bootstrap": 0}}
    (tmp_path / "own" / "public.yaml").write_text(yaml.safe_dump(own))
    monkeypatch.setattr("experiments.cli.CHECKPOINTS", tmp_path)
    arguments = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
    assert main(["test", "--config", str(tmp_path / "own" / "public.yaml"), *arguments]) == 0
    public = json.loads((tmp_path / "own" / "public" / "seed0" / "results.json").read_text())
    assert public["protocol"] == "unleashing_mask, but another mean, std"
    assert public["id_accuracy"] == results["id_accuracy"]
    expected = {(row["score"], row["ood_set"]): row for row in results["rows"]}
    assert len(public["rows"]) == 2 * 8
    for row in public["rows"]:
        same = expected[row["score"], row["ood_set"].removesuffix("_padded")]
        assert row["ood_count"] == same["ood_count"]
        assert row["auroc"] == pytest.approx(same["auroc"], abs=1e-6)


def test_mnist_and_omniglot(tmp_path, monkeypatch):
    digits = {name: np.load(next(Path(DATA).glob(f"mnist_{split}_*.npz"))) for name, split in SPLITS.items()}
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name, arrays in digits.items():
        for kind, values in (("images-idx3", arrays["images"]), ("labels-idx1", arrays["labels"].astype(np.uint8))):
            header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
            (raw / f"{name}-{kind}-ubyte").write_bytes(header + values.tobytes())
    characters = np.load(Path(DATA) / "omniglot_28_all.npz")["images"]
    for row, character in enumerate(characters):
        path = tmp_path / f"omniglot/omniglot-py/images_evaluation/all/{row // 20:04}/{row % 20:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - character).save(path)
    monkeypatch.setitem(ENTRIES, "omniglot", replace(ENTRIES["omniglot"], count=len(characters)))
    data = MNIST(protocol="variational_metric", root=str(tmp_path), batch_size=160, known=6)
    data.setup()
    labels = digits["t10k"]["labels"]
    assert data.sizes["train"] == (digits["train"]["labels"] < 6).sum()
    for name, images in (
        ("id", digits["t10k"]["images"][labels < 6]),
        ("unknown", digits["t10k"]["images"][labels > 5]),
    ):
        assert np.array_equal(data.sets[name].read(torch.arange(data.sizes[name]))[:, 0], images)
    assert np.array_equal(data.sets["omniglot"].read(torch.arange(len(characters)))[:, 0], characters)
    assert data.sizes["noise"] == data.sizes["mnist_noise"] == 10_000
