"""``heatmap-latest``: find the newest heatmap run of a setting by what its configuration says, not by its name."""

import argparse
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from backbones import weights
from callbacks.run_record import read_config, read_run, replaced


class Setting(NamedTuple):
    """What a run must agree in, values and types alike; None = the configuration says nothing of it.

    Attributes:
        data: class of the data module and its version, as ``cifar10``; of own data the file or folder to train on.
        architecture: class of the network.
        depth: of the network.
        width: its ``widen_factor``.
        layers: ``fw_layers``.
    """

    data: str
    architecture: str
    depth: int | None
    width: int | None
    layers: int | None


def heatmap_latest(args: Sequence[str]) -> None:
    """``heatmap-latest --data D --architecture A [options]``: print the folder of the newest run of a setting."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments heatmap-latest", description=heatmap_latest.__doc__, allow_abbrev=False
    )
    parser.add_argument("--data", required=True, help="cifar10, cifar100, tinyimagenet, digits, or a file of your own")
    parser.add_argument("--architecture", required=True, help="class of the network, as ResNet or HeatmapWideResNet")
    parser.add_argument("--depth", type=int, help="of the network; left out where it has none")
    parser.add_argument("--width", type=int, help="widening factor of the network; left out where it has none")
    parser.add_argument("--layers", type=int, default=1, help="fw_layers, 1 unless given")
    print(find_latest(weights.CHECKPOINTS / "heatmap", Setting(**vars(parser.parse_args(args)))))


def find_latest(root: Path, wanted: Setting) -> Path:
    """Return the newest finished run among ``<root>/<setting>/<name>``, by its record or else its last checkpoint.

    What is unfinished, damaged, or no run is passed over.

    Raises:
        FileNotFoundError: there is none.
    """
    found = [folder for folder in root.glob("*/*") if _agrees(_setting_of(folder), wanted) and _complete(folder)]
    if not found:
        asked = ", ".join(f"{field}={value}" for field, value in wanted._asdict().items())
        raise FileNotFoundError(f"no finished run with {asked} in {root}")
    return max(found, key=_time)


def _setting_of(folder: Path) -> Setting | None:
    """Read what a run's configuration says; None where it cannot be read, or says too little."""
    try:
        config = read_config(folder)
        data, model = config["data"]["init_args"], config["model"]["init_args"]
        network = model["backbone"]["init_args"]
        return Setting(
            data=_data(config["data"]["class_path"], data),
            architecture=model["backbone"]["class_path"].rpartition(".")[2],
            depth=network.get("depth"),
            width=network.get("widen_factor"),
            layers=model.get("fw_layers"),
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _agrees(setting: Setting | None, wanted: Setting) -> bool:
    """Compare values and types: 18.0 is not 18, and True is not 1."""
    return setting == wanted and [*map(type, setting or ())] == [*map(type, wanted)]


def _data(class_path: str, options: Mapping[str, Any]) -> str:
    own = options.get("train")
    if isinstance(own, Mapping):
        own = own["path"]
    return own if isinstance(own, str) else f"{class_path.rpartition('.')[2]}{options.get('version', '')}".lower()


def _complete(folder: Path) -> bool:
    """Whether a run is finished, and no other is about to overwrite it."""
    finished = _record(folder).get("status", "finished") == "finished"
    return (folder / "last.ckpt").is_file() and finished and folder.suffix != replaced(folder).suffix


def _time(folder: Path) -> float:
    try:
        return datetime.fromisoformat(_record(folder)["ended"]).timestamp()
    except (KeyError, TypeError, ValueError):  # there is no record, or it is damaged
        return (folder / "last.ckpt").stat().st_mtime


def _record(folder: Path) -> dict[str, Any]:
    try:
        return read_run(folder)
    except ValueError:  # damaged
        return {}
