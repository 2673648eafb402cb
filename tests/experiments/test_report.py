"""Reports of run folders: what may be compared, what may not, what is damaged; and every form they take."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import yaml
from pytorch_lightning.utilities import rank_zero_only
from report_toy import GROUPS, draw, edit, fingerprints, write_data, write_run

from callbacks.metrics import PRESETS
from callbacks.results import HEADLINE, summarize
from datamodules.arrays import Arrays
from experiments.__main__ import main
from experiments.cli import EXPERIMENTS
from experiments.reports.comparison import compare
from experiments.reports.examples import examples
from experiments.reports.published import PUBLISHED, beside, departures
from experiments.reports.runs import find_runs
from experiments.reports.sheets import notes, sheets
from experiments.reports.story import glossary, question, winners
from experiments.reports.trial import read_runs


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("images"))


@pytest.fixture
def write(data, checkpoints):
    """Write a run below the root of all runs: ``write("method/setting/name", ...)``."""
    splits = fingerprints(data)
    return lambda path, **kwargs: write_run(checkpoints / path, data, splits, **kwargs)


def gather(folder):
    runs, problems = read_runs(find_runs(folder))
    comparisons, unfit = compare(runs)
    return comparisons, problems | unfit


def rows_of(seed, shift):
    return summarize(draw(seed, shift), GROUPS, PRESETS["default"], 3, 0)["rows"]


def test_seeds_are_a_row_of_means_and_one_seed_has_bounds(write, checkpoints):
    for seed in range(3):
        write(f"toy/a/seed{seed}", seed=seed)
    write("toy/b/seed0", shift=1.0, method="Other")
    (comparison,), problems = gather(checkpoints)
    assert problems == {}
    assert [(e.method, e.score, len(e.runs)) for e in comparison.entries] == [
        ("Toy", "energy", 3),
        ("Toy", "msp", 3),
        ("Other", "energy", 1),
        ("Other", "msp", 1),
    ]
    seeds = [{(row["score"], row["ood_set"]): row for row in rows_of(seed, 2.0)} for seed in range(3)]
    for metric in HEADLINE:
        far = [np.mean([rows["energy", name][metric] for name in ("far", "farther")]) for rows in seeds]
        numbers = comparison.entries[0].numbers["far (mean)"]
        assert numbers[metric] == pytest.approx(np.mean(far))
        assert numbers[f"{metric}_std"] == pytest.approx(np.std(far, ddof=1))
        of_all = [np.mean([rows["energy", name][metric] for name in GROUPS]) for rows in seeds]
        assert comparison.entries[0].overall[metric] == pytest.approx(np.mean(of_all))
    single = comparison.entries[2].numbers
    mean = single["far (mean)"]
    assert "auroc_std" not in mean
    assert mean["auroc_low"] < mean["auroc"] < mean["auroc_high"]
    assert single["near (mean)"] == single["near"]
    assert single["near"]["auroc"] == rows_of(0, 1.0)[0]["auroc"]
    cost = comparison.entries[1].cost
    assert (cost.parameters, cost.trained, cost.seconds, cost.milliseconds) == (100, 70, 11.0, 0.75)
    auroc, _, costs = sheets(comparison)
    assert auroc.header == ["method", "score", "near: near", "far: mean of 2", "far", "farther"]
    assert re.fullmatch(r"\d+\.\d ± \d+\.\d", auroc.rows[0][2].text)
    assert re.fullmatch(r"\d+\.\d \[\d+\.\d, \d+\.\d\]", auroc.rows[2][2].text)
    assert [cell.text for cell in costs.rows[0][2:4]] == ["none", "3"]


def test_runs_that_differ_beyond_the_seed_are_not_averaged(write, checkpoints):
    write("toy/a/seed0")
    write("toy/a/wide", seed=1, model={"init_args": {"width": 8}})
    (comparison,), _ = gather(checkpoints)
    assert [(entry.method, len(entry.runs)) for entry in comparison.entries[::2]] == [
        ("Toy (toy/a/seed0)", 1),
        ("Toy (toy/a/wide)", 1),
    ]


@pytest.mark.parametrize("same", ["seed", "weights_sha256"])
def test_a_repeated_run_counts_once(write, checkpoints, same):
    first = write("toy/a/seed0")
    again = write("toy/a/seed1", seed=1)
    edit(again, **{same: json.loads((first / "results.json").read_text())[same]})
    (comparison,), problems = gather(checkpoints)
    assert len(comparison.entries[0].runs) == 1
    assert problems == {again: f"it repeats {first}: the same setting, and the same seed or weights"}


@pytest.mark.parametrize("odd", [0, 1, 2])
def test_a_seed_with_other_sets_is_left_out_of_its_setting_alone(write, checkpoints, odd):
    folders = [
        write(f"toy/a/seed{seed}", seed=seed, sets=("near", "far") if seed == odd else tuple(GROUPS))
        for seed in range(3)
    ]
    (comparison,), problems = gather(checkpoints)
    assert [len(entry.runs) for entry in comparison.entries] == [2, 2]
    assert "farther" in comparison.entries[0].numbers
    others = [folder for folder in folders if folder != folders[odd]]
    assert problems == {folders[odd]: f"it has other scores or OOD sets than {others[0]}, of its setting"}


def test_a_run_that_trained_nothing_is_told_and_wins_nothing(write, checkpoints):
    write("toy/a/seed0")
    write("toy/b/seed0", shift=6.0, method="Diagnosis", record={"trained_parameters": 0})
    (comparison,), _ = gather(checkpoints)
    assert [entry.untrained for entry in comparison.entries] == [False, False, True, True]
    for metric in ("auroc", "fpr95"):
        assert comparison.marks("near (mean)", metric)[2:] == ["", ""]
        assert "best" in comparison.marks("near (mean)", metric)
    assert [winner["name"] for winner in winners(comparison)] == ["Toy (energy)"] * 2
    assert any(note.startswith("Nothing trained in Diagnosis: ") for note in notes(comparison))


def given(folder, **numbers):
    """Set metrics of the first score of a run, on all sets and means; the second score is far behind."""
    results = json.loads((folder / "results.json").read_text())
    for row in [*results["rows"], *results["means"]]:
        worse = {
            "auroc": 0.5,
            "auroc_low": 0.49,
            "auroc_high": 0.51,
            "fpr95": 0.95,
            "fpr95_low": 0.9,
            "fpr95_high": 1.0,
        }
        row |= numbers if row["score"] == "energy" else worse
        for key in [key for key, value in numbers.items() if value is None]:
            row.pop(key, None)
    (folder / "results.json").write_text(json.dumps(results))
    return folder


def interval(metric, low, value, high):
    return {f"{metric}_low": low, metric: value, f"{metric}_high": high}


AHEAD = interval("auroc", 0.9, 0.92, 0.94) | interval("fpr95", 0.1, 0.2, 0.3)
BEHIND = interval("auroc", 0.7, 0.72, 0.74) | interval("fpr95", 0.5, 0.6, 0.7)
NO_INTERVAL = {"auroc_low": None, "auroc_high": None}


@pytest.mark.parametrize(
    ("first", "second", "verdict"),
    [
        (AHEAD, BEHIND, "Ahead of all others by more than the intervals, in AUROC and in FPR95."),
        (AHEAD, BEHIND | interval("auroc", 0.88, 0.89, 0.91), "A tie: the intervals meet those of Other (energy)."),
        (AHEAD, AHEAD, "A tie: the numbers are the same."),
        (AHEAD | interval("auroc", 1, 1, 1), BEHIND, "It is the largest AUROC."),
        (AHEAD, BEHIND | interval("fpr95", 0.25, 0.27, 0.3), "It is the largest AUROC."),
        (
            AHEAD,
            BEHIND | interval("fpr95", 0.0, 0.01, 0.02),
            "It is the largest AUROC. The lowest FPR95 is that of Other (energy).",
        ),
        (AHEAD | NO_INTERVAL, BEHIND, "It is the largest AUROC. No interval was recorded: it may be chance."),
    ],
)
def test_the_first_screen_claims_no_more_than_the_numbers(write, checkpoints, first, second, verdict):
    given(write("toy/a/seed0"), **first)
    given(write("toy/b/seed0", method="Other"), **second)
    (comparison,), _ = gather(checkpoints)
    for winner in winners(comparison):
        assert winner["verdict"] == verdict
        assert winner["name"] == ("Toy (energy), Other (energy)" if first == second else "Toy (energy)")
        assert winner["auroc"].startswith(f"{100 * first['auroc']:.1f}")
        assert winner["fpr95"].startswith(f"{100 * first['fpr95']:.1f}")
    assert main(["report"]) == 0
    page = (checkpoints / "report" / "report.html").read_text()
    assert page.count(f"<p>Best AUROC <b>{winner['auroc']}</b> · its FPR95 <b>{winner['fpr95']}</b></p>") == 2
    assert page.count(verdict) == 2


def test_the_first_screen_names_who_is_alone_absent_or_has_seen_outliers(write, checkpoints):
    given(write("toy/a/seed0", sets=("near", "far")), **BEHIND)
    (comparison,), _ = gather(checkpoints)
    alone = "There is no other method to compare it with. It is the largest AUROC of its 2 scores."
    assert [winner["verdict"] for winner in winners(comparison)] == [alone] * 2
    outliers = {"source": "x", "size": 7, "feed": "paired", "duplicates": None}
    given(write("toy/b/seed0", method="Exposed", outliers=outliers), **AHEAD)
    (comparison,), _ = gather(checkpoints)
    near, far = winners(comparison)
    assert (near["group"], far["group"]) == ("near: near", "far: mean of far, farther")
    assert (near["name"], far["name"]) == ("Exposed † (energy)", "Exposed † (energy)")
    assert (near["absent"], far["absent"]) == ("", "Toy")
    assert (near["honest"], far["honest"]) == ("Toy (energy), 72.0 [70.0, 74.0]", "")


def test_what_was_learned_is_told_of_methods_with_and_without_classes(write, checkpoints):
    write("toy/a/seed0", id_accuracy=None)
    (comparison,), _ = gather(checkpoints)
    assert question(comparison, []).startswith("Networks were trained on images of 3 classes of Arrays. ")
    write("toy/b/seed0", method="Classifier")
    (comparison,), _ = gather(checkpoints)
    told = "Networks were trained to tell 3 classes of Arrays apart (a, b, c); without telling them apart: Toy. "
    assert question(comparison, ["a", "b", "c"]).startswith(told)


def test_methods_and_scores_are_explained(write, checkpoints):
    write("toy/a/seed0", model={"class_path": "lightning_modules.loss_estimate.LossEstimate"})
    folder = write("toy/b/seed0", method="Other")
    configuration = json.loads((folder / "results.json").read_text())["configuration"]
    scores = {"energy": "lightning_modules.scores.logits.Energy", "msp": {"class_path": "mine.Score"}}
    edit(folder, configuration=configuration | {"evaluation": {"scores": scores}})
    comparisons, _ = gather(checkpoints)
    words = dict(glossary(comparisons))
    assert words.keys() == {"Toy", "energy"}
    assert all(len(text) > 20 for text in words.values())


def test_the_csv_names_the_group_of_each_line(write, checkpoints):
    write("toy/a/seed0")
    assert main(["report"]) == 0
    with open(checkpoints / "report" / "report.csv", newline="") as file:
        groups = {row["ood_set"]: row["group"] for row in csv.DictReader(file)}
    assert groups == GROUPS | {"near (mean)": "near", "far (mean)": "far"}


def test_one_of_several_processes_writes_and_leaves_no_part(write, checkpoints, capsys, monkeypatch):
    write("toy/a/seed0")
    monkeypatch.setattr(rank_zero_only, "rank", 1)
    assert main(["report"]) == 0
    assert not (checkpoints / "report").exists()
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(rank_zero_only, "rank", 0)
    assert main(["report"]) == 0
    names = {path.name for path in (checkpoints / "report").iterdir()}
    assert names == {f"report.{kind}" for kind in ("html", "md", "tex", "csv")}


def test_what_does_not_compare_forms_tables_of_its_own_with_the_reason(write, checkpoints, capsys):
    write("toy/a/seed0")
    write("toy/b/seed0", protocol="openood", method="B")
    write("toy/c/seed0", preset="heat", method="C")
    write("toy/d/seed0", truncated=True, method="D")
    moved = write("toy/e/seed0", method="E")
    splits = json.loads((moved / "results.json").read_text())["splits"]
    edit(moved, splits=splits | {"far": {"size": 25, "fingerprint": "another"}})
    write("toy/f/seed0", method="F", sets=("near", "far"))
    assert main(["report"]) == 0
    printed = capsys.readouterr().out
    comparisons, problems = gather(checkpoints)
    assert problems == {}
    assert [table.entries[0].method for table in comparisons] == ["Toy", "B", "C", "D", "E"]
    assert {entry.method for entry in comparisons[0].entries} == {"Toy", "F"}
    wanted = ["", "protocol", "reading of the metrics", "number of images tested", "images or group of far"]
    for table, reason in zip(comparisons, wanted, strict=True):
        assert table.apart == (f"Not in table 1, for it has another: {reason}." if reason else "")
        assert table.apart in printed
        assert table.rule in printed
    for file in ("report.md", "report.html", "report.tex"):
        text = (checkpoints / "report" / file).read_text()
        assert text.count("Not in table 1") == (4 * 3 if file == "report.tex" else 4)
    with open(checkpoints / "report" / "report.csv", newline="") as file:
        tables = {row["method"]: row["table"] for row in csv.DictReader(file)}
    assert tables == {"Toy": "1", "F": "1", "B": "2", "C": "3", "D": "4", "E": "5"}


def test_the_table_of_most_runs_comes_first_and_each_has_its_question(write, checkpoints):
    write("toy/a/seed0", preset="openood")
    for name in ("b", "c"):
        write(f"toy/{name}/seed0", method=name)
    assert main(["report"]) == 0
    comparisons, _ = gather(checkpoints)
    assert [len(table.settings) for table in comparisons] == [2, 1]
    page = (checkpoints / "report" / "report.html").read_text()
    assert page.count("Networks were trained to tell 3 classes of Arrays apart") == 2
    for words in ("lets 95% of the known images pass", "rejects 95% of the OOD images"):
        assert page.count(words) == 1


def test_a_mean_is_shown_over_all_sets_of_a_group_or_not_at_all(write, checkpoints):
    write("toy/a/seed0")
    write("toy/f/seed0", method="F", sets=("near", "far"))
    (comparison,), _ = gather(checkpoints)
    assert "far (mean)" in comparison.entries[0].numbers
    assert "far (mean)" not in comparison.entries[2].numbers
    auroc = sheets(comparison)[0]
    row = dict(zip(auroc.header, auroc.rows[2], strict=True))
    assert row["far: mean of 2"].text == "–"
    assert row["farther"].text == "–"
    assert row["near: near"].text != "–"


def test_best_and_tied_follow_from_the_intervals(write, checkpoints):
    write("toy/a/seed0", shift=6.0)
    write("toy/b/seed0", shift=5.8, method="Close")
    write("toy/c/seed0", shift=0.5, method="Worse")
    (comparison,), _ = gather(checkpoints)
    for metric, best in (("auroc", max), ("fpr95", min)):
        values = [entry.numbers["far"][metric] for entry in comparison.entries]
        marks = comparison.marks("far (mean)", metric)
        assert [mark == "best" for mark in marks] == [value == best(values) for value in values]
        by_name = {(e.method, e.score): mark for e, mark in zip(comparison.entries, marks, strict=True)}
        assert by_name["Close", "energy"] in ("best", "tied")
        assert by_name["Worse", "energy"] == ""


def test_a_difference_that_other_test_images_could_make_is_a_tie_whatever_the_seeds_say(write, checkpoints):
    for seed in range(2):
        write(f"toy/a/seed{seed}", shift=2.0).joinpath("scores.npz")
        same = write(f"toy/b/seed{seed}", shift=2.0, method="Same")
        rows = json.loads((same / "results.json").read_text())
        for row in [*rows["rows"], *rows["means"]]:
            row["auroc"] += 1e-4
        edit(same, rows=rows["rows"], means=rows["means"])
    (comparison,), _ = gather(checkpoints)
    marks = comparison.marks("far (mean)", "auroc")
    assert (marks[0], marks[2]) == ("tied", "best")


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


def test_nothing_to_compare_is_an_error_in_words(write, checkpoints, capsys):
    assert main(["report"]) == 2
    assert "there is nothing to compare; make a run first" in capsys.readouterr().err
    folder = write("toy/a/seed0", record={"status": "failed"})
    assert main(["report", str(folder)]) == 2
    assert "its status is failed" in capsys.readouterr().err
    assert not (checkpoints / "report").exists()


def test_folders_that_are_no_runs_are_passed_over(write, checkpoints):
    wanted = write("toy/a/seed0")
    for path in ("toy/a/seed0.replaced", "toy/a/seed0/stages/003", "toy/a/fast_dev_run", "features/x/y"):
        shutil.copytree(wanted, checkpoints / path, ignore=shutil.ignore_patterns("stages"))
    assert find_runs(checkpoints) == [wanted]
    assert find_runs(wanted) == [wanted]


def test_older_records_have_gaps_in_the_costs(write, checkpoints):
    old = write("toy/a/seed0", record={"seconds": None, "trained_parameters": None})
    edit(old, parameters=None, milliseconds=None)
    write("toy/b/seed0", method="Killed", record={"uncounted": 1})
    (comparison,), _ = gather(checkpoints)
    costs = sheets(comparison)[2]
    assert [cell.text for cell in costs.rows[0][5:]] == ["–"] * 4
    assert [cell.text for cell in costs.rows[2][5:]] == ["100", "70", "≥ 10.0", "0.5"]


def test_what_comes_from_files_is_escaped(write, checkpoints):
    outliers = {"source": "<b>50% & more_", "size": 7, "feed": "paired", "duplicates": None}
    write("toy/a_b&c/seed0", method="<i>To_y|", outliers=outliers)
    assert main(["report"]) == 0
    page, latex, markdown = ((checkpoints / "report" / f"report.{kind}").read_text() for kind in ("html", "tex", "md"))
    assert "<i>" not in page
    assert "&lt;i&gt;To_y| †" in page
    assert "7 images of &lt;b&gt;50% &amp; more_, paired" in page
    assert "$<$b$>$50\\% \\& more\\_" in latex
    assert re.search(r"(?<!\\)[%&_](?! )", latex.partition("\\midrule")[2].partition("\\bottomrule")[0]) is None
    assert "\\<i\\>To\\_y\\|" in markdown


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="there is no pdflatex")
def test_latex_compiles(write, checkpoints, tmp_path):
    outliers = {"source": "<b>50% & more_^~\\{}#$", "size": 7, "feed": "paired", "duplicates": None}
    write("toy/a_b/seed0", outliers=outliers)
    assert main(["report"]) == 0
    document = "\\documentclass{article}\\usepackage{booktabs,graphicx}\\begin{document}\\input{report}\\end{document}"
    (checkpoints / "report" / "all.tex").write_text(document)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    subprocess.run(command, cwd=checkpoints / "report", check=True, capture_output=True, timeout=60)


def test_the_page_is_one_file(write, checkpoints):
    folder = write("toy/a/seed0")
    (folder / "figures").mkdir()
    for name in ("roc", "histogram_msp", "heatmaps"):
        (folder / "figures" / f"{name}.png").write_bytes(b"picture")
    assert main(["report", "--output", str(checkpoints / "elsewhere")]) == 0
    page = (checkpoints / "elsewhere" / "report.html").read_text()
    assert set(re.findall(r'(?:src|href)="([a-z]+:|#)', page)) == {"data:", "#"}
    assert not re.search(r"https?://|@import|url\(", page)
    assert page.count("<img") == 4 * 6 + 1
    assert 'alt="heatmaps of Toy"' in page
    assert page.count('<svg class="roc"') == 3
    assert page.count('<svg class="histogram"') == 3
    assert "3 classes of Arrays apart (0, 1, 2)" in page


def test_images_are_those_at_the_boundary_and_the_surest_mistakes(write, checkpoints, data):
    write("toy/a/seed0", shift=1.0)
    runs, _ = read_runs(find_runs(checkpoints))
    from experiments.reports.examples import Images

    samples, tau = draw(0, 1.0), 1.2
    shown = examples(samples, Images().of(runs[0]), "energy", tau)
    scores, split = samples.scores["energy"], np.array(samples.splits)[samples.split]
    known, unknown = scores[split == "id"], scores[(split != "id") & (split != "calibration")]
    expected = {
        "ID images nearest to the boundary": sorted(known, key=lambda score: abs(score - tau)),
        "OOD images nearest to the boundary": sorted(unknown, key=lambda score: abs(score - tau)),
        "ID images that it is surest are OOD": sorted(known[known > tau])[::-1],
        "OOD images that it is surest are ID": sorted(unknown[unknown <= tau]),
    }
    for title, wanted in expected.items():
        assert [example.score for example in shown[title]] == pytest.approx(wanted[:6])
    assert {example.truth for example in shown["ID images nearest to the boundary"]} <= {"0", "1", "2"}
    assert {example.truth for example in shown["OOD images nearest to the boundary"]} <= set(GROUPS)


def test_one_data_module_is_held_for_all_that_have_the_same_test_images(write, checkpoints, data, tmp_path):
    from experiments.reports.examples import Images

    write("toy/a/seed0")
    gone = {"outliers": {"path": str(tmp_path / "gone.npz")}, "outlier_feed": "paired", "num_outliers": 3}
    for name, options in {"b": {"batch_size": 9, "val_split": 0.1, "seed": 3} | gone, "c": {"split_seed": 1}}.items():
        folder = write(f"toy/{name}/seed0", method=name)
        configuration = json.loads((folder / "results.json").read_text())["configuration"]
        configuration["data"]["init_args"] |= options
        edit(folder, configuration=configuration)
    runs, problems = read_runs(find_runs(checkpoints))
    assert problems == {}
    images = Images()
    first, second, third = map(images.of, runs)
    assert first is second
    assert third is not first
    assert [len(first.sets[name]) for name in ("id", *GROUPS)] == [60, 30, 25, 20]
    assert [value for value in vars(images).values() if isinstance(value, Arrays)] == [third]


@pytest.mark.parametrize("missing", ["images", "others"])
def test_a_page_without_images_says_why(write, checkpoints, tmp_path, missing):
    folder = write("toy/a/seed0")
    configuration = json.loads((folder / "results.json").read_text())["configuration"]
    if missing == "images":
        configuration["data"]["init_args"]["test"] = str(tmp_path / "gone.npz")
        edit(folder, configuration=configuration)
    else:
        splits = {name: {"size": 1, "fingerprint": "0" * 64} for name in ("id", *GROUPS)}
        edit(folder, splits=splits)
    assert main(["report"]) == 0
    page = (checkpoints / "report" / "report.html").read_text()
    reason = "gone.npz" if missing == "images" else "no longer those that the run was tested on"
    assert re.search(f'class="apart">Missing: .*{reason}', page)
    assert page.count('<svg class="roc"') == 3


def test_published_numbers_stand_beside_the_runs_that_reproduce_them(write, checkpoints, capsys):
    write("outlier_exposure/cifar10_oe/seed0", model={"init_args": {"floor": 0}})
    write("outlier_exposure/cifar10_oe/floor", method="Floor", model={"init_args": {"floor": "auto"}})
    write("toy/a/seed0", method="Toy2")
    comparisons, _ = gather(checkpoints)
    lines = beside(comparisons)
    assert [(line.name, line.ours) for line in lines] == [
        ("OE", "outlier_exposure/cifar10_oe, energy"),
        ("OE+UM", "outlier_exposure/cifar10_oe, energy"),
    ]
    assert lines[0].values["FPR95"][0] == "13.80 (0.28)"
    assert "the metrics as default, the source as unleashing_mask" in lines[0].differences
    assert "data.class_path is datamodules.arrays.Arrays, not datamodules.public.CIFAR" in lines[0].differences
    assert main(["report"]) == 0
    assert "97.07 (0.01)" in capsys.readouterr().out
    for kind in ("html", "md"):
        assert "97.07 (0.01)" in (checkpoints / "report" / f"report.{kind}").read_text()


README_OF_THE_SOURCE = """
Energy 92.07 0.22 92.72 0.39 42.69 1.31 94.01 0.08
Energy+UM 93.73 0.36 94.27 0.60 33.29 1.70 92.80 0.47
OE 97.07 0.01 97.31 0.05 13.80 0.28 92.59 0.32
OE+UM 97.60 0.03 97.87 0.02 11.22 0.16 93.66 0.12
"""  # AUROC, AUPR, FPR95, ID accuracy; mean, standard deviation


def test_published_rows_are_those_of_the_source_for_experiments_that_exist():
    rows = [line.split() for line in README_OF_THE_SOURCE.strip().splitlines()]
    assert [row.name for row in PUBLISHED] == [name for name, *_ in rows]
    for row, (_, *numbers) in zip(PUBLISHED, rows, strict=True):
        assert all((EXPERIMENTS / f"{name}.yaml").is_file() for name in row.experiments)
        assert list(row.values) == ["auroc", "aupr_in", "fpr95", "id_accuracy"]
        percents = [f"{100 * number:.2f}" for pair in row.values.values() for number in pair]
        assert percents == numbers


@pytest.fixture
def cifar10_oe():
    """As a run of outlier exposure records its configuration; weights and seeds may be anyone's."""
    stated = yaml.safe_load((EXPERIMENTS / "outlier_exposure" / "cifar10_oe.yaml").read_text())
    stated["model"]["init_args"]["floor"] = 0.0
    stated["model"]["init_args"]["optimizer"]["init_args"]["nesterov"] = False
    stated["model"]["init_args"]["backbone"]["init_args"]["weights"] = "run:mine/seed3"
    return stated


def test_what_a_run_has_other_than_its_experiment_is_named(cifar10_oe):
    assert departures(cifar10_oe, "outlier_exposure/cifar10_oe") == []
    model, data = (cifar10_oe[part]["init_args"] for part in ("model", "data"))
    model["backbone"]["class_path"] = "backbones.resnet.ResNet"
    model["optimizer"]["init_args"]["lr"] = 0.5
    data["num_outliers"], data["subset"] = 7, {"fraction": 0.5}
    cifar10_oe["trainer"]["max_epochs"] = 2
    assert departures(cifar10_oe, "outlier_exposure/cifar10_oe") == [
        "model.backbone.class_path is backbones.resnet.ResNet, not backbones.densenet.DenseNet",
        "model.optimizer.lr is 0.5, not 0.01",
        "data.num_outliers is 7, not 50000",
        "trainer.max_epochs is 2, not 10",
        "data.subset is {'fraction': 0.5}",
    ]


@pytest.mark.parametrize(
    "limits", [{"limit_train_batches": 3}, {"limit_test_batches": 0.5}, {"overfit_batches": 1}, {"max_steps": 5}, {}]
)
def test_a_run_cut_short_stands_beside_nothing(write, checkpoints, cifar10_oe, limits):
    folder = write("outlier_exposure/cifar10_oe/seed0", model=cifar10_oe["model"], truncated=not limits)
    configuration = json.loads((folder / "results.json").read_text())["configuration"]
    edit(folder, configuration=configuration | {"trainer": limits})
    assert beside(gather(checkpoints)[0]) == []


@pytest.mark.slow
def test_the_demo_ends_with_a_report(checkpoints, capsys):
    options = ["--trainer.logger", "false", "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
    assert main(["demo", *options]) == 0
    assert f"{checkpoints / 'report'}: report.md, report.tex, report.csv, report.html" in capsys.readouterr().out
    page = (checkpoints / "report" / "report.html").read_text()
    assert len(page.encode()) < 5e6
    assert "Missing: " not in page
    assert "Not in the tables" not in page
    with open(checkpoints / "report" / "report.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["table"] for row in rows} == {"1"}
    assert all(float(row["seconds"]) > 0 and float(row["milliseconds"]) > 0 and int(row["parameters"]) for row in rows)
