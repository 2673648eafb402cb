import os
import signal

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # small work: threads would only get in each other's way
os.environ["WANDB_MODE"] = "disabled"  # the wandb test turns it on for itself
os.environ.setdefault("MPLBACKEND", "agg")
signal.signal(
    signal.SIGINT, signal.default_int_handler
)  # a shell's background jobs ignore it, and so would the children
os.environ["JSONARGPARSE_DEPRECATION_WARNINGS"] = "off"  # Lightning calls what jsonargparse has renamed


@pytest.fixture(autouse=True)
def seed():
    """What a test draws does not depend on the tests before it."""
    import torch  # only once its threads are set

    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def data_folder(tmp_path_factory):
    """Root of all data where a test names no other: tests leave nothing in the repository's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OOD_DATA", str(tmp_path_factory.mktemp("data")))
        yield


@pytest.fixture
def checkpoints(tmp_path, monkeypatch):
    """Run folders below a temporary root instead of the repository's."""
    import backbones.weights
    import experiments.cli
    import experiments.report

    monkeypatch.setattr(experiments.cli, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(experiments.report, "CHECKPOINTS", tmp_path / "checkpoints")
    monkeypatch.setattr(backbones.weights, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"
