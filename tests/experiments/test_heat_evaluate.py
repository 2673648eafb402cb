"""Runs of HEAT and their compositions are evaluated in one pass, and are what each of them is by itself."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from scipy.special import logsumexp

from backbones.digits_net import DigitsNet
from backbones.weights import file_sha256
from datamodules.digits import Digits
from experiments.__main__ import main
from experiments.heat_evaluate import name_members

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("el", "gmm", "gmm_std")
RUNS = [f"heat/digits_{kind}" for kind in KINDS]
QUIET = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
QUIET += ["--evaluation.figures", "false", "--evaluation.bootstrap", "0", "--evaluation.scores", "{}"]
DATA = {"batch_size": 64, "val_split": 0.15, "mean": [0.5], "std": [0.5]}


def train(kind, network, *options, verb="run"):
    given = [
        "--config",
        str(ROOT / "experiments" / "heat" / f"digits_{kind}.yaml"),
        *QUIET,
        "--trainer.max_epochs",
        "2",
    ]
    given += ["--model.init_args.optimizer.init_args.lr", "1.0e-3"]  # so that a residual is not nothing
    return main([verb, *given, "--model.init_args.backbone.init_args.weights", str(network), *options])


def write_network(path, seed):
    torch.manual_seed(seed)
    torch.save(DigitsNet(6).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Root of run folders with three members on one network; the prior of each is fitted on 300 images only."""
    root = tmp_path_factory.mktemp("heat")
    torch.manual_seed(0)
    torch.save(DigitsNet(6).state_dict(), root / "net.pt")
    quick = ["--model.init_args.backbone.init_args.weights", str(root / "net.pt"), "--data.init_args.fit_limit", "300"]
    quick += ["--trainer.max_epochs", "2", "--model.init_args.optimizer.init_args.lr", "1.0e-3"]
    with pytest.MonkeyPatch.context() as patch:
        for module in ("experiments.cli", "backbones.weights"):
            patch.setattr(f"{module}.CHECKPOINTS", root / "checkpoints")
        for kind in KINDS:
            config = ROOT / "experiments" / "heat" / f"digits_{kind}.yaml"
            assert main(["run", "--config", str(config), *QUIET, *quick]) == 0
        yield root / "checkpoints"


@pytest.fixture
def runs(trained, checkpoints):
    """The same in folders that a test may change."""
    shutil.copytree(trained, checkpoints)
    shutil.copy(trained.parent / "net.pt", checkpoints.parent)
    return checkpoints


def evaluate(*options, runs=RUNS):
    return main(["heat-evaluate", "--runs", *map(str, runs), *options])


def record(folder):
    scores = np.load(folder / "scores.npz")
    return json.loads((folder / "results.json").read_text()), {name: scores[name] for name in scores.files}


def training_scores(folder, kind):
    """Hybrid energies of the ID training images, in NumPy from the tensors of a checkpoint."""
    config = yaml.safe_load((folder / "config.yaml").read_text())["model"]["init_args"]
    state = torch.load(folder / "last.ckpt", weights_only=True)["state_dict"]
    state = {name: values.double().numpy() for name, values in state.items() if values.is_floating_point()}
    network = DigitsNet(6, weights=str(folder.parent.parent.parent.parent / "net.pt")).eval()
    data = Digits(**DATA)
    data.setup()
    batch = data.sets["train"][torch.arange(data.sizes["train"])]
    with torch.no_grad():
        maps = network.forward_features((batch.images / 255 - 0.5) / 0.5).flatten(2).double().numpy()
    if kind == "el":
        features = maps.mean(2)
        logits = features @ state["backbone.fc.weight"].T + state["backbone.fc.bias"]
        prior = -logsumexp(logits, axis=1)
    else:
        pooled = maps.std(2, ddof=1) if kind == "gmm_std" else maps.mean(2)
        features = pooled / np.linalg.norm(pooled, axis=1, keepdims=True)
        data.fit_limit, data.sets = 300, {}
        data.setup()
        prior = mixture_energy(features, features[data.fit_rows], batch.labels[data.fit_rows].numpy())
    hidden = features
    layers = [name.removesuffix(".weight") for name in state if name.startswith("energy.residual") and "weight" in name]
    for layer in layers:
        hidden = hidden @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden) if layer != layers[-1] else hidden[:, 0]
    return hidden / config["temperature"] + prior / config["prior_temperature"]


def mixture_energy(features, fitted, labels):
    means = np.stack([fitted[labels == label].mean(0) for label in range(6)])
    residuals = fitted - means[labels]
    covariance = residuals.T @ residuals / len(fitted)
    shifts = features[:, None] - means
    squares = np.einsum("nkd,de,nke->nk", shifts, np.linalg.inv(covariance), shifts)
    log_scale = -0.5 * (np.linalg.slogdet(covariance)[1] + features.shape[1] * np.log(2 * np.pi))
    return -logsumexp(np.log(np.bincount(labels) / len(labels)) + log_scale - squares / 2, axis=1)


def standardised(root):
    """Each member's own test scores, in units of its deviation over the ID training images: (N, 3)."""
    columns = []
    for run, kind in zip(RUNS, KINDS, strict=True):
        own, training = record(root / run / "seed0")[1]["score/heat"], training_scores(root / run / "seed0", kind)
        columns.append((own - training.mean()) / training.std(ddof=1))
    return np.stack(columns, 1)


RULES = {
    "0": lambda scores: scores.sum(1),
    "-1": lambda scores: -logsumexp(-scores, axis=1),
    "inf": lambda scores: scores.max(1),
    "-inf": lambda scores: scores.min(1),
    "2.5": lambda scores: logsumexp(2.5 * scores, axis=1) / 2.5,
}


def test_members_and_compositions_in_one_pass(trained):
    assert evaluate("--beta", *RULES) == 0
    results, scores = record(trained / "heat" / "digits" / "seed0")
    assert (results["experiment"], results["name"], results["seed"]) == ("heat/digits", "seed0", 0)
    assert {row["score"] for row in results["rows"]} == {*KINDS, *(f"composition_{beta}" for beta in RULES)}
    splits = {name: split["size"] for name, split in results["splits"].items()}
    scored = splits["calibration"] + splits["id"] + sum(splits[name] for name in ("unknown", "photograph", "noise"))
    assert results["forwards"] == {"images": splits["train"] + scored}
    assert splits["fit"] == splits["train"]  # whatever the priors were fitted on
    assert results["truncated"] is False
    for kind, run in zip(KINDS, RUNS, strict=True):  # which files the numbers are from
        digest = file_sha256(trained / run / "seed0" / "last.ckpt")
        origin = {"source": f"run:{run}", "file": "last.ckpt", "sha256": digest}
        assert results["weights"][kind] == origin
        assert results["weights"][f"composition_0.members.{KINDS.index(kind)}"] == origin

    for run, kind in zip(RUNS, KINDS, strict=True):
        alone, own = record(trained / run / "seed0")
        assert alone["splits"]["fit"]["size"] == 300
        assert np.array_equal(own["ids"], scores["ids"])
        np.testing.assert_allclose(scores[f"score/{kind}"], own["score/heat"], rtol=1e-5, atol=1e-5)
    expected = standardised(trained)
    assert (np.abs(np.corrcoef(expected.T)[np.triu_indices(3, 1)]) < 0.999).all()  # three scores, and no two the same
    for beta, rule in RULES.items():
        np.testing.assert_allclose(scores[f"score/composition_{beta}"], rule(expected), rtol=2e-3, atol=2e-3)


def test_a_member_that_is_trained_again_counts(runs):
    assert evaluate("--name", "again") == 0
    _, before = record(runs / "heat" / "digits" / "again")
    state = torch.load(runs / RUNS[1] / "seed0" / "last.ckpt", weights_only=True)
    state["state_dict"]["energy.residual.mlp.0.weight"].mul_(3)
    torch.save(state, runs / RUNS[1] / "seed0" / "last.ckpt")
    assert evaluate("--name", "again", "--overwrite", "true") == 0
    results, after = record(runs / "heat" / "digits" / "again")
    assert results["restored"] == []
    assert not np.allclose(after["score/composition_0"], before["score/composition_0"])


@pytest.mark.slow
def test_own_scores_join_and_other_data_are_refused(runs, capsys):
    (runs.parent / "_own.yaml").write_text("evaluation: {scores: {msp: lightning_modules.scores.logits.MSP}}\n")
    own = ["--config", str(runs.parent / "_own.yaml"), "--name", "own", "--beta", "0.5", "-inf", "-1e-3"]
    shutil.move(runs / RUNS[2], runs.parent / "elsewhere")
    given = [f"run:{RUNS[0]}", f"{runs / RUNS[1]}/seed0", runs.parent / "elsewhere" / "seed0"]
    assert evaluate(*own, runs=given) == 0
    results, _ = record(runs / "heat" / "digits" / "own")
    assert {row["score"] for row in results["rows"]} == {
        "msp",
        *KINDS,
        *(f"composition_{beta}" for beta in ("0.5", "-inf", "-0.001")),
    }
    assert results["weights"]["backbone"]["source"] == f"run:{RUNS[0]}"

    assert evaluate(*own, runs=given) == 2
    assert "--overwrite true" in capsys.readouterr().err
    assert evaluate("--name", "other", "--data.init_args.mean", "[0.4]", runs=given) == 2
    assert "not the data that the runs were fitted on\n  mean: [0.5] there, [0.4] here" in capsys.readouterr().err
    assert evaluate("--name", "taken", "--evaluation.scores.el", "lightning_modules.scores.logits.MSP", runs=given) == 2
    assert "el is what members and compositions are called" in capsys.readouterr().err
    network = write_network(runs.parent / "other.pt", seed=1)
    other = ["--model.init_args.backbone.init_args.weights", str(network)]
    assert evaluate("--name", "network", *other, runs=given) == 2
    assert f"run:{RUNS[0]} was trained on the features of a network with other weights" in capsys.readouterr().err
    assert not (runs / "heat" / "digits" / "other" / "results.json").exists()


def edit(path, *keys, value):
    kind = json if path.suffix == ".json" else yaml
    content = (json.loads if kind is json else yaml.safe_load)(path.read_text())
    inner = content
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(content) if kind is json else yaml.safe_dump(content))


def test_runs_that_cannot_be_composed(runs, capsys):
    def refusal(*options, runs=RUNS):
        assert evaluate(*options, runs=runs) == 2
        return capsys.readouterr().err

    folder = runs / RUNS[2] / "seed0"
    assert "`make heat-cifar10_el` makes it" in refusal(runs=["heat/cifar10_el"])
    assert "gmm_seed0: give each run once" in refusal(runs=[RUNS[1], RUNS[1]])
    assert "beta is a number" in refusal("--beta", "nan", "--name", "nan")
    shutil.copytree(runs / RUNS[1], runs / "heat" / "digits_gmm_warm")
    edit(runs / "heat" / "digits_gmm_warm" / "seed0" / "config.yaml", "experiment", value="heat/digits_gmm_warm")
    shutil.copytree(runs / RUNS[1], runs / "heat" / "digits_gmm_cold")
    edit(runs / "heat" / "digits_gmm_cold" / "seed0" / "config.yaml", "experiment", value="heat/digits_gmm_cold")
    error = refusal(runs=["heat/digits_gmm_warm", "heat/digits_gmm_cold"])
    assert "have only the name of an experiment, heat/digits_gmm, in common: give --experiment" in error
    shutil.copytree(folder, folder.with_name("mine"))
    edit(folder.with_name("mine") / "config.yaml", "name", value="mine")
    assert "called seed0, mine: give --name" in refusal(runs=[*RUNS[:2], f"{RUNS[2]}/mine"])

    edit(folder / "config.yaml", "model", "init_args", "backbone", "init_args", "mean", value=[0.1])
    edit(folder / "run.json", "data", "fingerprints", "train", value="others")
    error = refusal()
    assert f"run:{RUNS[0]} (there) and run:{RUNS[2]} (here) differ in" in error
    assert "backbone.init_args.mean: None there, [0.1] here" in error
    assert "data.fingerprints.train: " in error
    assert "weights of the backbone" not in error

    state = torch.load(runs / RUNS[1] / "seed0" / "last.ckpt", weights_only=True)
    state["state_dict"]["backbone.fc.bias"][0] += 1e-6
    torch.save(state, runs / RUNS[1] / "seed0" / "last.ckpt")
    assert f"run:{RUNS[1]} (here) differ in\n  the weights of the backbone" in refusal()

    edit(folder / "config.yaml", "experiment", value="demo/heat")
    edit(folder / "config.yaml", "model", "class_path", value="lightning_modules.classifier.Classifier")
    assert "is a run of lightning_modules.classifier.Classifier that is finished" in refusal(runs=[RUNS[2]])
    edit(folder / "run.json", "status", value="interrupted")
    assert "is interrupted, not finished" in refusal(runs=[RUNS[2]])


@pytest.mark.parametrize(
    ("settings", "names", "experiment", "members"),
    [
        (["digits_el", "digits_gmm", "digits_gmm_std"], ["seed0"] * 3, "heat/digits", ["el", "gmm", "gmm_std"]),
        (["digits_gmm", "digits_gmm_std"], ["seed0"] * 2, "heat/digits", ["gmm", "gmm_std"]),
        (["digits_gmm", "digits_gmm"], ["seed0", "seed1"], "heat/digits", ["gmm_seed0", "gmm_seed1"]),
        (["digits_gmm"], ["seed0"], "heat/digits", ["gmm"]),
        (["cifar10_gmm", "digits_gmm"], ["seed0"] * 2, "", ["cifar10_gmm", "digits_gmm"]),
        (["heat"], ["seed0"], "", ["heat"]),
    ],
)
def test_members_are_called_by_what_tells_them_apart(settings, names, experiment, members):
    assert name_members([f"heat/{setting}" for setting in settings], names) == (experiment, members)


def test_a_composition_of_runs_from_yaml_alone(runs):
    config = yaml.safe_load((runs / RUNS[0] / "seed0" / "config.yaml").read_text())
    members = {}
    for run, kind in zip(RUNS, KINDS, strict=True):
        model = yaml.safe_load((runs / run / "seed0" / "config.yaml").read_text())["model"]["init_args"]
        options = {key: model[key] for key in ("prior", "residual", "prior_temperature")} | {"weights": f"run:{run}"}
        members[kind] = {"class_path": "lightning_modules.scores.hybrid_energy.HybridEnergy", "init_args": options}
    composition = {"class_path": "lightning_modules.scores.composition.Composition", "init_args": {"members": members}}
    settings = {
        "model": {"init_args": {"backbone": config["model"]["init_args"]["backbone"]}},
        "data": {"class_path": "datamodules.digits.Digits", "init_args": DATA},
        "evaluation": {"scores": {"heat": composition}},
    }
    (runs.parent / "network.yaml").write_text(yaml.safe_dump(settings))
    assert main(["evaluate", "--config", str(runs.parent / "network.yaml"), *QUIET[:-2]]) == 0
    results, scores = record(runs / "evaluate" / "network" / "seed0")
    assert results["forwards"]["images"] == len(scores["ids"]) + results["splits"]["fit"]["size"]
    np.testing.assert_allclose(scores["score/heat"], standardised(runs).sum(1), rtol=2e-3, atol=2e-3)
