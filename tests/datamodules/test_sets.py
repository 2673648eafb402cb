from dataclasses import replace

import pytest
import torch

from datamodules.images import ArrayImages
from datamodules.sets import OODSet, Sets
from datamodules.splits import Subset


def images(labels, seed=0, source="somewhere"):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (len(labels), 3, 4, 4), dtype=torch.uint8, generator=generator)
    return ArrayImages(pixels, torch.tensor(labels), source)


def five_classes():
    return Sets(
        train=images([0, 1, 2, 3, 4] * 20),
        test=images([4, 3, 2, 1, 0] * 6, 1),
        ood={"svhn": OODSet(images([-1] * 7, 2))},
        outliers=None,
        classes=["a", "b", "c", "d", "e"],
    )


def test_the_other_classes_of_an_open_set_are_unknown():
    whole = five_classes()
    sets = whole.open(3)
    assert sets.classes == ["a", "b", "c"]
    assert sets.train.labels.tolist() == [0, 1, 2] * 20
    assert sets.test.labels.tolist() == [2, 1, 0] * 6
    assert list(sets.ood) == ["unknown", "svhn"]
    unknown = sets.ood["unknown"]
    assert unknown.group == "near"
    rows = torch.tensor([row for row, label in enumerate(whole.test.labels.tolist()) if label >= 3])
    assert torch.equal(unknown.images.read(torch.arange(len(unknown.images))), whole.test.read(rows))
    known = torch.tensor([row for row, label in enumerate(whole.train.labels.tolist()) if label < 3])
    assert torch.equal(sets.train.read(torch.arange(60)), whole.train.read(known))


def test_an_open_set_without_training_images():
    assert replace(five_classes(), train=None).open(2).train is None


def test_unknown_is_taken():
    sets = five_classes()
    sets.ood["unknown"] = sets.ood["svhn"]
    with pytest.raises(ValueError, match="unknown is the OOD set of the other classes"):
        sets.open(2)


def test_a_subset_of_the_labels_drops_the_others_everywhere():
    sets = five_classes().subset(Subset(num_labels=3), seed=1)
    assert len(sets.classes) == 3
    assert sets.classes == sorted(sets.classes)
    assert sets.train.labels.bincount().tolist() == [20, 20, 20]
    assert sets.test.labels.bincount().tolist() == [6, 6, 6]
    assert list(sets.ood) == ["svhn"]
    original = five_classes()
    for kept, whole in ((sets.train, original.train), (sets.test, original.test)):
        names = [original.classes[label] for label in whole.labels.tolist()]
        rows = torch.tensor([row for row, name in enumerate(names) if name in sets.classes])
        assert torch.equal(kept.read(torch.arange(len(kept))), whole.read(rows))
        assert [sets.classes[label] for label in kept.labels.tolist()] == [names[row] for row in rows.tolist()]


def test_a_fraction_is_stratified_and_leaves_the_test_images():
    sets = five_classes().subset(Subset(fraction=0.25), seed=0)
    assert sets.train.labels.bincount().tolist() == [5] * 5
    assert len(sets.test) == 30
    whole = {image.numpy().tobytes() for image in five_classes().train.images}
    some = {image.numpy().tobytes() for image in sets.train.read(torch.arange(25))}
    assert len(some & whole) == 25
    other = five_classes().subset(Subset(fraction=0.25), seed=1)
    assert other.train.fingerprint() != sets.train.fingerprint()
    with pytest.raises(ValueError, match="there are none"):
        replace(five_classes(), train=None).subset(Subset(fraction=0.5), 0)


def test_fraction_and_labels_go_together():
    sets = five_classes().subset(Subset(fraction=0.5, num_labels=2), seed=0)
    assert sets.train.labels.bincount().tolist() == [10, 10]


def test_everything_is_the_default():
    assert five_classes().subset(Subset(), 0).train.fingerprint() == five_classes().train.fingerprint()


def test_outliers_of_the_origin_of_an_ood_set_are_refused():
    sets = five_classes()
    sets.outliers = images([-1] * 5, 3, source="places365_train")
    sets.outliers.origin, sets.ood["svhn"].images.origin = "Places", "SVHN"
    sets.check()
    sets.ood["places"] = OODSet(images([-1] * 5, 4))
    sets.ood["places"].images.origin = "Places"
    with pytest.raises(ValueError, match=r"\(places365_train\) and the OOD set places are both taken from Places"):
        sets.check()
    sets.outliers.origin = sets.ood["places"].images.origin = ""
    sets.check()


def test_the_origin_survives_a_choice_of_rows():
    sets = five_classes()
    sets.test.origin = "SVHN"
    assert sets.open(2).test.origin == "SVHN"
    assert sets.test.as_outliers().origin == "SVHN"
