import os

import pytest

os.environ["WANDB_MODE"] = "disabled"  # the wandb test turns it on for itself
os.environ.setdefault("MPLBACKEND", "agg")


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Run folders below a temporary root instead of the repository's."""
    import backbones.weights
    import experiments.cli

    monkeypatch.setattr(experiments.cli, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(backbones.weights, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"
