"""Reports beside damaged runs: each is told, none is fatal."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
from report_toy import edit, gather

from experiments.__main__ import main


def test_what_is_damaged_is_reported_and_not_fatal(write, checkpoints, capsys):
    good = write("toy/a/seed0")
    broken = write("toy/b/seed0", method="B")
    (broken / "results.json").write_text('{"schema')
    lacking = write("toy/c/seed0", method="C")
    edit(lacking, rows=None)
    spoiled = write("toy/j/seed0", method="J", record={"weights": {"backbone": "nothing"}})
    unfinished = write("toy/d/seed0", method="D", record={"status": "interrupted"})
    unseen = write("toy/e/seed0", method="E")
    (unseen / "results.json").unlink()
    old = write("toy/f/seed0", method="F")
    edit(old, schema_version=0)
    odd = write("toy/g/seed0", method="G")
    edit(odd, rows=[1, 2])
    write("toy/h/seed0", method="H").joinpath("scores.npz").write_bytes(b"no zip")
    assert main(["report", str(checkpoints / "toy"), str(checkpoints / "nowhere")]) == 2
    printed, error = capsys.readouterr()
    assert f"there is no run at or below {checkpoints / 'nowhere'}" in error
    page = (checkpoints / "report" / "report.html").read_text()
    reasons = {
        broken: "is damaged, no JSON of ours",
        lacking: "is damaged: there is no 'rows'",
        spoiled: "is damaged: ",
        unfinished: "its status is interrupted",
        unseen: "holds no results.json",
        old: "has schema 0",
        odd: "is damaged: ",
        checkpoints / "nowhere": "there is no run here",
    }
    _, problems = gather(checkpoints)
    assert problems.keys() == reasons.keys() - {checkpoints / "nowhere"}
    for folder, reason in reasons.items():
        (line,) = [line for line in printed.splitlines() if line.startswith(f"not in the tables: {folder}: ")]
        assert reason in line
        assert f"<b>{folder}</b>: " in page
    assert "Missing: " in page
    assert "is not a readable scores.npz" in page
    assert str(good) not in "".join(map(str, problems))


FULL = {"packages": {"python": "3"}, "weights": {}, "record": {"weights": {}, "starts": ["today"]}}


def reported(folders, checkpoints):
    """Write the report and return the methods in its tables, and the folders that are told to be in none."""
    assert main(["report", *map(str, folders)]) == 0
    with open(checkpoints / "report" / "report.csv", newline="") as file:
        methods = {row["method"] for row in csv.DictReader(file)}
    markdown = (checkpoints / "report" / "report.md").read_text().replace("\\", "")
    return methods, [folder for folder in folders if f"- {folder}: " in markdown.partition("## Not in")[2]]


def test_a_key_that_is_gone_or_another_thing_spoils_no_report(write, checkpoints):
    """All ways to damage a file at once, each in a folder of its own: each is in a table, or among the problems."""
    good, whole = write("toy/good/seed0", method="Good"), write("toy/whole/seed0", method="Whole", **FULL)
    damaged = {}
    for file in ("results.json", "run.json"):
        for key in json.loads((whole / file).read_text()):
            for i, value in enumerate([..., None, "text", []]):
                folder = checkpoints / "bad" / f"{file}-{key}-{i}".replace(".", "-")
                shutil.copytree(whole, folder)
                results = json.loads((folder / "results.json").read_text())
                name, sha = f"bad{len(damaged)}", f"sha{len(damaged)}"
                results |= {"method": name, "experiment": name, "weights_sha256": sha}
                (folder / "results.json").write_text(json.dumps(results))
                spoiled = json.loads((folder / file).read_text()) | {key: value}
                (folder / file).write_text(json.dumps({k: v for k, v in spoiled.items() if v is not ...}))
                damaged[folder] = name
    methods, told = reported([good, *damaged], checkpoints)
    assert "Good" in methods
    assert good not in told
    silent = [
        folder.name
        for folder, name in damaged.items()
        if folder not in told and not any(name in method for method in methods)
        if "json-method-" not in folder.name  # which then has another name
    ]
    assert silent == []
    assert {folder.name for folder in told} >= {
        f"results-json-{key}-{i}" for key in ("rows", "splits", "configuration", "metric_rules") for i in range(3)
    }


DAMAGES = {
    "there is a NaN": lambda results: results["rows"][0].update(auroc=float("nan")),
    "a bound is null": lambda results: results["rows"][0].update(auroc_low=None),
    "a bound lacks the other": lambda results: results["rows"][0].pop("aupr_in_high"),
    "there are no rows": lambda results: results["rows"].clear(),
    "a split lacks its size": lambda results: results["splits"]["far"].pop("size"),
    "outliers lack their size": lambda results: results.update(outliers={"source": "x", "size": None, "feed": "y"}),
    "duplicates are a list": lambda results: results.update(
        outliers={"source": "x", "size": 1, "feed": "y", "duplicates": [1]}
    ),
    "the model is a text": lambda results: results["configuration"].update(model="Toy"),
    "a group is unknown": lambda results: results["rows"][0].update(group="middle"),
    "a number is a text": lambda results: results["means"][0].update(fpr95="0.5"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_is_damaged_within_is_told(write, checkpoints, damage):
    good, bad = write("toy/good/seed0", method="Good"), write("toy/bad/seed0", method="Bad")
    results = json.loads((bad / "results.json").read_text())
    DAMAGES[damage](results)
    (bad / "results.json").write_text(json.dumps(results))
    assert reported([good, bad], checkpoints) == ({"Good"}, [bad])


@pytest.mark.parametrize("record", [{"starts": [1]}, {"trained_parameters": "many"}, {"seconds": "long"}])
def test_a_damaged_record_of_training_is_told(write, checkpoints, record):
    good, bad = write("toy/good/seed0", method="Good"), write("toy/bad/seed0", method="Bad", record=record)
    assert reported([good, bad], checkpoints) == ({"Good"}, [bad])


def changed(**columns):
    """Return what changes columns of ``scores.npz``: each from its own values."""

    def change(path):
        with np.load(path) as stored:
            arrays = dict(stored)
        for name, to in columns.items():
            arrays[name.replace("__", "/")] = to(arrays[name.replace("__", "/")])
        np.savez(path, **arrays)

    return change


def flip(path):
    """Flip a bit in the middle of the first compressed column."""
    content = bytearray(path.read_bytes())
    content[60] ^= 16
    path.write_bytes(bytes(content))


@pytest.mark.parametrize(
    "damage",
    [
        flip,
        changed(score__energy=lambda scores: np.where(scores > 1, np.nan, scores)),
        changed(score__energy=lambda scores: scores[:-1]),
        changed(ids=lambda ids: ids + 1000),
        changed(ids=lambda ids: ids - 1),
        changed(predictions=lambda predictions: predictions + 9),
        changed(split=lambda split: split + 1),
        changed(splits=lambda names: np.array([name.replace("farther", "farthest") for name in names])),
        lambda path: path.unlink(),
    ],
)
def test_scores_that_are_damaged_leave_their_pictures_out(write, checkpoints, damage):
    good, bad = write("toy/good/seed0", method="Good"), write("toy/bad/seed0", method="Bad")
    damage(bad / "scores.npz")
    assert reported([good, bad], checkpoints) == ({"Good", "Bad"}, [])
    page = (checkpoints / "report" / "report.html").read_text()
    assert len(re.findall(r'class="apart">Missing: .*scores.npz', page)) == 1


def test_a_figure_that_is_a_folder_is_missing(write, checkpoints):
    (write("toy/a/seed0") / "figures" / "x.png").mkdir(parents=True)
    assert main(["report"]) == 0
    assert re.search(r"Missing: .*x\.png", (checkpoints / "report" / "report.html").read_text())
