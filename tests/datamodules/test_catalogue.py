import pytest
import torch

from datamodules import catalogue
from datamodules.catalogue import ENTRIES, SOURCES
from datamodules.fitting import Fit
from datamodules.folders import find_images
from datamodules.protocols import PROTOCOLS


@pytest.mark.parametrize("name", ENTRIES)
def test_every_entry_loads(root, name):
    entry = ENTRIES[name]
    images = catalogue.read(name, root, Fit((3, 32, 32), "crop"))
    assert images.shape == (3, 32, 32)
    assert len(images) == (entry.count or len(images)) > 0
    assert images.source == name
    assert images.origin
    rows = torch.arange(min(len(images), 6))
    batch = images[rows]
    assert batch.images.shape == (len(rows), 3, 32, 32)
    assert batch.images.dtype == (torch.float32 if "noise" in name else torch.uint8)
    assert batch.images.float().flatten(1).std(1).min() > 0
    if entry.shape is not None:
        assert catalogue.read(name, root, Fit(entry.shape)).read(rows).shape[1:] == entry.shape


@pytest.mark.parametrize("name", [name for name, entry in ENTRIES.items() if SOURCES[entry.source].get is not None])
def test_a_set_that_is_not_there_says_how_to_get_it(tmp_path, name):
    source = ENTRIES[name].source
    how = SOURCES[source].get if isinstance(SOURCES[source].get, str) else f"`make data-{source}` downloads it"
    with pytest.raises(FileNotFoundError) as error:
        catalogue.read(name, tmp_path, Fit((3, 32, 32), "crop"))
    assert str(error.value) == f"{name} is wanted, but there is no folder {tmp_path / source}: {how}"


@pytest.mark.parametrize("name", ["isun", "places365", "omniglot", "tiny_imagenet", "textures"])
def test_a_partial_folder_does_not_count_as_present(root, name):
    folder = root / ENTRIES[name].source
    file = folder / find_images(folder)[0]
    if name == "tiny_imagenet":
        file = folder / "tiny-imagenet-200/test/images/test_2.JPEG"
    content = file.read_bytes()
    file.unlink()
    count = ENTRIES[name].count
    with pytest.raises(
        ValueError, match=f"{name} has {count} images, .* holds {count - 1}; remove .*{name}, then `make data-{name}`"
    ):
        catalogue.read(name, root, Fit((3, 32, 32), "crop"))
    file.write_bytes(content)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'svnh'; known are: .*cifar10, .*svhn"):
        catalogue.find("svnh")


def test_the_tables_hang_together():
    assert {entry.source for entry in ENTRIES.values()} == set(SOURCES)
    assert not set(ENTRIES) & {"train", "fit", "calibration", "id", "outliers", "unknown"}
    assert set(SOURCES) <= set(ENTRIES) | {"openood", "generated"}  # so that `make data-<set>` finds its source
    named = {name for protocol in PROTOCOLS.values() for name in (*protocol.ood, *protocol.resize_of)}
    assert named <= set(ENTRIES)
    near = {name for entry in ENTRIES.values() for name in entry.near}
    assert near <= {"cifar10", "cifar100", "mnist", "tiny_imagenet", "imagenet", "lsun"}
    for name, entry in ENTRIES.items():
        assert entry.origin or SOURCES[entry.source].origin or entry.source == "generated", name


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("places365_train", "places365"),
        ("places365_train", "places"),
        ("tiny_imagenet_train", "tiny_imagenet_crop"),
        ("imagenet64", "tiny_imagenet"),
        ("tiny_images", "cifar100"),
        ("lsun_crop", "lsun"),
        ("isun", "sun"),
        ("tiny_imagenet_train", "openood_cifar10_test_tin"),
        ("places365_train", "openood_cifar100_test_places365"),
    ],
)
def test_pictures_of_one_collection_have_one_origin(root, first, second):
    origins = {catalogue.read(name, root, Fit((3, 32, 32), "crop")).origin for name in (first, second)}
    assert len(origins) == 1


def test_cleaned_sets_have_an_origin_of_their_own(root):
    origin = catalogue.read("random_images", root, Fit((3, 32, 32))).origin
    assert origin not in {catalogue.read(name, root, Fit((3, 32, 32))).origin for name in ("cifar100", "svhn")}
