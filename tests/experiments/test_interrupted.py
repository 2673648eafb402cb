"""What a real ``fit`` process leaves behind when it is killed or interrupted, and how it continues."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
# A callback that ends its own process in mid-epoch: 8 batches an epoch, the last checkpoint after step 9 of 24.
BREAK = """
import os
import signal
from pathlib import Path

from pytorch_lightning import Callback


class Break(Callback):
    def __init__(self, flag: str, sig: int, batches: list[int]):
        self.flag, self.signal, self.batches = Path(flag), sig, batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        kills = int(self.flag.read_text()) if self.flag.exists() else 0
        batch = trainer.current_epoch * trainer.num_training_batches + batch_idx + 1
        if kills < len(self.batches) and batch == self.batches[kills]:
            self.flag.write_text(str(kills + 1))
            os.kill(os.getpid(), self.signal)
"""


def fit(folder, name, workers, sig, batches=(11,), accumulate=1, options=()):
    # The flag counts how often the run broke: one configuration for the broken and the resumed run.
    breaking = {"flag": str(folder / f"broke_{name}"), "sig": int(sig), "batches": list(batches)}
    callback = {"class_path": "breaking.Break", "init_args": breaking}
    command = [sys.executable, "-m", "experiments", "fit", "--config", "experiments/classifier/digits.yaml"]
    command += ["--experiment", "tests/broken", "--name", name, "--save_every_n_steps", "3" if accumulate == 1 else "2"]
    command += ["--trainer.max_epochs", "3", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
    command += ["--trainer.callbacks+", json.dumps(callback), "--data.init_args.num_workers", str(workers)]
    command += ["--data.init_args.augmentation", "{crop_padding: 1, flip: true}"]
    command += ["--model.init_args.backbone", "dropout_net.DropoutNet"]
    command += ["--trainer.logger", "callbacks.loggers.MetricsCSV"]
    command += ["--trainer.accumulate_grad_batches", str(accumulate), *options]
    env = os.environ | {"OOD_CHECKPOINTS": str(folder), "PYTHONPATH": os.pathsep.join([str(ROOT), str(folder)])}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)


DROPOUT = """
from torch.nn import functional

from backbones.digits_net import DigitsNet


class DropoutNet(DigitsNet):
    def __init__(self):
        super().__init__(num_classes=6)

    def forward_head(self, maps, pre_logits=False):
        features = functional.dropout(maps.mean((2, 3)), 0.3, self.training)
        return features if pre_logits else self.head(features)
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "breaking.py").write_text(BREAK)
    (tmp_path / "dropout_net.py").write_text(DROPOUT)
    return tmp_path


def last(folder, name):
    return torch.load(folder / "tests" / "broken" / name / "last.ckpt", weights_only=True)


def status(folder, name):
    return json.loads((folder / "tests" / "broken" / name / "run.json").read_text())["status"]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_killed_in_mid_epoch_continues_to_the_same_bits(folder, workers):
    (folder / "broke_whole").write_text("1")
    whole = fit(folder, "whole", workers, signal.SIGKILL)
    assert whole.returncode == 0, whole.stderr[-3000:]

    killed = fit(folder, "killed", workers, signal.SIGKILL)
    assert killed.returncode == -signal.SIGKILL
    assert last(folder, "killed")["global_step"] == 9  # in the middle of the second epoch
    assert status(folder, "killed") == "running"
    resumed = fit(folder, "killed", workers, signal.SIGKILL)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert status(folder, "killed") == "finished"

    assert last(folder, "whole")["global_step"] == 24
    same_state(folder)
    steps = [line.split(",")[-1] for line in (folder / "tests/broken/killed/metrics.csv").read_text().splitlines()]
    whole_steps = [line.split(",")[-1] for line in (folder / "tests/broken/whole/metrics.csv").read_text().splitlines()]
    assert steps == whole_steps


@pytest.mark.slow
def test_two_kills_while_gradients_accumulate(folder):
    (folder / "broke_whole").write_text("2")
    options = {"workers": 0, "sig": signal.SIGKILL, "batches": (12, 14), "accumulate": 3}
    assert fit(folder, "whole", **options).returncode == 0
    for expected in (-signal.SIGKILL, -signal.SIGKILL, 0):
        assert fit(folder, "killed", **options).returncode == expected
    same_state(folder)


@pytest.mark.slow
@pytest.mark.parametrize("schedule", ["plateau", "onecycle"])
def test_schedules_continue_after_a_kill(folder, schedule):
    scheduler = {
        "plateau": {
            "class_path": "pytorch_lightning.cli.ReduceLROnPlateau",
            "init_args": {"monitor": "val/accuracy", "mode": "max", "patience": 0, "threshold": 1.0},
        },
        "onecycle": {
            "class_path": "torch.optim.lr_scheduler.OneCycleLR",
            "init_args": {"max_lr": 0.01, "total_steps": 24},
        },
    }[schedule]
    interval = "epoch" if schedule == "plateau" else "step"
    options = ["--model.init_args.lr_scheduler", json.dumps(scheduler), "--model.init_args.lr_interval", interval]
    (folder / "broke_whole").write_text("2")
    broken = {"workers": 0, "sig": signal.SIGKILL, "batches": (9, 20), "options": options}
    assert fit(folder, "whole", **broken).returncode == 0
    for expected in (-signal.SIGKILL, -signal.SIGKILL, 0):
        assert fit(folder, "killed", **broken).returncode == expected
    same_state(folder)
    whole, killed = last(folder, "whole")["lr_schedulers"], last(folder, "killed")["lr_schedulers"]
    assert whole == killed


def same_state(folder):
    expected, found = last(folder, "whole"), last(folder, "killed")
    assert found["global_step"] == expected["global_step"]
    for name, value in expected["state_dict"].items():
        assert torch.equal(found["state_dict"][name], value), name
    for state, other in zip(expected["optimizer_states"], found["optimizer_states"], strict=True):
        for slot, value in state["state"].items():
            for key in value:
                assert torch.equal(value[key], other["state"][slot][key]), (slot, key)


@pytest.mark.slow
def test_ctrl_c_leaves_a_clean_record_that_continues(folder):
    broken = fit(folder, "interrupted", 0, signal.SIGINT)
    assert broken.returncode == 1
    assert "Traceback" not in broken.stderr
    run = folder / "tests" / "broken" / "interrupted"
    assert status(folder, "interrupted") == "interrupted"
    assert "interrupted at step" in (run / "log.txt").read_text()
    assert last(folder, "interrupted")["global_step"] == 9
    assert (run / "metrics.csv").read_text().startswith("epoch,")
    resumed = fit(folder, "interrupted", 0, signal.SIGINT)
    assert resumed.returncode == 0, resumed.stderr[-3000:]
    assert status(folder, "interrupted") == "finished"
    assert last(folder, "interrupted")["global_step"] == 24
