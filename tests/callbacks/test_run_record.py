import hashlib
import json
import logging
from types import SimpleNamespace

import pytest
import torch
import yaml
from pytorch_lightning import Trainer

from backbones.digits_net import DigitsNet
from callbacks.run_record import RunRecord, differences, prepare_folder, read_run
from datamodules.images import ArrayImages
from lightning_modules.classifier import Classifier

CONFIG = yaml.safe_dump({"model": {"lr": 0.1}, "seed_everything": 0})


def make_trainer(folder, train="a1"):
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=folder)
    fingerprints = {"train": train, "id": "b2", "outliers": "c3"}
    trainer.datamodule = SimpleNamespace(fingerprints=fingerprints, outlier_feed=None, mean=(0.5,), std=(0.25,))
    return trainer


def write_run(folder, status, config=CONFIG, last=True):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    (folder / "run.json").write_text(json.dumps({"status": status}))
    if last:
        (folder / "last.ckpt").touch()


def test_an_empty_folder_starts_anew(tmp_path):
    assert prepare_folder(tmp_path / "run", CONFIG, overwrite=False) is None


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_continues(tmp_path, status):
    write_run(tmp_path / "run", status)
    assert prepare_folder(tmp_path / "run", CONFIG, overwrite=False) == tmp_path / "run" / "last.ckpt"


def test_an_unfinished_run_without_a_checkpoint_starts_anew(tmp_path):
    write_run(tmp_path / "run", "running", last=False)
    assert prepare_folder(tmp_path / "run", CONFIG, overwrite=False) is None


def test_a_finished_run_is_refused_and_kept(tmp_path):
    write_run(tmp_path / "run", "finished")
    with pytest.raises(FileExistsError, match=r"finished run.*--overwrite"):
        prepare_folder(tmp_path / "run", CONFIG, overwrite=False)
    assert (tmp_path / "run" / "last.ckpt").is_file()


def test_an_unfinished_run_of_another_configuration_is_refused_with_the_difference(tmp_path):
    write_run(tmp_path / "run", "running")
    with pytest.raises(FileExistsError, match=r"model.lr: 0.1 there, 0.2 here"):
        prepare_folder(tmp_path / "run", CONFIG.replace("0.1", "0.2"), overwrite=False)


def test_overwrite_discards_the_run(tmp_path):
    write_run(tmp_path / "run", "finished")
    assert prepare_folder(tmp_path / "run", CONFIG, overwrite=True) is None
    assert not (tmp_path / "run").exists()
    trainer = make_trainer(tmp_path)
    record = RunRecord(tmp_path / "run", CONFIG)
    record.setup(trainer, None, "fit")
    assert (tmp_path / "run.replaced" / "last.ckpt").is_file()
    record.on_train_start(trainer, SimpleNamespace(device=torch.device("cpu")))
    record.teardown(trainer, None, "fit")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run" / "last.ckpt").exists()


def test_where_data_lie_and_how_they_are_read_makes_no_difference():
    old, new = ({"data": {"init_args": {"root": root, "num_workers": count}}} for root, count in (("a", 0), (None, 4)))
    assert differences(old, new) == ""


def test_differences_name_added_removed_and_changed_keys():
    text = differences({"a": 1, "b": {"c": 2}, "overwrite": True}, {"b": {"c": 3, "d": 4}, "overwrite": False})
    assert text.splitlines() == ["  a: 1 there, None here", "  b.c: 2 there, 3 here", "  b.d: None there, 4 here"]


def test_the_record_follows_a_run_that_breaks(tmp_path):
    handlers = list(logging.getLogger().handlers)
    record = RunRecord(tmp_path / "run", CONFIG)
    trainer = make_trainer(tmp_path)
    record.setup(trainer, None, "fit")
    assert read_run(tmp_path / "run")["status"] == "running"
    logging.getLogger("callbacks.run_record").setLevel(logging.INFO)
    try:
        raise RuntimeError("100% of the disk is on fire")
    except RuntimeError as error:
        record.on_exception(trainer, None, error)
    record.teardown(trainer, None, "fit")
    assert read_run(tmp_path / "run")["status"] == "failed"
    assert "100% of the disk is on fire" in (tmp_path / "run" / "log.txt").read_text()
    assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["model"] == {"lr": 0.1}
    assert logging.getLogger().handlers == handlers


def test_the_file_that_the_network_started_from_is_recorded(tmp_path):
    torch.save(DigitsNet(6).state_dict(), tmp_path / "net.pt")
    module = Classifier(DigitsNet(6, weights=str(tmp_path / "net.pt")), torch.optim.SGD)
    record = RunRecord(tmp_path / "run", CONFIG)
    trainer = make_trainer(tmp_path)
    record.setup(trainer, module, "fit")
    record.on_fit_start(trainer, module)
    record.teardown(trainer, module, "fit")
    digest = hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    expected = {"backbone": {"source": str(tmp_path / "net.pt"), "file": "net.pt", "sha256": digest}}
    assert read_run(tmp_path / "run")["weights"] == expected


def test_a_keyboard_interrupt_is_called_so(tmp_path):
    record = RunRecord(tmp_path / "run", CONFIG)
    trainer = make_trainer(tmp_path)
    record.setup(trainer, None, "fit")
    record.on_exception(trainer, None, KeyboardInterrupt())
    record.teardown(trainer, None, "fit")
    assert read_run(tmp_path / "run")["status"] == "interrupted"


def test_testing_a_run_leaves_its_configuration_alone(tmp_path):
    write_run(tmp_path / "run", "finished")
    trainer = make_trainer(tmp_path)
    record = RunRecord(tmp_path / "run", "model: other")
    record.setup(trainer, None, "test")
    record.teardown(trainer, None, "test")
    assert (tmp_path / "run" / "config.yaml").read_text() == CONFIG
    assert read_run(tmp_path / "run")["status"] == "finished"


def test_a_run_is_tested_on_the_images_it_was_fitted_on(tmp_path):
    record = RunRecord(tmp_path / "run", CONFIG)
    record.setup(make_trainer(tmp_path), None, "fit")
    record.teardown(make_trainer(tmp_path), None, "fit")
    for stage in ("test", "fit"):
        with pytest.raises(
            ValueError, match=r"not the data that the run .*\n.*fingerprints.train: 'a1' there, 'zz' here"
        ):
            record.setup(make_trainer(tmp_path, train="zz"), None, stage)
        record.teardown(make_trainer(tmp_path), None, stage)
        for option, value, message in (
            ("mean", (0.4,), r"mean: \[0.5\] there, \[0.4\] here"),
            ("outlier_feed", "mixed", "outlier_feed: None there, 'mixed' here"),
        ):
            trainer = make_trainer(tmp_path)
            setattr(trainer.datamodule, option, value)
            with pytest.raises(ValueError, match=message):
                record.setup(trainer, None, stage)
            record.teardown(trainer, None, stage)
    record.setup(make_trainer(tmp_path), None, "test")
    record.teardown(make_trainer(tmp_path), None, "test")


def test_outliers_that_are_also_other_images_are_reported_once_a_run(tmp_path, caplog):
    pixels = torch.randint(0, 256, (30, 3, 4, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows = {"train": range(10), "fit": range(10), "id": range(10, 20), "svhn": range(20, 30), "outliers": (3, 4, 12)}
    sets = {name: ArrayImages(pixels[[*r]], torch.zeros(len(r), dtype=torch.int64), name) for name, r in rows.items()}
    trainer = make_trainer(tmp_path)
    trainer.datamodule.outlier_feed, trainer.datamodule.sets = "mixed", sets
    trainer.datamodule.removed = {"calibration": 3}
    trainer.datamodule.sizes = {name: len(images) for name, images in sets.items()}
    record = RunRecord(tmp_path, CONFIG)
    with caplog.at_level(logging.WARNING):
        record.setup(trainer, None, "fit")
    record.teardown(trainer, None, "fit")
    assert read_run(tmp_path)["duplicates"] == {"train": 2, "id": 1}
    assert read_run(tmp_path)["removed"] == {"calibration": 3}
    assert "2 of the 3 outliers are also images of train" in caplog.text
    trainer.datamodule.sets = None
    RunRecord(tmp_path, CONFIG).setup(trainer, None, "fit")
    assert read_run(tmp_path)["duplicates"] == {"train": 2, "id": 1}


def test_a_folder_with_checkpoints_of_something_else_is_refused(tmp_path):
    (tmp_path / "best.ckpt").touch()
    with pytest.raises(FileExistsError, match="something else"):
        prepare_folder(tmp_path, CONFIG, overwrite=False)


def test_a_damaged_record_is_named(tmp_path):
    for content in ("", "{", "[]"):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match=r"run\.json is damaged"):
            prepare_folder(tmp_path, CONFIG, overwrite=False)
    (tmp_path / "run.json").write_text('{"status": "running"}')
    (tmp_path / "config.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match=r"config\.yaml is damaged"):
        prepare_folder(tmp_path, CONFIG, overwrite=False)


def start(folder, monkeypatch, clock):
    monkeypatch.setattr("callbacks.run_record.time.perf_counter", lambda: clock[0])
    record, trainer = RunRecord(folder, CONFIG), make_trainer(folder)
    record.setup(trainer, None, "fit")
    return record, trainer


def test_seconds_add_up_over_starts_and_say_what_they_lack(tmp_path, monkeypatch):
    clock = [100.0]
    record, trainer = start(tmp_path, monkeypatch, clock)
    clock[0] += 5
    record.on_train_epoch_end(trainer, None)
    clock[0] += 3  # killed here: nobody writes this down
    assert (read_run(tmp_path)["seconds"], read_run(tmp_path)["uncounted"]) == (5.0, 0)
    record.teardown(trainer, None, "fit")
    record, trainer = start(tmp_path, monkeypatch, clock)
    assert (read_run(tmp_path)["seconds"], read_run(tmp_path)["uncounted"]) == (5.0, 1)
    clock[0] += 2
    record.on_exception(trainer, None, KeyboardInterrupt())
    record, trainer = start(tmp_path, monkeypatch, clock)
    clock[0] += 1
    module = Classifier(DigitsNet(6), torch.optim.SGD)
    module.backbone.layer1.requires_grad_(False)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    trainer.strategy._optimizers = [torch.optim.SGD(trained, lr=0.1)]
    record.on_fit_end(trainer, module)
    record.teardown(trainer, module, "fit")
    stored = read_run(tmp_path)
    assert (stored["seconds"], stored["uncounted"]) == (8.0, 1)
    assert 0 < stored["trained_parameters"] == sum(parameter.numel() for parameter in trained)
    assert stored["trained_parameters"] < sum(parameter.numel() for parameter in module.parameters())


def test_the_starts_of_a_record_without_seconds_are_not_counted(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_text('{"status": "interrupted", "starts": ["a", "b"]}')
    record, trainer = start(tmp_path, monkeypatch, [0.0])
    record.teardown(trainer, None, "fit")
    assert (read_run(tmp_path)["seconds"], read_run(tmp_path)["uncounted"]) == (0.0, 2)
