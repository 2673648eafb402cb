"""The latent space through the command line: on two processes, killed, with and without outliers to watch."""

import json
import os
import shutil
import signal
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from test_interrupted import BREAK
from torch import nn

from backbones.autoencoders import Autoencoder
from backbones.weights import load_weights
from experiments.__main__ import main

ROOT = Path(__file__).resolve().parent.parent.parent
CONFIG = ["--config", str(ROOT / "experiments" / "variational_metric" / "digits.yaml"), "--experiment", "tests/latent"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false", "--evaluation.figures", "false", "--evaluation.bootstrap", "0"]
SMALL = ["--model.margin", "{final: 1.5, first_epoch: 1}", "--trainer.max_epochs", "2"]
BATCHES = 9  # of an epoch


class Scribble(Autoencoder):
    """Draws 8x8 digits from 16 numbers."""

    def __init__(self, weights: str):
        super().__init__((1, 8, 8), 16)
        self.inner, self.outer = nn.Linear(64, 16), nn.Linear(16, 64)
        load_weights(self, weights)

    def encode(self, images):
        return self.inner(images.flatten(1))

    def decode(self, latent):
        return self.outer(latent).view(-1, 1, 8, 8)


def weighing(folder):
    """Options for an autoencoder that finds principal components of noise."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(64, 16, generator=generator))[0]
    state = {"inner.weight": directions.T.contiguous(), "outer.weight": directions}
    torch.save(state | {"inner.bias": torch.zeros(16), "outer.bias": torch.zeros(64)}, folder / "scribble.pt")
    part = {
        "class_path": "test_variational_metric_runs.Scribble",
        "init_args": {"weights": str(folder / "scribble.pt")},
    }
    return ["--model.autoencoder", json.dumps(part)]


def run_folder(folder, name):
    return folder / "tests" / "latent" / name


def last(folder, name):
    return torch.load(run_folder(folder, name) / "last.ckpt", weights_only=True)


def scores(folder, name, subfolder=""):
    with np.load(run_folder(folder, name) / subfolder / "scores.npz") as stored:
        samples = {key: stored[key] for key in stored.files}
    return samples, json.loads((run_folder(folder, name) / subfolder / "results.json").read_text())


def callback(class_path, **init_args):
    return ["--trainer.callbacks+", json.dumps({"class_path": class_path, "init_args": init_args})]


def command(folder, verb, *options, processes=1, codes=0):
    found, output = forked.command(folder, verb, *options, *QUIET, processes=processes)
    assert found == [codes] * processes, output[-3000:]
    return output


# On one process


def test_fit_and_test(tmp_path, checkpoints):
    options = [*CONFIG, *SMALL, *QUIET, *weighing(tmp_path), "--name", "whole", "--trainer.precision", "bf16-mixed"]
    assert main(["fit", *options]) == 0
    state = last(checkpoints, "whole")["state_dict"]
    assert state["statistics.course"][:, 0].tolist() == [0.15, 1.15]
    assert {value.dtype for name, value in state.items() if name.startswith("fc_")} == {torch.float32}
    knn = {"class_path": "lightning_modules.scores.knn.KNN", "init_args": {"k": 5, "tap": "latent"}}
    options = ["--config", str(run_folder(checkpoints, "whole") / "config.yaml"), *QUIET]
    assert main(["test", *options, "--evaluation.scores", json.dumps({"nearest": knn})]) == 0
    samples, results = scores(checkpoints, "whole")
    assert {row["score"] for row in results["rows"]} == {"likelihood", "reconstruction", "weighted", "nearest"}
    assert results["checkpoint"] == "last.ckpt"
    train, rest = 554, len(samples["ids"])
    assert results["forwards"] == {"images": 2 * train + rest, "model": 2 * (2 * train + rest)}
    assert results["weights"]["autoencoder"]["file"] == "scribble.pt"
    assert results["id_accuracy"] > 0.8
    assert all(np.isfinite(values).all() for name, values in samples.items() if name.startswith("score/"))


def test_outliers_to_watch_change_nothing(checkpoints):
    logs = {}
    for name, options in {"without": [], "with": ["--data.val_ood", "noise"]}.items():
        assert main(["fit", *CONFIG, *SMALL, *QUIET, "--data.val_ood", "null", *options, "--name", name]) == 0
        logs[name] = (run_folder(checkpoints, name) / "log.txt").read_text()
        assert [path.name for path in run_folder(checkpoints, name).glob("*.ckpt")] == ["last.ckpt"]
    assert "epoch 0: latent/greatest_norm" in logs["with"]  # what is logged at the end of an epoch is in its line
    assert "epoch 1: latent/greatest_norm" in logs["with"]
    assert "val/open_f1" in logs["with"]
    assert "val/open_f1" not in logs["without"]
    without, watched = (last(checkpoints, name) for name in logs)
    assert without["global_step"] == watched["global_step"] == 2 * BATCHES
    torch.testing.assert_close(watched["state_dict"], without["state_dict"], rtol=0, atol=0)


FINETUNE = ["--model.finetune", "{unfreeze_epoch: 1, lr: 0.01}"]
REFUSED = {
    "half precision": (["--trainer.precision", "bf16-true"], "do not survive bf16-true: choose 32-true or bf16-mixed"),
    "outliers": (
        ["--data.balanced", "null", "--data.outlier_feed", "mixed"],
        "is trained without outliers: leave out outlier_feed",
    ),
    "no such tap": (["--model.density.taps", "[layer9, latent]"], "reads layer9, which DigitsNet does not yield"),
    "scores of a head": (
        ["--evaluation.scores.react", "lightning_modules.scores.react.ReAct"],
        "ReAct reads the head: it needs a method with a classifier, this one has none",
    ),
    "scores fitted on logits": (
        ["--evaluation.scores.kl", "lightning_modules.scores.prototypes.KLMatching"],
        "kl is fitted on logits, and those of VariationalMetric are class likelihoods",
    ),
    "a share of none": (["--model.lower_bound", "95"], r"lower_bound is the share of training samples to reject"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_said(checkpoints, capsys, case):
    options, message = REFUSED[case]
    assert main(["fit", *CONFIG, *SMALL, *QUIET, *options]) == 2
    assert message in capsys.readouterr().err


# Killed

STEPS = {
    "class_path": "torch.optim.lr_scheduler.StepLR",
    "init_args": {"step_size": 5, "gamma": 0.5},
}
KILLED = {  # options, batches after which it is killed
    # while the heads learn alone, in the first step of the backbone, and later
    "finetuning": (
        [*FINETUNE, "--model.lr_scheduler", json.dumps(STEPS), "--model.lr_interval", "step"],
        [6, BATCHES + 1, 2 * BATCHES + 6],
    ),
    "from the start": ([], [BATCHES + 6]),
    "accumulating": (["--trainer.accumulate_grad_batches", "2", "--model.kl_estimator", "mc"], [6, BATCHES + 6]),
}


@pytest.mark.parametrize(
    "case", [name if name == "finetuning" else pytest.param(name, marks=pytest.mark.slow) for name in KILLED]
)
def test_a_fit_that_is_killed_continues_to_the_same_bits(tmp_path, case):
    options, kills = KILLED[case]
    (tmp_path / "breaking.py").write_text(BREAK)

    def fit(name, code):
        breaking = callback("breaking.Break", flag=str(tmp_path / name), sig=int(signal.SIGKILL), batches=kills)
        own = [*options, *breaking, "--name", name, "--save_every_n_steps", "2", "--trainer.max_epochs", "3"]
        command(tmp_path, "fit", *CONFIG, *SMALL, *own, codes=code)

    (tmp_path / "whole").write_text(str(len(kills)))
    fit("whole", 0)
    for _ in kills:
        fit("killed", -signal.SIGKILL)
    assert last(tmp_path, "killed")["state_dict"]["statistics.counts"].any()  # of mid-epoch
    fit("killed", 0)
    whole, resumed = last(tmp_path, "whole"), last(tmp_path, "killed")
    for part in ("state_dict", "global_step", "epoch", "lr_schedulers"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    (whole,), (resumed,) = whole["optimizer_states"], resumed["optimizer_states"]
    assert resumed["param_groups"] == whole["param_groups"]
    torch.testing.assert_close(resumed["state"], whole["state"], rtol=0, atol=0)


BREAK_AT_THE_END = """
import os, signal
from pathlib import Path
from pytorch_lightning import Callback

class Break(Callback):
    def __init__(self, flag: str):
        self.flag = Path(flag)

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == 1 and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_fit_that_is_killed_between_the_last_step_and_the_end_of_an_epoch_ends_that_epoch(tmp_path):
    (tmp_path / "ending.py").write_text(BREAK_AT_THE_END)

    def fit(name, code, *options):
        own = ["--name", name, "--save_every_n_steps", str(BATCHES), "--trainer.max_epochs", "3", *options]
        command(tmp_path, "fit", *CONFIG, *SMALL, *own, codes=code)

    breaking = callback("ending.Break", flag=str(tmp_path / "flag"))
    (tmp_path / "whole").touch()
    fit("whole", 0, *callback("ending.Break", flag=str(tmp_path / "whole")))
    fit("killed", -signal.SIGKILL, *breaking)
    fit("killed", 0, *breaking)
    whole, resumed = last(tmp_path, "whole"), last(tmp_path, "killed")
    torch.testing.assert_close(resumed["state_dict"], whole["state_dict"], rtol=0, atol=0)


# On two processes


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latent")
    command(folder, "fit", *CONFIG, *SMALL, *weighing(folder), "--name", "two", processes=2)
    return folder


@pytest.fixture(scope="module")
def evaluated(trained):
    """The scores of one process."""
    return evaluate(trained, "one")


def evaluate(folder, subfolder, name="two", processes=1):
    config = ["--config", str(run_folder(folder, name) / "config.yaml"), "--evaluation.subfolder", subfolder]
    command(folder, "test", *config, processes=processes)
    return scores(folder, name, subfolder)


def test_two_processes_make_the_steps_of_one(trained):
    checkpoint = last(trained, "two")
    assert checkpoint["global_step"] == 2 * BATCHES
    assert checkpoint["state_dict"]["statistics.course"].shape == (2, 6)
    assert not checkpoint["state_dict"]["statistics.counts"].any()


NAMES = [f"score/{name}" for name in ("likelihood", "reconstruction", "weighted")]


def test_two_processes_evaluate_as_one(trained, evaluated):
    (one, results), (two, others) = evaluated, evaluate(trained, "two", processes=2)
    assert (results["processes"], others["processes"]) == (1, 2)
    for name in ("ids", "labels", "split", "predictions"):
        np.testing.assert_array_equal(two[name], one[name])
    for name in NAMES:
        least = 1e-4 * np.median(np.abs(one[name]))  # a likelihood may be next to nothing
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=least, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("calibration", ["id_val", "test"])
def test_two_processes_calibrate_on_the_images_of_all(trained, evaluated, calibration):
    shutil.copytree(run_folder(trained, "two"), run_folder(trained, calibration))
    path = run_folder(trained, calibration) / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config["model"]["init_args"]["calibration"], config["name"] = calibration, calibration
    path.write_text(yaml.safe_dump(config))
    found, _ = evaluate(trained, "", calibration, processes=2)
    samples, _ = evaluated
    of_calibration = samples["split"] == list(samples["splits"]).index("calibration")
    rows = of_calibration if calibration == "id_val" else ~of_calibration
    likelihood, error = -samples[NAMES[0]], samples[NAMES[1]]
    bracket = np.minimum(likelihood - likelihood[rows].max(), 0) - 1
    expected = -error / error[rows].max() * bracket
    np.testing.assert_allclose(found[NAMES[2]], expected, rtol=1e-3, atol=1e-4 * np.median(expected))


# Real images

DATA = os.environ.get("OOD_TEST_DATA")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(DATA is None, reason="OOD_TEST_DATA names no folder with the arrays of MNIST")
def test_the_recipe_learns_a_part_of_mnist(tmp_path, checkpoints):
    noise = np.random.default_rng(0).integers(128, 256, (500, 28, 28), dtype=np.uint8)  # 0 to 1 for the network
    np.savez(tmp_path / "noise.npz", images=noise)
    recipe = yaml.safe_load((ROOT / "experiments" / "variational_metric" / "mnist_arrays.yaml").read_text())
    del recipe["model"]["init_args"]["autoencoder"]
    # of a class there are 570 images, too few for the covariance of all 832 features
    recipe["model"]["init_args"]["density"]["taps"] = ["latent"]
    recipe["model"]["init_args"]["optimizer"]["init_args"]["lr"] = 1e-3
    recipe["model"]["init_args"]["lr_scheduler"]["init_args"]["step_size"] = 3
    recipe["data"]["init_args"] |= {
        "train": {"path": f"{DATA}/mnist_train_60000.npz", "limit": 6000},
        "test": {"path": f"{DATA}/mnist_test_10000.npz", "limit": 1000},
        "ood": {"noise": {"path": str(tmp_path / "noise.npz")}},
        "val_ood": None,
        "balanced": {"classes_per_batch": 10, "images_per_class": 5},
    }
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "mnist.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--config", str(tmp_path / "tests" / "mnist.yaml"), *QUIET, "--trainer.max_epochs", "4"]
    options += ["--trainer.precision", "bf16-mixed", "--trainer.limit_val_batches", "0"]
    assert main(["fit", *options]) == 0
    assert main(["test", *options]) == 0
    results = json.loads((checkpoints / "tests" / "mnist" / "seed0" / "results.json").read_text())
    assert results["id_accuracy"] > 0.97
    (row,) = [row for row in results["rows"] if row["score"] == "likelihood"]
    assert row["auroc"] > 0.95
