"""Outliers as data modules feed them: how many, and none that are ID images."""

from dataclasses import replace

import pytest
import torch
from test_datamodule import files_of, random_images, some_sets, toy

from datamodules import datamodule
from datamodules.fitting import Fit
from datamodules.folders import FolderSet, read_folder
from datamodules.images import ArrayImages, FolderImages
from datamodules.outliers import RandomWindows
from datamodules.sets import OODSet


def planted():
    """Forty outliers, of which 3 are training images, 2 ID test images and 4 images of the OOD set ``far``."""
    sets = some_sets()
    pixels = sets.outliers.images.clone()
    pixels[[5, 17, 30]] = sets.train.images[[0, 50, 99]]
    pixels[[6, 7]] = sets.test.images[[3, 4]]
    pixels[8:12] = sets.ood["far"].images.images[:4]
    return replace(sets, outliers=ArrayImages(pixels, sets.outliers.labels, "planted")), pixels


@pytest.mark.parametrize("feed", ["paired", "mixed"])
def test_outliers_that_are_id_images_are_left_out_and_counted(feed):
    sets, pixels = planted()
    data = toy(sets, outlier_feed=feed)
    assert data.removed == {"train": 3, "id": 2}
    kept = [row for row in range(40) if row not in (5, 6, 7, 17, 30)]
    assert data.sizes["outliers"] == 35
    assert torch.equal(data.sets["outliers"].read(torch.arange(35)), pixels[kept])
    assert (data.sets["outliers"].labels == -1).all()
    assert toy(planted()[0], outlier_feed=feed, seed=5).fingerprints == data.fingerprints


def test_held_out_images_count_by_themselves():
    sets, _ = planted()
    data = toy(sets, outlier_feed="mixed", val_split=0.5)
    held_out = data.sets["calibration"].rows.tolist()
    inside = sum(row in held_out for row in (0, 50, 99))
    assert data.removed == {
        name: count for name, count in {"train": 3 - inside, "calibration": inside, "id": 2}.items() if count
    }
    assert data.sizes["outliers"] == 35


def test_those_that_are_left_out_are_replaced_by_others():
    for seed in range(5):
        sets, pixels = planted()
        data = toy(sets, outlier_feed="mixed", num_outliers=34, split_seed=seed)
        served = data.sets["outliers"].read(torch.arange(34))
        rows = [row for row in range(40) if any(torch.equal(pixels[row], image) for image in served)]
        assert len(rows) == 34
        assert not {5, 6, 7, 17, 30} & set(rows)
        assert sum(data.removed.values()) <= 5


def test_what_is_not_fed_is_not_looked_at(monkeypatch):
    monkeypatch.setattr(datamodule, "draw_outliers", None)
    sets, _ = planted()
    for options in ({}, {"outlier_feed": "mixed", "num_outliers": 0}):
        data = toy(sets, **options)
        assert data.outlier_feed is None
        assert data.removed == {}
        assert data.sizes["outliers"] == 40
        assert len(data.training_rows()) == 100


def test_a_number_without_a_feed():
    with pytest.raises(ValueError, match=r"^num_outliers=3, but not how they come into training: set outlier_feed$"):
        toy(num_outliers=3)
    with pytest.raises(ValueError, match="num_outliers must be at least 0, got -1"):
        toy(outlier_feed="mixed", num_outliers=-1)


def copies(tmp_path):
    """Files of which three outliers are training images."""
    sets = files_of(tmp_path)
    for outlier, image in ((0, 3), (4, 5), (8, 7)):
        source, target = sets.train, sets.outliers.images
        (target.root / target.names[outlier]).write_bytes((source.root / source.names[image]).read_bytes())
    return sets


def test_files_are_compared_whether_or_not_they_can_be_kept(tmp_path, monkeypatch):
    monkeypatch.setenv("OOD_DATA", str(tmp_path / "root"))
    sets = copies(tmp_path)
    kept = toy(sets, outlier_feed="mixed", num_outliers=12)
    assert kept.removed.keys() <= {"train"}
    everything = toy(sets, outlier_feed="mixed")
    assert everything.removed == {"train": 3}
    assert everything.sizes["outliers"] == 17
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("OOD_DATA", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="images are decoded each time"):
        decoded = toy(sets, outlier_feed="mixed", num_outliers=12)
    assert decoded.fingerprints == kept.fingerprints
    assert decoded.removed == kept.removed


def test_of_files_only_those_that_are_drawn_are_looked_at(tmp_path, monkeypatch):
    monkeypatch.setenv("OOD_DATA", str(tmp_path / "root"))
    sets = files_of(tmp_path)
    folder = sets.outliers.images
    data = toy(replace(sets, outliers=folder), outlier_feed="mixed", num_outliers=5)
    first = (folder.root / folder.names[0]).read_bytes() + b"more"
    chosen = data.sets["outliers"]
    again = toy(replace(sets, outliers=folder), outlier_feed="mixed", num_outliers=5)
    for name in folder.names:
        if not any(
            torch.equal(folder.read(torch.tensor([folder.names.index(name)]))[0], image)
            for image in chosen.read(torch.arange(5))
        ):
            (folder.root / name).write_bytes(first)  # it was not drawn
    fresh = FolderImages(folder.root, folder.names, folder.labels, folder.fit)
    without = toy(replace(sets, outliers=fresh), outlier_feed="mixed", num_outliers=5)
    assert without.fingerprints == again.fingerprints == data.fingerprints


def test_windows_of_larger_images_are_not_compared(monkeypatch):
    sets = some_sets()
    windows = RandomWindows(random_images(40, 4, shape=(3, 12, 12)), 6, 0, 0)
    read = []
    monkeypatch.setattr(RandomWindows, "read", lambda self, rows: read.extend(rows.tolist()) or self.images.read(rows))
    data = toy(replace(sets, outliers=windows), outlier_feed="mixed", num_outliers=9)
    assert data.sizes["outliers"] == 9
    assert set(read) <= {0}  # the first image of a set is looked at


def test_an_ood_set_from_the_same_file_or_folder_is_refused(tmp_path):
    sets = files_of(tmp_path)
    outliers, far = (read_folder(FolderSet(str(tmp_path / "far")), Fit((3, 6, 6))) for _ in range(2))
    with pytest.raises(ValueError, match=r"the OOD set far are both taken from .*far"):
        toy(replace(sets, outliers=outliers, ood={"far": OODSet(far)}), outlier_feed="mixed")
