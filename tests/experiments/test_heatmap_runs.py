"""The heatmap decoder through the command line: with and without outliers, killed, and on two processes."""

import csv
import json
import signal
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
from heatmap_toy import decode, published
from test_interrupted import BREAK

import backbones.weights
import experiments.cli
from backbones.digits_net import DigitsNet
from backbones.heatmap_decoder import HeatmapDecoder
from datamodules.digits import Digits
from experiments.__main__ import main

EXPERIMENTS = Path(__file__).resolve().parent.parent.parent / "experiments"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false", "--evaluation.figures", "false", "--evaluation.bootstrap", "0"]
SETTING = ["--config", str(EXPERIMENTS / "heatmap" / "digits.yaml"), *QUIET]
LOG = ["--trainer.logger", "callbacks.loggers.MetricsCSV", "--trainer.log_every_n_steps", "1"]
MUTE = ["--trainer.logger", "false"]
STEPS, BATCHES, BATCHES_ALONE = 240, 15, 8  # steps of a run; batches of an epoch with outliers, and without


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tree with a classifier."""
    folder = tmp_path_factory.mktemp("heatmap")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backbones.weights, "CHECKPOINTS", folder)
        patch.setattr(experiments.cli, "CHECKPOINTS", folder)
        classifier = ["--config", str(EXPERIMENTS / "classifier" / "digits.yaml"), *QUIET, *MUTE]
        short = ["--trainer.max_epochs", "8", "--model.lr_scheduler.init_args.T_max", "8"]
        assert main(["fit", *classifier, *short, "--keep_every_n_epochs", "null"]) == 0
        yield folder


def fit(name, epochs, *options):
    assert main(["fit", *SETTING, "--name", name, "--trainer.max_epochs", str(epochs), *options]) == 0


def evaluate(folder, name, subfolder=None):
    path = folder / "heatmap" / "digits" / name
    own = [] if subfolder is None else ["--evaluation.subfolder", subfolder]
    assert main(["test", "--config", str(path / "config.yaml"), *own]) == 0
    return read(path / (subfolder or ""))


def read(path):
    """Return the results, and columns of all images."""
    columns = dict(np.load(path / "scores.npz"))
    columns["split"] = columns["splits"][columns["split"]]
    return json.loads((path / "results.json").read_text()), columns


def last(folder, name):
    return torch.load(folder / "heatmap" / "digits" / name / "last.ckpt", weights_only=True)


def losses(folder, name):
    with (folder / "heatmap" / "digits" / name / "metrics.csv").open() as file:
        return [float(row["train/loss"]) for row in csv.DictReader(file) if row.get("train/loss")]


def means(scores):
    """Mean score of each split."""
    return {split: scores["score/heatmap"][scores["split"] == split].mean() for split in set(scores["split"])}


@pytest.fixture(scope="module")
def trained(folder):
    fit("seed0", STEPS // BATCHES, *LOG)
    return evaluate(folder, "seed0")


def test_the_loss_falls_and_outliers_score_higher(folder, trained):
    results, scores = trained
    found = losses(folder, "seed0")
    assert len(found) == last(folder, "seed0")["global_step"] == STEPS
    assert np.mean(found[-BATCHES:]) < 0.5 * np.mean(found[:BATCHES])
    mean = means(scores)
    for name in ("unknown", "photograph", "noise"):
        assert mean[name] > mean["id"]
    auroc = {row["ood_set"]: row["auroc"] for row in results["rows"] if row["score"] == "heatmap"}
    assert auroc["photograph"] > 0.95
    assert auroc["noise"] > 0.95
    assert results["outliers"] | {"fingerprint": 0} == {
        "source": "flower.jpg",
        "feed": "mixed",
        "size": 442,
        "fingerprint": 0,
        "removed": {},
        "duplicates": {},
    }
    assert results["checkpoint"] == "last.ckpt"


def test_without_outliers_heat_is_less_than_half(folder, trained):
    with pytest.warns(UserWarning, match="there are no outliers to pair"):
        fit("alone", STEPS // BATCHES_ALONE, "--data.init_args.num_outliers", "0", *LOG)
    results, scores = evaluate(folder, "alone")
    found = losses(folder, "alone")
    assert len(found) == last(folder, "alone")["global_step"] == STEPS
    assert np.mean(found[-BATCHES_ALONE:]) < 0.5 * np.mean(found[:BATCHES_ALONE])
    with_outliers, without = means(trained[1]), means(scores)
    for name in ("unknown", "photograph", "noise"):
        assert without[name] < with_outliers[name] / 2
    assert results["outliers"] is None


def test_scores_are_those_of_the_decoder_in_the_checkpoint(folder, trained):
    _, scores = trained
    state = last(folder, "seed0")["state_dict"]
    network, decoder = DigitsNet(6), HeatmapDecoder(64, 6, 64, [64, 32], channels=1)
    for name, part in (("backbone", network), ("decoder", decoder)):
        part.load_state_dict({k.removeprefix(f"{name}."): v for k, v in state.items() if k.startswith(f"{name}.")})
        part.eval()
    data = Digits(batch_size=64, mean=[0.5], std=[0.5], val_split=0.15)
    data.setup()
    images = data.sets["photograph"].read(torch.arange(data.sizes["photograph"])) / 127.5 - 1
    with torch.no_grad():
        features = network.forward_features(images).mean((2, 3))
        classes = network(images).argmax(1)
        low, high = state["minmax.low"], state["minmax.high"]
        heatmaps = decode(published(decoder), (features - low) / (high - low), classes, 6)
    assert low == 0
    assert high > 1
    expected = heatmaps.abs().max(1).values.mean((1, 2)).numpy()
    np.testing.assert_allclose(scores["score/heatmap"][scores["split"] == "photograph"], expected, atol=1e-5)
    for part in ("backbone", "decoder"):
        assert any(name.startswith(f"{part}.") for name in state)
    classifier = torch.load(folder / "classifier" / "digits" / "seed0" / "best.ckpt", weights_only=True)["state_dict"]
    frozen = {name: value for name, value in state.items() if name.startswith("backbone.")}
    assert all(torch.equal(value, classifier[name]) for name, value in frozen.items())


def test_a_checkpoint_is_evaluated_to_the_same_bits_again(folder, trained):
    results, scores = evaluate(folder, "seed0", "again")
    assert scores.keys() == trained[1].keys()
    for name, column in scores.items():
        np.testing.assert_array_equal(column, trained[1][name])
    assert results["rows"] == trained[0]["rows"]


def pairs(folder):
    return {path.parent.name: np.load(path)["partners"].tolist() for path in folder.glob("features/*/nearest.npz")}


@pytest.mark.parametrize("case", ["shuffled", "unscaled"])
def test_other_pairs_and_other_scales_change_only_what_they_are_about(folder, trained, case, tmp_path):
    before, text = pairs(folder), (EXPERIMENTS / "heatmap" / "digits.yaml").read_text()
    pairing = "    - class_path: callbacks.pairing.Pairing\n"
    assert pairing in text
    if case == "shuffled":
        text = text.replace(pairing, f"{pairing}      init_args: {{pairing: shuffled}}\n")
    path = tmp_path / "heatmap" / "digits.yaml"
    path.parent.mkdir()
    path.write_text(text)
    own = ["--model.feature_norm", "none"] if case == "unscaled" else []
    short = ["--name", case, "--trainer.max_epochs", "6", *LOG]
    assert main(["fit", "--config", str(path), *QUIET, *own, *short]) == 0
    assert pairs(folder) == before
    state, nearest = last(folder, case)["state_dict"], last(folder, "seed0")["state_dict"]
    scales = {name for name in nearest if name.startswith("minmax.")}
    assert len(scales) == 3
    if case == "unscaled":
        assert state.keys() == nearest.keys() - scales
    else:
        assert state.keys() == nearest.keys()
        assert all(torch.equal(state[name], nearest[name]) for name in scales)
    found, others = losses(folder, case), losses(folder, "seed0")
    assert np.mean(found[-BATCHES:]) < 0.9 * np.mean(found[:BATCHES])
    assert found[0] != others[0]
    assert found[0] == pytest.approx(others[0], rel=0.3)


def test_the_number_of_outliers_is_said_on_the_command_line_and_recorded(folder):
    fit("fifty", 1, "--data.init_args.num_outliers", "50", *MUTE)
    results, _ = evaluate(folder, "fifty")
    assert results["outliers"]["size"] == results["splits"]["outliers"]["size"] == 50
    assert last(folder, "fifty")["global_step"] == (554 + 50) // 64
    assert {len(partners) for partners in pairs(folder).values()} >= {50}


def command(folder, verb, *args, processes=1, code=0):
    codes, output = forked.command(folder, verb, *args, processes=processes)
    assert codes == [code] * processes, output[-3000:]
    return output


@pytest.mark.parametrize(
    "kills", [[BATCHES + 5], pytest.param([3, BATCHES + 1, 2 * BATCHES + 6], marks=pytest.mark.slow)]
)
def test_a_fit_that_is_killed_continues_to_the_same_bits(folder, kills):
    (folder / "breaking.py").write_text(BREAK)
    names = [f"{kind}{len(kills)}" for kind in ("whole", "killed")]

    def fit(name, code):
        breaking = {"flag": str(folder / f"flag_{name}"), "sig": int(signal.SIGKILL), "batches": kills}
        callback = json.dumps({"class_path": "breaking.Break", "init_args": breaking})
        own = ["--trainer.callbacks+", callback, "--name", name, "--save_every_n_steps", "2"]
        command(folder, "fit", *SETTING, *MUTE, "--trainer.max_epochs", "3", *own, code=code)

    (folder / f"flag_{names[0]}").write_text(str(len(kills)))
    fit(names[0], 0)
    for _ in kills:
        fit(names[1], -signal.SIGKILL)
    assert last(folder, names[1])["epoch"] == kills[-1] // BATCHES  # in the middle of it
    fit(names[1], 0)
    whole, resumed = (last(folder, name) for name in names)
    assert whole["global_step"] == 3 * BATCHES
    for part in ("state_dict", "global_step", "epoch"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    (ours,), (theirs,) = resumed["optimizer_states"], whole["optimizer_states"]
    torch.testing.assert_close(ours["state"], theirs["state"], rtol=0, atol=0)


@pytest.mark.slow
def test_two_processes_find_the_same_pairs_and_score_as_one(folder, trained, tmp_path):
    (tmp_path / "classifier").symlink_to(folder / "classifier")
    command(tmp_path, "fit", *SETTING, *MUTE, "--trainer.max_epochs", "3", "--name", "two", processes=2)
    state = last(tmp_path, "two")
    assert state["global_step"] == 3 * BATCHES
    whole = {tuple(partners) for partners in pairs(folder).values() if len(partners) == 442}
    assert {tuple(partners) for partners in pairs(tmp_path).values()} == whole
    for name in ("low", "high"):
        ours, theirs = (states["state_dict"][f"minmax.{name}"] for states in (state, last(folder, "seed0")))
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    found = {}
    for processes in (1, 2):
        own = ["--config", str(tmp_path / "heatmap" / "digits" / "two" / "config.yaml")]
        own += ["--evaluation.subfolder", str(processes)]
        command(tmp_path, "test", *own, processes=processes)
        found[processes] = read(tmp_path / "heatmap" / "digits" / "two" / str(processes))[1]
    np.testing.assert_array_equal(found[2]["split"], found[1]["split"])
    np.testing.assert_allclose(found[2]["score/heatmap"], found[1]["score/heatmap"], rtol=0, atol=1e-4)


REFUSED = {
    "a classifier that is not trained": (
        ["--model.backbone.init_args.weights", "run:classifier/digits/none"],
        "run:classifier/digits/none is not trained yet",
    ),
    "more outliers than there are": (
        ["--data.init_args.num_outliers", "443"],
        "num_outliers=443, but only 442 are left of flower.jpg",
    ),
    "layers that do not exist": (["--model.fw_layers", "5"], "fw_layers must be 1, 2, 3 or 4, got 5"),
    "augmented images": (
        ["--data.init_args.augmentation", "{flip: true}"],
        "features are cached of images as they are",
    ),
    "a decoder of other images": (
        ["--model.decoder.widths", "[64]"],
        "HeatmapDecoder does not fit DigitsNet, it has image shape",
    ),
    "two kinds of pairs": (
        ["--trainer.callbacks+", "callbacks.pairing.Pairing"],
        "say --trainer.callbacks.init_args.pairing shuffled",
    ),
    "no pairs": (["--trainer.callbacks", "null"], "add callbacks.frozen_features.FrozenFeatures"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_said(folder, capsys, case):
    own, message = REFUSED[case]
    try:
        code = main(["fit", *SETTING, *MUTE, "--name", case.replace(" ", "_"), *own])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_run_without_pairs_does_not_destroy_the_one_that_it_was_to_overwrite(folder, trained):
    before = last(folder, "seed0")["global_step"]
    features = '[{"class_path": "callbacks.frozen_features.FrozenFeatures"}]'
    command = ["fit", *SETTING, *MUTE, "--name", "seed0", "--overwrite", "true", "--trainer.callbacks", features]
    assert main(command) == 2
    assert last(folder, "seed0")["global_step"] == before
    assert (folder / "heatmap" / "digits" / "seed0" / "results.json").is_file()


def test_a_result_states_pairs_scale_and_layers(folder, trained, capsys):
    results, _ = evaluate(folder, "seed0", "stated")
    assert results["notes"] == {"feature_norm": "minmax", "fw_layers": 1, "pairing": "nearest"}
    assert "of flower.jpg, mixed, feature_norm minmax, fw_layers 1, pairing nearest" in capsys.readouterr().out


def test_a_published_decoder_is_tested_as_it_was_trained(folder, tmp_path, capsys):
    file = tmp_path / "model.pt"
    decoder = HeatmapDecoder(64, 6, 64, (64, 32), channels=1)
    torch.save({"min": 0, "max": 2.5, 149: {"generator": published(decoder)}}, file)
    command = ["test", *SETTING, *MUTE, "--name", "published", "--model.decoder.weights", str(file)]
    assert main(command) == 2
    assert "set feature_norm to none" in capsys.readouterr().err
    assert main([*command, "--model.feature_norm", "none"]) == 0
    results, columns = read(folder / "heatmap" / "digits" / "published")
    assert results["outliers"] is None  # of this run; its decoder had others
    assert np.isfinite(columns["score/heatmap"]).all()
