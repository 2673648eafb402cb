"""Cached features: equal to computed ones, and never stale."""

import pickle
from pathlib import Path

import pytest
import torch
from frozen_toy import OUTLIERS, TRAIN, Net, Pixels, Toy, experiment
from pytorch_lightning import Trainer

from callbacks.cached_evidence import CachedEvidence
from callbacks.feature_cache import CHUNK
from callbacks.frozen_features import PROBES, FrozenFeatures
from datamodules.augmentation import Augmentation
from datamodules.batch import Batch
from datamodules.plans import Balanced
from experiments.__main__ import main
from lightning_modules.evidence import EvidenceBatch, observe

ROOT = Path(__file__).resolve().parent.parent.parent
EPOCHS = 2
pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),  # nothing is held out
]


@pytest.fixture
def fit(tmp_path):
    """Train a toy from the cache, or without it, and return module, data and callback."""

    def run(cached=True, module=None, data=None, options=None, **callback):
        options = {"max_epochs": EPOCHS, "num_sanity_val_steps": 0, "accelerator": "cpu"} | (options or {})
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        extractor = FrozenFeatures(**({"folder": str(tmp_path / "features")} | callback))
        module, data = module or Toy(), data or Pixels()
        torch.manual_seed(0)
        callbacks = [extractor] if cached else []
        Trainer(callbacks=callbacks, enable_model_summary=False, **quiet, **options).fit(module, data)
        return module, data, extractor

    return run


def folders(tmp_path):
    return {path.name for path in (tmp_path / "features").iterdir()}


def on_the_fly(module, data, ids):
    batch = data.on_after_batch_transfer(data.training_rows()[ids], 0)
    with torch.no_grad():
        return observe(module.backbone.float(), batch.images.float(), ["penultimate", "layer2"])


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-6), ("float16", 1e-3)])
@pytest.mark.parametrize("feed", [None, "paired", "mixed"])
def test_what_is_served_is_what_the_network_sees(fit, dtype, tolerance, feed):
    module, data, _ = fit(data=Pixels(outlier_feed=feed), dtype=dtype)
    data.trainer = None
    ids = torch.cat([batch.ids for batch in module.batches])
    assert len(ids.unique()) == TRAIN + (0 if feed is None else OUTLIERS)
    if feed == "paired":
        assert all(len(batch.ids) == 200 and (batch.labels < 0).sum() == 100 for batch in module.batches)
    for batch in module.batches:
        assert isinstance(batch, EvidenceBatch)
        assert torch.equal(batch.labels, torch.where(batch.ids < TRAIN, batch.ids % 3, -1))
        expected = on_the_fly(module, data, batch.ids)
        assert batch.evidence.features.keys() == expected.features.keys()
        served = {"logits": batch.evidence.logits, **batch.evidence.features}
        for name, values in {"logits": expected.logits, **expected.features}.items():
            assert served[name].dtype == torch.float32
            torch.testing.assert_close(served[name], values, rtol=tolerance, atol=tolerance)
        assert batch.evidence.scores == {}
        assert batch.evidence.maps is None


@pytest.mark.parametrize(("precision", "served"), [("bf16-mixed", torch.float32), ("64-true", torch.float64)])
@pytest.mark.parametrize("on_device", [False, True])
def test_features_come_in_the_precision_of_the_trainer(fit, precision, served, on_device):
    module, data, _ = fit(options={"precision": precision}, on_device=on_device)
    data.trainer = None
    batch = module.batches[3]
    expected = on_the_fly(module, data, batch.ids).features["penultimate"]
    found = batch.evidence.features["penultimate"]
    assert found.dtype == served
    tolerance = 0.02 if precision == "bf16-mixed" else 1e-6
    torch.testing.assert_close(found.float(), expected, rtol=tolerance, atol=tolerance)
    assert torch.equal(found.float(), expected) == (precision != "bf16-mixed") or precision == "64-true"


def test_training_equals_that_on_images(fit):
    cached, plain = fit()[0], fit(cached=False, module=Toy().train())[0]
    assert [batch.ids.tolist() for batch in cached.batches] == [batch.ids.tolist() for batch in plain.batches]
    torch.testing.assert_close(cached.classifier.weight, plain.classifier.weight, rtol=1e-4, atol=1e-6)
    assert cached.classifier.weight.abs().max() > 0.001


@pytest.mark.parametrize("options", [{}, {"on_device": True}, {"data": {"num_workers": 2}}])
def test_training_is_the_same_whether_features_were_there_or_not(fit, options):
    data = options.pop("data", {})
    first, _, _ = fit()
    weight = first.classifier.weight
    assert torch.equal(fit(**options, data=Pixels(**data))[0].classifier.weight, weight)


def test_the_network_runs_once_for_each_image(fit):
    module, _, _ = fit(data=Pixels(outlier_feed="mixed"))
    assert sum(module.seen) == PROBES + TRAIN + OUTLIERS
    again, _, _ = fit(data=Pixels(outlier_feed="mixed"))
    assert again.seen == [PROBES]


def test_frozen_parts_and_modes_stay_as_they_were(fit):
    before = {name: value.clone() for name, value in Net().state_dict().items()}
    module, _, _ = fit()
    assert all(torch.equal(value, before[name]) for name, value in module.backbone.state_dict().items())
    assert module.training
    assert not module.backbone.training


def other_weights():
    network = Net()
    with torch.no_grad():
        network.fc.bias[0] += 1e-3
    return network


def other_structure():
    network = Net()
    network.layer1[2] = torch.nn.LeakyReLU()
    return network


def other_constants():
    network = Net()
    network.register_buffer("scale", torch.ones(1), persistent=False)
    return network


OTHERS = {
    "weights": {"module": lambda: Toy(other_weights())},
    "structure": {"module": lambda: Toy(other_structure())},
    "constants": {"module": lambda: Toy(other_constants())},
    "taps": {"module": lambda: Toy(cached=["penultimate"])},
    "mean": {"data": lambda: Pixels(mean=[0.4])},
    "std": {"data": lambda: Pixels(std=[0.5])},
    "images": {"data": lambda: Pixels(train=2400)},
    "held out": {"data": lambda: Pixels(val_split=0.1)},
    "split": {"data": lambda: Pixels(val_split=0.1, split_seed=1)},
    "outliers": {"data": lambda: Pixels(outlier_feed="mixed")},
    "dtype": {"dtype": lambda: "float16"},
    "precision": {"options": lambda: {"precision": "bf16-mixed", "max_epochs": 0}},
}


def test_another_network_other_images_another_form_have_another_cache(fit, tmp_path):
    found = set()
    for make in ({}, *OTHERS.values()):
        arguments = {"options": {"max_epochs": 0}} | {name: value() for name, value in make.items()}
        _, _, extractor = fit(**arguments)
        found.add(extractor.cache.folder.name)
    assert len(found) == len(OTHERS) + 1
    assert folders(tmp_path) == found


def test_seeds_and_batches_share_a_cache(fit, tmp_path):
    fit()
    for data in (Pixels(seed=1), Pixels(batch_size=50), Pixels(eval_batch_size=7), Pixels(num_workers=1)):
        module, _, _ = fit(data=data, options={"max_epochs": 1})
        assert module.seen == [PROBES]
    module, _, _ = fit(data=Pixels(balanced=Balanced(3, 10)), options={"max_epochs": 1}, on_device=True)
    assert module.seen == [PROBES]
    assert module.batches[0].labels.bincount().tolist() == [10, 10, 10]
    assert len(folders(tmp_path)) == 1


def test_only_a_damaged_chunk_is_extracted_again(fit):
    first, _, extractor = fit()
    path = extractor.cache.folder / "features.layer2.npy"
    whole = path.read_bytes()
    content = bytearray(whole)
    content[len(content) - 10] ^= 4
    path.write_bytes(content)
    again, _, _ = fit()
    assert sum(again.seen) == PROBES + TRAIN - 2 * CHUNK
    assert path.read_bytes() == whole
    path.write_bytes(whole[: len(whole) // 2])
    third, _, _ = fit()
    assert sum(third.seen) == PROBES + TRAIN - CHUNK
    assert path.read_bytes() == whole
    assert torch.equal(third.classifier.weight, first.classifier.weight)


def test_changed_code_is_found(fit, monkeypatch):
    fit()
    stem = Net.stem
    monkeypatch.setattr(Net, "stem", lambda self, images: stem(self, images.abs()))
    with pytest.raises(ValueError, match=r"not what the network sees .* code must have changed\. Remove the folder"):
        fit()


def test_changed_code_adds_nothing_to_a_cache(fit, monkeypatch):
    """Not even where what is missing holds none of the images that are compared."""
    _, _, extractor = fit()
    cache = extractor.cache
    contents = {path.name: path.read_bytes() for path in cache.folder.glob("*.npy")}
    path = cache.folder / "features.layer2.npy"
    damaged = bytearray(contents[path.name])
    damaged[-10] ^= 4  # in the last chunk
    path.write_bytes(damaged)
    stem = Net.stem
    with monkeypatch.context() as patch:
        patch.setattr(Net, "stem", lambda self, images: stem(self, images) * 1.01)
        with pytest.raises(ValueError, match="code must have changed"):
            fit()
    assert path.read_bytes() == damaged
    fit()
    assert {path.name: path.read_bytes() for path in cache.folder.glob("*.npy")} == contents


def test_what_is_no_number_is_not_cached(fit, monkeypatch):
    stem = Net.stem
    monkeypatch.setattr(Net, "stem", lambda self, images: stem(self, images) * torch.nan)
    with pytest.raises(ValueError, match="is not a number for some images"):
        fit()


def test_scores_and_maps_of_encode_are_refused(fit, monkeypatch):
    encode = Toy.encode
    monkeypatch.setattr(Toy, "encode", lambda self, images: encode(self, images)._replace(scores={"s": images}))
    with pytest.raises(ValueError, match="only logits and features are cached"):
        fit()


def test_after_the_fit_images_are_served_again(fit):
    _, data, _ = fit()
    assert isinstance(next(iter(data.train_dataloader())), Batch)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: {"data": Pixels(augmentation=Augmentation(flip=True))}, ValueError, "as they are: leave out Augment"),
        (lambda: {"data": Pixels(num_workers=1), "on_device": True}, ValueError, "take num_workers 0, or on_device f"),
        (lambda: {"module": type("Free", (Toy,), {"frozen": ()})()}, ValueError, "Free keeps nothing frozen"),
        (lambda: {"module": type("Mute", (Toy,), {"encode": super(Toy, Toy).encode})()}, TypeError, "Mute has nothing"),
    ],
)
def test_experiments_that_cannot_be_cached_are_refused(fit, tmp_path, make, error, message):
    with pytest.raises(error, match=message):
        fit(**make())
    assert not (tmp_path / "features").exists()


def test_what_float16_cannot_hold_is_refused(fit):
    network = Net()
    with torch.no_grad():
        network.fc.bias[0] = 70_000
    with pytest.raises(ValueError, match=r"logits reaches 70\d\d\d.*, float16 only 65504: cache it as float32"):
        fit(module=Toy(network), dtype="float16")
    fit(module=Toy(network))


def test_rows_that_go_to_a_worker_leave_the_arrays_behind(fit):
    _, data, extractor = fit()
    rows = CachedEvidence(extractor.cache, data.training_rows().labels)
    ids = torch.tensor([5, 2499, 5])
    received = pickle.loads(text := pickle.dumps(rows))
    assert len(text) < rows.cache.nbytes / 10
    assert torch.equal(received[ids].evidence.logits, rows[ids].evidence.logits)


def test_the_verb_says_what_it_did_and_leaves_no_run(checkpoints, tmp_path, capsys):
    config = str(experiment(tmp_path))
    arguments = ["--experiment", "tests/toy", "--config", config]
    assert main(["features", *arguments]) == 0
    (folder,) = (checkpoints / "features").iterdir()
    expected = f"{folder}: 2,500 rows of features.layer2, features.penultimate, logits, {TRAIN * 131 * 4:,} bytes\n"
    assert capsys.readouterr().out == expected
    assert [path.name for path in checkpoints.iterdir()] == ["features"]
    before = {path.name: path.stat().st_mtime_ns for path in folder.glob("features*")}
    assert main(["fit", *arguments]) == 0
    assert {path.name: path.stat().st_mtime_ns for path in folder.glob("features*")} == before


def test_the_verb_refuses_an_experiment_without_cached_features(checkpoints, capsys):
    assert main(["features", "--config", str(ROOT / "experiments" / "classifier" / "digits.yaml")]) == 2
    assert "this experiment caches no features" in capsys.readouterr().err
    assert not checkpoints.exists()
