"""Unleashing Mask through the command line: estimate, fine-tune, test; killed, and on two processes."""

import csv
import json
import re
import shutil
import signal
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from test_interrupted import BREAK

import backbones.weights
import experiments.cli
from backbones.digits_net import DigitsNet
from backbones.subnetwork import maskable
from callbacks.checkpoints import epoch_of
from datamodules.digits import Digits
from experiments.__main__ import main

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false", "--evaluation.figures", "false", "--evaluation.bootstrap", "0"]
SCORES = ["--evaluation.scores", json.dumps({"energy": "lightning_modules.scores.logits.Energy"})]
EPOCHS = 3


def config(name):
    return ["--config", str(EXPERIMENTS / f"{name}.yaml"), *QUIET, *SCORES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tree with a converged classifier and the estimate of its floor."""
    folder = tmp_path_factory.mktemp("mask")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones.weights, "CHECKPOINTS", folder)
        patch.setattr(experiments.cli, "CHECKPOINTS", folder)
        short = ["--trainer.max_epochs", "12", "--keep_every_n_epochs", "null"]
        assert main(["fit", *config("classifier/digits"), *short]) == 0
        assert main(["run", *config("unleashing_mask/estimate_digits")]) == 0
        yield folder


FEW = ["--model.keep", "0.3"]  # so that the subnetwork is worse than the network
SHORT = ["--trainer.max_epochs", str(EPOCHS), "--keep_every_n_epochs", "2"]


def run(name, *options):
    assert main(["run", *config(f"unleashing_mask/{name}"), *SHORT, *options]) == 0


def results(folder, name, subfolder=""):
    return json.loads((folder / "unleashing_mask" / name / "seed0" / subfolder / "results.json").read_text())


def state_of(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture(scope="module")
def um(folder):
    run("digits_um")
    return folder / "unleashing_mask" / "digits_um" / "seed0"


@pytest.fixture(scope="module")
def umap(folder):
    run("digits_umap", *FEW)
    return folder / "unleashing_mask" / "digits_umap" / "seed0"


def test_the_estimate_is_in_the_run_folder(folder):
    run_folder = folder / "unleashing_mask" / "estimate_digits" / "seed0"
    found = json.loads((run_folder / "estimate.json").read_text())
    assert found["images"] == 554
    assert found["floor"] == pytest.approx(np.mean(found["losses"]))
    assert found["floor"] > found["whole"]["loss"]
    assert found["weights"]["source"] == "run:classifier/digits@last"
    before, after = (
        state_of(path) for path in (folder / "classifier/digits/seed0/last.ckpt", run_folder / "last.ckpt")
    )
    weights = [name for name in before if name.startswith("backbone.")]
    assert all(torch.equal(before[name], after[name]) for name in weights)
    assert results(folder, "estimate_digits")["epoch"] == -1


@pytest.mark.parametrize("name", ["digits_um", "digits_umap"])
def test_without_an_estimate_nothing_begins(folder, name, capsys, monkeypatch):
    shutil.copytree(folder / "classifier", folder / "elsewhere" / "classifier", dirs_exist_ok=True)
    for module in (backbones.weights, experiments.cli):
        monkeypatch.setattr(module, "CHECKPOINTS", folder / "elsewhere")
    assert main(["fit", *config(f"unleashing_mask/{name}")]) == 2
    assert "`make unleashing_mask-estimate_digits` makes it" in capsys.readouterr().err
    assert not (folder / "elsewhere" / "unleashing_mask").exists()


def test_first_best_last_and_every_nth_checkpoint_are_kept(um):
    kept = {path.stem: epoch_of(path) for path in (um / "epochs").iterdir()}
    assert kept.keys() == {"first", "001", "best"}
    assert (kept["first"], kept["001"]) == (-1, 1)
    assert 0 <= kept["best"] < EPOCHS
    assert epoch_of(um / "last.ckpt") == EPOCHS - 1
    assert not (um / "best.ckpt").exists()
    assert json.loads((um / "results.json").read_text())["checkpoint"] == "last.ckpt"
    floor = json.loads((um.parents[1] / "estimate_digits" / "seed0" / "estimate.json").read_text())["floor"]
    assert torch.load(um / "last.ckpt", weights_only=True)["floor"] == floor


def test_a_folder_per_run(um, folder):
    with pytest.raises(SystemExit):  # an unknown option is no new run
        main(["run", *config("unleashing_mask/digits_um"), "--model.prune_rate", "0.8"])
    assert main(["run", *config("unleashing_mask/digits_um"), "--model.beta", "2.0"]) == 2
    assert {path.name for path in um.parent.iterdir()} <= {"seed0", "further", "killed"}


def test_umap_predicts_as_before_and_scores_by_the_subnetwork(umap, folder):
    found, before = results(folder, "digits_umap"), results(folder, "estimate_digits")
    assert found["id_accuracy"] == before["id_accuracy"]
    assert found["logit_accuracy"] < found["id_accuracy"]
    assert before["logit_accuracy"] == before["id_accuracy"]
    assert found["forwards"]["model"] == found["forwards"]["images"]
    old, new = (np.load(umap.parents[1] / name / "seed0" / "scores.npz") for name in ("estimate_digits", "digits_umap"))
    np.testing.assert_array_equal(new["predictions"], old["predictions"])
    assert not np.allclose(new["score/energy"], old["score/energy"])


@pytest.mark.parametrize("freeze", [True, False])
def test_the_weights_of_umap_are_those_of_the_subnetwork(umap, folder, freeze):
    name = "seed0"
    if not freeze:
        name = "joint"
        run("digits_umap", *FEW, "--model.freeze_weights", "false", "--name", name)
    found = json.loads((umap.with_name(name) / "results.json").read_text())
    network = DigitsNet(num_classes=6, weights=f"run:unleashing_mask/digits_umap/{name}").eval()
    assert sum(int((weight == 0).sum()) for _, weight in maskable(network)) > 0.6 * sum(
        weight.numel() for _, weight in maskable(network)
    )
    data = Digits(batch_size=64, mean=[0.5], std=[0.5])
    data.setup()
    images = (data.sets["id"].read(torch.arange(data.sizes["id"])).float() / 255 - 0.5) / 0.5
    accuracy = float((network(images).argmax(1) == data.sets["id"].labels).float().mean())
    assert accuracy == pytest.approx(found["logit_accuracy"], abs=1e-6)


def test_the_best_of_umap_is_that_of_the_subnetwork(umap):
    state = torch.load(umap / "epochs" / "best.ckpt", weights_only=True)
    (best,) = [s for name, s in state["callbacks"].items() if "'monitor': 'val/subnetwork_accuracy'" in name]
    assert best["best_model_score"] < 1
    assert epoch_of(umap / "epochs" / "best.ckpt") > 0


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_a_run_from_a_checkpoint_in_a_folder_of_its_own(um):
    options = ["--name", "further", "--ckpt_path", str(um / "last.ckpt"), "--trainer.max_epochs", str(EPOCHS + 1)]
    assert main(["fit", *config("unleashing_mask/digits_um"), *options, "--keep_every_n_epochs", "2"]) == 0
    assert (um.with_name("further") / "forgotten" / "samples.csv").is_file()


def test_stages_go_from_the_converged_network_on(um, folder, capsys):
    assert main(["stages", str(um)]) == 0
    with (um / "stages" / "stages.csv").open() as file:
        rows = list(csv.DictReader(file))
    epochs = sorted({int(row["epoch"]) for row in rows})
    assert epochs[0] == -1
    assert epochs[-1] == EPOCHS - 1
    first = [float(row["fpr95"]) for row in rows if row["epoch"] == "-1"]
    assert first == [row["fpr95"] for row in results(folder, "estimate_digits")["rows"]]
    assert (um / "stages" / "fpr95.png").stat().st_size > 10_000


def test_what_was_forgotten_is_told(um):
    summary = json.loads((um / "forgotten" / "summary.json").read_text())
    with (um / "forgotten" / "samples.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == summary["images"] == 554
    assert sum(row["forgotten"] == "True" for row in rows) == summary["forgotten"]


# In other processes


def command(folder, verb, name, *options, processes=1, codes=0):
    found, output = forked.command(folder, verb, *config(f"unleashing_mask/{name}"), *options, processes=processes)
    assert found == [codes] * processes, output[-3000:]


@pytest.mark.parametrize("name", ["digits_umap", pytest.param("digits_um", marks=pytest.mark.slow)])
def test_a_fit_that_is_killed_continues_to_the_same_bits(folder, request, name):
    whole = request.getfixturevalue("um" if name == "digits_um" else "umap")
    (folder / "breaking.py").write_text(BREAK)
    breaking = {"flag": str(folder / f"broke_{name}"), "sig": int(signal.SIGKILL), "batches": [11]}
    callback = json.dumps({"class_path": "breaking.Break", "init_args": breaking})
    options = [
        *SHORT,
        *(FEW if name == "digits_umap" else []),
        "--name",
        "killed",
        "--save_every_n_steps",
        "3",
        "--trainer.callbacks+",
        callback,
    ]
    command(folder, "fit", name, *options, codes=-signal.SIGKILL)
    assert torch.load(whole.with_name("killed") / "last.ckpt", weights_only=True)["global_step"] == 9
    command(folder, "fit", name, *options)
    expected = torch.load(whole / "last.ckpt", weights_only=True)
    found = torch.load(whole.with_name("killed") / "last.ckpt", weights_only=True)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "floor"):
        torch.testing.assert_close(found[part], expected[part], rtol=0, atol=0)
    assert (whole.with_name("killed") / "epochs" / "first.ckpt").is_file()
    stories = [(run / "forgotten" / "samples.csv").read_text() for run in (whole, whole.with_name("killed"))]
    assert stories[0] == stories[1]


def test_two_processes_evaluate_as_one(folder, umap):
    stored = ["--config", str(umap / "config.yaml"), "--evaluation.subfolder", "two"]
    found, output = forked.command(folder, "test", *stored, processes=2)
    assert found == [0, 0], output[-3000:]
    one, two = results(folder, "digits_umap"), results(folder, "digits_umap", "two")
    assert two["processes"] == 2
    for key in ("id_accuracy", "logit_accuracy", "forwards"):
        assert two[key] == one[key]
    for row, other in zip(one["rows"], two["rows"], strict=True):
        assert other["auroc"] == pytest.approx(row["auroc"], abs=1e-3)


# As the README shows it


def test_the_floor_in_plain_pytorch():
    text = (EXPERIMENTS / "unleashing_mask" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len([line for line in code.splitlines() if line and not line.startswith(("import", "from"))]) <= 10
    images, labels = torch.randn(32, 1, 8, 8), torch.arange(32) % 6
    names = {"network": DigitsNet(num_classes=6).train(), "loader": [(images, labels)] * 60, "floor": 0.5}
    exec(compile(code, "README.md", "exec"), names)
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(names["network"](images), labels)
    assert 0.3 < loss < 0.7
