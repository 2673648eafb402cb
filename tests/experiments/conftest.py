"""Runs to report on."""

import pytest
from report_toy import fingerprints, write_data, write_run


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("images"))


@pytest.fixture
def write(data, checkpoints):
    """Write a run below the root of all runs: ``write("method/setting/name", ...)``."""
    splits = fingerprints(data)
    return lambda path, **kwargs: write_run(checkpoints / path, data, splits, **kwargs)
