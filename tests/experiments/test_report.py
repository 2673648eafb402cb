"""Reports of run folders: what may be compared, what may not, and every form they take."""

import csv
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
from pytorch_lightning.utilities import rank_zero_only
from report_toy import GROUPS, draw, edit, gather

from callbacks.metrics import PRESETS
from callbacks.results import HEADLINE, summarize
from datamodules.arrays import Arrays
from experiments.__main__ import main
from experiments.reports.examples import examples
from experiments.reports.runs import find_runs
from experiments.reports.sheets import notes, sheets
from experiments.reports.story import winners
from experiments.reports.trial import read_runs


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
