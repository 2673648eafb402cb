"""A run that is resumed from any checkpoint ends with the weights of the run that was never interrupted."""

import pytest
import torch
from pytorch_lightning import LightningModule, Trainer
from pytorch_lightning.callbacks import ModelCheckpoint
from torch.nn import functional

from datamodules.augmentation import Augmentation, random_crop, random_flip
from datamodules.datamodule import OODDataModule
from datamodules.images import ArrayImages
from datamodules.sets import OODSet, Sets

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint.*"),
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
]


class Toy(OODDataModule):
    def load(self):
        def images(length, seed):
            pixels = torch.randint(
                0, 256, (length, 1, 5, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
            )
            return ArrayImages(pixels, torch.arange(length) % 2, str(seed))

        return Sets(images(42, 0), images(10, 1), {"far": OODSet(images(10, 2))}, images(9, 3), ["even", "odd"])


class Linear(LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(25, 2)
        torch.nn.init.zeros_(self.layer.weight)
        torch.nn.init.zeros_(self.layer.bias)
        self.seen, self.stages = [], set()

    def forward(self, batch):
        return self.layer(batch.images.flatten(1))

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, batch.ids.tolist(), batch.images.sum().item()))
        return functional.cross_entropy(self(batch), batch.labels, ignore_index=-1)

    def validation_step(self, batch, batch_idx):
        self.stages.add("validation")

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self.stages.add(dataloader_idx)

    def predict_step(self, batch, batch_idx, dataloader_idx=0):
        return batch.ids

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


def data(num_workers=0, val_split=0.2):
    return Toy(
        batch_size=8,
        num_workers=num_workers,
        val_split=val_split,
        augmentation=Augmentation(crop_padding=1, flip=True),
        mean=[0.5],
        std=[0.3],
        outlier_feed="paired",
    )


def trainer(folder=None, callbacks=(), **kwargs):
    options = {"max_epochs": 3, "accelerator": "cpu", "devices": 1, "logger": False, "enable_progress_bar": False}
    options |= {"enable_model_summary": False, "default_root_dir": folder, "enable_checkpointing": bool(callbacks)}
    return Trainer(callbacks=list(callbacks), **(options | kwargs))


def run(folder, ckpt_path=None, save=False, num_workers=0, val_split=0.2, **kwargs):
    saver = ModelCheckpoint(folder, "step{step}", auto_insert_metric_name=False, every_n_train_steps=1, save_top_k=-1)
    after = ModelCheckpoint(folder, "epoch{epoch}", auto_insert_metric_name=False, every_n_epochs=1, save_top_k=-1)
    module = Linear()
    torch.manual_seed(0 if save else 1)  # nothing may hang on the global state
    training = trainer(folder, (saver, after) if save else (), **kwargs)
    training.fit(module, datamodule=data(num_workers, val_split), ckpt_path=ckpt_path, weights_only=True)
    return module


def assert_same_end(resumed, whole):
    assert resumed.seen == whole.seen[len(whole.seen) - len(resumed.seen) :]
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


@pytest.mark.parametrize("options", [{}, {"val_split": 0.0}, {"limit_train_batches": 3}, {"val_check_interval": 2}])
def test_resume_from_every_checkpoint_is_exact(tmp_path, options):
    whole = run(tmp_path, save=True, **options)
    steps = 15 if "val_split" in options else 9 if "limit_train_batches" in options else 12
    assert len(whole.seen) == steps
    assert len({step[2][0] for step in whole.seen}) > 5
    for step in range(1, steps):
        resumed = run(tmp_path, tmp_path / f"step{step}.ckpt", **options)
        assert len(resumed.seen) == steps - step
        assert_same_end(resumed, whole)
    for epoch in range(2):
        resumed = run(tmp_path, tmp_path / f"epoch{epoch}.ckpt", **options)
        assert len(resumed.seen) == steps - steps // 3 * (epoch + 1)
        assert_same_end(resumed, whole)


def test_resume_is_exact_with_worker_processes(tmp_path):
    whole = run(tmp_path, save=True)
    assert_same_end(run(tmp_path, tmp_path / "step6.ckpt", num_workers=2), whole)
    assert (tmp_path / "step12.ckpt").exists()


def test_resume_is_exact_when_only_steps_are_counted(tmp_path):
    options = {"max_epochs": -1, "max_steps": 10}
    whole = run(tmp_path, save=True, **options)
    for step in (2, 6, 7):
        assert_same_end(run(tmp_path, tmp_path / f"step{step}.ckpt", **options), whole)


def test_augmentation_follows_the_epoch(tmp_path):
    class Recorder(Linear):
        def training_step(self, batch, batch_idx):
            images = served.train_dataloader().dataset[batch.ids].images
            for epoch in range(3):
                augmented = random_flip(random_crop(images, 1, batch.ids, 0, epoch), batch.ids, 0, epoch)
                matches = torch.allclose(batch.images, (augmented / 255 - 0.5) / 0.3)
                self.seen.append(matches == (epoch == self.current_epoch))
            return super().training_step(batch, batch_idx)

    module, served = Recorder(), data()
    trainer(tmp_path).fit(module, datamodule=served)
    assert [seen for seen in module.seen if isinstance(seen, bool)] == [True] * 36


def test_validation_is_skipped_where_nothing_is_held_out(tmp_path):
    assert run(tmp_path).stages == {"validation"}
    assert run(tmp_path, val_split=0.0).stages == set()


def test_lightning_tests_and_predicts():
    module, served = Linear(), data()
    served.fit_passes = 2
    trainer().test(module, datamodule=served, verbose=False)
    assert module.stages == {0, 1, 2, 3, 4}
    for given in ({"datamodule": served}, {"dataloaders": list(served.predict_dataloader().values())}):
        predictions = trainer().predict(module, **given)
        assert [torch.cat(batches).tolist() for batches in predictions] == [list(range(10))] * 2
