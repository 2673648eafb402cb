from dataclasses import replace

import pytest
import torch
from miniature import draw
from torch.utils.data import Dataset
from torchvision.transforms import functional

from datamodules import datamodule, plans
from datamodules import images as sets_of_images
from datamodules.augmentation import Augmentation, random_crop, random_flip
from datamodules.batch import Batch, TrainingBatch
from datamodules.datamodule import OODDataModule
from datamodules.fitting import Fit
from datamodules.images import ArrayImages, FolderImages, Rows
from datamodules.plans import Balanced
from datamodules.sets import OODSet, Sets
from datamodules.splits import OODSubset, Subset


def random_images(length, seed, shape=(3, 6, 6), classes=4, source="somewhere"):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (length, *shape), dtype=torch.uint8, generator=generator)
    return ArrayImages(pixels, torch.arange(length) % classes, source)


def some_sets():
    return Sets(
        train=random_images(100, 0, source="train.npz"),
        test=random_images(30, 1, source="test.npz"),
        ood={"near": OODSet(random_images(20, 2), "near"), "far": OODSet(random_images(25, 3))},
        outliers=random_images(40, 4),
        classes=["a", "b", "c", "d"],
    )


class Toy(OODDataModule):
    def __init__(self, sets=None, **kwargs):
        super().__init__(**{"batch_size": 16} | kwargs)
        self.given = sets or some_sets()
        self.loads = 0

    def load(self):
        self.loads += 1
        return self.given


def toy(sets=None, **kwargs):
    data = Toy(sets, **kwargs)
    data.setup("fit")
    data.setup("test")
    assert data.loads == 1
    return data


def test_what_is_known_after_setup():
    data = toy(val_split=0.2, fit_limit=10)
    assert (data.num_classes, data.image_shape, data.classes) == (4, (3, 6, 6), ["a", "b", "c", "d"])
    assert data.groups == {"near": "near", "far": "far"}
    assert data.sizes == {"train": 80, "fit": 10, "calibration": 20, "id": 30, "near": 20, "far": 25, "outliers": 40}
    assert list(data.fingerprints) == list(data.sizes)
    assert len(set(data.fingerprints.values())) == 7
    assert toy(val_split=0.2, fit_limit=10, seed=7).fingerprints == data.fingerprints
    moved = toy(val_split=0.2, fit_limit=10, split_seed=7).fingerprints
    assert {name for name in moved if moved[name] != data.fingerprints[name]} == {"train", "fit", "calibration"}
    assert not data.normalizes
    assert toy(mean=[0.0], std=[1.0]).normalizes


def test_test_loaders_come_in_order():
    data = toy(val_split=0.2, eval_batch_size=7)
    assert list(data.test_dataloader()) == ["calibration", "id", "near", "far"]
    data.fit_passes = 2
    loaders = data.test_dataloader()
    assert list(loaders) == ["fit", "fit_2", "calibration", "id", "near", "far"]
    for name, loader in loaders.items():
        batches = list(loader)
        ids = torch.cat([batch.ids for batch in batches])
        labels = torch.cat([batch.labels for batch in batches])
        assert ids.tolist() == list(range(data.sizes[name.removesuffix("_2")]))
        assert len(batches[0].images) == 7
        assert bool((labels == -1).all()) == (name in data.groups)
        assert not any(isinstance(batch, TrainingBatch) for batch in batches)
    assert list(data.predict_dataloader()) == ["id", "near", "far"]
    assert torch.equal(next(iter(loaders["id"])).labels, torch.arange(7) % 4)


def test_without_held_out_images_there_is_nothing_to_validate_on():
    data = toy()
    assert data.val_dataloader() == []
    assert list(data.test_dataloader()) == ["id", "near", "far"]
    assert data.sizes["fit"] == 100


def test_held_out_images_are_neither_trained_nor_fitted_on():
    data = toy(val_split=0.2, batch_size=20)
    seen = {
        name: {image.numpy().tobytes() for batch in loader for image in batch.images}
        for name, loader in {
            "train": data.train_dataloader(),
            "fit": data.fit_dataloader(),
            "val": data.val_dataloader(),
        }.items()
    }
    assert seen["train"] == seen["fit"]
    assert len(seen["train"]) == 80
    assert len(seen["val"]) == 20
    assert not seen["train"] & seen["val"]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("feed", [None, "paired", "mixed"])
def test_training_batches_are_the_same_on_any_number_of_processes(monkeypatch, world_size, feed):
    data = toy(outlier_feed=feed, outlier_ratio=0.5, augmentation=Augmentation(crop_padding=1, flip=True))

    def epoch(rank, size):
        monkeypatch.setattr(plans, "rank_and_world_size", lambda: (rank, size))
        return [data.on_after_batch_transfer(batch, 0) for batch in data.train_dataloader()]

    whole = epoch(0, 1)
    shares = [epoch(rank, world_size) for rank in range(world_size)]
    for i, total in enumerate(whole):
        rows = {int(row): image for row, image in zip(total.ids, total.images, strict=True)}
        parts = [share[i] for share in shares]
        assert {len(part.ids) for part in parts} == {len(total.ids) // world_size}
        assert sorted(torch.cat([part.ids for part in parts]).tolist()) == sorted(rows)
        for part in parts:
            assert all(torch.equal(rows[int(row)], image) for row, image in zip(part.ids, part.images, strict=True))


def test_outlier_feeds():
    assert all((batch.labels >= 0).all() for batch in toy().train_dataloader())

    paired = list(toy(outlier_feed="paired", outlier_ratio=0.5).train_dataloader())
    assert len(paired) == 6
    assert {(int((b.labels >= 0).sum()), int((b.labels == -1).sum())) for b in paired} == {(16, 8)}

    data = toy(outlier_feed="mixed")
    mixed = list(data.train_dataloader())
    assert len(mixed) == 140 // 16
    for batch in (*paired, *mixed):
        assert torch.equal(batch.ids >= 100, batch.labels == -1)
        for image, row in zip(batch.images, batch.ids, strict=True):
            source = data.given.train.images if row < 100 else data.given.outliers.images
            assert torch.equal(image, source[row % 100])


def outliers_of(loader):
    return {int(row) - 100 for batch in loader for row in batch.ids[batch.labels < 0]}


def test_outliers_are_chosen_from_the_next_epoch_on():
    data = toy(outlier_feed="paired", drop_last=False)
    loader = data.train_dataloader()
    assert outliers_of(loader) == set(range(40))
    for rows in ([3, 7, 30], list(range(1, 40, 2))):
        data.choose_outliers(torch.tensor(rows))
        (first, *_), everything = loader, outliers_of(loader)
        assert everything == set(rows)
        assert (first.labels < 0).sum() == 16  # however few are chosen


@pytest.mark.parametrize("feed", [None, "mixed"])
def test_outliers_are_chosen_for_paired_batches_only(feed):
    data = toy(outlier_feed=feed)
    data.train_dataloader()
    with pytest.raises(ValueError, match=f"outliers are chosen for paired batches: outlier_feed is {feed!r}"):
        data.choose_outliers(torch.tensor([0]))


@pytest.mark.parametrize("final", [False, True])
def test_a_batch_looks_as_training_sees_it_in_an_epoch(final):
    data = toy(outlier_feed="paired", augmentation=Augmentation(crop_padding=2, flip=True), seed=9)
    data.sets["outliers"].final = final
    rows = torch.tensor([5, 60, 100, 139])
    batch = data.training_rows()[rows]
    expected = random_flip(random_crop(batch.images, 2, rows, 9, 7), rows, 9, 7)
    seen = data.augment(batch, 7)
    assert torch.equal(seen.images[:2], expected[:2])
    assert torch.equal(seen.images[2:], batch.images[2:] if final else expected[2:])
    assert not torch.equal(data.augment(batch, 8).images[:2], expected[:2])


def test_images_are_augmented_for_training_only():
    data = toy(
        augmentation=Augmentation(crop_padding=2, flip=True),
        seed=9,
        mean=[0.1, 0.2, 0.3],
        std=[0.5, 0.6, 0.7],
        val_split=0.2,
    )

    def normal(images):
        return functional.normalize(images.float() / 255, [0.1, 0.2, 0.3], [0.5, 0.6, 0.7])

    raw = next(iter(data.train_dataloader()))
    batch = data.on_after_batch_transfer(raw, 0)
    expected = random_flip(random_crop(raw.images, 2, raw.ids, 9, 0), raw.ids, 9, 0)
    assert type(batch) is Batch
    torch.testing.assert_close(batch.images, normal(expected))
    assert not torch.equal(expected, raw.images)

    data.fit_passes = 1
    for loader in (data.fit_dataloader(), data.val_dataloader(), *data.test_dataloader().values()):
        raw = next(iter(loader))
        torch.testing.assert_close(data.on_after_batch_transfer(raw, 0).images, normal(raw.images))


def test_without_constants_images_are_in_0_1_and_other_batches_pass():
    data = toy()
    batch = next(iter(data.fit_dataloader()))
    images = data.on_after_batch_transfer(batch, 0).images
    assert images.dtype == torch.float32
    torch.testing.assert_close(images, batch.images.float() / 255)
    for other in ({"x": torch.zeros(3)}, torch.zeros(2, dtype=torch.uint8)):
        assert data.on_after_batch_transfer(other, 0) is other


def test_images_of_floats_are_normalised_but_not_scaled():
    data = toy(mean=[0.5], std=[0.25])
    batch = Batch(torch.full((2, 3, 6, 6), 1.25), torch.zeros(2), torch.arange(2))
    assert (data.on_after_batch_transfer(batch, 0).images == 3).all()


def test_one_constant_stands_for_all_channels():
    data = toy(mean=[0.5], std=[0.25])
    batch = next(iter(data.fit_dataloader()))
    torch.testing.assert_close(data.on_after_batch_transfer(batch, 0).images, (batch.images / 255 - 0.5) / 0.25)


class Features(Dataset):
    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, rows):
        return {"features": rows.float().view(-1, 1), "ids": rows}


def test_other_rows_can_be_trained_on():
    data = toy(augmentation=Augmentation(crop_padding=2, flip=True))
    order = torch.cat([batch.ids for batch in data.train_dataloader()])
    data.serve(Features(100))
    batches = list(data.train_dataloader())
    assert torch.equal(torch.cat([batch["ids"] for batch in batches]), order)
    assert data.on_after_batch_transfer(batches[0], 0) is batches[0]

    data.serve(random_images(64, 8))
    assert len(data.train_dataloader()) == 4
    assert isinstance(next(iter(data.train_dataloader())), TrainingBatch)

    data = toy(outlier_feed="paired")
    data.serve(Features(110))  # as many as there are ID rows, and ten outliers
    ids = next(iter(data.train_dataloader()))["ids"]
    assert [(ids < 100).sum(), (ids >= 100).sum()] == [16, 16]
    data.serve(Features(100))
    with pytest.raises(ValueError, match="the set has 0"):
        data.train_dataloader()


def test_fit_limit_takes_sorted_rows():
    first, second = toy(fit_limit=10), toy(fit_limit=10, seed=5)
    assert first.sizes["fit"] == 10
    rows = first.sets["fit"].rows
    assert rows.tolist() == sorted(set(rows.tolist()))
    assert torch.equal(rows, second.sets["fit"].rows)
    assert not torch.equal(rows, toy(fit_limit=10, split_seed=5).sets["fit"].rows)
    assert toy(fit_limit=1000).sizes["fit"] == 100


def test_testing_needs_no_training_images():
    data = toy(replace(some_sets(), train=None, outliers=None))
    assert list(data.test_dataloader()) == ["id", "near", "far"]
    assert data.val_dataloader() == []
    data.fit_passes = 1
    for serve in (data.train_dataloader, data.fit_dataloader, data.test_dataloader):
        with pytest.raises(ValueError, match="Toy has no ID training images"):
            serve()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"num_workers": -1}, "num_workers must be at least 0"),
        ({"val_split": 1.0}, "0 <= val_split < 1, got 1.0"),
        ({"mean": [0.5]}, "mean and std belong together"),
        ({"mean": [0.5, 0.5], "std": [1.0]}, "mean has 2 values, the images have 3 channels"),
        ({"val_split": 0.01}, "of class 'a'"),
        ({"batch_size": 101}, "100 rows does not fill one batch of 101"),
    ],
)
def test_options_that_make_no_sense_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        toy(**options).train_dataloader()


def wrong_label():
    train = random_images(100, 0, source="train.npz")
    train.labels[17] = 4
    return {"train": train}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"outliers": None}, "outlier_feed='paired' needs outliers"),
        ({"train": None}, "val_split=0.1 holds out ID training images, but there are none"),
        ({"ood": {"fit": OODSet(random_images(3, 0))}}, "cannot be called fit"),
        (
            {"ood": {"svhn": OODSet(random_images(3, 0, (3, 6, 7), source="svhn.npz"))}},
            r"set ood svhn \(svhn.npz\) .* \(3, 6, 7\) .* set test \(test.npz\) of \(3, 6, 6\)",
        ),
        ({"outliers": random_images(3, 0, (1, 6, 6))}, r"set outliers .* \(1, 6, 6\)"),
        ({"outliers": random_images(0, 0)}, "set outliers .* has no images"),
        (wrong_label(), r"train.npz: label 4 in row 17 is not one of the 4 classes 0\.\.3"),
        ({"test": random_images(5, 0, source="test.npz").as_outliers()}, "test.npz: label -1 in row 0"),
    ],
)
def test_sets_that_do_not_go_together_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        toy(replace(some_sets(), **change), outlier_feed="paired", val_split=0.1)


def per_class(labels):
    return labels.unique(return_counts=True)[1].tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_processes_share_the_images_of_a_balanced_batch(monkeypatch, world_size):
    images = 12 // world_size
    data = toy(balanced=Balanced(3, 12), val_split=0.2, eval_batch_size=7, augmentation=Augmentation(flip=True))

    def epoch(rank, size):
        monkeypatch.setattr(plans, "rank_and_world_size", lambda: (rank, size))
        return list(data.train_dataloader())

    smaller = list(plans.BalancedPlan(data.sets["train"].labels, 3, images))
    for rank in range(world_size):
        batches = epoch(rank, world_size)
        assert len(batches) == len(data.train_dataloader()) == 79 // 36
        for batch, expected in zip(batches, smaller[rank::world_size], strict=False):
            assert isinstance(batch, TrainingBatch)
            assert per_class(batch.labels) == [images] * 3
            assert torch.equal(batch.ids, expected)
            assert torch.equal(batch.images, data.sets["train"][batch.ids].images)
    monkeypatch.undo()
    assert {len(batch.ids) for batch in data.val_dataloader()} == {7, 6}
    assert len(next(iter(toy(balanced=Balanced(3, 4)).fit_dataloader())).ids) == 16


@pytest.mark.parametrize("world_size", [1, 2])
def test_balanced_training_resumes_in_mid_epoch(monkeypatch, world_size):
    monkeypatch.setattr(plans, "rank_and_world_size", lambda: (world_size - 1, world_size))

    def loader():
        loader = toy(balanced=Balanced(2, 4 * world_size)).train_dataloader()
        loader.sampler.set_epoch(3)
        return loader

    whole = [batch.ids.tolist() for batch in loader()]
    assert len(whole) == 12 // world_size
    interrupted = loader()
    iterator = iter(interrupted)
    assert [next(iterator).ids.tolist() for _ in range(4)] == whole[:4]
    restored = loader()
    restored.load_state_dict(interrupted.state_dict())
    assert [batch.ids.tolist() for batch in restored] == whole[4:]


def test_served_rows_are_balanced_by_the_labels_of_the_training_images():
    data = toy(balanced=Balanced(3, 4))
    order = [batch.ids.tolist() for batch in data.train_dataloader()]
    assert order != [batch.ids.tolist() for batch in toy(balanced=Balanced(3, 4), seed=1).train_dataloader()]
    data.serve(Features(100))
    batches = [batch["ids"] for batch in data.train_dataloader()]
    assert [ids.tolist() for ids in batches] == order
    assert {tuple(per_class(data.sets["train"].labels[ids])) for ids in batches} == {(4, 4, 4)}
    data.serve(Features(110))
    with pytest.raises(ValueError, match=r"a row for each of the 100 ID training images, .*; 110 are served"):
        data.train_dataloader()


def test_balanced_batches_that_make_no_sense_are_errors():
    with pytest.raises(ValueError, match="no place for outliers: leave out outlier_feed='mixed'"):
        toy(balanced=Balanced(3, 4), outlier_feed="mixed")
    with pytest.raises(ValueError, match=r"classes_per_batch must be in 2\.\.4"):
        toy(balanced=Balanced(5, 4)).train_dataloader()


@pytest.mark.parametrize("world_size", [3, 4])
def test_processes_that_cannot_share_a_balanced_batch_are_an_error(monkeypatch, world_size):
    monkeypatch.setattr(plans, "rank_and_world_size", lambda: (0, world_size))
    with pytest.raises(ValueError, match=rf"over all devices together: 4 cannot be shared by {world_size} of them"):
        toy(balanced=Balanced(3, 4)).train_dataloader()


def folder_of(path, count, classes=4, size=(6, 6, 3)):
    names = [f"{row:02}.png" for row in range(count)]
    for name in names:
        draw(path / name, size)
    return FolderImages(path, names, torch.arange(count) % classes, Fit((3, *size[:2])))


def files_of(root, size=(6, 6, 3)):
    far, outliers = (folder_of(root / name, count, size=size) for name, count in (("far", 25), ("outliers", 40)))
    outliers.labels = torch.full((40,), -1)
    return Sets(
        train=folder_of(root / "train", 60, size=size),
        test=folder_of(root / "test", 30, size=size),
        ood={"far": OODSet(far), "memory": OODSet(random_images(20, 2, shape=(3, *size[:2])))},
        outliers=Rows(outliers, torch.arange(0, 40, 2)),
        classes=["a", "b", "c", "d"],
    )


@pytest.fixture
def decoded(monkeypatch):
    """The files that are decoded, one by one."""
    names, read_image = [], sets_of_images.read_image
    monkeypatch.setattr(Sets, "check", lambda sets, remedy: None)  # looks at the first image of each set

    def read(file, fit):
        names.append("/".join(file.parts[-2:]))
        return read_image(file, fit)

    monkeypatch.setattr(sets_of_images, "read_image", read)
    return names


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """The folder of decoded images."""
    monkeypatch.setenv("OOD_DATA", str(tmp_path / "root"))
    return tmp_path / "root" / ".packed"


def served(data):
    """Everything that a data module serves, by split, as bytes."""
    loaders = data.test_dataloader() | {"train": data.train_dataloader(), "fit": data.fit_dataloader()}
    batches = {name: list(loader) for name, loader in loaders.items()}
    return {name: [[part.numpy().tobytes() for part in batch] for batch in all_] for name, all_ in batches.items()}


OPTIONS = {
    "known": 3,
    "subset": Subset(fraction=0.8),
    "val_split": 0.25,
    "fit_limit": 20,
    "ood_subset": OODSubset("random", 10, repeats=2),
    "outlier_feed": "paired",
    "batch_size": 10,
}


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_small_images_are_decoded_once(tmp_path, kept, decoded, monkeypatch, num_workers):
    sets = files_of(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(datamodule, "SMALL", 5)
        plain = toy(sets, **OPTIONS)
    assert not kept.exists()
    assert decoded == []
    expected = served(plain)
    decoded.clear()

    random = torch.get_rng_state()
    first = toy(sets, num_workers=num_workers, **OPTIONS)
    assert torch.equal(torch.get_rng_state(), random)
    assert len(list(kept.glob("*.npy"))) == 5  # training and test images, of other classes, OOD set, outliers
    if not num_workers:
        used = {name: sum(each.startswith(name) for each in decoded) for name in ("train", "test", "far", "outliers")}
        assert used == {"train": 36, "test": 30, "far": plain.sizes["far"], "outliers": 20}
        assert len(decoded) == len(set(decoded))
    decoded.clear()
    again = toy(sets, num_workers=num_workers, **OPTIONS)
    for data in (first, again):
        assert served(data) == expected
        assert data.fingerprints == plain.fingerprints
        assert data.sizes == plain.sizes
        assert {name: images.source for name, images in data.sets.items()} == {
            name: images.source for name, images in plain.sets.items()
        }
    assert decoded == []


def test_large_images_stay_in_their_files(tmp_path, kept):
    data = toy(files_of(tmp_path, size=(4, 65, 3)))
    assert isinstance(data.sets["train"], FolderImages)
    assert not kept.exists()


def test_where_nothing_can_be_kept_images_are_decoded_each_time(tmp_path, kept, decoded):
    sets = files_of(tmp_path)
    kept.parent.write_text("not a folder")
    with pytest.warns(UserWarning, match=r"images are decoded each time .* cannot be kept in .*\.packed: ") as warned:
        data = toy(sets, outlier_feed="paired")
    assert len(warned) == 1
    assert len(decoded) == 110  # outliers and ID images, to compare them
    decoded.clear()
    list(data.test_dataloader()["id"])
    list(data.test_dataloader()["id"])
    assert len(decoded) == 60
