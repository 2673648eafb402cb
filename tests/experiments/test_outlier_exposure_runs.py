"""Outlier exposure through the command line: killed, on two processes, with and without outliers and floor."""

import json
import signal
from pathlib import Path

import forked
import pytest
import torch
from test_interrupted import BREAK

from backbones.digits_net import DigitsNet
from experiments.__main__ import main

SETTINGS = Path(__file__).resolve().parent.parent.parent / "experiments" / "outlier_exposure"
QUIET = ["--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false"]
QUIET += ["--trainer.enable_model_summary", "false", "--evaluation.figures", "false", "--evaluation.bootstrap", "0"]
SMALL = ["--trainer.max_epochs", "3", "--model.backbone", "test_outlier_exposure_runs.Untrained"]
ONE_SCORE = ["--evaluation.scores", '{"msp": "lightning_modules.scores.logits.MSP"}']
BATCHES = 8  # of an epoch
DIGITS_NET = {
    "class_path": "backbones.digits_net.DigitsNet",
    "init_args": {"num_classes": 6, "weights": "run:classifier/digits@last"},
}
FORMS = {"oe": [], "energy": [], "poem": [], "doe": ["--model.warmup", "1"]}


class Untrained(DigitsNet):
    """Needs no classifier to be trained first."""

    def __init__(self):
        super().__init__(num_classes=6)


def options(form):
    path = ["--config", str(SETTINGS / f"digits_{form}.yaml"), "--experiment", f"tests/{form}"]
    return [*path, *SMALL, *QUIET, *ONE_SCORE, *FORMS[form]]


def last(folder, form, name):
    return torch.load(folder / "tests" / form / name / "last.ckpt", weights_only=True)


def command(folder, verb, *args, processes=1, code=0):
    codes, output = forked.command(folder, verb, *args, processes=processes)
    assert codes == [code] * processes, output[-3000:]
    return output


# Killed

KILLED = {  # form, batches after which it is killed
    "poem in its second epoch": ("poem", [BATCHES + 5]),
    "doe under perturbation": ("doe", [BATCHES + 5]),
    "poem again and again": ("poem", [3, BATCHES + 1, 2 * BATCHES + 6]),
    "doe again and again": ("doe", [3, BATCHES + 1, 2 * BATCHES + 6]),
    "oe with a floor": ("oe", [BATCHES + 5]),
}
QUICK = ("poem in its second epoch", "doe under perturbation")


@pytest.mark.parametrize(
    "case", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in KILLED]
)
def test_a_fit_that_is_killed_continues_to_the_same_bits(tmp_path, case):
    form, kills = KILLED[case]
    (tmp_path / "breaking.py").write_text(BREAK)

    def fit(name, code):
        breaking = {"flag": str(tmp_path / name), "sig": int(signal.SIGKILL), "batches": kills}
        callback = json.dumps({"class_path": "breaking.Break", "init_args": breaking})
        own = ["--trainer.callbacks+", callback, "--name", name, "--save_every_n_steps", "2", "--model.floor", "0.3"]
        command(tmp_path, "fit", *options(form), *own, code=code)

    (tmp_path / "whole").write_text(str(len(kills)))
    fit("whole", 0)
    for _ in kills:
        fit("killed", -signal.SIGKILL)
    assert last(tmp_path, form, "killed")["epoch"] == kills[-1] // BATCHES  # in the middle of it
    fit("killed", 0)
    whole, resumed = (last(tmp_path, form, name) for name in ("whole", "killed"))
    parts = ["state_dict", "global_step", "epoch", "floor"]
    parts += ["perturbation"] if form == "doe" else []
    for part in parts:
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    assert whole["floor"] == 0.3
    (momenta,), (others,) = whole["optimizer_states"], resumed["optimizer_states"]
    torch.testing.assert_close(others["state"], momenta["state"], rtol=0, atol=0)
    if form == "poem":
        chosen, again = (checkpoint["callbacks"]["OutlierSelection"]["chosen"] for checkpoint in (whole, resumed))
        assert list(chosen) == [0, 1, 2]
        torch.testing.assert_close(again, chosen, rtol=0, atol=0)
        assert not torch.equal(chosen[1], chosen[2])
    if form == "doe":
        assert whole["global_step"] == 3 * BATCHES
        assert whole["perturbation"].keys() == {name for name in whole["perturbation"] if name.endswith("weight")}


# On one process and on two


@pytest.mark.parametrize("form", [pytest.param("oe", marks=pytest.mark.slow), "energy"])
def test_fit_and_test(checkpoints, form):
    assert main(["fit", *options(form), "--name", "one", "--model.floor", "0.3"]) == 0
    folder = checkpoints / "tests" / form / "one"
    assert not (folder / "best.ckpt").exists()
    assert main(["test", "--config", str(folder / "config.yaml")]) == 0
    results = json.loads((folder / "results.json").read_text())
    assert results["checkpoint"] == "last.ckpt"
    assert results["outliers"]["feed"] == "paired"
    assert results["outliers"]["size"] == 442
    assert {row["ood_set"] for row in results["rows"]} == {"unknown", "photograph", "noise"}


@pytest.mark.slow
@pytest.mark.parametrize("form", ["poem", "doe"])
def test_two_processes_train_and_are_tested_as_one(tmp_path, form):
    command(tmp_path, "fit", *options(form), "--name", "two", processes=2)
    state = last(tmp_path, form, "two")
    assert state["global_step"] == 3 * BATCHES
    found = {}
    for processes in (1, 2):
        own = ["--config", str(tmp_path / "tests" / form / "two" / "config.yaml")]
        own += ["--evaluation.subfolder", str(processes)]
        command(tmp_path, "test", *own, processes=processes)
        results = json.loads((tmp_path / "tests" / form / "two" / str(processes) / "results.json").read_text())
        found[processes] = [results["id_accuracy"], *(row["auroc"] for row in results["rows"])]
    assert found[2] == pytest.approx(found[1], abs=1e-4)


REFUSED = {
    "no outliers": ("oe", ["--data.outlier_feed", "null"], "OutlierExposure is trained with auxiliary outliers, and "),
    "a pool shuffled among ID images": (
        "poem",
        ["--data.outlier_feed", "mixed"],
        "set outlier_feed of the data to paired, it is 'mixed'",
    ),
    "an estimate of nothing": ("doe", ["--model.floor", "auto"], "floor: auto is read from a run: say which"),
    "a floor and an estimate": (
        "energy",
        ["--model.floor", "0.1", "--model.estimate", "run:unleashing_mask/estimate_digits"],
        "takes no estimate",
    ),
    "smoothed labels": ("oe", ["--model.label_smoothing", "0.1"], "label_smoothing"),
    "a classifier that is not trained": (
        "oe",
        ["--model.backbone", json.dumps(DIGITS_NET)],
        "`make classifier-digits` makes it",
    ),
    "gradients that accumulate": ("doe", ["--trainer.accumulate_grad_batches", "2"], "manual optimization"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_said(checkpoints, capsys, case):
    form, own, message = REFUSED[case]
    try:
        code = main(["fit", *options(form), *own])
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    assert message in capsys.readouterr().err
