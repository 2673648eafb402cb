"""Miniatures of the public data sets, written in their real formats on disk."""

import hashlib
import io
import pickle
import struct
from dataclasses import replace

import lmdb
import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

RANDOM = np.random.default_rng(0)
CATEGORIES = [
    "bedroom",
    "bridge",
    "church_outdoor",
    "classroom",
    "conference_room",
    "dining_room",
    "kitchen",
    "living_room",
    "restaurant",
    "tower",
]


def pixels(*shape):
    return RANDOM.integers(0, 256, shape, dtype=np.uint8)


def draw(path, size=(8, 8, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = pixels(*size)
    Image.fromarray(image).save(path.with_suffix(".png"))  # lossless, whatever the name says
    path.with_suffix(".png").rename(path)
    return image


def write_cifar(folder, version, monkeypatch):
    """Write three images a file, of classes all over their range; return all, (N, 3, 32, 32), and their labels."""
    kind = {10: datasets.CIFAR10, 100: datasets.CIFAR100}[version]
    base = folder / kind.base_folder
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content, protocol=2))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    images, labels = {"train": [], "test": []}, {"train": [], "test": []}
    for split in images:
        files = getattr(kind, f"{split}_list")
        sums = []
        for name, _ in files:
            images[split].append(pixels(3, 3 * 32 * 32))
            labels[split] += [len(labels[split]) % version, version // 2, version - 1]
            content = {"data": images[split][-1]}
            if version == 10:
                content["labels"] = labels[split][-3:]
            else:
                content |= {"fine_labels": labels[split][-3:], "coarse_labels": [0, 0, 0]}
            sums.append([name, write(name, content)])
        monkeypatch.setattr(kind, f"{split}_list", sums)
    names = [f"class {label}" for label in range(version)]
    key = "label_names" if version == 10 else "fine_label_names"
    meta = {"filename": kind.meta["filename"], "key": key}
    monkeypatch.setattr(kind, "meta", meta | {"md5": write(meta["filename"], {key: names})})
    return {split: (np.concatenate(images[split]).reshape(-1, 3, 32, 32), labels[split]) for split in images}


def write_idx(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape) + values.tobytes())


def write_mnist(folder, name="MNIST", count=5):
    images, labels = {}, {}
    for prefix in ("train", "t10k"):
        images[prefix], labels[prefix] = pixels(count, 28, 28), np.arange(count, dtype=np.uint8)[::-1]
        write_idx(folder / name / "raw" / f"{prefix}-images-idx3-ubyte", images[prefix])
        write_idx(folder / name / "raw" / f"{prefix}-labels-idx1-ubyte", labels[prefix])
    return images, labels


def write_lsun(folder, split, sizes):
    """Write an LMDB of a category for each of the sizes; return the images in the order of the keys."""
    images = []
    for category, count in zip(CATEGORIES, sizes, strict=True):
        with lmdb.open(str(folder / f"{category}_{split}_lmdb"), map_size=1 << 20) as database:
            for _ in range(count):
                file = io.BytesIO()
                images.append(pixels(8, 10, 3))
                Image.fromarray(images[-1]).save(file, "webp", lossless=True)
                with database.begin(write=True) as transaction:
                    transaction.put(b"%040x" % len(images), file.getvalue())
    return images


def write_svhn(folder, monkeypatch, count=4):
    written = pixels(32, 32, 3, count)
    savemat(folder / "test_32x32.mat", {"X": written, "y": np.array([[1], [10], [9], [2]], dtype=np.uint8)[:count]})
    md5 = hashlib.md5((folder / "test_32x32.mat").read_bytes()).hexdigest()
    monkeypatch.setitem(datasets.SVHN.split_list, "test", ["", "test_32x32.mat", md5])
    return written


def write_textures(folder, listed=3, others=2):
    names = [f"banded/banded_{i:04}.jpg" for i in range(listed + others)]
    for name in names:
        draw(folder / "dtd/dtd/images" / name, (50, 40, 3))
    (folder / "dtd/dtd/labels").mkdir()
    (folder / "dtd/dtd/labels/test1.txt").write_text("".join(f"{name}\n" for name in names[:listed]))


def write_tiny_imagenet(folder, count=4):
    root = folder / "tiny-imagenet-200"
    for i in range(count):
        draw(root / f"test/images/test_{i}.JPEG", (64, 64, 3))
        draw(root / f"val/images/val_{i}.JPEG", (64, 64, 3))
        for wnid in ("n01", "n02"):
            draw(root / f"train/{wnid}/images/{wnid}_{i}.JPEG", (64, 64, 3))
    lines = [f"val_{i}.JPEG\tn0{1 + i % 2}\t0\t0\t62\t62\n" for i in range(count)]
    (root / "val/val_annotations.txt").write_text("".join(lines))


def write_openood(folder, cifar, other):
    lists = {f"{split}_{cifar}": [0, 1] for split in ("train", "test")}
    lists |= {f"test_{name}": [-1, -1, -1] for name in (other, "tin", "mnist", "svhn", "texture", "places365")}
    for name, labels in lists.items():
        lines = []
        for i, label in enumerate(labels):
            image = f"{name}/class {label}/{i}.png"
            draw(folder / "images_classic" / image, (40, 32, 3) if label < 0 else (32, 32, 3))
            lines.append(f"{image} {label}\n")
        path = folder / f"benchmark_imglist/{cifar}/{name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(lines))


def write_imagenet64(folder, count=3):
    for number in (1, 2):
        batch = {"data": pixels(count, 3 * 64 * 64), "labels": [1 + number * count + i for i in range(count)]}
        (folder / f"train_data_batch_{number}").write_bytes(pickle.dumps(batch))


TREES = {  # source: how its images are called, and how large they are
    "places365": ("val_256/Places365_val_{:08}.jpg", (256, 256, 3)),
    "places365_train": ("data_256_standard/a/abbey/{:08}.jpg", (256, 256, 3)),
    "tiny_imagenet_crop": ("Imagenet/test/{}.png", (36, 36, 3)),
    "tiny_imagenet_resize": ("Imagenet_resize/{}.png", (32, 32, 3)),
    "lsun_crop": ("LSUN/test/{}.png", (36, 36, 3)),
    "lsun_resize": ("LSUN_resize/{}.png", (32, 32, 3)),
    "isun": ("iSUN/iSUN_patches/{}.png", (32, 32, 3)),
    "inaturalist": ("iNaturalist/images/{}.jpg", (80, 60, 3)),
    "sun": ("SUN/images/{}.jpg", (60, 80, 3)),
    "places": ("Places/images/{}.jpg", (70, 70, 3)),
    "omniglot": ("omniglot-py/images_evaluation/Angelic/character01/0965_{:02}.png", (105, 105)),
    "tiny_images": ("{}.png", (32, 32, 3)),
}


def write_everything(root, monkeypatch, entries):
    """Write every source below ``root``, and say in the catalogue how few images there are."""
    for source in {entry.source for entry in entries.values()}:
        (root / source).mkdir()
    for version in (10, 100):
        write_cifar(root / f"cifar{version}", version, monkeypatch)
    for source, name in (("mnist", "MNIST"), ("fashion_mnist", "FashionMNIST"), ("kmnist", "KMNIST")):
        write_mnist(root / source, name)
    write_svhn(root / "svhn", monkeypatch)
    write_textures(root / "textures")
    write_tiny_imagenet(root / "tiny_imagenet")
    write_openood(root / "openood", "cifar10", "cifar100")
    write_openood(root / "openood", "cifar100", "cifar10")
    write_imagenet64(root / "imagenet64")
    write_lsun(root / "lsun", "val", [2] * 10)
    write_lsun(root / "lsun_train", "train", [2] * 10)
    np.save(root / "random_images/300K_random_images.npy", pixels(7, 32, 32, 3))
    for split in ("train", "val"):
        for wnid in ("n01", "n02", "n03"):
            for i in range(2):
                draw(root / "imagenet" / split / wnid / f"{i}.JPEG", (300, 400, 3))
    for source, (name, size) in TREES.items():
        for i in range(3):
            draw(root / source / name.format(i), size)
    counts = dict.fromkeys(TREES, 3) | {
        "cifar10": 3,
        "cifar10_train": 15,
        "cifar100": 3,
        "cifar100_train": 3,
        "mnist": 5,
        "mnist_train": 5,
        "mnist_noise": 5,
        "fashion_mnist": 5,
        "kmnist": 5,
        "svhn": 4,
        "textures": 5,
        "textures_test": 3,
        "tiny_imagenet": 4,
        "tiny_imagenet_val": 4,
        "tiny_imagenet_train": 8,
        "lsun": 20,
        "imagenet": 6,
        "imagenet_train": 6,
        "imagenet64": 6,
        "random_images": 7,
    }
    counts["lsun_train"] = 20
    for name in entries:
        if name.startswith("openood"):
            own = name.split("_")[1]
            counts[name] = 2 if name.endswith((f"train_{own}", f"test_{own}")) else 3
    for name, count in counts.items():
        monkeypatch.setitem(entries, name, replace(entries[name], count=count))
