import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from PIL import Image
from torchvision.transforms import functional

from datamodules.arrays import Arrays, ArraySet
from datamodules.datamodule import OODDataModule

RANDOM = np.random.default_rng(0)


def pixels(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture
def save(tmp_path):
    def save(name, images, labels=None, **more):
        arrays = {"images": images} | ({} if labels is None else {"labels": labels}) | more
        np.savez(tmp_path / name, **arrays)
        return str(tmp_path / name)

    return save


def arrays(test, **kwargs):
    data = Arrays(test=test, batch_size=4, **kwargs)
    data.setup()
    return data


def all_images(data, name):
    return data.sets[name][torch.arange(data.sizes[name])].images


def test_colour_arrays(save):
    images, labels = pixels(12, 6, 5, 3), np.arange(12) % 3
    data = arrays(
        save("test.npz", images, labels),
        train=ArraySet(save("train.npz", pixels(20, 6, 5, 3), np.arange(20, dtype=np.int32) % 3), limit=10),
        ood={"svhn": ArraySet(save("svhn.npz", pixels(9, 6, 5, 3), np.arange(9)), group="near", limit=7)},
        outliers=ArraySet(save("aux.npz", pixels(8, 6, 5, 3))),
    )
    assert data.image_shape == (3, 6, 5)
    assert data.classes == ["0", "1", "2"]
    assert data.groups == {"svhn": "near"}
    assert data.sizes == {"train": 10, "fit": 10, "id": 12, "svhn": 7, "outliers": 8}
    assert np.array_equal(all_images(data, "id").permute(0, 2, 3, 1), images)
    assert data.sets["id"].labels.tolist() == labels.tolist()
    assert set(data.sets["svhn"].labels.tolist()) == {-1}


def test_grey_arrays_need_no_channel(save):
    images = pixels(5, 4, 4)
    data = arrays(save("test.npz", images, np.zeros(5, dtype=np.uint8)), num_classes=2)
    assert data.image_shape == (1, 4, 4)
    assert data.num_classes == 2
    assert np.array_equal(all_images(data, "id")[:, 0], images)


@pytest.mark.parametrize("resize", ["squash", "crop", "pad"])
@pytest.mark.parametrize("shape", [(6, 9), (6, 9, 3)])
def test_sets_are_made_to_fit(save, resize, shape):
    images = pixels(4, *shape)
    data = arrays(
        save("test.npz", pixels(3, 12, 12, 3), np.arange(3)),
        ood={"other": ArraySet(save("other.npz", images), resize=resize, channels=3)},
    )
    for image, result in zip(images, all_images(data, "other"), strict=True):
        whole = Image.fromarray(image).convert("RGB")
        expected = {
            "squash": lambda whole: functional.resize(whole, [12, 12]),
            "crop": lambda whole: functional.center_crop(functional.resize(whole, 12), [12, 12]),
            "pad": lambda whole: functional.pad(whole, [1, 3, 2, 3]),
        }[resize](whole)
        assert np.array_equal(result.permute(1, 2, 0), expected)


def test_colour_becomes_grey(save):
    images = pixels(4, 6, 6, 3)
    data = arrays(
        save("test.npz", pixels(3, 6, 6), np.arange(3)), ood={"other": ArraySet(save("o.npz", images), channels=1)}
    )
    weights = torch.tensor([0.299, 0.587, 0.114])
    expected = torch.from_numpy(images).float() @ weights
    assert (all_images(data, "other")[:, 0] - expected).abs().max() <= 1


def test_id_images_may_be_converted_too(save):
    test, train = (save(name, pixels(4, size, size), np.arange(4) % 2) for name, size in (("a.npz", 5), ("b.npz", 6)))
    data = arrays(ArraySet(test, resize="pad", channels=3), train=ArraySet(train, channels=3))
    assert data.image_shape == (3, 6, 6)
    with pytest.raises(ValueError, match=r"b.npz itself says .* resize=crop has no aim"):
        arrays(test, train=ArraySet(train, resize="crop"))


def test_sets_of_another_shape_are_an_error_that_names_the_remedy(save):
    test, other = save("test.npz", pixels(3, 6, 6, 3), np.arange(3)), save("mnist.npz", pixels(2, 4, 4))
    with pytest.raises(ValueError, match=r"mnist.npz.*\(1, 4, 4\).*test.npz.*\(3, 6, 6\).*squash.*channels"):
        arrays(test, ood={"mnist": ArraySet(other)})
    with pytest.raises(ValueError, match=r"mnist.npz.*\(1, 6, 6\).*\(3, 6, 6\)"):
        arrays(test, ood={"mnist": ArraySet(other, resize="pad")})
    with pytest.raises(ValueError, match=r"big.npz, row 0: it is 9x9 .* 6x6 .* padding cannot shrink"):
        arrays(test, ood={"big": ArraySet(save("big.npz", pixels(2, 9, 9, 3)), resize="pad")})


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((3, 4, 4), dtype=np.float32), np.zeros(3, dtype=int), "images must be uint8 .* float32"),
        (pixels(3, 4), np.zeros(3, dtype=int), r"images must be .* \(3, 4\)"),
        (pixels(2, 3, 4, 4), np.zeros(2, dtype=int), r"images must be \(N, H, W, C\) .* \(2, 3, 4, 4\)"),
        (pixels(0, 4, 4), np.zeros(0, dtype=int), "N > 0"),
        (pixels(3, 4, 4), np.zeros(2, dtype=int), r"3 images, but labels of shape \(2,\)"),
        (pixels(3, 4, 4), np.zeros((3, 2), dtype=int), r"3 images, but labels of shape \(3, 2\)"),
        (pixels(3, 4, 4), np.array([0.0, 1.0, 1.5]), "float64, row 2 has 1.5"),
        (pixels(3, 4, 4), np.array(["cat", "dog", "cat"]), "row 0 has cat"),
        (pixels(3, 4, 4), np.array([0, 1, 7]), r"label 7 in row 2 is not one of the 5 classes 0\.\.4"),
        (pixels(3, 4, 4), np.array([0, -1, 1]), "label -1 in row 1"),
        (pixels(3, 4, 4), None, "ID images need `labels`"),
        (np.array([{}, {}]), None, "cannot be read as an .npz file of plain arrays"),
    ],
)
def test_wrong_arrays_are_errors_that_name_the_file(save, images, labels, message):
    with pytest.raises(ValueError, match=f"wrong.npz.*{message}"):
        arrays(save("wrong.npz", images, labels), num_classes=5)


def test_wrong_files_are_errors_that_name_the_file(save, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no file .*missing.npz"):
        arrays(str(tmp_path / "missing.npz"))
    whole = (tmp_path / save("whole.npz", pixels(50, 8, 8), np.arange(50))).read_bytes()
    for name, content in {
        "truncated.npz": whole[: len(whole) // 2],
        "damaged.npz": whole[:1500] + bytes(200) + whole[1700:],
        "text.npz": b"images",
        "empty.npz": b"",
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} cannot be read"):
            arrays(str(tmp_path / name))
    np.save(tmp_path / "single.npy", pixels(3, 4, 4))
    with pytest.raises(ValueError, match=r"single.npy cannot be read"):
        arrays(str(tmp_path / "single.npy"))
    np.savez(tmp_path / "other.npz", x=np.zeros(3), y=np.zeros(2))
    with pytest.raises(ValueError, match=r"other.npz: no array `images`; it holds: x, y"):
        arrays(str(tmp_path / "other.npz"))
    with pytest.raises(ValueError, match=r"whole.npz: limit must be at least 1, got 0"):
        arrays(ArraySet(str(tmp_path / "whole.npz"), limit=0))


YAML = """
data:
  class_path: datamodules.arrays.Arrays
  init_args:
    train: {train}
    test: {{path: {test}, limit: 5}}
    ood:
      svhn: {{path: {ood}, group: near, limit: 3}}
      mnist: {{path: {ood}, resize: pad, channels: 1}}
    outliers: {{path: {outliers}}}
    batch_size: 4
    val_split: 0.25
    mean: [0.5]
    std: [0.25]
    augmentation: {{crop_padding: 1, flip: true}}
    outlier_feed: paired
    outlier_ratio: 2
    fit_limit: 10
"""


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse renames the method Lightning still calls
def test_yaml_builds_it_and_comes_back(save):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(OODDataModule, "data")
    text = YAML.format(
        train=save("train.npz", pixels(16, 4, 4), np.arange(16) % 2),
        test=save("test.npz", pixels(6, 4, 4), np.arange(6) % 2),
        ood=save("ood.npz", pixels(9, 4, 4)),
        outliers=save("outliers.npz", pixels(9, 4, 4)),
    )
    config = parser.parse_string(text)
    again = parser.parse_string(parser.dump(config))
    assert again == config
    data = parser.instantiate_classes(again).data
    data.setup()
    assert data.sizes == {"train": 12, "fit": 10, "calibration": 4, "id": 5, "svhn": 3, "mnist": 9, "outliers": 9}
    assert data.groups == {"svhn": "near", "mnist": "far"}
    assert [len(batch.ids) for batch in data.train_dataloader()] == [12] * 3
