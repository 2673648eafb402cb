"""HEAT through the command line: on several processes, interrupted, diverging."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import forked
import numpy as np
import pytest
import torch
import yaml
from pytorch_lightning import Callback, Trainer
from scipy.special import logsumexp
from test_interrupted import BREAK

from backbones.digits_net import DigitsNet
from backbones.residual_energy import ResidualEnergy
from callbacks.cached_evidence import CachedEvidence
from callbacks.frozen_features import PROBES, FrozenFeatures
from datamodules.digits import Digits
from datamodules.images import ArrayImages
from experiments.__main__ import main
from lightning_modules.heat import HEAT
from lightning_modules.samplers.sgld import SGLD
from lightning_modules.scores.gmm import GMMEnergy

ROOT = Path(__file__).resolve().parent.parent.parent
IMAGES, BATCHES = 554, 8  # that are trained on; of an epoch
EXPERIMENT = {
    "model": {
        "class_path": "lightning_modules.heat.HEAT",
        "init_args": {
            "backbone": {"class_path": "backbones.digits_net.DigitsNet", "init_args": {"num_classes": 6}},
            "prior": {"class_path": "lightning_modules.scores.gmm.GMMEnergy"},
            "residual": {"num_features": 64, "hidden_dim": 16},
            "sgld": {"steps": 3, "step_size": 1e-4, "noise": 5e-3},
            "prior_temperature": 1e3,
            "regularization": 10.0,
            "optimizer": {"class_path": "torch.optim.Adam", "init_args": {"lr": 1e-4, "betas": [0.0, 0.999]}},
        },
    },
    "data": {
        "class_path": "datamodules.digits.Digits",
        "init_args": {"batch_size": 64, "val_split": 0.15, "mean": [0.5], "std": [0.5]},
    },
    "trainer": {
        "max_epochs": 2,
        "limit_val_batches": 0,
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "callbacks": [{"class_path": "callbacks.frozen_features.FrozenFeatures"}],
    },
    "evaluation": {"figures": False, "bootstrap": 0, "scores": {}},
}
FROZEN = '[{"class_path": "callbacks.frozen_features.FrozenFeatures", "init_args": %s}]'
CHAINS = ["--model.chains", "{capacity: 300, restart: 0.25}"]


def slow_but(cases, first):
    """Mark all but the first few cases as slow."""
    return [name if place < first else pytest.param(name, marks=pytest.mark.slow) for place, name in enumerate(cases)]


class Watch(Callback):
    """Notes what each process trains on and what it ends with; or which checkpoint there was before it failed."""

    def __init__(self, path: str):
        self.path, self.ids, self.good = path, [], None

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.ids.append(batch.ids)
        self.good = fingerprint(Path(trainer.default_root_dir))

    def on_train_end(self, trainer, pl_module):
        torch.save({"ids": self.ids, "state": pl_module.state_dict()}, f"{self.path}.{trainer.global_rank}")

    def on_exception(self, trainer, pl_module, exception):
        Path(f"{self.path}.{trainer.global_rank}").write_text(str(self.good))


def fingerprint(run):
    path = run / "last.ckpt"
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else None


def callback(class_path, **init_args):
    return ["--trainer.callbacks+", json.dumps({"class_path": class_path, "init_args": init_args})]


def heat(folder, *options):
    """Write a small experiment, with a network that has learned nothing, and return its options."""
    torch.manual_seed(0)
    torch.save(DigitsNet(6).state_dict(), folder / "weights.pt")
    (folder / "heat.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    own = ["--config", str(folder / "heat.yaml"), "--model.backbone.weights", str(folder / "weights.pt")]
    return [*own, "--experiment", "tests/heat", *options]


def run_folder(folder, name="seed0"):
    return folder / "tests" / "heat" / name


def last(folder, name="seed0"):
    return torch.load(run_folder(folder, name) / "last.ckpt", weights_only=True)


def succeed(folder, verb, *options, processes=1):
    codes, output = forked.command(folder, verb, *options, processes=processes)
    assert codes == [0] * processes, output[-3000:]
    return output


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The same experiment on one process (``p1``) and on two (``p2``)."""
    folder = tmp_path_factory.mktemp("trained")
    for processes in (1, 2):
        name = ["--name", f"p{processes}", *callback("test_heat_runs.Watch", path=str(folder / f"watch{processes}"))]
        succeed(folder, "fit", *heat(folder, *CHAINS, *name), processes=processes)
    return folder


def watched(folder, processes):
    return [torch.load(folder / f"watch{processes}.{rank}", weights_only=True) for rank in range(processes)]


def test_two_processes_train_on_the_batches_of_one(trained):
    (one,), two = watched(trained, 1), watched(trained, 2)
    assert len(one["ids"]) == 2 * BATCHES
    assert [len(ids) for ids in two[0]["ids"]] == [32] * 2 * BATCHES
    for expected, *shares in zip(one["ids"], two[0]["ids"], two[1]["ids"], strict=True):
        assert torch.cat(shares).sort().values.tolist() == expected.sort().values.tolist()


def test_two_processes_end_with_the_same_and_save_it(trained):
    first, second = (process["state"] for process in watched(trained, 2))
    saved = last(trained, "p2")["state_dict"]
    assert first.keys() == second.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(first[name], value), name
        assert torch.equal(second[name], value), name
    assert saved["chains.ends"].shape == (300, 64)
    assert len(saved["chains.ends"].unique(dim=0)) == 300  # both processes' own


def test_the_prior_is_that_of_one_process(trained):
    one, two = (last(trained, name)["state_dict"] for name in ("p1", "p2"))
    prior = [name for name in one if name.startswith("energy.prior.")]
    assert len(prior) == 5
    for name in prior:
        torch.testing.assert_close(two[name], one[name], rtol=1e-6, atol=1e-6 * float(one[name].abs().max()))


def scores(folder, name, subfolder, *options, processes=1):
    run = run_folder(folder, name)
    options = ["--config", str(run / "config.yaml"), "--evaluation.subfolder", subfolder, *options]
    succeed(folder, "test", *options, processes=processes)
    with np.load(run / subfolder / "scores.npz") as stored:
        return {key: stored[key] for key in stored.files}, json.loads((run / subfolder / "results.json").read_text())


@pytest.fixture(scope="module")
def evaluated(trained):
    return scores(trained, "p2", "one")


def test_a_checkpoint_scores_the_same_on_two_processes(trained, evaluated):
    (one, results), (two, others) = evaluated, scores(trained, "p2", "two", processes=2)
    assert (results["processes"], others["processes"]) == (1, 2)
    for name in ("ids", "labels", "split", "predictions"):
        np.testing.assert_array_equal(two[name], one[name])
    for name in ("score/heat", "score/prior", "score/residual"):
        np.testing.assert_allclose(two[name], one[name], rtol=1e-4, atol=1e-6 * np.abs(one[name]).max(), err_msg=name)


def by_hand(state, images, labels, queries):
    """Compute E_h, E_q / T_q and E_theta of images in float64, with the prior fitted on images in one go."""
    network = DigitsNet(6).double().eval()
    network.load_state_dict({k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")})
    with torch.no_grad():
        known, asked = (
            network.forward_features((x.double() / 255 - 0.5) / 0.5).mean((2, 3)).numpy() for x in (images, queries)
        )
    known, asked = (x / np.linalg.norm(x, axis=1, keepdims=True) for x in (known, asked))
    means = np.stack([known[labels == label].mean(0) for label in range(6)])
    centred = known - means[labels]
    covariance = centred.T @ centred / len(known)
    log_determinant = np.linalg.slogdet(2 * np.pi * covariance)[1]
    offsets = asked[:, None] - means
    distances = np.einsum("ncd,ncd->nc", offsets, np.linalg.solve(covariance, offsets[..., None])[..., 0])
    prior = -logsumexp(np.log(np.bincount(labels) / len(labels)) - (distances + log_determinant) / 2, axis=1) / 1000
    hidden = asked
    for layer in (0, 2, 4, 6, 8, 10):
        weight, bias = (state[f"energy.residual.mlp.{layer}.{kind}"].numpy() for kind in ("weight", "bias"))
        hidden = hidden @ weight.T + bias
        hidden = hidden if layer == 10 else np.where(hidden > 0, hidden, 0.2 * hidden)
    return hidden[:, 0] + prior, prior, hidden[:, 0]


def test_a_checkpoint_alone_scores_as_computed_by_hand(trained, evaluated):
    samples, results = evaluated
    assert results["forwards"]["images"] == len(samples["ids"])  # without a pass over training images
    data = Digits(batch_size=64, val_split=0.15, mean=[0.5], std=[0.5])
    data.setup()
    known, queries = data.sets["train"], data.sets["id"]
    images = (part.read(torch.arange(len(part))) for part in (known, queries))
    expected = by_hand(last(trained, "p2")["state_dict"], next(images), known.labels.numpy(), next(images))
    mine = samples["split"] == list(samples["splits"]).index("id")
    for name, values in zip(("heat", "prior", "residual"), expected, strict=True):
        found = samples[f"score/{name}"][mine]
        np.testing.assert_allclose(found, values, rtol=1e-4, atol=1e-4 * np.abs(values).max(), err_msg=name)


KILLED = {  # options, batches after which it is killed, steps in all
    # the last group of an epoch is of two batches
    "accumulating, with chains": ([*CHAINS, "--trainer.accumulate_grad_batches", "3"], [13], 6),
    "twice, on the device": (["--trainer.callbacks", FROZEN % '{"on_device": true}'], [3, 12], 16),
    "conditional": (["--model.conditional", "true", "--model.proposal", "prior_tempered"], [11], 16),
    "from noise": (["--model.proposal", "normal", "--data.drop_last", "false"], [15], 18),
}


@pytest.mark.parametrize("case", slow_but(KILLED, 1))
def test_a_fit_that_is_killed_continues_to_the_same_bits(tmp_path, case):
    options, kills, steps = KILLED[case]
    (tmp_path / "breaking.py").write_text(BREAK)

    def fit(name):
        breaking = callback("breaking.Break", flag=str(tmp_path / name), sig=int(signal.SIGKILL), batches=kills)
        own = [*options, *breaking, "--name", name, "--save_every_n_steps", "2"]
        codes, output = forked.command(tmp_path, "fit", *heat(tmp_path, *own))
        return codes[0], output

    (tmp_path / "whole").write_text(str(len(kills)))
    assert fit("whole")[0] == 0
    for _ in kills:
        assert fit("killed")[0] == -signal.SIGKILL
        assert last(tmp_path, "killed")["global_step"] % BATCHES  # of mid-epoch
    code, output = fit("killed")
    assert code == 0, output[-3000:]
    assert "fitted energy" not in output
    whole, resumed = last(tmp_path, "whole"), last(tmp_path, "killed")
    assert whole["global_step"] == steps
    for part in ("state_dict", "global_step", "epoch"):
        torch.testing.assert_close(resumed[part], whole[part], rtol=0, atol=0)
    (whole,), (resumed,) = whole["optimizer_states"], resumed["optimizer_states"]
    torch.testing.assert_close(resumed["state"], whole["state"], rtol=0, atol=0)


def exploding(step):
    """A learning rate that is absurd from the update on that follows so many."""
    milestones = {"milestones": [step], "gamma": 1e30}
    scheduler = {"class_path": "torch.optim.lr_scheduler.MultiStepLR", "init_args": milestones}
    return ["--model.lr_scheduler", json.dumps(scheduler), "--model.lr_interval", "step"]


RATE = r"a residual energy is not a finite number\. Remedy: lower the learning rate, or raise regularization 10\.0\n"
CHAIN = (
    r"the length of a chain's end is not a finite number\. Remedy: lower step_size or noise of "
    r"SGLD\(steps=3, step_size=1e\+30, .*\), or raise prior_temperature 1000\.0\n"
)
LOST = ["--model.sgld.step_size", "1e30", "--model.prior.normalize", "false"]
DIVERGING = {  # options, processes, steps done, message
    "at once": (LOST, 1, 0, CHAIN),
    "in the last step of an epoch, on two processes": (exploding(BATCHES - 1), 2, BATCHES - 1, RATE),
    "in the last step of an epoch": (exploding(BATCHES - 1), 1, BATCHES - 1, RATE),
    "in the first step of an epoch": (exploding(BATCHES), 1, BATCHES, RATE),
}


@pytest.mark.parametrize("case", slow_but(DIVERGING, 2))
def test_divergence_ends_a_run_and_leaves_the_last_good_checkpoint(tmp_path, case):
    options, processes, steps, message = DIVERGING[case]
    watch = callback("test_heat_runs.Watch", path=str(tmp_path / "watch"))
    arguments = heat(tmp_path, *options, *watch, "--save_every_n_steps", "1")
    codes, output = forked.command(tmp_path, "fit", *arguments, processes=processes)
    assert codes == [2] * processes, output[-3000:]
    assert re.search(r"error: HEAT diverged .*\d+.*: " + message, output), output[-3000:]
    assert "Traceback" not in output
    run = run_folder(tmp_path)
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert str(fingerprint(run)) == (tmp_path / "watch.0").read_text()
    if steps:
        good = last(tmp_path)
        assert good["global_step"] == steps
        assert all(value.isfinite().all() for name, value in good["state_dict"].items() if "log_prior" not in name)


@pytest.mark.slow
def test_divergence_ends_the_processes_that_a_command_has_started(tmp_path):
    arguments = heat(tmp_path, *exploding(3), "--trainer.devices", "2", "--trainer.strategy", "ddp")
    env = os.environ | {"OOD_CHECKPOINTS": str(tmp_path)}
    command = [sys.executable, "-m", "experiments", "fit", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
    # Lightning kills the first process where it finds that another has ended before.
    assert done.returncode in (2, -signal.SIGKILL), done.stderr[-3000:]
    assert re.search(r"HEAT diverged .*\d+.*: " + RATE, done.stderr)
    assert json.loads((run_folder(tmp_path) / "run.json").read_text())["status"] == "failed"


@pytest.mark.parametrize("on_device", ["true", pytest.param("false", marks=pytest.mark.slow)])
def test_once_features_are_cached_no_image_is_read_and_the_network_does_not_run(
    tmp_path, checkpoints, monkeypatch, on_device
):
    events = []
    read, convolve, start = ArrayImages.read, torch.nn.Conv2d.forward, HEAT.on_train_start
    monkeypatch.setattr(ArrayImages, "read", lambda *args: [events.append("image"), read(*args)][1])
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda *args: [events.append("network"), convolve(*args)][1])
    monkeypatch.setattr(HEAT, "on_train_start", lambda self: [events.append("start"), start(self)][1])
    frozen = FROZEN % f'{{"on_device": {on_device}}}'
    assert main(["fit", *heat(tmp_path, "--trainer.callbacks", frozen)]) == 0
    assert events[-1] == "start"
    assert {"image", "network"} < set(events)
    assert last(checkpoints)["global_step"] == 2 * BATCHES


def test_the_network_runs_once_for_each_image_whatever_the_prior(tmp_path, checkpoints, monkeypatch):
    seen, encode = [], HEAT.encode
    monkeypatch.setattr(HEAT, "encode", lambda self, images: [seen.append(len(images)), encode(self, images)][1])
    prior = {"class_path": "lightning_modules.scores.pca.PCA", "init_args": {"components": 8}}
    prior["init_args"]["score"] = "lightning_modules.scores.gmm.GMMEnergy"
    arguments = heat(tmp_path, "--model.prior", json.dumps(prior), "--model.residual.num_features", "8")
    arguments += ["--model.sgld.relu", "false"]
    assert main(["fit", *arguments]) == 0
    assert sum(seen) == PROBES + IMAGES
    state = last(checkpoints)["state_dict"]
    assert (int(state["energy.finished"]), state["energy.prior.directions"].shape) == (2, (8, 64))


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float16", 1e-3)])
def test_cached_features_score_like_their_images(tmp_path, dtype, tolerance):
    torch.manual_seed(0)
    sgld, residual = SGLD(2, 1e-4, 5e-3), ResidualEnergy(64, 16)
    module = HEAT(DigitsNet(6), GMMEnergy(), residual, sgld, torch.optim.Adam, prior_temperature=1000.0)
    data = Digits(batch_size=64, mean=[0.5], std=[0.5])
    extractor = FrozenFeatures(dtype=dtype, folder=str(tmp_path))
    quiet = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(callbacks=[extractor], max_epochs=1, accelerator="cpu", **quiet).fit(module, data)
    images = data.training_rows()
    rows = torch.arange(len(images))
    batch = data.on_after_batch_transfer(images[rows], 0)
    with torch.no_grad():
        expected = module.eval()(batch.images).scores["heat"]
        cached = CachedEvidence(extractor.cache, images.labels)[rows].evidence
        torch.testing.assert_close(
            module.energy(cached), expected, rtol=tolerance, atol=tolerance * float(expected.abs().max())
        )


ENERGY = {"class_path": "lightning_modules.scores.energy.FeatureEnergy"}
ENERGY["init_args"] = {"score": "lightning_modules.scores.logits.Energy"}
LOGITS = ["--model.prior", json.dumps(ENERGY), "--model.prior_temperature", "1.0"]
REFUSED = {
    "images": (["--trainer.callbacks", "[]"], "this batch holds images: add callbacks.frozen_features.FrozenFeatures"),
    "outliers": (["--data.outlier_feed", "mixed"], "is an outlier: HEAT is trained without outlier_feed"),
    "half precision": (["--trainer.precision", "bf16-true"], "choose 32-true or bf16-mixed"),
    "another width": (["--model.residual.num_features", "32"], "about 64 features, the residual reads 32: give it num"),
    "a prior without draws": (LOGITS, "cannot be drawn from: let chains start elsewhere"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_said(tmp_path, checkpoints, capsys, case):
    options, message = REFUSED[case]
    assert main(["fit", *heat(tmp_path, *options)]) == 2
    assert message in capsys.readouterr().err


GOES = {  # options, steps
    "validation": (["--trainer.limit_val_batches", "1.0"], 2 * BATCHES),
    "mixed precision": (["--trainer.precision", "bf16-mixed"], 2 * BATCHES),
    "few batches": (["--trainer.limit_train_batches", "3"], 6),
}


@pytest.mark.parametrize("case", slow_but(GOES, 1))
def test_what_goes_together_goes(tmp_path, checkpoints, case):
    options, steps = GOES[case]
    assert main(["fit", *heat(tmp_path, *options)]) == 0
    assert last(checkpoints)["global_step"] == steps
    assert ("val/accuracy" in (run_folder(checkpoints) / "log.txt").read_text()) == (case == "validation")


def test_the_energy_of_logits_is_that_of_the_network(tmp_path, checkpoints):
    assert main(["fit", *heat(tmp_path, *LOGITS, "--model.proposal", "normal")]) == 0
    state = last(checkpoints)["state_dict"]
    assert torch.equal(state["energy.prior.weight"], state["backbone.fc.weight"])
    assert torch.equal(state["energy.prior.bias"], state["backbone.fc.bias"])


def test_features_are_extracted_without_a_run_and_a_smoke_run_leaves_no_checkpoint(tmp_path, checkpoints, capsys):
    assert main(["features", *heat(tmp_path)]) == 0
    (cache,) = (checkpoints / "features").iterdir()
    assert f"{cache}: {IMAGES} rows of features.penultimate, logits" in capsys.readouterr().out
    assert [path.name for path in checkpoints.iterdir()] == ["features"]
    before = {path.name: path.stat().st_mtime_ns for path in cache.glob("features*")}
    assert main(["fit", *heat(tmp_path, "--trainer.fast_dev_run", "true")]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in cache.glob("features*")} == before
    assert not list(checkpoints.glob("tests/**/*.ckpt"))
