"""``evaluate`` and ``stages``: networks without a run, runs at every stage, and scores that are fitted once."""

import csv
import importlib
import inspect
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from backbones.digits_net import DigitsNet
from experiments.__main__ import main
from experiments.stages import kept_checkpoints
from lightning_modules.scores.score import Score

ROOT = Path(__file__).resolve().parent.parent.parent
EXPERIMENTS = ROOT / "experiments"
DIGITS = str(EXPERIMENTS / "classifier" / "digits.yaml")
QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
QUIET += ["--evaluation.figures", "false", "--evaluation.bootstrap", "0"]
SCORES = {
    "msp": "lightning_modules.scores.logits.MSP",
    "gmm": {"class_path": "lightning_modules.scores.gmm.GMMEnergy", "init_args": {"tap": "std"}},
    "layered": {
        "class_path": "lightning_modules.scores.layered_mahalanobis.LayeredMahalanobis",
        "init_args": {"taps": ["layer1", "penultimate"], "magnitudes": [0.0, 0.01]},
    },
    "both": {
        "class_path": "lightning_modules.scores.composition.Composition",
        "init_args": {
            "members": {
                "msp": "lightning_modules.scores.logits.MSP",
                "gmm": "lightning_modules.scores.gmm.GMMEnergy",
            },
            "beta": float("-inf"),
        },
    },
}


@pytest.fixture
def network(tmp_path, checkpoints):
    """A YAML of a network with weights, of digits, and of scores, and no run."""
    torch.manual_seed(0)
    torch.save(DigitsNet(6).state_dict(), tmp_path / "net.pt")
    backbone = {"class_path": "backbones.digits_net.DigitsNet"}
    backbone["init_args"] = {"num_classes": 6, "weights": str(tmp_path / "net.pt")}
    settings = {
        "model": {"init_args": {"backbone": backbone}},
        "data": {
            "class_path": "datamodules.digits.Digits",
            "init_args": {"batch_size": 64, "val_split": 0.2, "mean": [0.5], "std": [0.5]},
        },
        "evaluation": {"scores": SCORES},
    }
    (tmp_path / "network.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path / "network.yaml"


def evaluate(network, *options):
    return main(["evaluate", "--config", str(network), *QUIET, *options])


def record(network):
    folder = network.parent / "checkpoints" / "evaluate" / "network" / "seed0"
    scores = np.load(folder / "scores.npz")
    return json.loads((folder / "results.json").read_text()), {name: scores[name] for name in scores.files}


def test_a_network_is_evaluated_without_a_run_and_fitted_once(network, capsys):
    assert evaluate(network) == 0
    first, scores = record(network)
    assert first["experiment"] == "evaluate/network"
    assert {row["score"] for row in first["rows"]} == set(SCORES)
    assert first["restored"] == []
    assert first["weights"]["backbone"]["file"] == "net.pt"
    fit = first["splits"]["fit"]["size"]
    scored = sum(split["size"] for name, split in first["splits"].items() if name not in ("fit", "train", "outliers"))
    assert first["forwards"]["images"] == 2 * fit + scored  # a composition takes two passes

    assert evaluate(network) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert evaluate(network, "--overwrite", "true") == 0
    second, again = record(network)
    assert set(second["restored"]) == {"gmm", "layered", "both"}
    assert second["forwards"]["images"] == scored
    assert second["rows"] == first["rows"]
    assert all((again[name] == values).all() for name, values in scores.items())


@pytest.mark.parametrize(
    ("change", "restored"),
    [
        (["--evaluation.scores.gmm.init_args.tap", "max"], {"layered", "both"}),
        (["--evaluation.scores.extra", "lightning_modules.scores.knn.KNN"], {"gmm", "layered", "both"}),
        (["--data.init_args.fit_limit", "300"], set()),
        pytest.param(["--data.init_args.mean", "[0.4]"], set(), marks=pytest.mark.slow),
        pytest.param(["--data.init_args.split_seed", "1"], set(), marks=pytest.mark.slow),
        pytest.param(["--trainer.precision", "64-true"], set(), marks=pytest.mark.slow),
        pytest.param(["--trainer.limit_test_batches", "2"], set(), marks=pytest.mark.slow),
        pytest.param(["--trainer.limit_test_batches", "1"], None, marks=pytest.mark.slow),
        pytest.param(["--data.init_args.eval_batch_size", "50"], {"gmm", "layered", "both"}, marks=pytest.mark.slow),
        (["weights"], set()),
        (["damage"], {"layered", "both"}),
    ],
)
def test_scores_are_fitted_again_where_something_changed(network, change, restored, caplog):
    assert evaluate(network) == 0
    if change == ["weights"]:
        torch.manual_seed(1)
        torch.save(DigitsNet(6).state_dict(), network.parent / "net.pt")
    elif change == ["damage"]:
        file = network.parent / "checkpoints" / "evaluate" / "network" / "seed0" / "fitted" / "gmm.pt"
        file.write_bytes(file.read_bytes()[:-900])
    assert evaluate(network, "--overwrite", "true", *(change if len(change) > 1 else [])) == 0
    results, _ = record(network)
    if restored is None:  # the parser may take 1 for the whole, depending on what was imported before it
        restored = set() if results["truncated"] else {"gmm", "layered", "both"}
    assert set(results["restored"]) == restored
    assert ("is damaged" in caplog.text) == (change == ["damage"])


def test_what_a_truncated_test_has_fitted_is_not_kept(network):
    assert evaluate(network, "--trainer.limit_test_batches", "1") == 0
    truncated = record(network)[0]["truncated"]
    assert evaluate(network, "--overwrite", "true") == 0
    assert (record(network)[0]["restored"] == []) == truncated
    assert evaluate(network, "--overwrite", "true", "--trainer.limit_test_batches", "3") == 0
    assert record(network)[0]["restored"] == []


OWN_SCORE = """
from lightning_modules.scores.score import Score
from own_helper import SIGN


class Own(Score):
    taps = frozenset({"penultimate"})

    def forward(self, evidence):
        return SIGN * evidence.features["penultimate"].sum(1)
"""


def test_changed_code_of_the_user_is_noticed_wherever_it_is_used(network, monkeypatch):
    monkeypatch.syspath_prepend(str(network.parent))
    (network.parent / "own_score.py").write_text(OWN_SCORE)
    (network.parent / "own_helper.py").write_text("SIGN = 1\n")
    wrapped = {"class_path": "lightning_modules.scores.clipped.Clipped", "init_args": {"score": "own_score.Own"}}
    own = ["--evaluation.scores", json.dumps({"own": wrapped}), "--overwrite", "true"]
    for sign, restored in (("1", []), ("1", ["own"]), ("-1", [])):
        (network.parent / "own_helper.py").write_text(f"SIGN = {sign}\n")
        assert evaluate(network, *own) == 0
        assert record(network)[0]["restored"] == restored
        for name in ("own_score", "own_helper"):
            monkeypatch.delitem(sys.modules, name)


def test_kept_scores_are_those_of_the_checkpoint(checkpoints):
    assert main(["run", "--config", DIGITS, *QUIET, "--trainer.max_epochs", "2"]) == 0
    folder = checkpoints / "classifier" / "digits" / "seed0"
    again = ["test", "--config", str(folder / "config.yaml"), "--overwrite", "true"]
    for checkpoint, restored in (("best", 4), ("last", 0), ("last", 4)):
        state = torch.load(folder / "last.ckpt", weights_only=True)
        if checkpoint == "last" and not restored:  # another network of the same name
            state["state_dict"]["backbone.fc.weight"] += 1
            torch.save(state, folder / "last.ckpt")
        assert main([*again, "--ckpt_path", str(folder / f"{checkpoint}.ckpt")]) == 0
        assert len(json.loads((folder / "results.json").read_text())["restored"]) == restored


def test_a_disk_that_is_full_costs_no_result(network, monkeypatch, caplog):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("callbacks.fitted_scores.tempfile.NamedTemporaryFile", full)
    assert evaluate(network) == 0
    assert "what gmm has learned is not kept: [Errno 28]" in caplog.text
    assert record(network)[0]["rows"]


@pytest.mark.slow
def test_kept_scores_are_those_of_the_precision(network):
    exact = ["--trainer.precision", "64-true", "--overwrite", "true"]
    assert evaluate(network, *exact) == 0
    first, scores = record(network)
    assert evaluate(network, *exact) == 0
    second, again = record(network)
    assert (len(first["restored"]), len(second["restored"])) == (0, 3)
    assert all((again[name] == values).all() for name, values in scores.items())


@pytest.fixture
def run(checkpoints):
    keep = [
        "--keep_every_n_epochs",
        "2",
        "--trainer.max_epochs",
        "3",
        "--evaluation.scores",
        json.dumps({"msp": SCORES["msp"]}),
    ]
    assert main(["fit", "--config", DIGITS, *QUIET, *keep]) == 0
    return checkpoints / "classifier" / "digits" / "seed0"


def test_every_stage_of_a_run_is_tested_once(run, capsys):
    epochs = {
        torch.load(run / name, weights_only=True)["epoch"] for name in ("last.ckpt", "best.ckpt", "epochs/001.ckpt")
    } | {-1}  # before the first step
    assert main(["stages", str(run)]) == 0
    with (run / "stages" / "stages.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [epoch for epoch in sorted(epochs) for _ in range(3)]
    for row in rows:
        folder = run / "stages" / (f"{int(row['epoch']):03d}" if int(row["epoch"]) >= 0 else "first")
        stage = json.loads((folder / "results.json").read_text())
        assert stage["epoch"] == int(row["epoch"])
        (expected,) = [found for found in stage["rows"] if found["ood_set"] == row["ood_set"]]
        assert float(row["auroc"]) == expected["auroc"]
        assert float(row["id_accuracy"]) == stage["id_accuracy"]
        assert (stage["experiment"], stage["name"]) == ("classifier/digits", "seed0")
    assert len({row["auroc"] for row in rows}) > 3
    assert all((run / "stages" / f"{metric}.png").stat().st_size > 10_000 for metric in ("auroc", "fpr95", "aupr_in"))
    assert not (run / "results.json").exists()

    times = {path: path.stat().st_mtime_ns for path in run.glob("stages/*/results.json")}
    assert main(["stages", str(run)]) == 0
    assert {path: path.stat().st_mtime_ns for path in run.glob("stages/*/results.json")} == times
    assert main(["stages", str(run), "--evaluation.rules", "openood"]) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert main(["stages", str(run), "--evaluation.rules", "openood", "--overwrite", "true"]) == 0
    assert all(path.stat().st_mtime_ns > time for path, time in times.items())


@pytest.mark.slow
def test_a_stage_whose_checkpoint_changed_is_tested_again(run):
    assert main(["stages", str(run)]) == 0
    before = (run / "stages" / "stages.csv").read_text()
    state = torch.load(run / "epochs" / "001.ckpt", weights_only=True)
    state["state_dict"]["backbone.fc.weight"].neg_()
    torch.save(state, run / "epochs" / "001.ckpt")
    assert main(["stages", str(run)]) == 0
    after = (run / "stages" / "stages.csv").read_text()
    changed = [new for old, new in zip(before.splitlines(), after.splitlines(), strict=True) if old != new]
    assert changed
    assert all(row.startswith("1,") for row in changed)


def test_the_last_checkpoint_of_an_unfinished_run_is_no_stage(run):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "running"}))
    assert "last.ckpt" not in [path.name for _, path in kept_checkpoints(run)]


def test_a_curve_needs_two_points(checkpoints, capsys):
    options = ["--trainer.max_epochs", "1", "--keep_every_n_epochs", "null"]
    assert main(["fit", "--config", DIGITS, *QUIET, *options]) == 0
    folder = checkpoints / "classifier" / "digits" / "seed0"
    assert main(["stages", str(folder)]) == 2
    assert "holds 1 checkpoint, and a curve needs two: train with --keep_every_n_epochs" in capsys.readouterr().err
    assert main(["stages", str(folder.parent / "seed7")]) == 2
    assert "holds no run" in capsys.readouterr().err


PARTS_OF_METHODS = {"FeatureEnergy", "HybridEnergy", "WeightedDensity"}  # another score as a prior, or trained


def test_every_score_is_in_the_list_of_all(network):
    everything = EXPERIMENTS / "_all_scores.yaml"
    text = everything.read_text()
    for path in (ROOT / "lightning_modules" / "scores").glob("*.py"):
        module = importlib.import_module(f"lightning_modules.scores.{path.stem}")
        for name, kind in vars(module).items():
            if inspect.isclass(kind) and issubclass(kind, Score) and kind.__module__ == module.__name__:
                if name in PARTS_OF_METHODS:
                    continue
                assert inspect.isabstract(kind) or f"scores.{path.stem}.{name}" in text, name
    assert evaluate(network, "--config", str(everything)) == 0
    results, _ = record(network)
    assert {row["score"] for row in results["rows"]} == set(yaml.safe_load(text)["evaluation"]["scores"])
    assert all(np.isfinite(row["auroc"]) for row in results["rows"])
