"""The first screen of a report: what was asked, who won where, and no more than the numbers say."""

import json

import pytest
from report_toy import edit, gather

from experiments.__main__ import main
from experiments.reports.story import glossary, question, winners


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
