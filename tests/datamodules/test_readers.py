import pickle

import numpy as np
import pytest
import torch
from miniature import draw, pixels, write_cifar, write_lsun, write_mnist, write_svhn
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import datasets

from datamodules import readers
from datamodules.fitting import Fit

RANDOM = np.random.default_rng(0)
SMALL, GREY = Fit((3, 32, 32)), Fit((1, 28, 28))


def check(images, expected, labels, classes):
    """Compare all of a set, (N, H, W, C), with what was written."""
    assert len(images) == len(expected)
    assert images.labels.dtype == torch.int64
    assert images.labels.tolist() == list(labels)
    assert list(images.classes) == list(classes)
    rows = torch.cat([torch.arange(len(images)).flip(0), torch.tensor([0, 0])])
    read = images.read(rows)
    assert read.dtype == torch.uint8
    assert read.shape == (len(rows), *images.shape)
    assert np.array_equal(read.permute(0, 2, 3, 1), np.stack(expected)[rows])
    assert images.read(rows[:0]).shape == (0, *images.shape)
    assert len(images.fingerprint()) == 64


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("version", [10, 100])
def test_cifar(tmp_path, monkeypatch, version, train):
    written, labels = write_cifar(tmp_path, version, monkeypatch)["train" if train else "test"]
    images = readers.cifar(tmp_path, SMALL, version, train)
    check(images, written.transpose(0, 2, 3, 1), labels, [f"class {label}" for label in range(version)])
    red, green, blue = written[1, :, 0, 0]
    assert images.read(torch.tensor([1]))[0, :, 0, 0].tolist() == [red, green, blue]


def test_cifar_is_verified(tmp_path, monkeypatch):
    write_cifar(tmp_path, 10, monkeypatch)
    path = tmp_path / "cifar-10-batches-py" / "data_batch_3"
    content = bytearray(path.read_bytes())
    content[-2000] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"data_batch_3 is damaged: its MD5 sum is not"):
        readers.cifar(tmp_path, SMALL, 10, train=True)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*cifar-10-batches-py/data_batch_3"):
        readers.cifar(tmp_path, SMALL, 10, train=True)


def test_cifar_lacks_its_classes(tmp_path, monkeypatch):
    write_cifar(tmp_path, 10, monkeypatch)
    (tmp_path / "cifar-10-batches-py" / "batches.meta").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*batches\.meta"):
        readers.cifar(tmp_path, SMALL, 10, train=False)


@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("MNIST", list("0123456789")),
        ("FashionMNIST", datasets.FashionMNIST.classes),
        ("KMNIST", ["o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"]),
    ],
)
def test_mnist(tmp_path, name, classes):
    images, labels = write_mnist(tmp_path, name)
    for prefix, train in (("train", True), ("t10k", False)):
        read = readers.mnist(tmp_path, GREY, name, train)
        check(read, images[prefix][..., None], labels[prefix], classes)
        rgb = readers.mnist(tmp_path, Fit((3, 28, 28)), name, train)
        check(rgb, np.repeat(images[prefix][..., None], 3, axis=3), labels[prefix], classes)


def test_mnist_is_damaged(tmp_path):
    write_mnist(tmp_path)
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    whole = path.read_bytes()
    for content in (b"", b"text", whole[:-1], whole[:3] + b"\x01" + whole[4:], b"\0\0\x0d\x03" + whole[4:]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"t10k-images-idx3-ubyte is damaged"):
            readers.mnist(tmp_path, GREY, "MNIST", train=False)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*raw/t10k-images-idx3-ubyte"):
        readers.mnist(tmp_path, GREY, "MNIST", train=False)


def test_svhn(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        written = write_svhn(tmp_path, patch)
    with pytest.raises(ValueError, match=r"test_32x32\.mat is damaged: its MD5 sum is not eb5a983b"):
        readers.svhn(tmp_path, SMALL)
    written = write_svhn(tmp_path, monkeypatch)
    images = readers.svhn(tmp_path, SMALL)
    check(images, written.transpose(3, 0, 1, 2), [1, 0, 9, 2], "0123456789")
    assert images.read(torch.tensor([2]))[0, :, 0, 5].tolist() == written[0, 5, :, 2].tolist()
    with pytest.raises(FileNotFoundError, match=r"no file .*test_32x32\.mat"):
        readers.svhn(tmp_path / "nowhere", SMALL)


def test_tree(tmp_path):
    names = ["b/1.png", "a/deep/2.png", "a-b/3.png", "c.png"]
    written = {name: draw(tmp_path / "below" / name) for name in names}
    in_order = [written[name] for name in ("a/deep/2.png", "a-b/3.png", "b/1.png", "c.png")]
    fit = Fit((3, 8, 8))
    check(readers.tree(tmp_path / "below", fit), in_order, [-1] * 4, [])
    below = readers.tree(tmp_path, fit, "below")
    check(below, in_order, [-1] * 4, [])
    inverted = readers.tree(tmp_path, fit, "below", invert=True)
    check(inverted, [255 - image for image in in_order], [-1] * 4, [])
    assert inverted.fingerprint() != below.fingerprint()
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere"):
        readers.tree(tmp_path, fit, "nowhere")


def test_tree_of_classes(tmp_path):
    root = tmp_path / "tiny-imagenet-200/train"
    written = [draw(root / wnid / "images" / f"{wnid}_{i}.JPEG") for wnid in ("n01", "n02") for i in range(2)]
    (root / "n01/n01_boxes.txt").write_text("n01_0.JPEG\t0\t0\t62\t62\n")
    images = readers.tree(tmp_path, Fit((3, 8, 8)), "tiny-imagenet-200/train", labelled=True)
    check(images, written, [0, 0, 1, 1], ["n01", "n02"])


def test_textures(tmp_path):
    names = ["banded/banded_0002.jpg", "woven/woven_0001.jpg", "dotted/dotted_0009.jpg"]
    written = [draw(tmp_path / "dtd/dtd/images" / name) for name in names]
    draw(tmp_path / "dtd/dtd/images/banded/banded_0001.jpg")
    (tmp_path / "dtd/dtd/labels").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no file .*labels/test1\.txt"):
        readers.textures_test(tmp_path, Fit((3, 8, 8)))
    (tmp_path / "dtd/dtd/labels/test1.txt").write_text("\n".join(names) + "\n")
    check(readers.textures_test(tmp_path, Fit((3, 8, 8))), written, [-1] * 3, [])


def test_tiny_imagenet_val(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for wnid in ("n03", "n01", "n02"):
        draw(root / f"train/{wnid}/images/{wnid}_0.JPEG")
    written = [draw(root / f"val/images/val_{i}.JPEG") for i in range(3)]
    listing = root / "val/val_annotations.txt"
    lines = [f"val_{i}.JPEG\t{wnid}\t0\t32\t44\t62\n" for i, wnid in ((0, "n03"), (2, "n01"), (1, "n01"))]
    listing.write_text("".join(lines))
    images = readers.tiny_imagenet_val(tmp_path, Fit((3, 8, 8)))
    check(images, [written[0], written[2], written[1]], [2, 0, 0], ["n01", "n02", "n03"])
    listing.write_text("".join([*lines, "val_9.JPEG\tn02\t0\t0\t1\t1\n"]))
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images that .*val_annotations\.txt names .*val_9\.JPEG first"):
        readers.tiny_imagenet_val(tmp_path, Fit((3, 8, 8)))
    listing.write_text("val_0.JPEG\tn04\t0\t0\t1\t1\n")
    with pytest.raises(ValueError, match=r"val_annotations\.txt has images of n04, of which .*train has none"):
        readers.tiny_imagenet_val(tmp_path, Fit((3, 8, 8)))
    listing.write_text("\n".join([lines[0], "val_1.JPEG n01"]))
    with pytest.raises(ValueError, match=r"val_annotations\.txt, line 3 does not name an image as it should: 'val_1"):
        readers.tiny_imagenet_val(tmp_path, Fit((3, 8, 8)))


def listed(folder, lines):
    (folder / "lists").mkdir(exist_ok=True)
    (folder / "lists/test.txt").write_text("\n".join(lines) + "\n")
    return readers.listed(folder, Fit((3, 8, 8)), "lists/test.txt", "images")


def test_listed(tmp_path):
    names = ["set/cat/1 2 3.png", "set/dog/1.png", "set/dog/2.png", "set/old fox/1.png"]
    written = [draw(tmp_path / "images" / name) for name in names]

    def lines(*labels):
        return [f"{name} {label}" for name, label in zip(names, labels, strict=True)]

    check(listed(tmp_path, lines(1, 0, 0, 2)), written, [1, 0, 0, 2], ["dog", "cat", "old fox"])
    check(listed(tmp_path, lines(-1, 0, 0, 1)), written, [-1, 0, 0, 1], ["dog", "old fox"])
    check(listed(tmp_path, lines(-1, -1, -1, -1)), written, [-1] * 4, [])
    check(listed(tmp_path, lines(0, 0, 0, 1)), written, [0, 0, 0, 1], "01")
    check(listed(tmp_path, lines(0, 0, 0, 2)), written, [0, 0, 0, 2], "012")
    check(listed(tmp_path, lines(0, 1, 2, 3)), written, [0, 1, 2, 3], "0123")
    check(listed(tmp_path, lines(3, 0, 0, 1)), written, [3, 0, 0, 1], "0123")
    check(listed(tmp_path, [*lines(1, 0, 0, 2)[::-1], ""]), written[::-1], [2, 0, 0, 1], ["dog", "cat", "old fox"])


def test_wrong_lists_are_errors(tmp_path):
    draw(tmp_path / "images/cat/1.png")
    with pytest.raises(
        FileNotFoundError, match=r"2 of 3 images that .*test\.txt names are missing, .*cat/2\.png first"
    ):
        listed(tmp_path, ["cat/2.png 0", "cat/1.png 0", "cat/3.png 1"])
    for line in ("cat/1.png", "cat/1.png dog", "cat/1.png -2", "0"):
        with pytest.raises(ValueError, match=r"test\.txt, line 2 does not name an image as it should"):
            listed(tmp_path, ["cat/1.png 0", line])
    with pytest.raises(ValueError, match=r"test\.txt names no image"):
        listed(tmp_path, [""])


def test_lsun(tmp_path):
    sizes = [2, 1, 3, 1, 1, 1, 1, 1, 1, 2]
    written = write_lsun(tmp_path, "val", sizes)
    labels = np.repeat(range(10), sizes).tolist()
    images = readers.lsun(tmp_path, Fit((3, 8, 10)), "val")
    assert list(images.classes)[:3] == ["bedroom", "bridge", "church_outdoor"]
    check(images, written, labels, readers.LSUN_CATEGORIES)
    with pytest.raises(FileNotFoundError, match=r"no database .*bedroom_train_lmdb/data\.mdb"):
        readers.lsun(tmp_path, Fit((3, 8, 10)), "train")


def test_downsampled_imagenet(tmp_path):
    written = pixels(3, 3, 64, 64)
    for number, rows in ((1, [0, 1]), (2, [2])):
        content = {"data": written[rows].reshape(-1, 12288), "labels": [[1, 1000], [7]][number - 1]}
        (tmp_path / f"train_data_batch_{number}").write_bytes(pickle.dumps(content))
    images = readers.downsampled_imagenet(tmp_path, Fit((3, 64, 64)))
    check(images, written.transpose(0, 2, 3, 1), [0, 999, 6], [str(number) for number in range(1, 1001)])
    assert images.read(torch.tensor([2]))[0, :, 1, 3].tolist() == written[2, :, 1, 3].tolist()
    small = readers.downsampled_imagenet(tmp_path, Fit((3, 32, 32), "squash"))
    squashed = [Image.fromarray(image.transpose(1, 2, 0)).resize((32, 32), Image.BILINEAR) for image in written]
    check(small, [np.asarray(image) for image in squashed], [0, 999, 6], images.classes)


def test_npy(tmp_path):
    written = pixels(4, 32, 32, 3)
    np.save(tmp_path / "300K_random_images.npy", written)
    check(readers.npy(tmp_path, SMALL, "300K_random_images.npy"), written, [-1] * 4, [])


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 6)])
def test_noise(tmp_path, shape):
    images = readers.noise(tmp_path / "nowhere", Fit(shape), 400)
    assert len(images) == 400
    assert images.labels.tolist() == [-1] * 400
    assert images.shape == shape
    read = images.read(torch.arange(400))
    assert read.shape == (400, *shape)
    assert read.dtype == torch.float32
    inputs = (read - 0.5) / 0.5
    assert inputs.min() >= 0
    assert inputs.max() <= 1
    assert inputs.mean() == pytest.approx(1 / 2, abs=0.01)
    assert inputs.var() == pytest.approx(1 / 12, abs=0.01)
    assert len(inputs.flatten(1).unique(dim=0)) == 400
    rows = torch.tensor([7, 2, 7])
    assert torch.equal(images.read(rows), read[rows])
    assert torch.equal(readers.noise(tmp_path, Fit(shape), 9).read(rows), read[rows])
    assert images.read(rows[:0]).shape == (0, *shape)
    batches = DataLoader(images, sampler=[rows, rows[1:]], batch_size=None, num_workers=2)
    assert all(torch.equal(batch.images, read[batch.ids]) for batch in batches)


def test_mnist_noise(tmp_path):
    written = write_mnist(tmp_path, count=60)[0]["t10k"]
    images = readers.mnist_noise(tmp_path, GREY)
    assert len(images) == 60
    assert images.labels.tolist() == [-1] * 60
    assert list(images.classes) == []
    read = images.read(torch.arange(60))
    assert read.dtype == torch.float32
    inputs = (read - 0.5) / 0.5
    noise = inputs[:, 0] - (torch.from_numpy(written) / 255 - 0.5) / 0.5
    assert noise.min() >= -1e-6
    assert noise.max() <= 1 + 1e-6
    assert noise.mean() == pytest.approx(1 / 2, abs=0.01)
    assert inputs.max() > 1.5
    rows = torch.tensor([59, 0, 59])
    assert torch.equal(images.read(rows), read[rows])
    assert images.read(rows[:0]).shape == (0, 1, 28, 28)


def test_noise_has_fingerprints(tmp_path):
    write_mnist(tmp_path)
    sets = [readers.noise(tmp_path, GREY, 5), readers.noise(tmp_path, GREY, 6), readers.mnist_noise(tmp_path, GREY)]
    path = tmp_path / "MNIST/raw/t10k-images-idx3-ubyte"
    first = [images.fingerprint() for images in sets]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    last = readers.mnist_noise(tmp_path, GREY).fingerprint()
    assert len({*first, last}) == 4
    assert readers.noise(tmp_path, GREY, 5).fingerprint() == first[0]
