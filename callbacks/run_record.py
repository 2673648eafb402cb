"""The run folder: what was asked, what happened, how it ended."""

import logging
import shutil
import time
import traceback
from pathlib import Path
from typing import Any

import yaml
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_only

from backbones.weights import origins
from callbacks.loggers import MetricsCSV
from callbacks.provenance import git_revision, hardware, package_versions
from callbacks.results import read_json, write_json
from datamodules.datamodule import OODDataModule
from datamodules.duplicates import count_duplicates

IGNORED = ("ckpt_path", "overwrite")  # how a run was started, not what it is
ELSEWHERE = ("data.init_args.root", "data.init_args.num_workers")  # where data lie and how they are read: no difference
log = logging.getLogger(__name__)


class RunRecord(Callback):
    """Keeps ``config.yaml``, ``run.json`` (status, times, code, hardware) and ``log.txt`` of a run.

    Args:
        folder: ``checkpoints/<method>/<setting>/<name>``.
        config: the resolved configuration as YAML.
    """

    def __init__(self, folder: Path, config: str) -> None:
        self.folder, self.config = folder, config
        self._handler: logging.Handler | None = None
        self._status: dict[str, Any] = {}
        self._ended: int | None = None  # an epoch that has no line in the log yet
        self._before, self._started = 0.0, time.perf_counter()  # seconds of earlier starts; where this one began

    @rank_zero_only
    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the record; ``test`` leaves the configuration of the fit alone.

        Raises:
            ValueError: the data are not those that the run was fitted on.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self._handler = logging.FileHandler(self.folder / "log.txt", encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for name in ("", "pytorch_lightning"):  # Lightning's logger does not propagate
            logging.getLogger(name).addHandler(self._handler)
        log.info("%s started in %s", stage, self.folder)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):  # the CSV logger would write a second configuration file
                logger.log_hyperparams(yaml.safe_load(self.config))
        data: OODDataModule = trainer.datamodule  # type: ignore[attr-defined]
        trained_on = describe_training(data)
        record = read_run(self.folder)
        if changed := differences(record.get("data", trained_on), trained_on):
            raise ValueError(f"these are not the data that the run was fitted on\n{changed}")
        if stage == "fit":
            (self.folder / "config.yaml").write_text(self.config, encoding="utf-8")
            self._status = {"starts": [*record.get("starts", []), _now()], "data": trained_on}
            if data.outlier_feed is not None:
                self._status["removed"] = data.removed
                self._status["duplicates"] = record["duplicates"] if "duplicates" in record else report_duplicates(data)
            self._before = record.get("seconds", 0.0)
            self._write(
                status="running",
                git_revision=git_revision(),
                packages=package_versions(),
                seconds=self._before,
                uncounted=_uncounted(record),
            )
            self._started = time.perf_counter()

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the files of weights that the network starts from."""
        self._write(weights=origins(pl_module))

    @rank_zero_only
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the hardware and where training starts; from here on an overwritten run is gone."""
        shutil.rmtree(replaced(self.folder), ignore_errors=True)
        device = hardware(pl_module.device)
        self._write(hardware=device, processes=trainer.world_size)
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.forget(trainer.global_step)

    @rank_zero_only
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that there is a line to log; what the method itself logs at the end of an epoch comes after this.

        The seconds are written now, for whoever is killed writes nothing.
        """
        self._ended = trainer.current_epoch
        self._write(seconds=self._seconds())

    @rank_zero_only
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Log one line about the epoch that has ended."""
        if self._ended is not None:
            metrics = ", ".join(f"{key} {float(value):.4g}" for key, value in sorted(trainer.callback_metrics.items()))
            log.info("epoch %d: %s", self._ended, metrics)
            self._ended = None

    on_train_end = on_train_epoch_start

    @rank_zero_only
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Mark the run as finished, and write what it has found."""
        for name, found in pl_module.findings().items():  # type: ignore[operator]
            write_json(self.folder / f"{name}.json", found)
        trained = [p for optimizer in trainer.optimizers for group in optimizer.param_groups for p in group["params"]]
        self._write(
            status="finished",
            ended=_now(),
            epochs=trainer.current_epoch,
            steps=trainer.global_step,
            seconds=self._seconds(),
            trained_parameters=sum(parameter.numel() for parameter in trained),
        )

    @rank_zero_only
    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Note how the run broke off; the last checkpoint stays, and ``fit`` again continues from it."""
        if self._handler is None:  # it broke off before there was a record
            return
        interrupted = isinstance(exception, KeyboardInterrupt)
        step = trainer.global_step
        if interrupted:
            log.error("interrupted at step %d", step)
        else:
            log.error("failed at step %d\n%s", step, "".join(traceback.format_exception(exception)))
        if self._status:
            status = "interrupted" if interrupted else "failed"
            self._write(status=status, ended=_now(), steps=trainer.global_step, seconds=self._seconds())
        self._close()  # Lightning tears nothing down after this

    @rank_zero_only
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the log."""
        self._close()

    def _close(self) -> None:
        if self._handler is not None:
            for name in ("", "pytorch_lightning"):
                logging.getLogger(name).removeHandler(self._handler)
            self._handler.close()
            self._handler = None

    def _seconds(self) -> float:
        return round(self._before + time.perf_counter() - self._started, 3)

    def _write(self, **entries: Any) -> None:
        self._status |= entries
        write_json(self.folder / "run.json", self._status)


def describe_training(data: OODDataModule) -> dict[str, Any]:
    """Say what a network sees in training, as far as it must see the same in a test: images, labels, normalisation."""
    splits = ["train", "calibration", *(["outliers"] if data.outlier_feed is not None else [])]
    return {
        "outlier_feed": data.outlier_feed,
        "mean": None if data.mean is None else list(data.mean),
        "std": None if data.std is None else list(data.std),
        "fingerprints": {name: data.fingerprints[name] for name in splits if name in data.fingerprints},
    }


def report_duplicates(data: OODDataModule) -> dict[str, int]:
    """Count the outliers that are also ID or OOD images, pixel for pixel, and warn of them."""
    log.info("looking for outliers among the other images")
    others = {name: images for name, images in data.sets.items() if name not in ("outliers", "fit")}
    counts = count_duplicates(data.sets["outliers"], others)
    for name, count in counts.items():
        log.warning("%d of the %d outliers are also images of %s", count, data.sizes["outliers"], name)
    return counts


class FinishedRunError(FileExistsError):
    """The folder holds a finished run of the very same configuration."""

    def __init__(self, folder: Path, message: str) -> None:
        super().__init__(message)
        self.folder = folder


def prepare_folder(folder: Path, config: str, overwrite: bool) -> Path | None:
    """Decide how ``fit`` treats a run folder.

    With ``overwrite`` an old run moves aside; it is deleted when the new one starts to train, and
    ``restore_folder`` brings it back where that never happens.

    Returns:
        The checkpoint to continue from, None to start anew.

    Raises:
        FinishedRunError: the folder holds this run, finished.
        FileExistsError: it holds a run of another configuration, or something else.
    """
    if overwrite:
        if getattr(rank_zero_only, "rank", 0) == 0 and folder.exists():
            shutil.rmtree(replaced(folder), ignore_errors=True)
            folder.rename(replaced(folder))
        return None
    way_out = "take another --name, or discard it with --overwrite true"
    status = read_run(folder).get("status")
    if status is None:
        if (folder / "results.json").is_file() or any(folder.glob("*.ckpt")):
            raise FileExistsError(f"{folder} holds results or checkpoints of something else: {way_out}")
        return None
    kind = "a finished" if status == "finished" else "an unfinished"
    if changed := differences(read_config(folder), yaml.safe_load(config)):
        raise FileExistsError(f"{folder} holds {kind} run of another configuration: {way_out}\n{changed}")
    if status == "finished":
        raise FinishedRunError(folder, f"{folder} holds a finished run: evaluate it with test, {way_out}")
    last = folder / "last.ckpt"
    return last if last.is_file() else None


def replaced(folder: Path) -> Path:
    """Where a run waits while the one that overwrites it starts."""
    return folder.with_name(f"{folder.name}.replaced")


def restore_folder(folder: Path) -> None:
    """Bring back a run that was to be overwritten by one that did not start; otherwise do nothing."""
    if replaced(folder).exists() and getattr(rank_zero_only, "rank", 0) == 0:
        shutil.rmtree(folder, ignore_errors=True)
        replaced(folder).rename(folder)


def read_run(folder: Path) -> dict[str, Any]:
    """Return the ``run.json`` of a folder, empty where nothing was fitted.

    Its ``status`` is ``running`` (also after a kill), ``finished``, ``interrupted`` or ``failed``.
    """
    path = folder / "run.json"
    return read_json(path) if path.is_file() else {}


def read_config(folder: Path) -> dict[str, Any]:
    """Return the ``config.yaml`` of a run, empty where there is none; a damaged one is a ``ValueError``."""
    path = folder / "config.yaml"
    if not path.is_file():
        return {}
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is damaged, it is not YAML: {error}") from error


def differences(old: Any, new: Any, path: str = "") -> str:
    """List the keys at which two configurations differ, a line each; empty where they agree."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [key for key in {**old, **new} if path or key not in IGNORED]
        lines = (differences(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in keys)
        return "\n".join(line for line in lines if line)
    if path in ELSEWHERE:
        return ""
    # 1 is not 1.0: as a limit of batches, the one is a number and the other a share
    same = old == new and isinstance(old, type(new))
    return "" if same else f"  {path}: {old!r} there, {new!r} here"


def _uncounted(record: dict[str, Any]) -> int:
    """Count the starts whose time is not all in ``seconds``: killed ones, and those of before it was kept."""
    if "seconds" not in record:
        return len(record.get("starts", []))
    return record["uncounted"] + (record["status"] == "running")


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
