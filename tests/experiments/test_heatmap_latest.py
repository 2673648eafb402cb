"""The newest run is found by what its configuration says, whatever its folder is called."""

import json
import os

import pytest
import yaml

from experiments.__main__ import main
from experiments.heatmap_latest import Setting, find_latest

RESNET = Setting("cifar10", "ResNet", 18, None, 1)
WRN = Setting("cifar10", "HeatmapWideResNet", 40, 2, 1)
TIMES = {"old": "2026-01-01T10:00:00+0000", "new": "2026-01-01T10:30:00+0100", "newest": "2026-01-01T10:00:01+0000"}


def write(folder, setting=RESNET, ended=TIMES["old"], status="finished", version=None, **network):
    """Write a run as training leaves it."""
    folder.mkdir(parents=True)
    name, version = {"cifar10": ("CIFAR", 10), "cifar100": ("CIFAR", 100)}.get(setting.data, (setting.data, version))
    options = {"depth": setting.depth, "widen_factor": setting.width}
    network = {"num_classes": 10} | {key: value for key, value in options.items() if value is not None} | network
    model = {"backbone": {"class_path": f"backbones.any.{setting.architecture}", "init_args": network}}
    if setting.layers is not None:
        model["fw_layers"] = setting.layers
    data = {"batch_size": 200} | ({} if version is None else {"version": version})
    config = {
        "model": {"class_path": "lightning_modules.heatmap.Heatmap", "init_args": model},
        "data": {"class_path": f"datamodules.public.{name}", "init_args": data},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "last.ckpt").touch()
    if status is not None:
        (folder / "run.json").write_text(json.dumps({"status": status, "ended": ended}))
    return folder


@pytest.mark.parametrize("field", Setting._fields)
@pytest.mark.parametrize("run", [RESNET, WRN])
def test_each_field_must_agree(tmp_path, run, field):
    folder = write(tmp_path / "setting" / "seed0", run)
    assert find_latest(tmp_path, run) == folder
    other = {"data": "cifar100", "architecture": "Other", "depth": 50, "width": 10, "layers": 4}[field]
    with pytest.raises(FileNotFoundError):
        find_latest(tmp_path, run._replace(**{field: other}))
    if run._asdict()[field] is not None and field in ("depth", "width"):
        with pytest.raises(FileNotFoundError):  # unset is not anything
            find_latest(tmp_path, run._replace(**{field: None}))


@pytest.mark.parametrize("other", [{"depth": "18"}, {"depth": 18.0}, {"layers": "1"}, {"layers": True}])
def test_types_must_agree_too(tmp_path, other):
    write(tmp_path / "setting" / "seed0", RESNET._replace(**other))
    with pytest.raises(FileNotFoundError):
        find_latest(tmp_path, RESNET)


@pytest.mark.parametrize("ended", [5, "yesterday", None, []])
def test_where_the_record_tells_no_time_the_checkpoint_does(tmp_path, ended):
    old, new = write(tmp_path / "a" / "old"), write(tmp_path / "a" / "new", ended=ended)
    os.utime(new / "last.ckpt", (4e9, 4e9))
    assert find_latest(tmp_path, RESNET) == new
    os.utime(new / "last.ckpt", (1, 1))
    assert find_latest(tmp_path, RESNET) == old


def test_a_run_that_is_about_to_be_overwritten_is_none_and_folders_inside_are_none(tmp_path):
    write(tmp_path / "a" / "seed0.replaced", ended=TIMES["newest"])
    write(tmp_path / "a" / "seed0" / "inside", ended=TIMES["newest"])
    with pytest.raises(FileNotFoundError):
        find_latest(tmp_path, RESNET)


def test_runs_of_cifar100_are_no_runs_of_cifar10(tmp_path):
    write(tmp_path / "cifar10_resnet18" / "seed0", RESNET._replace(data="cifar100"))
    with pytest.raises(FileNotFoundError):
        find_latest(tmp_path, RESNET)


def test_more_layers_or_another_width_never_win(tmp_path):
    mine = write(tmp_path / "a" / "seed0", WRN)
    for i, other in enumerate([WRN._replace(layers=4), WRN._replace(width=4), WRN._replace(depth=28), RESNET]):
        write(tmp_path / "z" / f"seed{i}", other, TIMES["newest"])
    assert find_latest(tmp_path, WRN) == mine


@pytest.mark.parametrize("names", [("a/a", "z/z", "m/m"), ("z/z", "a/a", "m/m"), ("m/seed2", "m/seed10", "m/seed1")])
def test_the_newest_wins_whatever_the_folders_are_called(tmp_path, names):
    folders = [write(tmp_path / name, ended=ended) for name, ended in zip(names, TIMES.values(), strict=True)]
    assert find_latest(tmp_path, RESNET) == folders[-1]


def test_without_a_record_the_checkpoint_tells_the_time(tmp_path):
    folders = [write(tmp_path / "setting" / name, status=None) for name in ("b", "c", "a")]
    for folder, time in zip(folders, (5, 7, 6), strict=True):
        os.utime(folder / "last.ckpt", (time, time))
    assert find_latest(tmp_path, RESNET) == folders[1]
    (folders[2] / "run.json").write_text("{")  # damaged
    os.utime(folders[2] / "last.ckpt", (8, 8))
    assert find_latest(tmp_path, RESNET) == folders[2]


def test_strays_and_unfinished_and_unreadable_runs_are_passed_over(tmp_path):
    mine = write(tmp_path / "a" / "seed0")
    (tmp_path / "stray").touch()
    (tmp_path / "a" / "stray").touch()
    (tmp_path / "empty" / "seed0").mkdir(parents=True)
    for status in ("running", "interrupted", "failed"):
        write(tmp_path / "z" / status, ended=TIMES["newest"], status=status)
    (write(tmp_path / "z" / "without_checkpoint", ended=TIMES["newest"]) / "last.ckpt").unlink()
    (write(tmp_path / "z" / "without_config", ended=TIMES["newest"]) / "config.yaml").unlink()
    for i, text in enumerate(["{", "just text", "model: 1", "- 1", "", "\0"]):
        (write(tmp_path / "y" / f"{i}", ended=TIMES["newest"]) / "config.yaml").write_text(text)
    assert find_latest(tmp_path, RESNET) == mine


def test_where_there_is_none_the_error_names_what_was_asked_for(tmp_path):
    message = "no finished run with data=cifar10, architecture=HeatmapWideResNet, depth=40, width=2, layers=1 in "
    with pytest.raises(FileNotFoundError, match=message + str(tmp_path)):
        find_latest(tmp_path, WRN)


def test_own_data_are_told_by_their_files(tmp_path):
    folder = write(tmp_path / "own" / "seed0")
    config = yaml.safe_load((folder / "config.yaml").read_text())
    for train in ("mine/train.npz", {"path": "mine/train.npz", "limit": None}):
        config["data"] = {"class_path": "datamodules.arrays.Arrays", "init_args": {"train": train}}
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        assert find_latest(tmp_path, RESNET._replace(data="mine/train.npz")) == folder
    config["data"] = {"class_path": "datamodules.public.TinyImageNet", "init_args": {"train": True}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert find_latest(tmp_path, RESNET._replace(data="tinyimagenet")) == folder


def test_the_command_prints_the_folder(checkpoints, capsys):
    folder = write(checkpoints / "heatmap" / "wide" / "seed3", WRN)
    command = ["heatmap-latest", "--data", "cifar10", "--architecture", "HeatmapWideResNet"]
    assert main([*command, "--depth", "40", "--width", "2"]) == 0
    assert capsys.readouterr().out == f"{folder}\n"
    assert main([*command, "--depth", "40"]) == 2
    assert "no finished run with data=cifar10, " in capsys.readouterr().err
