import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision.transforms import functional

from datamodules.datamodule import OODDataModule
from datamodules.folders import Folders, FolderSet, find_images

RANDOM = np.random.default_rng(0)


def draw(path, size=(6, 6), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode == "RGB" else size
    image = Image.fromarray(RANDOM.integers(0, 256, shape, dtype=np.uint8))
    image.save(path)
    return image


@pytest.fixture
def root(tmp_path):
    for split in ("train", "test"):
        for name in ("dog", "cat"):
            for i in range(6):
                draw(tmp_path / split / name / f"{i}.png")
    for name in ("b/x.PNG", "a/deep/y.bmp", "z.png"):
        draw(tmp_path / "ood" / name)
    return tmp_path


def folders(root, **kwargs):
    options = {"test": str(root / "test"), "image_size": (6, 6), "batch_size": 4}
    data = Folders(**options | kwargs)
    data.setup()
    return data


def all_images(data, name):
    return data.sets[name][torch.arange(data.sizes[name])].images


def test_classes_are_folders_and_ood_any_tree(root):
    data = folders(root, train=str(root / "train"), ood={"other": FolderSet(str(root / "ood"), "near")}, val_split=0.3)
    assert data.classes == ["cat", "dog"]
    assert data.image_shape == (3, 6, 6)
    assert data.sizes == {"train": 8, "fit": 8, "calibration": 4, "id": 12, "other": 3}
    assert data.groups == {"other": "near"}
    assert data.sets["id"].labels.tolist() == [0] * 6 + [1] * 6
    assert data.sets["other"].labels.tolist() == [-1] * 3
    names = [root / "test" / name / f"{i}.png" for name in ("cat", "dog") for i in range(6)]
    assert np.array_equal(all_images(data, "id").permute(0, 2, 3, 1), [np.asarray(Image.open(n)) for n in names])
    names = [root / "ood" / name for name in ("a/deep/y.bmp", "b/x.PNG", "z.png")]
    assert np.array_equal(all_images(data, "other").permute(0, 2, 3, 1), [np.asarray(Image.open(n)) for n in names])


def test_loaders_decode_in_worker_processes(root):
    data = folders(root, train=str(root / "train"), num_workers=2)
    batches = list(data.train_dataloader())
    assert [tuple(batch.images.shape) for batch in batches] == [(4, 3, 6, 6)] * 3
    for batch in batches:
        assert torch.equal(batch.images, all_images(data, "train")[batch.ids])


def test_files_are_sorted_folder_by_folder(tmp_path):
    names = ["Greek/1/2.png", "Greek/1.png", "Greek-old/1/1.png", "Greek/1-a/1.png", "Greek.png", "Avesta/9/1.png"]
    for name in names:
        draw(tmp_path / name)
    in_order = ["Avesta/9/1.png", "Greek/1/2.png", "Greek/1-a/1.png", "Greek/1.png", "Greek-old/1/1.png", "Greek.png"]
    assert find_images(tmp_path) == in_order


@pytest.mark.parametrize("resize", ["squash", "crop"])
def test_images_are_resized(root, resize):
    image = draw(root / "large" / "image.png", (20, 31))
    draw(root / "large" / "more.png", (9, 7))
    large = FolderSet(str(root / "large"), resize=resize)
    data = folders(root, ood={"large": large})
    expected = functional.resize(image, [6, 6])
    if resize == "crop":
        expected = functional.center_crop(functional.resize(image, 6), [6, 6])
    assert np.array_equal(all_images(data, "large")[0].permute(1, 2, 0), expected)
    large.resize = None
    inherited = folders(root, ood={"large": large}, resize=resize)
    assert torch.equal(all_images(inherited, "large"), all_images(data, "large"))


def test_images_become_rgb_or_grey(root):
    grey = draw(root / "grey" / "1.png", mode="L")
    colour = Image.open(root / "ood" / "z.png")
    sets = {"grey": FolderSet(str(root / "grey")), "other": FolderSet(str(root / "ood"))}
    data = folders(root, ood=sets)
    assert np.array_equal(all_images(data, "grey")[0], np.stack([grey] * 3))
    data = folders(root, ood=sets, channels=1)
    assert data.image_shape == (1, 6, 6)
    assert np.array_equal(all_images(data, "grey")[0, 0], grey)
    assert np.array_equal(all_images(data, "other")[2, 0], colour.convert("L"))


def test_fingerprints(root):
    def fingerprint(**kwargs):
        return folders(root, **kwargs).fingerprints["id"]

    first = fingerprint()
    assert fingerprint() == first
    others = [fingerprint(resize="crop"), fingerprint(image_size=(5, 5), resize="squash"), fingerprint(channels=1)]
    (root / "test" / "cat" / "0.png").rename(root / "test" / "cat" / "00.png")
    others.append(fingerprint())
    with (root / "test" / "dog" / "0.png").open("ab") as file:
        file.write(b"0")
    others.append(fingerprint())
    assert len({first, *others}) == 6


def test_hidden_files_and_others_are_left_out(root):
    for name in ("._z.png", ".cache/z.png", "notes.txt"):
        path = root / "ood" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
    (root / "test" / ".cache").mkdir()
    data = folders(root, ood={"other": FolderSet(str(root / "ood")), "two": FolderSet(str(root / "ood"), limit=2)})
    assert (data.sizes["other"], data.sizes["two"]) == (3, 2)
    assert data.classes == ["cat", "dog"]


def test_links_are_followed_and_broken_ones_an_error(root):
    (root / "linked").mkdir()
    (root / "linked" / "folder").symlink_to(root / "ood")
    (root / "linked" / "file.png").symlink_to(root / "ood" / "z.png")
    assert folders(root, ood={"linked": FolderSet(str(root / "linked"))}).sizes["linked"] == 4
    (root / "linked" / "gone.png").symlink_to(root / "nowhere.png")
    with pytest.raises(FileNotFoundError, match=r"gone.png is a link to a file that does not exist"):
        folders(root, ood={"linked": FolderSet(str(root / "linked"))})


def test_wrong_images_are_errors_that_name_the_file(root):
    whole = (root / "ood" / "z.png").read_bytes()
    for name, content in {"text.png": b"text", "cut.png": whole[: len(whole) // 2], "none.jpg": b""}.items():
        (root / "wrong").mkdir(exist_ok=True)
        path = root / "wrong" / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"cannot use image .*{name}"):
            folders(root, ood={"wrong": FolderSet(str(root / "wrong"))})
        path.unlink()
    draw(root / "wrong" / "large.png", (7, 9))
    with pytest.raises(ValueError, match=r"large.png: it is 7x9 \(HxW\), 6x6 is wanted; say how"):
        folders(root, ood={"wrong": FolderSet(str(root / "wrong"))})
    Image.fromarray(np.full((6, 6), 40_000, dtype=np.uint16)).save(root / "wrong" / "large.png")
    with pytest.raises(ValueError, match=r"large.png: pixels are of mode I;16, not 8 bits"):
        folders(root, ood={"wrong": FolderSet(str(root / "wrong"))})


def test_wrong_folders_are_errors(root):
    (root / "empty" / "cat").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        folders(root, test=str(root / "nowhere"))
    with pytest.raises(ValueError, match=r"no image below folder .*empty/cat: .*\.jpg.*\.png"):
        folders(root, test=str(root / "empty"))
    with pytest.raises(ValueError, match=r"no image below folder .*empty"):
        folders(root, ood={"empty": FolderSet(str(root / "empty"))})
    with pytest.raises(ValueError, match=r"cat has no sub-folders; ID images lie in one sub-folder for each class"):
        folders(root, test=str(root / "test" / "cat"))
    with pytest.raises(ValueError, match="limit must be at least 1"):
        folders(root, ood={"other": FolderSet(str(root / "ood"), limit=0)})
    with pytest.raises(ValueError, match="channels must be 1"):
        folders(root, channels=2)


def test_training_and_test_classes_must_agree(root):
    (root / "train" / "cat").rename(root / "train" / "fox")
    with pytest.raises(ValueError, match=r"only in .*train: fox; only in .*test: cat"):
        folders(root, train=str(root / "train"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse renames the method Lightning still calls
def test_yaml_builds_it_and_comes_back(root):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(OODDataModule, "data")
    text = f"""
data:
  class_path: datamodules.folders.Folders
  init_args:
    train: {root}/train
    test: {root}/test
    image_size: [6, 6]
    resize: crop
    ood:
      other: {{path: {root}/ood, group: near}}
    outliers: {{path: {root}/test/dog, limit: 2, resize: squash}}
    batch_size: 4
"""
    config = parser.parse_string(text)
    again = parser.parse_string(parser.dump(config))
    assert again == config
    data = parser.instantiate_classes(again).data
    data.setup()
    assert data.sizes == {"train": 12, "fit": 12, "id": 12, "other": 3, "outliers": 2}
