"""``stages``: out-of-distribution detection over the course of training."""

import argparse
import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from backbones.weights import file_sha256
from callbacks.checkpoints import epoch_of
from callbacks.figures import stages_figure
from callbacks.results import HEADLINE, read_results
from callbacks.run_record import differences, read_run
from experiments.cli import OODCLI

COLUMNS = ("epoch", "checkpoint", "id_accuracy", "score", "ood_set", "group", *HEADLINE)


def stages(args: Sequence[str]) -> None:
    """``stages FOLDER [options]``: test every kept checkpoint of a run, and draw each metric over training."""
    parser = argparse.ArgumentParser(prog="python -m experiments stages", description=stages.__doc__, add_help=False)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a run folder; what follows goes to `test`")
    options, rest = parser.parse_known_args(args)
    folder = options.folder
    results = []
    for epoch, checkpoint in kept_checkpoints(folder):
        stage = f"stages/{epoch:03d}" if epoch >= 0 else "stages/first"
        StageCLI(["--config", str(folder / "config.yaml"), *rest], checkpoint, stage)
        results.append(read_results(folder / stage))
    write_stages(folder / "stages", results)
    print(f"{folder / 'stages'}: stages.csv, {', '.join(f'{metric}.png' for metric in HEADLINE)}")


class StageCLI(OODCLI):
    """``test`` of one checkpoint, into a folder of its own; what is there already is not done again."""

    def __init__(self, args: Sequence[str], checkpoint: Path, stage: str) -> None:
        self.stage, self.checkpoint = stage, checkpoint
        own = ["--ckpt_path", str(checkpoint), "--trainer.logger", "false", "--evaluation.subfolder", self.stage]
        super().__init__(["test", *args, *own], show_results=False)

    def after_instantiate_classes(self) -> None:
        """Leave out what an earlier call has done with the same checkpoint and configuration."""
        folder = self.folder / self.stage
        results = read_results(folder) if (folder / "results.json").is_file() else {}
        # a run that went on since, or was made anew, has another checkpoint of this epoch
        same = results.get("checkpoint_sha256") == file_sha256(self.checkpoint)
        self.settings.overwrite |= not same
        self.done = not self.settings.overwrite and not differences(results["configuration"], self.configuration)
        if not self.done:
            super().after_instantiate_classes()

    def _run_subcommand(self, subcommand: str) -> None:
        if not self.done:
            super()._run_subcommand(subcommand)


def kept_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """List (epoch, file), in order: those of ``epochs/``, and best and last where they are of other epochs.

    Raises:
        FileNotFoundError: there are not even two, and a curve needs more than a point.
    """
    record = read_run(folder)
    files = [folder / "best.ckpt", *sorted((folder / "epochs").glob("*.ckpt"))]
    if record.get("status") == "finished":  # else it may be of mid-epoch
        files = [folder / "last.ckpt", *files]
    found = {epoch_of(path): path for path in files if path.is_file()}
    if len(found) < 2:
        state = f"{len(found)} checkpoint" if record else "no run"
        raise FileNotFoundError(
            f"{folder} holds {state}, and a curve needs two: train with --keep_every_n_epochs 5, or the like"
        )
    return sorted(found.items())


def write_stages(folder: Path, results: Sequence[dict[str, Any]]) -> None:
    """Write ``stages.csv`` and a figure for each headline metric."""
    with (folder / "stages.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for stage in results:
            writer.writerows({**stage, **row} for row in stage["rows"])
    for metric in HEADLINE:
        stages_figure(results, metric).savefig(folder / f"{metric}.png", dpi=110)
