import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from backbones.digits_net import DigitsNet
from callbacks.checkpoints import epoch_of
from experiments.__main__ import main
from experiments.cli import OODCLI

ROOT = Path(__file__).resolve().parent.parent.parent
YAMLS = sorted(path for path in (ROOT / "experiments").glob("[!_]*/[!_]*.yaml"))
DIGITS = str(ROOT / "experiments" / "classifier" / "digits.yaml")
QUICK = ["--trainer.max_epochs", "2", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
QUICK += ["--evaluation.figures", "false", "--evaluation.bootstrap", "10", "--trainer.accelerator", "cpu"]


class Construct(OODCLI):
    """Parses and builds everything, runs nothing."""

    def _run_subcommand(self, subcommand):
        pass


@pytest.fixture
def finished(checkpoints):
    assert main(["run", "--config", DIGITS, *QUICK]) == 0
    return checkpoints / "classifier" / "digits" / "seed0"


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_every_yaml_is_constructed(path, checkpoints, monkeypatch):
    for module in list(sys.modules.values()):  # weights are not at hand
        if module.__name__.startswith("backbones.") and hasattr(module, "load_weights"):
            monkeypatch.setattr(module, "load_weights", lambda network, source: None)
    monkeypatch.setattr("lightning_modules.losses.loss_floor.read_estimate", lambda source, network: 0.1)
    cli = Construct(["fit", "--config", str(path)])
    assert cli.folder == checkpoints / path.parent.name / path.stem / "seed0"
    assert not cli.folder.exists()


def test_the_seed_reaches_data_steps_and_name(checkpoints):
    cli = Construct(["fit", "--config", DIGITS, "--seed_everything", "7"])
    assert cli.datamodule.seed == 7
    assert cli.datamodule.split_seed == 0
    assert [callback.seed for callback in cli.trainer.callbacks if type(callback).__name__ == "SeedSteps"] == [7]
    assert cli.folder.name == "seed7"
    assert [c.folder for c in cli.trainer.callbacks if type(c).__name__ == "OODEvaluation"] == [cli.folder]


def test_a_run_leaves_the_whole_record(finished):
    files = {path.name for path in finished.iterdir()}
    wanted = {
        "config.yaml",
        "run.json",
        "log.txt",
        "last.ckpt",
        "best.ckpt",
        "results.json",
        "results.csv",
        "scores.npz",
    }
    assert wanted <= files
    results = json.loads((finished / "results.json").read_text())
    assert results["experiment"] == "classifier/digits"
    assert results["checkpoint"] == "best.ckpt"
    assert results["epoch"] == torch.load(finished / "best.ckpt", weights_only=True)["epoch"]
    assert {row["ood_set"] for row in results["rows"]} == {"unknown", "photograph", "noise"}
    assert len(results["rows"]) == 8 * 3
    assert json.loads((finished / "run.json").read_text())["status"] == "finished"
    assert "epoch 1:" in (finished / "log.txt").read_text()
    config = yaml.safe_load((finished / "config.yaml").read_text())
    assert not {"ckpt_path", "overwrite"} & set(config)
    assert str(finished) not in (finished / "config.yaml").read_text()


def test_a_finished_run_is_refused_then_overwritten_on_request(finished, capsys):
    before = (finished / "last.ckpt").read_bytes()
    assert main(["fit", "--config", DIGITS, *QUICK]) == 2
    assert "finished run" in capsys.readouterr().err
    assert (finished / "last.ckpt").read_bytes() == before
    assert main(["fit", "--config", DIGITS, *QUICK, "--overwrite", "true"]) == 0
    assert not (finished / "results.json").exists()


def test_run_does_not_repeat_what_is_done(finished, capsys):
    before = (finished / "last.ckpt").stat().st_mtime_ns
    assert main(["run", "--config", DIGITS, *QUICK]) == 0
    assert "is fitted already" in capsys.readouterr().out
    (finished / "results.json").unlink()  # as if it had been cut off before the test
    assert main(["run", "--config", DIGITS, *QUICK]) == 0
    assert (finished / "results.json").is_file()
    assert (finished / "last.ckpt").stat().st_mtime_ns == before
    assert main(["run", "--config", DIGITS, *QUICK, "--trainer.max_epochs", "3"]) == 2
    assert "finished run of another configuration" in capsys.readouterr().err


def test_a_run_is_not_lost_to_one_that_cannot_start(finished):
    before = {path.name for path in finished.iterdir()}
    overwrite = ["fit", "--config", DIGITS, *QUICK, "--overwrite", "true"]
    assert main([*overwrite, "--data.init_args.batch_size", "100000"]) == 2
    assert main([*overwrite, "--model.init_args.backbone.init_args.num_classes", "7"]) == 2
    assert main([*overwrite, "--model.init_args.backbone.init_args.weights", "no.pt"]) == 2
    assert {path.name for path in finished.iterdir()} == before
    assert [path.name for path in finished.parent.iterdir()] == ["seed0"]


@pytest.mark.parametrize("name", ["a/b", "../elsewhere", ".."])
def test_a_name_that_leaves_the_run_folders_is_refused(checkpoints, capsys, name):
    code = main(["fit", "--config", DIGITS, *QUICK, "--name", name])
    assert code == 2
    assert "one word" in capsys.readouterr().err


def test_an_unfinished_run_continues_and_refuses_another_configuration(checkpoints, capsys):
    folder = checkpoints / "classifier" / "digits" / "seed0"
    assert main(["fit", "--config", DIGITS, *QUICK]) == 0
    whole = torch.load(folder / "last.ckpt", weights_only=True)
    assert main(["fit", "--config", DIGITS, *QUICK, "--overwrite", "true", "--trainer.max_epochs", "1"]) == 0
    record = yaml.safe_load((folder / "config.yaml").read_text())
    (folder / "run.json").write_text(json.dumps({"status": "interrupted"}))
    assert main(["fit", "--config", DIGITS, *QUICK]) == 2
    assert "trainer.max_epochs: 1 there, 2 here" in capsys.readouterr().err
    record["trainer"]["max_epochs"] = 2
    (folder / "config.yaml").write_text(yaml.safe_dump(record))
    assert main(["fit", "--config", DIGITS, *QUICK]) == 0
    resumed = torch.load(folder / "last.ckpt", weights_only=True)
    assert resumed["epoch"] == whole["epoch"] == 1
    for name, value in whole["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value), name


def test_the_record_is_a_configuration_again(finished, checkpoints):
    config = str(finished / "config.yaml")
    assert main(["run", "--config", config, "--name", "again"]) == 0
    again = finished.parent / "again"
    first, second = (json.loads((folder / "results.json").read_text()) for folder in (finished, again))
    assert second["rows"] == first["rows"]
    assert second["weights_sha256"] == first["weights_sha256"]
    assert second["name"] == "again"


def test_testing_from_the_experiments_yaml_needs_the_model_of_the_run(finished, capsys):
    smoothed = ["--model.init_args.label_smoothing", "0.1"]
    assert main(["test", "--config", DIGITS, *QUICK, *smoothed, "--overwrite", "true"]) == 2
    assert "label_smoothing: 0.0 there, 0.1 here" in capsys.readouterr().err
    assert main(["test", "--config", DIGITS, *QUICK]) == 2
    assert "replace it with --overwrite true" in capsys.readouterr().err
    assert main(["test", "--config", DIGITS, *QUICK, "--overwrite", "true"]) == 0


def test_other_scores_and_sets_can_be_tested_on_a_finished_run(finished):
    config = str(finished / "config.yaml")
    scores = '{"energy": {"class_path": "lightning_modules.scores.logits.Energy", "init_args": {"temperature": 2.0}}}'
    assert (
        main(
            [
                "test",
                "--config",
                config,
                "--evaluation.scores",
                scores,
                "--data.init_args.ood",
                "[noise]",
                "--overwrite",
                "true",
            ]
        )
        == 0
    )
    rows = json.loads((finished / "results.json").read_text())["rows"]
    assert [(row["score"], row["ood_set"]) for row in rows] == [("energy", "unknown"), ("energy", "noise")]
    scores = json.loads((finished / "results.json").read_text())["configuration"]["evaluation"]["scores"]
    assert scores["energy"]["init_args"] == {"temperature": 2.0}


def test_another_split_of_the_data_is_not_tested_on_a_run(finished, capsys):
    arguments = ["test", "--config", str(finished / "config.yaml"), "--overwrite", "true"]
    assert main([*arguments, "--data.init_args.subset.fraction", "0.5"]) == 2
    assert "not the data that the run was fitted on" in capsys.readouterr().err
    assert main([*arguments, "--data.init_args.split_seed", "3"]) == 2


def test_scores_read_the_head_of_the_checkpoint(finished):
    config = str(finished / "config.yaml")
    cli = OODCLI(["test", "--config", config, "--overwrite", "true"])
    trained = torch.load(finished / "best.ckpt", weights_only=True)["state_dict"]
    (evaluation,) = [c for c in cli.trainer.callbacks if type(c).__name__ == "OODEvaluation"]
    assert any(torch.equal(evaluation.scores["react"].weight, value) for value in trained.values())


def test_without_held_out_images_the_last_checkpoint_is_tested(checkpoints):
    assert main(["run", "--config", DIGITS, *QUICK, "--data.init_args.val_split", "0"]) == 0
    folder = checkpoints / "classifier" / "digits" / "seed0"
    results = json.loads((folder / "results.json").read_text())
    assert results["checkpoint"] == "last.ckpt"
    assert results["thresholds"] == {}
    assert not (folder / "best.ckpt").exists()


def test_a_damaged_checkpoint_is_named(finished, capsys):
    (finished / "best.ckpt").write_bytes((finished / "best.ckpt").read_bytes()[:1000])
    assert main(["test", "--config", str(finished / "config.yaml"), "--overwrite", "true"]) == 2
    assert "best.ckpt is damaged" in capsys.readouterr().err


def test_checkpoints_of_the_training_are_kept(checkpoints):
    keep = ["--trainer.max_epochs", "5", "--keep_every_n_epochs", "2"]
    assert main(["fit", "--config", DIGITS, *QUICK, *keep]) == 0
    folder = checkpoints / "classifier" / "digits" / "seed0"
    kept = {path.name: epoch_of(path) for path in (folder / "epochs").iterdir()}
    assert kept == {"first.ckpt": -1, "001.ckpt": 1, "003.ckpt": 3}  # epochs count from 0
    assert (folder / "last.ckpt").is_file()


def test_seeds_are_averaged(finished, capsys):
    assert main(["run", "--config", DIGITS, *QUICK, "--seed_everything", "1"]) == 0
    runs = [json.loads((finished.parent / f"seed{k}" / "results.json").read_text())["rows"][0] for k in (0, 1)]
    capsys.readouterr()
    assert main(["metrics", str(finished), str(finished.parent / "seed1"), "--bootstrap", "0"]) == 0
    mean, std = (100 * f([run["auroc"] for run in runs]) for f in (np.mean, lambda values: np.std(values, ddof=1)))
    assert f"{mean:.1f} ± {std:.1f}" in capsys.readouterr().out


def test_the_metrics_of_the_record_follow_from_its_scores(finished, capsys):
    rows = json.loads((finished / "results.json").read_text())["rows"]
    capsys.readouterr()
    assert main(["metrics", str(finished), "--bootstrap", "0", "--rules", "default"]) == 0
    printed = capsys.readouterr().out
    for row in rows:
        assert f"{100 * row['aupr_out']:.1f}" in printed
    assert main(["metrics", str(finished), "--bootstrap", "0", "--rules", "openood"]) == 0
    assert "share of ID rejected where 95% of OOD is" in " ".join(capsys.readouterr().out.split())


def test_fast_dev_run_touches_no_real_run(finished):
    before = {path.name: path.stat().st_mtime_ns for path in finished.iterdir()}
    assert main(["fit", "--config", DIGITS, *QUICK, "--trainer.fast_dev_run", "true"]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in finished.iterdir()} == before
    assert (finished.parent / "fast_dev_run").is_dir()
    assert main(["run", "--config", DIGITS, *QUICK, "--trainer.fast_dev_run", "true"]) == 0


def test_weights_alone_can_be_evaluated_from_anywhere(checkpoints, tmp_path, monkeypatch):
    torch.manual_seed(0)
    torch.save(DigitsNet(num_classes=6).state_dict(), tmp_path / "weights.pt")
    monkeypatch.chdir(tmp_path)
    weights = ["--model.init_args.backbone.init_args.weights", str(tmp_path / "weights.pt")]
    assert main(["test", "--config", DIGITS, *QUICK, *weights, "--name", "mine"]) == 0
    results = json.loads((checkpoints / "classifier" / "digits" / "mine" / "results.json").read_text())
    assert results["checkpoint"] is None
    assert results["epoch"] is None


def test_a_user_brings_arrays_and_a_network_in_yaml_alone(checkpoints, tmp_path):
    rng = np.random.default_rng(0)
    for name in ("train", "test", "far", "aux"):
        images = rng.integers(0, 256, (60, 8, 8, 1), dtype=np.uint8)
        np.savez(tmp_path / f"{name}.npz", images=images, labels=np.arange(60) % 6)
    data = {
        "train": str(tmp_path / "train.npz"),
        "test": str(tmp_path / "test.npz"),
        "ood": {"mine": {"path": str(tmp_path / "far.npz"), "group": "near", "limit": 33}},
        "outliers": {"path": str(tmp_path / "aux.npz")},
        "outlier_feed": "paired",
        "batch_size": 20,
        "mean": [0.5],
        "std": [0.5],
    }
    config = yaml.safe_load(Path(DIGITS).read_text())
    config["data"] = {"class_path": "datamodules.arrays.Arrays", "init_args": data | {"val_split": 0.2}}
    config["model"]["init_args"]["backbone"] = {"class_path": "own_network.Own"}
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "first.yaml").write_text(yaml.safe_dump(config))
    knn = ["--evaluation.scores.knn", '{"class_path": "lightning_modules.scores.knn.KNN", "init_args": {"k": 5}}']
    with pytest.MonkeyPatch.context() as patch:
        (tmp_path / "own_network.py").write_text(OWN_NETWORK)
        patch.syspath_prepend(tmp_path)
        assert main(["run", "--config", str(tmp_path / "own" / "first.yaml"), *QUICK, *knn]) == 0
    results = json.loads((checkpoints / "own" / "first" / "seed0" / "results.json").read_text())
    assert {(row["ood_set"], row["group"], row["ood_count"]) for row in results["rows"]} == {("mine", "near", 33)}
    assert results["outliers"]["feed"] == "paired"
    assert results["outliers"]["size"] == 60


OWN_NETWORK = """
from torch import nn

from backbones.backbone import Backbone


class Own(Backbone):
    def __init__(self):
        super().__init__(num_features=64, num_classes=6, input_shape=(1, 8, 8))
        self.fc = nn.Linear(64, 6)

    @property
    def head(self):
        return self.fc

    def stem(self, images):
        return images.flatten(1)
"""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.init_args.ood", "[photograph,svhn]"], "no OOD set svhn; it has: photograph, noise"),
        (["--evaluation.scores.x", "lightning_modules.scores.logits.MPS"], "did you mean MSP?"),
        (["--model.init_args.backbone", "backbones.digits_net.Digitnet"], "did you mean DigitsNet?"),
        (
            ["--model.init_args.backbone.init_args.wieghts", "x"],
            "DigitsNet has no option 'wieghts'; did you mean weights?",
        ),
        (
            ["--evaluation.scores.mahalanobis.init_args.tapp", "x"],
            "Mahalanobis has no option 'tapp'; did you mean tap?",
        ),
        (["--evaluation.scores.mahalanobis.init_args.tap", "layer9"], "has no tap layer9; its taps: penultimate, std"),
        (["--trainer.max_epoch", "1"], "unknown key trainer.max_epoch; did you mean trainer.max_epochs"),
        (["--evaluation.rules", "heta"], "there are default, heat, unleashing_mask"),
        (["--model.init_args.backbone.init_args.num_classes", "7"], "DigitsNet has 7 classes, the ID data of Digits 6"),
        (["--data.init_args.mean", "[123]", "--data.init_args.std", "[58]"], "mean and std are for images in [0, 1]"),
        (["--model.init_args.optimizer", "torch.optim.SDG"], "did you mean SGD"),
        (["--data.init_args.mean", "null", "--data.init_args.std", "null"], "nobody normalises"),
        (["--model.init_args.backbone.init_args.weights", "no.pt"], "no weights at"),
        (
            ["--model.init_args.backbone.init_args.weights", "run:classifier/nothing"],
            "experiments/classifier/nothing.yaml would make it, which is not there either",
        ),
        (["--data.init_args.batch_size", "100000"], "does not fill one batch of 100000"),
    ],
)
def test_wrong_input_ends_in_a_short_message_with_what_would_be_right(checkpoints, capsys, arguments, message):
    try:
        code = main(["run", "--config", DIGITS, *QUICK, *arguments])
    except SystemExit as exit_:
        code = exit_.code
    error = capsys.readouterr().err
    assert code == 2
    assert message in error
    assert "Traceback" not in error
    assert len(error.splitlines()) < 8


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("optimizer:", "optimiser:", "Classifier has no option 'optimiser'; did you mean optimizer?"),
        ("max_epochs:", "max_epoch:", "unknown key trainer.max_epoch; did you mean trainer.max_epochs"),
        ("trainer:", "trainr:", "unknown key trainr.max_epochs"),
        ("lr:", "learning_rate:", "AdamW has no option 'learning_rate'; its options:"),
        ("classifier.Classifier", "clasifier.Classifier", "did you mean classifier?"),
        ("init_args:", "init_arg:", "class_path: package.module.Class"),
    ],
)
def test_a_wrong_key_in_yaml_is_named(checkpoints, tmp_path, capsys, old, new, message):
    text = Path(DIGITS).read_text().replace("../_", f"{ROOT}/experiments/_").replace(old, new)
    (tmp_path / "wrong.yaml").write_text(text)
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", str(tmp_path / "wrong.yaml"), *QUICK])
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err


def test_nothing_to_evaluate_names_the_make_target(checkpoints, capsys):
    assert main(["test", "--config", DIGITS, *QUICK]) == 2
    assert "make classifier-digits" in capsys.readouterr().err


def test_an_unknown_verb_lists_the_verbs(capsys):
    assert main(["evalute"]) == 2
    assert "fit, validate, test, run, demo, metrics" in capsys.readouterr().err


@pytest.mark.parametrize("prior", ["gmm", "el"])
def test_an_untrained_method_on_a_trained_network_is_not_tested(finished, capsys, prior):
    heat = ROOT / "experiments" / "heat" / f"digits_{prior}.yaml"
    assert main(["test", "--config", str(heat), *QUICK]) == 2
    assert "the model names no weights of energy; train it with make heat-digits" in capsys.readouterr().err
