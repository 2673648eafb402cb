"""POEM's selection: which outliers an epoch trains on, what is remembered, and what a checkpoint brings back."""

from functools import partial

import numpy as np
import pytest
import torch
from pytorch_lightning import Callback, Trainer

from backbones.digits_net import DigitsNet
from callbacks.outlier_selection import OutlierSelection
from datamodules.augmentation import Augmentation
from datamodules.datamodule import OODDataModule
from datamodules.images import ArrayImages
from datamodules.sets import Sets
from lightning_modules.losses.outlier_exposure import EnergyMargins
from lightning_modules.outlier_exposure import OutlierExposure
from lightning_modules.samplers.thompson import ThompsonSampling

TRAIN, POOL, COUNT, BATCH = 24, 40, 10, 8
QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}


class Pixels(OODDataModule):
    def __init__(self, final=False, **options):
        defaults = {"outlier_feed": "paired", "eval_batch_size": 7, "mean": [0.5], "std": [0.5], "seed": 3}
        super().__init__(BATCH, **defaults | options)
        self.final = final

    def load(self):
        def images(length, seed):
            generator = torch.Generator().manual_seed(seed)
            pixels = torch.randint(0, 256, (length, 1, 8, 8), dtype=torch.uint8, generator=generator)
            return ArrayImages(pixels, torch.arange(length) % 3, str(seed))

        outliers = images(POOL, 1)
        outliers.final = self.final
        return Sets(images(TRAIN, 0), images(6, 2), {}, outliers, list("abc"))


class Watch(Callback):
    """Keeps the network as it is when an epoch begins, and what the epoch trained on."""

    def __init__(self):
        self.networks, self.seen = [], []

    def on_train_epoch_start(self, trainer, pl_module):
        self.networks.append({name: value.clone() for name, value in pl_module.backbone.state_dict().items()})
        self.seen.append(set())
        assert pl_module.training

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert (batch.labels < 0).sum() == BATCH // trainer.world_size
        self.seen[-1] |= set((batch.ids[batch.labels < 0] - TRAIN).tolist())


def train(epochs, selection=None, data=None, backbone=None, **options):
    torch.manual_seed(0)
    backbone = backbone or DigitsNet(num_classes=3)
    module = OutlierExposure(backbone, partial(torch.optim.SGD, lr=0.01), outlier_loss=EnergyMargins())
    selection, watch = selection or OutlierSelection(COUNT), Watch()
    callbacks = {"callbacks": [watch, selection], "enable_checkpointing": False}
    trainer = Trainer(max_epochs=epochs, use_distributed_sampler=False, **QUIET, **callbacks, **options)
    trainer.fit(module, datamodule=data or Pixels())
    return selection, watch, trainer.datamodule


def observe(network, data, rows, epoch):
    """Penultimate features of training rows as they look in an epoch, by a copy of the network in eval mode."""
    backbone = DigitsNet(num_classes=3)
    backbone.load_state_dict(network)
    batch = data.augment(data.training_rows()[rows], epoch)
    with torch.no_grad():
        images = (batch.images.float() / 255 - 0.5) / 0.5
        return backbone.eval().forward_intermediates(images, {"penultimate"})[1]["penultimate"].double().numpy()


def expected(network, data, chosen, epoch):
    """Choose by the book: repeat the ID images, invert, and take the nearest to the same draw."""
    sampling = ThompsonSampling()
    features = [observe(network, data, torch.arange(TRAIN), 0)] * len(chosen)
    features += [observe(network, data, TRAIN + rows, past) for past, rows in chosen.items()]
    outliers = torch.arange(len(chosen) * (TRAIN + COUNT)) >= len(chosen) * TRAIN
    features, targets = np.concatenate(features), sampling.targets(outliers, 3).numpy()
    precision = features.T @ features / 0.5 + np.eye(64) / 20
    mean = np.linalg.solve(precision, features.T @ targets / 0.5)
    noise = np.random.default_rng((3, 1, epoch)).standard_normal(64)
    boundary = mean + np.sqrt(20) * np.linalg.solve(np.linalg.cholesky(precision).T, noise)
    distances = np.abs(observe(network, data, TRAIN + torch.arange(POOL), epoch) @ boundary)
    return sorted(np.argsort(distances, kind="stable")[:COUNT].tolist())


AUGMENTED = Augmentation(crop_padding=2, flip=True)


@pytest.mark.parametrize("options", [{}, {"augmentation": AUGMENTED}, {"augmentation": AUGMENTED, "final": True}])
def test_an_epoch_has_the_outliers_nearest_to_the_boundary_that_the_last_epochs_teach(options):
    chosen, epochs = {}, 6

    class Kept(OutlierSelection):
        def on_train_epoch_start(self, trainer, pl_module):
            super().on_train_epoch_start(trainer, pl_module)
            chosen[trainer.current_epoch] = self.chosen[trainer.current_epoch]

    _, watch, data = train(epochs, Kept(COUNT), Pixels(**options))
    for epoch in range(epochs):
        assert watch.seen[epoch] == set(chosen[epoch].tolist())
    assert len({tuple(rows.tolist()) for rows in chosen.values()}) > 3
    for epoch in range(1, epochs):
        remembered = {past: chosen[past] for past in range(max(0, epoch - 4), epoch)}
        assert chosen[epoch].tolist() == expected(watch.networks[epoch], data, remembered, epoch)


def test_the_last_four_epochs_are_remembered_whole():
    selection, watch, _ = train(7)
    past = selection.state_dict()["chosen"]
    assert list(past) == [2, 3, 4, 5, 6]  # and the one that has just ended
    for epoch, rows in past.items():
        assert watch.seen[epoch] == set(rows.tolist())
        assert len(rows) == COUNT


def test_before_the_first_epoch_the_prior_chooses():
    selection, watch, data = train(1)
    boundary = ThompsonSampling().draw(None, 64, 3, 0).double().numpy()
    distances = np.abs(observe(watch.networks[0], data, TRAIN + torch.arange(POOL), 0) @ boundary)
    assert selection.chosen[0].tolist() == sorted(np.argsort(distances)[:COUNT].tolist())


def test_as_many_as_id_images_unless_told_otherwise():
    selection, watch, _ = train(1, OutlierSelection())
    assert len(selection.chosen[0]) == TRAIN
    assert len(watch.seen[0]) == TRAIN


def test_choosing_draws_nothing_from_the_global_random_state():
    states = []

    class Kept(OutlierSelection):
        def on_train_epoch_start(self, trainer, pl_module):
            before = torch.random.get_rng_state()
            super().on_train_epoch_start(trainer, pl_module)
            states.append(torch.equal(before, torch.random.get_rng_state()))

    train(2, Kept(COUNT))
    assert states == [True, True]


def test_statistics_of_batch_norm_do_not_see_the_pool():
    class Kept(OutlierSelection):
        def on_train_epoch_start(self, trainer, pl_module):
            before = {name: value.clone() for name, value in pl_module.state_dict().items()}
            super().on_train_epoch_start(trainer, pl_module)
            assert all(torch.equal(value, before[name]) for name, value in pl_module.state_dict().items())

    train(2, Kept(COUNT))


@pytest.mark.parametrize("feed", [None, "mixed"])
def test_other_feeds_are_refused(feed):
    with pytest.raises(ValueError, match=f"set outlier_feed of the data to paired, it is {feed!r}"):
        train(1, data=Pixels(outlier_feed=feed))


def test_a_pool_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="41 outliers are to be chosen, and the pool has 40"):
        train(1, OutlierSelection(41))


@pytest.mark.parametrize("options", [{"count": 0}, {"remembered": 0}])
def test_numbers_below_1_are_refused(options):
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        OutlierSelection(**options)
