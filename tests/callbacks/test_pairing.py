"""Pairs of outliers and the nearest ID images: the right ones, found once, and served whatever the order of rows."""

import numpy as np
import pytest
import torch
from heatmap_toy import BATCH, KNOWN, OUTLIERS, Pixels, Planted, fit, make, planted
from pytorch_lightning import Trainer

import callbacks.pairing
from callbacks.cached_evidence import DeviceEvidence
from callbacks.frozen_features import FrozenFeatures
from callbacks.pairing import Pairing, TargetRows, read_partners, write_partners
from datamodules.images import ImageSet, sha256
from datamodules.sets import OODSet, Sets


def partners_by_hand():
    """Compare all bytes, among the ID images of a class where there are any."""
    known, unknown, classes, theirs = planted()
    known, unknown = (images.flatten(1).long().numpy() for images in (known, unknown))
    found = []
    for image, label in zip(unknown, theirs.tolist(), strict=True):
        candidates = np.flatnonzero(classes.numpy() == label)
        candidates = candidates if len(candidates) else np.arange(KNOWN)
        found.append(int(candidates[((known[candidates] - image) ** 2).sum(1).argmin()]))
    return found


def served(module):
    """Put what was trained on in the order of the rows."""
    order = torch.cat([batch.seen.ids for batch in module.batches]).argsort()
    return [torch.cat([get(batch) for batch in module.batches])[order] for get in PARTS]


PARTS = [
    lambda batch: batch.seen.ids,
    lambda batch: batch.images,
    lambda batch: batch.targets,
    lambda batch: batch.seen.labels,
    lambda batch: batch.inputs[0],
    lambda batch: batch.seen.evidence.features["penultimate"],
]


def test_the_images_are_planted_as_the_tests_need_them():
    _, _, classes, theirs = planted()
    assert theirs.tolist() != sorted(theirs.tolist())
    assert classes.tolist() != sorted(classes.tolist())
    assert set(theirs.tolist()) - set(classes.tolist()) == {4}
    data = Planted()
    data.setup()
    images = data.on_after_batch_transfer(data.training_rows()[torch.arange(KNOWN + OUTLIERS)], 0).images
    assert Pixels()(images).argmax(1).tolist() == [*classes.tolist(), *theirs.tolist()]
    assert not (data.sets["train"].labels == classes).any()


@pytest.mark.parametrize(
    ("options", "on_device"),
    [
        ({}, False),
        ({}, True),
        ({"seed": 5}, False),
        ({"batch_size": 7}, True),
        ({"batch_size": 130}, False),
        ({"num_workers": 1}, False),
    ],
)
def test_every_outlier_is_served_with_its_image_and_the_nearest_id_image(tmp_path, monkeypatch, options, on_device):
    looked_up, look_up = [], DeviceEvidence.look_up
    monkeypatch.setattr(DeviceEvidence, "look_up", lambda self, rows: looked_up.append(1) or look_up(self, rows))
    module, _, pairing = fit(tmp_path, data=Planted(**options), on_device=on_device)
    assert len(looked_up) == on_device * len(module.batches)
    known, unknown, classes, theirs = planted()
    expected = partners_by_hand()
    assert pairing.partners.tolist() == expected
    same = theirs < 4
    assert torch.equal(classes[expected][same], theirs[same])
    ids, images, targets, labels, inputs, features = served(module)
    assert ids.tolist() == list(range(KNOWN + OUTLIERS))
    assert torch.equal(images, torch.cat([known, unknown]))
    assert torch.equal(targets, torch.cat([known, known[expected]]))
    assert torch.equal(labels, torch.cat([module.trainer.datamodule.sets["train"].labels, torch.full((OUTLIERS,), -1)]))
    torch.testing.assert_close(inputs, images / 127.5 - 1, rtol=0, atol=1e-6)
    assert torch.equal(features, inputs.flatten(1))


def test_neither_labels_nor_all_images_nor_the_order_of_classes_would_have_given_these_pairs():
    known, unknown, _, theirs = planted()
    expected = torch.tensor(partners_by_hand())
    distances = torch.cdist(unknown.flatten(1).double(), known.flatten(1).double())
    anywhere = distances.argmin(1)
    by_labels = distances.masked_fill(Planted().load().train.labels != theirs[:, None], torch.inf).argmin(1)
    grouped = expected[theirs.argsort(stable=True)]
    for other in (anywhere, by_labels, grouped):
        assert (other != expected).sum() > OUTLIERS / 2


def rows_of(folder):
    _, data, pairing = fit(folder)
    features = next(callback for callback in data.trainer.callbacks if isinstance(callback, FrozenFeatures))
    return TargetRows(features.rows, data.training_rows(), KNOWN, pairing.partners)


@pytest.mark.parametrize("order", ["backwards", "outliers", "known", "repeated", "none"])
def test_rows_may_be_asked_for_in_any_order(tmp_path, order):
    rows = rows_of(tmp_path)
    asked = {
        "backwards": torch.arange(KNOWN + OUTLIERS).flip(0),
        "outliers": KNOWN + torch.randperm(OUTLIERS),
        "known": torch.randperm(KNOWN)[:20],
        "repeated": torch.tensor([91, 3, 91, 129, 3, 90]),
        "none": torch.arange(0),
    }[order]
    known, unknown, *_ = planted()
    everything = torch.cat([known, unknown])
    batch = rows[asked]
    assert torch.equal(batch.images, everything[asked])
    becomes = torch.tensor([*range(KNOWN), *partners_by_hand()])[asked]
    assert torch.equal(batch.targets, everything[becomes])
    for part in (batch.inputs, batch.seen):
        assert torch.equal(part[2], asked)
    assert torch.equal(batch.inputs[0], batch.images)
    assert len(rows) == KNOWN + OUTLIERS


def test_each_image_is_read_once_and_id_images_are_their_own_targets(tmp_path, monkeypatch):
    rows, seen = rows_of(tmp_path), []
    kind, read = type(rows.images), type(rows.images).read
    monkeypatch.setattr(kind, "read", lambda self, some: seen.extend(some.tolist()) or read(self, some))
    asked = torch.tensor([4, 95, 0, 110])
    batch = rows[asked]
    partners = partners_by_hand()
    assert sorted(seen) == sorted([4, 95, 0, 110, partners[5], partners[20]])
    assert torch.equal(batch.images[[0, 2]], batch.targets[[0, 2]])
    assert batch.images.data_ptr() != batch.targets.data_ptr()


@pytest.fixture
def searches(monkeypatch):
    calls, search = [], callbacks.pairing.nearest_of_class
    monkeypatch.setattr(callbacks.pairing, "nearest_of_class", lambda *args, **_: calls.append(1) or search(*args))
    return calls


def test_pairs_are_found_once_for_the_same_network_and_images(tmp_path, searches):
    for data in (Planted(), Planted(seed=1), Planted(batch_size=5)):
        _, _, pairing = fit(tmp_path, data=data)
        assert pairing.partners.tolist() == partners_by_hand()
    (path,) = tmp_path.glob("*/nearest.npz")
    assert (path.parent / "meta.json").exists()
    assert not list(tmp_path.glob("*/*.part"))
    assert searches == [1]
    fit(tmp_path, data=Planted(num_outliers=30))
    assert searches == [1, 1]
    other = Pixels()
    with torch.no_grad():
        other.fc.bias[1] = 1 / 64
    _, _, pairing = fit(tmp_path, make(other))
    assert searches == [1, 1, 1]
    assert pairing.partners.tolist() != partners_by_hand()
    assert len(list(tmp_path.glob("*/nearest.npz"))) == 3


DAMAGES = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-40]),
    "flipped": lambda path: path.write_bytes(bytes(x ^ (i == 200) for i, x in enumerate(path.read_bytes()))),
    "of another name": lambda path: np.savez(path, pairs=np.zeros(OUTLIERS, np.int64)),
    "too short": lambda path: np.savez(path, partners=np.zeros(OUTLIERS - 1, np.int64)),
    "of two columns": lambda path: np.savez(path, partners=np.zeros((OUTLIERS, 1), np.int64)),
    "of another type": lambda path: np.savez(path, partners=np.zeros(OUTLIERS, np.int32)),
    "too large": lambda path: np.savez(path, partners=np.full(OUTLIERS, KNOWN)),
    "negative": lambda path: np.savez(path, partners=np.full(OUTLIERS, -1)),
    "of objects": lambda path: np.savez(path, partners=np.array([None] * OUTLIERS)),
    "no numbers": lambda path: np.savez(path, partners=np.array(["one"] * OUTLIERS)),
    "a bare array": lambda path: np.lib.format.open_memmap(path, "w+", np.int64, (OUTLIERS,)).flush(),
}


def test_whatever_bit_is_flipped_pairs_are_right_or_none(tmp_path):
    path, partners = tmp_path / "nearest.npz", torch.tensor(partners_by_hand()[:4])
    write_partners(path, partners)
    whole = path.read_bytes()
    for place in range(len(whole)):
        for flipped in (1, 8, 64):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ flipped]) + whole[place + 1 :])
            found = read_partners(path, 4, KNOWN)
            assert found is None or torch.equal(found, partners)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_or_foreign_file_is_found_anew(tmp_path, searches, damage):
    fit(tmp_path)
    (path,) = tmp_path.glob("*/nearest.npz")
    DAMAGES[damage](path)
    for _ in range(2):
        _, _, pairing = fit(tmp_path)
        assert pairing.partners.tolist() == partners_by_hand()
    assert searches == [1, 1]


def test_shuffled_pairs_are_the_same_id_images_dealt_out_by_the_seed(tmp_path, searches):
    dealt = {}
    for seed in (0, 0, 1):
        module, _, pairing = fit(tmp_path, data=Planted(seed=seed), pairing="shuffled")
        partners = pairing.partners.tolist()
        assert dealt.setdefault(seed, partners) == partners
        assert sorted(partners) == sorted(partners_by_hand())
        _, _, targets, *_ = served(module)
        assert torch.equal(targets[KNOWN:], planted()[0][partners])
    assert dealt[0] != dealt[1]
    assert partners_by_hand() not in dealt.values()
    assert fit(tmp_path)[2].partners.tolist() == partners_by_hand()
    assert searches == [1]


@pytest.mark.parametrize("options", [{"num_outliers": 0}, {"outlier_feed": None}])
@pytest.mark.parametrize("pairing", ["nearest", "shuffled"])
def test_without_outliers_id_images_alone_are_trained_on(tmp_path, options, pairing):
    with pytest.warns(UserWarning, match="there are no outliers to pair: training sees ID images alone"):
        module, data, pairs = fit(tmp_path, data=Planted(**options), pairing=pairing)
    assert data.outlier_feed is None
    ids, images, targets, *_ = served(module)
    assert len(pairs.partners) == 0
    assert ids.tolist() == list(range(KNOWN))
    assert torch.equal(images, planted()[0])
    assert torch.equal(targets, images)


@pytest.mark.parametrize("order", [[Pairing], [Pairing, FrozenFeatures]])
def test_pairs_need_cached_features_before_them(tmp_path, order):
    made = [kind() if kind is Pairing else kind(folder=str(tmp_path)) for kind in order]
    trainer = Trainer(max_epochs=1, logger=False, accelerator="cpu", enable_checkpointing=False, callbacks=made)
    with pytest.raises(ValueError, match=r"list callbacks\.frozen_features\.FrozenFeatures before callbacks\.pairing"):
        trainer.fit(make(), Planted())


def test_an_epoch_takes_in_all_pairs_and_after_the_fit_images_are_served_again(tmp_path):
    module, data, _ = fit(tmp_path)
    assert [len(batch.images) for batch in module.batches] == [BATCH] * 8 + [2]
    assert torch.is_tensor(next(iter(data.train_dataloader())).images)


def drawn(**options):
    data = Planted(**options)
    data.setup()
    assert data.sizes["outliers"] == options["num_outliers"]
    outliers = data.sets["outliers"].read(torch.arange(options["num_outliers"])).flatten(1)
    everything = planted()[1].flatten(1).tolist()
    return [everything.index(image) for image in outliers.tolist()]


def test_which_outliers_are_drawn_is_up_to_the_split_seed():
    first = drawn(num_outliers=25)
    assert first == sorted(set(first))
    assert drawn(num_outliers=25, seed=7) == first
    assert drawn(num_outliers=25, split_seed=1) != first


class Unread(ImageSet):
    """Images that nobody reads; too large to be kept decoded."""

    shape = (3, 65, 65)

    def __init__(self, length, name):
        self.labels, self.source = torch.arange(length) % 10, name

    @property
    def digest(self):
        return sha256(self.source)

    def stamp(self):
        return self.source

    def read(self, rows):
        assert rows.tolist() == [0]  # as every set is looked at
        return torch.zeros(1, *self.shape, dtype=torch.uint8)


class Published(Planted):
    def __init__(self, known, outliers, **options):
        super().__init__(**options)
        self.given = known, outliers

    def load(self):
        known, outliers = self.given
        ood = {"far": OODSet(Unread(10, "far"))}
        return Sets(Unread(known, "train"), Unread(10, "id"), ood, Unread(outliers, "outliers"), list("abcdefghij"))


@pytest.mark.parametrize(
    ("known", "outliers", "number", "steps"), [(50_000, 300_000, 10_000, 300), (100_000, 1_803_460, 20_000, 600)]
)
def test_the_published_numbers_of_images_make_300_and_600_steps(known, outliers, number, steps):
    data = Published(known, outliers, num_outliers=number, batch_size=200)
    data.setup()
    assert len(data.training_rows()) == known + number
    loader = data.train_dataloader()
    assert len(loader) == steps
    rows = torch.cat(list(loader.sampler))
    assert len(rows) == len(rows.unique()) == known + number
