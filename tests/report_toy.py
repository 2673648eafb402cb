"""Run folders as evaluations leave them, made of drawn scores in a moment; the images behind them lie in files."""

import json

import numpy as np

from callbacks.metrics import PRESETS
from callbacks.results import summarize, write_json, write_results
from callbacks.samples import Samples
from datamodules.arrays import Arrays, ArraySet
from experiments.reports.comparison import compare
from experiments.reports.runs import find_runs
from experiments.reports.trial import read_runs

SIZES = {"calibration": 40, "id": 60, "near": 30, "far": 25, "farther": 20}
GROUPS = {"near": "near", "far": "far", "farther": "far"}


def write_data(folder):
    """Write images of 4x4 pixels and return the configuration of the data module that serves them."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    for name, size in {"train": 200, "id": 60, "near": 30, "far": 25, "farther": 20}.items():
        images = rng.integers(0, 256, (size, 4, 4, 1), dtype=np.uint8)
        np.savez(folder / f"{name}.npz", images=images, labels=np.arange(size) % 3)
    ood = {name: {"path": str(folder / f"{name}.npz"), "group": group} for name, group in GROUPS.items()}
    options = {"train": str(folder / "train.npz"), "test": str(folder / "id.npz"), "ood": ood, "val_split": 0.2}
    options |= {"batch_size": 8, "mean": [0.5], "std": [0.5]}
    return {"class_path": "datamodules.arrays.Arrays", "init_args": options}


def fingerprints(data):
    """Say which images a data module serves."""
    options = data["init_args"]
    ood = {name: ArraySet(**given) for name, given in options["ood"].items()}
    module = Arrays(**options | {"train": ArraySet(options["train"]), "test": ArraySet(options["test"]), "ood": ood})
    module.setup()
    return {name: {"size": module.sizes[name], "fingerprint": module.fingerprints[name]} for name in module.sizes}


def draw(seed=0, shift=2.0, scores=("energy", "msp"), sets=tuple(GROUPS)):
    """Draw scores of every image; those of OOD images are larger by ``shift``, the second score's by half of it."""
    names = ("calibration", "id", *sets)
    split = np.repeat(np.arange(len(names)), [SIZES[name] for name in names])
    rng, is_ood = np.random.default_rng(seed), split >= 2
    ids = np.concatenate([np.arange(SIZES[name]) for name in names])
    labels = np.where(is_ood, -1, ids % 3)
    drawn = {name: rng.normal(is_ood * shift / (i + 1), 1) for i, name in enumerate(scores)}
    return Samples(names, split, ids, labels, np.where(ids % 10, ids % 3, 0), drawn)


def write_run(folder, data, splits, seed=0, shift=2.0, method="Toy", replicates=50, preset="default", **changes):
    """Write an evaluated run; ``changes`` to ``results.json``, and those of ``model`` and ``record``, as given."""
    sets = changes.pop("sets", tuple(GROUPS))
    samples = draw(seed, shift, sets=sets)
    summary = summarize(samples, GROUPS, PRESETS[preset], 3, replicates)
    summary["metric_rules"]["preset"] = preset
    configuration = {"model": changes.pop("model", {"init_args": {"width": 4}}), "data": data, "trainer": {}}
    record = {"status": "finished", "seconds": 10.0 + seed, "uncounted": 0, "trained_parameters": 70}
    record |= {"hardware": "a small machine"} | changes.pop("record", {})
    results = {
        "experiment": "/".join(folder.parts[-3:-1]),
        "name": folder.name,
        "method": method,
        "seed": seed,
        "num_classes": 3,
        "protocol": None,
        "known": None,
        "subset": {"fraction": 1.0, "num_labels": None},
        "ood_subset": {"rule": "all", "count": None, "repeats": 1},
        "weights_sha256": f"{method}{seed}",
        "parameters": 100,
        "splits": {name: splits[name] for name in ("id", *sets)},
        "outliers": None,
        "truncated": False,
        "milliseconds": {"network": 0.5, "msp": 0.25},
        "hardware": "a small machine",
        "configuration": configuration,
        **summary,
        **changes,
    }
    folder.mkdir(parents=True)
    write_results(folder, results)
    write_json(folder / "run.json", record)
    samples.save(folder / "scores.npz")
    return folder


def edit(folder, **changes):
    """Change what ``results.json`` says; None takes a key away."""
    path = folder / "results.json"
    results = json.loads(path.read_text()) | changes
    gone = [key for key, value in changes.items() if value is None]
    path.write_text(json.dumps({key: value for key, value in results.items() if key not in gone}))


def gather(folder):
    runs, problems = read_runs(find_runs(folder))
    comparisons, unfit = compare(runs)
    return comparisons, problems | unfit
