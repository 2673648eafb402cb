import pytest
from miniature import write_everything

from datamodules.catalogue import ENTRIES


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Root of all data, in miniature; until the module is done, the catalogue expects as few images as there are."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("data")
        write_everything(folder, patch, ENTRIES)
        yield folder
