"""What an evaluation is about: the part of its record that is known before any score."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from pytorch_lightning import Trainer

from backbones.weights import file_sha256, weights_sha256
from callbacks.checkpoints import epoch_of
from callbacks.provenance import git_revision, hardware, package_versions
from callbacks.run_record import read_run
from datamodules.datamodule import OODDataModule
from lightning_modules.ood_module import OODModule


def identify(trainer: Trainer, module: OODModule, data: OODDataModule, run_folder: Path | None) -> dict[str, Any]:
    """Say what was evaluated, on what, by what; a run folder ends with method, setting and name."""
    checkpoint = trainer.ckpt_path
    outliers = None
    trained = run_folder is None or read_run(
        run_folder
    )  # else the weights are from elsewhere, and so were their outliers
    if data.outlier_feed is not None and trained:
        outliers = {
            "source": data.sets["outliers"].source,
            "feed": data.outlier_feed,
            "size": data.sizes["outliers"],
            "fingerprint": data.fingerprints["outliers"],
            "removed": data.removed,
            "duplicates": None if run_folder is None else read_run(run_folder).get("duplicates"),
        }
    names = run_folder.parts[-3:] if run_folder is not None else ("", "", "")
    return {
        "experiment": "/".join(names[:2]),
        "name": names[2],
        "method": type(module).__name__,
        "seed": data.seed,
        "num_classes": data.num_classes,
        "protocol": data.protocol,
        "known": data.known,
        "subset": asdict(data.subset),
        "ood_subset": {key: getattr(data.ood_subset, key) for key in ("rule", "count", "repeats")},
        "checkpoint": None if checkpoint is None else Path(checkpoint).name,
        "checkpoint_sha256": None if checkpoint is None else file_sha256(checkpoint),
        "epoch": None if checkpoint is None else epoch_of(checkpoint),
        "git_revision": git_revision(),
        "packages": package_versions(),
        "hardware": hardware(module.device),
        "processes": trainer.world_size,
        "notes": module.notes,
        "weights_sha256": weights_sha256(module),
        "parameters": sum(parameter.numel() for parameter in module.parameters()),
        "splits": {
            name: {"size": data.sizes[name], "fingerprint": fingerprint}
            for name, fingerprint in data.fingerprints.items()
        },
        "outliers": outliers,
    }
