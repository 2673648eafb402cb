"""The offline wandb run holds what the record holds, and two runs in a row both succeed."""

import json
import struct
from pathlib import Path

import pytest
import wandb

from experiments.__main__ import main

DIGITS = str(Path(__file__).resolve().parent.parent.parent / "experiments" / "classifier" / "digits.yaml")
BLOCK, HEADER = 32768, 7


def records(path):
    """Read a ``.wandb`` file: the LevelDB log format (blocks of 32 KiB, crc/length/type headers) around protobufs."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, parts, found = path.read_bytes(), 7, b"", []  # 7 bytes of file header
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:  # padding at a block's end
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        parts += data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        if kind in (1, 4):  # a whole record, or the last part of one
            found.append(Record.FromString(parts))
            parts = b""
    return found


def content(path):
    summary, config = {}, {}
    for record in records(path):
        for item in record.summary.update:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in [*record.run.config.update, *record.config.update]:
            config["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
        for item in record.history.item:
            summary["/".join(item.nested_key) or item.key] = json.loads(item.value_json)
    return summary, config


@pytest.fixture
def forgetful_wandb():
    """Once used, wandb keeps to the mode of before, whatever the environment says."""
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_offline_run_holds_the_numbers_of_the_record(checkpoints, monkeypatch, forgetful_wandb):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    arguments = ["--trainer.max_epochs", "2", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    arguments += ["--evaluation.bootstrap", "10", "--data.init_args.ood", "[noise]", "--overwrite", "true"]
    for _ in range(2):
        assert main(["run", "--config", DIGITS, *arguments]) == 0
    folder = checkpoints / "classifier" / "digits" / "seed0"
    results = json.loads((folder / "results.json").read_text())
    # by time, for their names count whole seconds
    runs = sorted(folder.glob("wandb/offline-run-*/*.wandb"), key=lambda path: path.stat().st_mtime_ns)
    assert len(runs) == 2  # one of the fit, one of the test

    summaries, configs = zip(*(content(path) for path in runs), strict=True)
    summary = summaries[1]
    for row in results["rows"]:
        for metric in ("auroc", "aupr_in", "aupr_out", "fpr95"):
            assert summary[f"ood/{row['ood_set']}/{row['score']}/{metric}"] == pytest.approx(row[metric], abs=1e-12)
    assert summary["test/accuracy"] == results["id_accuracy"]
    assert summary["ood/results/_type"] == "table-file"
    table = json.loads((runs[1].parent / "files" / summary["ood/results/path"]).read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["auroc"] for row in rows] == pytest.approx([row["auroc"] for row in results["rows"]], abs=1e-12)
    figures = {key.split("/")[1] for key in summary if key.startswith("figures/") and key.endswith("/_type")}
    assert figures == {"roc", *(f"histogram_{row['score']}" for row in results["rows"])}
    for config in configs:
        assert config["experiment"] == "classifier/digits"
        assert config["model"]["class_path"] == "lightning_modules.classifier.Classifier"
    assert "train/loss" in summaries[0]
