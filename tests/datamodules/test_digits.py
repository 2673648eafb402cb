import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from datamodules.digits import Digits
from datamodules.splits import OODSubset, Subset


def digits(**kwargs):
    data = Digits(batch_size=32, **kwargs)
    data.setup()
    return data


def test_sets():
    data = digits(val_split=0.15)
    assert data.image_shape == (1, 8, 8)
    assert data.num_classes == 6
    assert data.classes == ["0", "1", "2", "3", "4", "5"]
    assert data.groups == {"unknown": "near", "photograph": "far", "noise": "far"}
    target = load_digits().target
    known = (target < 6).sum()
    assert data.sizes["unknown"] == pytest.approx(0.4 * (target >= 6).sum(), abs=2)
    assert data.sizes["train"] + data.sizes["calibration"] + data.sizes["id"] == known
    assert data.sizes["id"] == pytest.approx(0.4 * known, abs=3)
    assert data.sizes["calibration"] == pytest.approx(0.15 * 0.6 * known, abs=4)


def test_pixels_and_labels_are_those_of_scikit_learn():
    data = digits(known=4, ood=())
    reference = load_digits()
    pixels = {
        np.rint(image / 16 * 255).astype(np.uint8).tobytes(): digit
        for image, digit in zip(reference.images, reference.target, strict=True)
    }
    assert data.classes == ["0", "1", "2", "3"]
    for name in ("train", "id", "unknown"):
        images, labels, _ = data.sets[name][torch.arange(data.sizes[name])]
        truth = [pixels[image.numpy().tobytes()] for image in images]
        if name == "unknown":
            assert set(truth) == {4, 5, 6, 7, 8, 9}
            assert set(labels.tolist()) == {-1}
        else:
            assert truth == labels.tolist()
            assert images.max() == 255


def test_splits_are_disjoint_and_do_not_depend_on_the_training_seed():
    first, second = digits(seed=0, val_split=0.2), digits(seed=1, val_split=0.2)
    assert first.fingerprints == second.fingerprints
    other = digits(split_seed=1, val_split=0.2)
    assert not set(other.fingerprints.values()) & {first.fingerprints[name] for name in ("train", "calibration", "id")}
    train, test = (first.sets[name][torch.arange(first.sizes[name])].images for name in ("train", "id"))
    assert not {image.numpy().tobytes() for image in train} & {image.numpy().tobytes() for image in test}


def test_photographs_have_structure_and_differ():
    data = digits()
    for name in ("photograph", "outliers"):
        images = data.sets[name][torch.arange(data.sizes[name])].images.float()
        assert images.flatten(1).std(1).median() > 4
    assert data.fingerprints["photograph"] != data.fingerprints["outliers"]


def test_only_the_ood_sets_asked_for_are_served():
    assert list(digits(ood=("noise",)).test_dataloader()) == ["id", "unknown", "noise"]


@pytest.mark.parametrize("known", [10, 0, 12])
def test_known_digits_that_make_no_sense_are_an_error(known):
    with pytest.raises(ValueError, match=f"known={known}: .* it must be in 1..9"):
        digits(known=known)


def test_all_digits_are_known_where_none_are_unknown():
    data = digits(known=None)
    assert data.num_classes == 10
    assert list(data.groups) == ["photograph", "noise"]


def test_unknown_ood_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no OOD set svhn; it has: photograph, noise"):
        Digits(ood=("svhn", "noise"), batch_size=8)


def test_subsets_do_not_depend_on_the_training_seed():
    options = {"subset": Subset(fraction=0.5, num_labels=8), "ood_subset": OODSubset("random", 50, 2)}
    first, second = (digits(seed=seed, **options) for seed in (0, 1))
    assert first.fingerprints == second.fingerprints
    assert first.classes == second.classes
    other = digits(split_seed=1, **options)
    assert not set(first.fingerprints.values()) & {
        other.fingerprints[name] for name in ("train", "photograph", "noise")
    }
