"""Images to look at: those at the decision boundary of a method, and its most confident mistakes."""

import base64
import io
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser
from numpy.typing import NDArray
from PIL import Image

from callbacks.metrics import threshold_at_tpr
from callbacks.samples import Samples
from datamodules.datamodule import OODDataModule
from experiments.reports.runs import Run

SHOWN = 6  # images of a kind
SIDE = 96  # pixels, at most


@dataclass(frozen=True)
class Example:
    """An image as the page shows it.

    Attributes:
        source: the image itself, as a ``data:`` address.
        truth: its class, or the OOD set that it is from.
        said: what the method makes of it, in words.
        score: higher = more OOD.
    """

    source: str
    truth: str
    said: str
    score: float


# What is neither here nor there for test images -> a value that loads least.
IGNORED = {
    "batch_size": 1,
    "drop_last": False,
    "eval_batch_size": None,
    "num_workers": 0,
    "seed": 0,
    "val_split": 0.0,
    "val_ood": None,
    "augmentation": None,
    "outlier_ratio": 1.0,
    "balanced": None,
    "fit_limit": None,
}


class Images:
    """The test images behind runs: one data module at a time, which may be large; runs that follow on share it."""

    def __init__(self) -> None:
        self._key = ""
        self._loaded: OODDataModule | str = ""

    def of(self, run: Run) -> OODDataModule:
        """Load the data of a run; ``ValueError`` or ``OSError`` where it is not there, or not what was tested on."""
        config = run.results["configuration"].get("data")
        key = json.dumps(_identity(config), sort_keys=True)
        if key != self._key:
            self._key, self._loaded = key, ""  # frees the last one before the next is loaded
            try:
                self._loaded = _load(
                    json.loads(json.dumps(for_tests(config)))
                )  # a copy: the parser changes what it is given
            except Exception as error:  # a user's own data may fail in any way
                self._loaded = str(error) or type(error).__name__
        data = self._loaded
        if isinstance(data, str):
            raise ValueError(data)
        for name, split in run.results["splits"].items():
            if name in ("id", *data.groups) and data.fingerprints.get(name) != split["fingerprint"]:
                raise ValueError(f"the images of {name} are no longer those that the run was tested on")
        return data

    def classes(self, run: Run) -> list[str]:
        """Name the ID classes of a run; none where its data is not there."""
        try:
            return self.of(run).classes
        except (ValueError, OSError):
            return []


def for_tests(config: Any) -> Any:
    """Return the configuration of a data module that serves the same test images, and else as little as it can.

    >>> for_tests({"class_path": "A", "init_args": {"batch_size": 64, "num_outliers": 9, "outlier_feed": "mixed"}})
    {'class_path': 'A', 'init_args': {'batch_size': 1, 'num_outliers': 0, 'outlier_feed': None}}
    """
    if not isinstance(config, dict) or not isinstance(config.get("init_args"), dict):
        return config
    options = config["init_args"]
    options = options | {key: value for key, value in IGNORED.items() if key in options}
    if "outlier_feed" in options:
        options |= {"outlier_feed": None, "num_outliers": 0}
    if (
        "outliers" in options and "own" not in options
    ):  # sets of one's own must be used, and without a feed none is read
        options["outliers"] = None
    return config | {"init_args": options}


def _identity(config: Any) -> Any:
    if not isinstance(config, dict) or not isinstance(config.get("init_args"), dict):
        return config
    ignored = (*IGNORED, "outlier_feed", "num_outliers", "outliers")
    return config | {"init_args": {key: value for key, value in config["init_args"].items() if key not in ignored}}


def _load(config: Any) -> OODDataModule:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(OODDataModule, "data", required=True)
    try:
        data = parser.instantiate_classes(parser.parse_object({"data": config})).data
    except Exception as error:  # a user's own class may fail in any way, and the report goes on without its images
        raise ValueError(f"the data module cannot be built: {error}") from error
    data.setup()
    return data


def threshold(run: Run, samples: Samples, score: str) -> float:
    """Return the score above which an image counts as OOD: what accepts 95% of the ID images of ``tau_source``.

    Where no such threshold was recorded, that of the ID test images.
    """
    recorded = (run.results.get("thresholds") or {}).get(score)
    return threshold_at_tpr(samples.of("id").scores[score]) if recorded is None else recorded


def examples(samples: Samples, data: OODDataModule, score: str, tau: float) -> dict[str, list[Example]]:
    """Choose images by one score: title -> at most ``SHOWN`` images."""
    scores = samples.scores[score]
    split = np.array(samples.splits)[samples.split]
    known, tested = split == "id", split != "calibration"
    rejected = scores > tau

    def choose(mask: NDArray[np.bool_], key: NDArray[np.floating]) -> list[Example]:
        rows = np.flatnonzero(mask)
        rows = rows[np.argsort(key[rows], kind="stable")][:SHOWN]
        return [_example(samples, data, score, int(row), bool(rejected[row])) for row in rows]

    distance = np.abs(scores - tau)
    return {
        "ID images nearest to the boundary": choose(known, distance),
        "OOD images nearest to the boundary": choose(tested & ~known, distance),
        "ID images that it is surest are OOD": choose(known & rejected, -scores),
        "OOD images that it is surest are ID": choose(tested & ~known & ~rejected, scores),
    }


def _example(samples: Samples, data: OODDataModule, score: str, row: int, rejected: bool) -> Example:
    split = samples.splits[samples.split[row]]
    image = data.sets[split].read(torch.from_numpy(samples.ids[row : row + 1]))[0].numpy()
    label, guess = int(samples.labels[row]), int(samples.predictions[row])
    said = "rejected" if rejected else "accepted" if guess < 0 else f"taken for {data.classes[guess]}"
    truth = data.classes[label] if label >= 0 else split
    return Example(to_address(image), truth, said, float(samples.scores[score][row]))


def to_address(image: NDArray[Any]) -> str:
    """Write a (C, H, W) image, uint8 or float in [0, 1], as an address that holds it: small as PNG, else as JPEG."""
    if image.dtype != np.uint8:
        image = np.rint(255 * image.clip(0, 1)).astype(np.uint8)
    pixels = image.transpose(1, 2, 0)
    picture = Image.fromarray(pixels if pixels.shape[2] == 3 else pixels[:, :, 0])
    file, kind = io.BytesIO(), "png"
    if max(picture.size) > SIDE:
        picture.thumbnail((SIDE, SIDE))
        kind = "jpeg"
    picture.save(file, kind)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"
