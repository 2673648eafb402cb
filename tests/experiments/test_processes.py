"""The real ``test`` command on one, two and three processes: the same images, scores, statistics and metrics."""

import json

import forked
import numpy as np
import pytest
import torch
import yaml

from backbones.digits_net import DigitsNet
from experiments.cli import EXPERIMENTS

SIZES = {"train": 167, "test": 83, "far": 50, "lonely": 1}  # no size divides by 2 or 3 batches evenly; one image
DIRECTIONS = ("vim", "pca_gmm", "relative_mahalanobis")  # scores that keep eigenvectors or singular vectors
SAVE_STATE = """
import torch
from pytorch_lightning import Callback


class SaveState(Callback):
    def __init__(self, path: str):
        self.path = path

    def on_test_end(self, trainer, pl_module):
        (evaluation,) = [c for c in trainer.callbacks if type(c).__name__ == "OODEvaluation"]
        if trainer.is_global_zero:
            torch.save({name: score.state_dict() for name, score in evaluation.scores.items()}, self.path)
"""


def write_experiment(folder):
    rng = np.random.default_rng(0)
    for name, size in SIZES.items():
        images = rng.integers(0, 256, (size, 8, 8), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(size) % 3)
    torch.manual_seed(0)
    torch.save(DigitsNet(num_classes=3).state_dict(), folder / "weights.pt")
    (folder / "savestate.py").write_text(SAVE_STATE)
    arrays = {"path": str(folder / "far.npz")}, {"path": str(folder / "lonely.npz"), "group": "near"}
    config = {
        "model": {
            "class_path": "lightning_modules.classifier.Classifier",
            "init_args": {
                "backbone": {
                    "class_path": "backbones.digits_net.DigitsNet",
                    "init_args": {"num_classes": 3, "weights": str(folder / "weights.pt")},
                },
                "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            },
        },
        "data": {
            "class_path": "datamodules.arrays.Arrays",
            "init_args": {
                "train": str(folder / "train.npz"),
                "test": str(folder / "test.npz"),
                "ood": {"far": arrays[0], "lonely": arrays[1]},
                "batch_size": 12,
                "val_split": 0.2,
                "mean": [0.5],
                "std": [0.5],
            },
        },
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
        "evaluation": {"bootstrap": 20, "figures": False},
    }
    (folder / "many.yaml").write_text(yaml.safe_dump(config))


def run(folder, processes, precision, *options):
    name = f"p{processes}_{precision}"
    callback = {"class_path": "savestate.SaveState", "init_args": {"path": str(folder / f"{name}.pt")}}
    command = ["test", "--config", str(folder / "many.yaml"), "--experiment", "tests/many", "--name", name, *options]
    command += ["--trainer.callbacks+", json.dumps(callback), "--trainer.precision", precision]
    codes, output = forked.command(folder, *command, processes=processes)
    assert codes == [0] * processes, output[-4000:]
    run_folder = folder / "tests" / "many" / name
    with np.load(run_folder / "scores.npz") as stored:
        samples = {key: stored[key] for key in stored.files}
    results = json.loads((run_folder / "results.json").read_text())
    return results, samples, torch.load(folder / f"{name}.pt", weights_only=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    write_experiment(folder)
    return folder


@pytest.fixture(scope="module")
def records(folder):
    return {processes: run(folder, processes, "32-true") for processes in (1, 2, 3)}


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_every_image_is_evaluated_exactly_once(records, processes):
    results, samples, _ = records[processes]
    assert results["processes"] == processes
    for split, size in {"id": 83, "far": 50, "lonely": 1}.items():
        rows = samples["split"] == list(samples["splits"]).index(split)
        assert samples["ids"][rows].tolist() == list(range(size))
    held_out = results["splits"]["calibration"]["size"]
    assert results["forwards"]["images"] == SIZES["train"] + 83 + 50 + 1
    assert (samples["split"] == list(samples["splits"]).index("calibration")).sum() == held_out
    assert not results["truncated"]


@pytest.mark.parametrize("processes", [2, 3])
def test_scores_and_metrics_equal_those_of_one_process(records, processes):
    (results_1, samples_1, _), (results_n, samples_n, _) = records[1], records[processes]
    assert samples_n.keys() == samples_1.keys()
    for name, values in samples_1.items():
        if name.startswith("score/"):
            np.testing.assert_allclose(samples_n[name], values, rtol=1e-4, err_msg=name)
        else:
            np.testing.assert_array_equal(samples_n[name], values, err_msg=name)
    for row_1, row_n in zip(results_1["rows"], results_n["rows"], strict=True):
        assert row_n == pytest.approx(row_1, abs=1e-12)
    assert results_n["weights_sha256"] == results_1["weights_sha256"]
    assert results_n["splits"] == results_1["splits"]


def every_score(folder, processes):
    # In float64, so that what is compared is the reduction and not the rounding of the network.
    return run(folder, processes, "64-true", "--config", str(EXPERIMENTS / "_all_scores.yaml"))


@pytest.fixture(scope="module")
def alone(folder):
    return every_score(folder, 1)


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_scores_and_what_they_learn_equal_those_of_one_process(folder, alone, processes):
    _, samples_1, states_1 = alone
    _, samples, states = every_score(folder, processes)
    for name, values in samples_1.items():
        if name.startswith("score/"):
            # a difference of distances may be next to nothing
            np.testing.assert_allclose(samples[name], values, 1e-5, 1e-7 * np.abs(values).max(), err_msg=name)
    for name, state in states_1.items():
        for key, value in state.items():
            other = states[name][key]
            if key == "bank":  # a set of rows: every order gives the same neighbours
                value, other = value[value[:, 0].argsort()], other[other[:, 0].argsort()]
            # of directions, small entries are less certain
            least = 1e-12 + (1e-9 * float(value.abs().max()) if name in DIRECTIONS else 0)
            np.testing.assert_allclose(other, value, rtol=1e-9, atol=least, err_msg=f"{name}.{key}")
