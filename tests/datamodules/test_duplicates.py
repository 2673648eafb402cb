import numpy as np
import pytest
import torch
from PIL import Image

from datamodules import duplicates
from datamodules.duplicates import count_duplicates, image_hashes
from datamodules.fitting import Fit
from datamodules.images import ArrayImages, FolderImages, ImageSet, Rows


class FloatImages(ImageSet):
    def __init__(self, images):
        self.images, self.labels = images, torch.zeros(len(images), dtype=torch.int64)
        self.shape, self.source = tuple(images.shape[1:]), "float"

    def read(self, rows):
        return self.images[rows]

    @property
    def digest(self):
        return ""


def array_set(images):
    return ArrayImages(images, torch.zeros(len(images), dtype=torch.int64), "array")


def random_images(count, seed=0, shape=(3, 5, 7)):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=generator)


@pytest.fixture(params=["hashed", "all hashes collide"])
def hashes(request, monkeypatch):
    if request.param == "all hashes collide":
        monkeypatch.setattr(duplicates, "image_hashes", lambda images: torch.zeros(len(images), dtype=torch.int64))


@pytest.mark.usefixtures("hashes")
def test_planted_duplicates_are_counted():
    outliers, others = random_images(40), random_images(30, seed=1)
    others[[3, 29, 0]] = outliers[[39, 0, 17]]
    others[4] = outliers[39]  # twice there, once an outlier
    outliers[5] = outliers[17]  # once there, twice an outlier
    almost = outliers[20:25].clone()
    almost[:, 2, 4, 6] ^= 1
    sets = {"planted": others, "none": random_images(30, seed=2), "mirrored": outliers.flip(3), "almost": almost}
    counts = count_duplicates(array_set(outliers), {name: array_set(images) for name, images in sets.items()})
    assert counts == {"planted": 4}


@pytest.mark.usefixtures("hashes")
def test_a_set_among_itself():
    images = array_set(random_images(50))
    assert count_duplicates(Rows(images, torch.arange(10, 35)), {"whole": images}) == {"whole": 25}


@pytest.mark.usefixtures("hashes")
def test_no_images():
    none, some = array_set(random_images(0)), array_set(random_images(4))
    assert count_duplicates(none, {"some": some, "none": none}) == {}
    assert count_duplicates(some, {"none": none}) == {}
    assert count_duplicates(some, {}) == {}


@pytest.mark.usefixtures("hashes")
def test_float_images_are_never_those_of_bytes():
    black = torch.zeros(3, 1, 4, 4)
    floats, bytes_ = FloatImages(black), array_set(black.byte())
    assert count_duplicates(floats, {"bytes": bytes_, "floats": FloatImages(black)}) == {"floats": 3}
    assert count_duplicates(bytes_, {"floats": floats}) == {}


@pytest.mark.usefixtures("hashes")
def test_the_same_bytes_in_another_shape_are_another_picture():
    images = random_images(3, shape=(1, 4, 6))
    assert count_duplicates(array_set(images), {"turned": array_set(images.view(3, 1, 6, 4))}) == {}


def test_pixels_are_compared_as_they_are_served(tmp_path):
    images = random_images(3, shape=(3, 8, 8))
    for i, image in enumerate(images):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(tmp_path / f"{i}.png")
    names = ["2.png", "0.png"]
    folder = FolderImages(tmp_path, names, torch.zeros(2, dtype=torch.int64), Fit((3, 8, 8)))
    assert count_duplicates(array_set(images), {"folder": folder}) == {"folder": 2}
    assert torch.equal(image_hashes(folder), image_hashes(array_set(images))[[2, 0]])


def test_hashes_are_read_in_chunks_and_differ():
    class Watched(ArrayImages):
        largest = 0

        def read(self, rows):
            self.largest = max(self.largest, len(rows))
            return super().read(rows)

    images = torch.zeros(96, 1, 1, 12, dtype=torch.uint8)
    images.view(96, 12)[torch.arange(96), torch.arange(96) // 8] = 2 ** (torch.arange(96) % 8).byte()  # one bit each
    watched = Watched(images, torch.zeros(96, dtype=torch.int64), "bits")
    hashes = image_hashes(watched, chunk=10)
    assert watched.largest == 10
    assert (hashes.dtype, len(hashes.unique())) == (torch.int64, 96)
    assert torch.equal(hashes, image_hashes(watched))


def test_hashes_are_alike_however_pixels_lie_in_memory():
    class FirstOfInterleaved(FloatImages):
        def read(self, rows):
            return self.images[rows].permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)[:, :1]

    images = random_images(6, shape=(3, 4, 4)).float()
    assert torch.equal(image_hashes(FirstOfInterleaved(images)), image_hashes(FloatImages(images[:, :1])))
