"""Every recipe takes two steps: its own network, optimiser, schedule and precision on images that a test may have."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments.cli import OODCLI

ROOT = Path(__file__).resolve().parent.parent.parent
RECIPES = sorted(path for path in (ROOT / "experiments" / "classifier").glob("*.yaml") if path.stem != "digits")
KEPT = (
    "batch_size",
    "drop_last",
    "augmentation",
    "balanced",
)  # of the data's options: the others are about real images


@pytest.fixture(scope="module")
def arrays(tmp_path_factory):
    """Two noise images of each class, by (K, shape)."""
    folder, generator = tmp_path_factory.mktemp("arrays"), np.random.default_rng(0)

    def write(num_classes, shape):
        path = folder / f"{num_classes}_{shape}.npz"
        if not path.exists():
            labels = np.arange(2 * num_classes) % num_classes
            channels, height, width = shape
            images = generator.integers(0, 256, (len(labels), height, width, channels), dtype=np.uint8)
            np.savez(path, images=images, labels=labels)
        return str(path)

    return write


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_takes_two_steps(path, arrays, checkpoints, tmp_path):
    recipe = yaml.safe_load(path.read_text())
    backbone, given = recipe["model"]["init_args"]["backbone"]["init_args"], recipe["data"]["init_args"]
    file = arrays(backbone["num_classes"], tuple(backbone.get("input_shape", (3, 32, 32))))
    kept = {key: value for key, value in given.items() if key in KEPT and value != "protocol"} | {"batch_size": 2}
    constants = {} if "mean" in backbone else {"mean": [0.5], "std": [0.5]}
    recipe["data"] = {
        "class_path": "datamodules.arrays.Arrays",
        "init_args": {"train": file, "test": file, "val_split": 0.5} | kept | constants,
    }
    (tmp_path / path.parent.name).mkdir()
    (tmp_path / path.parent.name / path.name).write_text(yaml.safe_dump(recipe))

    quick = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.fast_dev_run", "2"]
    quick += ["--trainer.enable_model_summary", "false"]  # which warns of bf16
    cli = OODCLI(["fit", "--config", str(tmp_path / path.parent.name / path.name), *quick])
    assert cli.trainer.global_step == 2
    settings = recipe["model"]["init_args"]
    (optimizer,), (schedule,) = cli.trainer.optimizers, cli.trainer.lr_scheduler_configs
    assert type(optimizer).__name__ == settings["optimizer"]["class_path"].split(".")[-1]
    assert type(schedule.scheduler).__name__ == settings["lr_scheduler"]["class_path"].split(".")[-1]
    assert cli.trainer.precision == recipe["trainer"].get("precision", "32-true")
    trained = [parameter for parameter in cli.model.parameters() if parameter.requires_grad]
    assert all(parameter.isfinite().all() for parameter in trained)
    assert all(parameter in optimizer.state for parameter in trained)
