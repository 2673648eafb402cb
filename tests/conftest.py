import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small work: threads would only get in each other's way
os.environ["WANDB_MODE"] = "disabled"  # the wandb test turns it on for itself
os.environ.setdefault("MPLBACKEND", "agg")
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning calls what jsonargparse has renamed


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Run folders below a temporary root instead of the repository's."""
    import backbones.weights
    import experiments.cli

    monkeypatch.setattr(experiments.cli, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(backbones.weights, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"
