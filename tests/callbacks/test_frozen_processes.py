"""Cached features in real processes: killed, several at once, and within bounds of memory."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import frozen_toy
import numpy as np
import pytest
import torch
from frozen_toy import OUTLIERS, TRAIN, experiment

from callbacks.feature_cache import CHUNK
from callbacks.frozen_features import PROBES

ROOT = Path(__file__).resolve().parent.parent.parent


class Processes:
    """The command line as a user starts it, in a tree of run folders."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir()
        (folder / "breaking.py").write_text(BREAK)

    def start(self, verb, *args, devices=1, data=None, **env):
        command = [sys.executable, "-m", "experiments", verb, "--experiment", "tests/toy", "--config"]
        command += [str(experiment(self.folder, devices, **(data or {}))), *args]
        paths = [str(ROOT), str(Path(frozen_toy.__file__).parent), str(self.folder)]
        env = {"OOD_CHECKPOINTS": str(self.folder), "TOY_LOG": str(self.folder / "log"), "OOD_TRACEBACK": "1"} | env
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"} | env
        return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def run(self, *args, code=0, **kwargs):
        process = self.start(*args, **kwargs)
        output, _ = process.communicate(timeout=120)
        assert process.returncode == code, output[-3000:]
        return output

    def encoded(self):
        return sum(map(int, (self.folder / "log").read_text().split()))

    def arrays(self):
        (folder,) = (self.folder / "features").iterdir()
        return {path.name: path.read_bytes() for path in folder.glob("*.npy")}

    def last(self, name="seed0"):
        return torch.load(self.folder / "tests" / "toy" / name / "last.ckpt", weights_only=True)["state_dict"]


BREAK = """
import os
import signal
from pathlib import Path

from pytorch_lightning import Callback


class Break(Callback):
    def __init__(self, flag: str, batch: int):
        self.flag, self.batch = Path(flag), batch

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if trainer.current_epoch * trainer.num_training_batches + batch_idx == self.batch and not self.flag.exists():
            self.flag.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def processes(tmp_path):
    return lambda name: Processes(tmp_path / name)


@pytest.mark.slow
def test_an_extraction_that_is_killed_continues_where_it_was(processes):
    whole, killed = processes("whole"), processes("killed")
    output = whole.run("features")
    assert f"{TRAIN:,} rows of features.layer2, features.penultimate, logits" in output
    assert whole.encoded() == PROBES + TRAIN
    assert [path.name for path in whole.folder.iterdir() if path.is_dir()] == ["features"]

    # After the probes and the 4 batches of a chunk, in the second of the next.
    killed.run("features", code=-signal.SIGKILL, TOY_KILL_AT="7")
    assert killed.encoded() == PROBES + 6 * 256
    output = killed.run("features")
    assert f"extracted those of {TRAIN - CHUNK:,} images" in output
    assert killed.encoded() == PROBES + 6 * 256 + PROBES + TRAIN - CHUNK
    assert killed.arrays() == whole.arrays()


@pytest.mark.slow
def test_two_runs_that_want_one_cache_extract_it_once(processes):
    both = processes("both")
    arrived = both.folder / "arrived"
    first = both.start("features", TOY_WAIT_FOR=str(arrived))
    while not (both.folder / "log").exists() or len((both.folder / "log").read_text().split()) < 4:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.05)
    second = both.start("features")
    lines = []
    for line in second.stdout:
        lines.append(line)
        if "waiting for another run" in line:
            arrived.touch()
    assert first.wait(60) == second.wait(60) == 0, lines
    assert arrived.exists(), lines
    assert both.encoded() == TRAIN + 2 * PROBES
    first.stdout.close()
    second.stdout.close()


@pytest.mark.slow
def test_two_processes_share_the_work(processes):
    one, two = processes("one"), processes("two")
    data = {"outlier_feed": "paired"}
    one.run("fit", data=data)
    two.run("fit", devices=2, data=data)
    assert two.encoded() == TRAIN + OUTLIERS + 2 * PROBES
    ours, theirs = one.arrays(), two.arrays()
    for name in ours.keys() - {"checksums.npy"}:
        ours_array, theirs_array = (np.frombuffer(arrays[name][128:], np.float32) for arrays in (ours, theirs))
        np.testing.assert_allclose(theirs_array, ours_array, rtol=1e-5, atol=1e-6)
    assert {key: value.shape for key, value in two.last().items()} == {k: v.shape for k, v in one.last().items()}


@pytest.mark.slow
def test_where_one_process_fails_none_waits(processes):
    output = processes("failing").run("features", devices=2, code=1, TOY_FAIL_RANK="1")
    assert "this rank cannot go on" in output
    assert "another process of this run failed on cached features" in output


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [1, 3])
def test_training_from_the_cache_continues_to_the_same_bits(processes, accumulate):
    both = processes("both")
    options = ["--save_every_n_steps", "2", "--trainer.accumulate_grad_batches", str(accumulate)]
    options += ["--data.init_args.outlier_feed", "mixed", "--trainer.max_epochs", "2"]

    def fit(name, code=0):
        flag = both.folder / f"broke_{name}"
        callback = {"class_path": "breaking.Break", "init_args": {"flag": str(flag), "batch": 45}}  # of 2 * 32
        both.run("fit", *options, "--name", name, "--trainer.callbacks+", json.dumps(callback), code=code)

    (both.folder / "broke_whole").touch()
    fit("whole")
    fit("killed", code=-signal.SIGKILL)
    encoded = both.encoded()
    fit("killed")
    assert both.encoded() == encoded + PROBES
    whole, resumed = both.last("whole"), both.last("killed")
    assert whole["classifier.weight"].abs().max() > 0.001
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


MEMORY = """
import sys
import threading
import time

import torch
from pytorch_lightning import Trainer

from callbacks.frozen_features import FrozenFeatures
from datamodules.datamodule import OODDataModule
from datamodules.images import ImageSet, sha256
from datamodules.sets import OODSet, Sets
from frozen_toy import Net, Toy
from lightning_modules.evidence import Evidence


class Made(ImageSet):  # images that are made when they are read
    shape, source, digest = (1, 8, 8), "made", sha256("made")

    def __init__(self, length):
        self.labels = torch.arange(length) % 3

    def read(self, rows):
        return (rows[:, None] * torch.arange(1, 65) % 251).to(torch.uint8).view(-1, 1, 8, 8)


class Data(OODDataModule):
    def load(self):
        return Sets(Made(120_000), Made(10), {"far": OODSet(Made(10))}, None, list("abc"))


class Wide(Toy):
    expand = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))

    def encode(self, images):
        return Evidence(self.expand.T[:3] @ images.flatten(1).T, {}, {}, None)._replace(
            logits=images.flatten(1) @ self.expand[:, :3], features={"penultimate": images.flatten(1) @ self.expand}
        )

    def training_step(self, batch, batch_idx):
        return self.classifier(batch.evidence.features["penultimate"][:, :64]).sum()


def anonymous():  # resident memory that is not a page of some file, in MB
    (line,) = [line for line in open("/proc/self/status") if line.startswith("RssAnon")]
    return int(line.split()[1]) / 1e3


def peak():  # of all resident memory
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1e3


def trainer(callbacks, epochs):
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    return Trainer(callbacks=callbacks, enable_model_summary=False, max_epochs=epochs, **options)


def data():
    return Data(1000, eval_batch_size=256, mean=[0.5], std=[0.25])


trainer([], 0).fit(Wide(), data())
extractor = FrozenFeatures(folder=sys.argv[1])
before = peak()
trainer([extractor], 0).fit(Wide(), data())
extraction = peak() - before
trainer([extractor], 0).fit(Wide(), data())
verification = peak() - before
samples, done = [], threading.Event()
before = anonymous()
watch = threading.Thread(target=lambda: [samples.append(anonymous()) for _ in iter(lambda: done.wait(0.002), True)])
watch.start()
trainer([extractor], 2).fit(Wide(), data())
done.set()
watch.join()
print("RESULT", extractor.cache.nbytes / 1e6, extraction, verification, max(samples) - before)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_images(tmp_path):
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(frozen_toy.__file__).parent)])}
    command = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    size, extraction, verification, serving = map(float, line.split()[1:])
    assert size > 240
    assert max(extraction, verification, serving) < size / 3
