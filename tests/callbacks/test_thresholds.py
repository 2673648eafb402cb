"""What thresholds do, against scikit-learn and a count of every image at every threshold."""

import csv

import numpy as np
import pytest
from sklearn.metrics import f1_score

from callbacks.figures import thresholds_figure
from callbacks.metrics import PRESETS
from callbacks.results import summarize, write_csv
from callbacks.samples import Samples
from callbacks.thresholds import as_rows, operating_points, sweep, thin

GROUPS = {"near": "near", "far": "far"}


def table(seed: int = 0, classes: int = 5, sizes: tuple[int, ...] = (41, 60, 50, 20), step: float = 0.25) -> Samples:
    """Held-out ID, ID and two OOD sets; scores tied and infinite, one class never predicted and one never there."""
    rng = np.random.default_rng(seed)
    split = np.repeat(np.arange(4), sizes)
    is_ood = split >= 2
    labels = np.where(is_ood, -1, rng.integers(0, classes - 1, len(split)))
    right = ~is_ood & (rng.random(len(split)) < 0.6) & (labels > 0)
    predictions = np.where(right, labels, rng.integers(1, classes, len(split)))
    scores = np.round(rng.normal(is_ood, 1) / step) * step
    scores[rng.random(len(split)) < 0.05] = np.inf
    scores[rng.random(len(split)) < 0.05] = -np.inf
    ids = np.concatenate([np.arange(size) for size in sizes])
    return Samples(("calibration", "id", "near", "far"), split, ids, labels, predictions, {"s": scores})


def parts(samples: Samples, ood_set: str = "near") -> tuple[Samples, Samples]:
    return samples.of("id"), samples.of(ood_set)


def reference(known: Samples, unknown: Samples, threshold: float, classes: int) -> dict[str, float]:
    truth = [*known.labels, *[classes] * len(unknown.ids)]
    rows = [*zip(known.predictions, known.scores["s"], strict=True)]
    rows += zip(unknown.predictions, unknown.scores["s"], strict=True)
    guess = [classes if score > threshold else prediction for prediction, score in rows]
    return {
        "tpr": sum(score <= threshold for score in known.scores["s"]) / len(known.ids),
        "fpr": sum(score <= threshold for score in unknown.scores["s"]) / len(unknown.ids),
        "macro_f1": f1_score(truth, guess, labels=range(classes + 1), average="macro", zero_division=0),
    }


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("tau", [None, 0.1, -7.0, 7.0])
def test_every_threshold_equals_sklearn_and_a_count(seed, tau):
    classes = 2 + seed
    known, unknown = parts(table(seed, classes))
    points = operating_points(known, unknown, "s", classes, tau)
    values = {*known.scores["s"], *unknown.scores["s"]} | ({tau} - {None})
    assert points["threshold"].tolist() == sorted(values)
    assert {-np.inf, np.inf} < values
    for place, threshold in enumerate(points["threshold"]):
        expected = reference(known, unknown, threshold, classes)
        assert {key: points[key][place] for key in expected} == pytest.approx(expected, rel=0, abs=1e-12)


def test_a_threshold_below_all_scores_rejects_every_image():
    known, unknown = parts(table(step=1e-3))
    for rows in (known, unknown):
        rows.scores["s"] = np.maximum(rows.scores["s"], -5)
    points = operating_points(known, unknown, "s", 5, -9.0)
    assert {key: points[key][0] for key in ("threshold", "tpr", "fpr")} == {"threshold": -9, "tpr": 0, "fpr": 0}
    assert points["macro_f1"][0] == pytest.approx(2 * 50 / (60 + 50 + 50) / 6)


def test_without_predicted_classes_there_is_no_f1():
    samples = table()
    samples.predictions[:] = -1
    assert operating_points(*parts(samples), "s", 5).keys() == {"threshold", "tpr", "fpr"}
    (header, *_) = as_rows(sweep(samples, {}, 5))
    assert header.keys() == {"score", "ood_set", "threshold", "tpr", "fpr"}
    rows = summarize(samples, GROUPS, PRESETS["default"], 5, replicates=0, oracle=True)["rows"]
    assert all({"tpr", "tnr"} < row.keys() and not {"macro_f1", "oracle_f1"} & row.keys() for row in rows)


def test_perfect_separation_leaves_a_threshold_without_error():
    samples = table()
    samples.scores["s"] = np.where(samples.split >= 2, 1.0, 0.0) + samples.ids / 1e3
    samples.predictions[:] = np.maximum(samples.labels, 0)
    (row, _) = summarize(samples, GROUPS, PRESETS["variational_metric"], 5, 0, oracle=True, tau_source="test_known")[
        "rows"
    ]
    assert (row["auroc"], row["tnr"], row["fpr95"]) == (1, 1, 0)
    assert row["oracle_f1"] == pytest.approx(5 / 6)  # one of the five classes has no image


def test_thinning_is_even_in_rank_and_keeps_the_threshold_and_the_best():
    points = operating_points(*parts(table(sizes=(1, 3000, 2000, 1), step=1e-6)), "s", 5, 0.123)
    few = thin(points, 20, 0.123)
    ranks = np.searchsorted(points["threshold"], few["threshold"])
    assert 20 <= len(ranks) <= 22
    assert (ranks[0], ranks[-1]) == (0, len(points["threshold"]) - 1)
    assert np.diff(ranks).max() <= len(points["threshold"]) / 19 + 1
    assert 0.123 in few["threshold"]
    assert few["macro_f1"].max() == points["macro_f1"].max()
    assert all((few[key] == points[key][ranks]).all() for key in points)
    assert all((thin(points, 10**5)[key] == points[key]).all() for key in points)


@pytest.mark.parametrize("tau_source", ["id_val", "test_known"])
def test_a_row_stands_at_its_threshold_and_below_the_oracle(tau_source, tmp_path):
    samples = table(sizes=(200, 300, 400, 30))
    summary = summarize(samples, GROUPS, PRESETS["variational_metric"], 5, 0, tau_source=tau_source, oracle=True)
    assert summary["metric_rules"]["tau_source"] == tau_source
    tau = summary["thresholds"]["s"]
    source = samples.of({"id_val": "calibration", "test_known": "id"}[tau_source]).scores["s"]
    assert (source <= tau).mean() >= 0.95 > (source < tau).mean()
    curves = sweep(samples, summary["thresholds"], 5)
    write_csv(tmp_path / "thresholds.csv", as_rows(curves))
    with (tmp_path / "thresholds.csv").open(newline="") as file:
        stored = [*csv.DictReader(file)]
    for row in summary["rows"]:
        expected = reference(*parts(samples, row["ood_set"]), tau, 5)
        assert (row["tpr"], 1 - row["tnr"], row["macro_f1"]) == pytest.approx(tuple(expected.values()), abs=1e-12)
        if tau_source == "test_known":
            assert row["tpr"] >= 0.95
            assert row["tnr"] == pytest.approx(1 - row["fpr95"])
        lines = [line for line in stored if line["ood_set"] == row["ood_set"]]
        (line,) = [line for line in lines if float(line["threshold"]) == tau]
        assert {key: float(line[key]) for key in expected} == pytest.approx(expected, abs=1e-12)
        best = max(float(line["macro_f1"]) for line in lines)
        assert row["oracle_f1"] == pytest.approx(best, abs=1e-12)
        assert best >= row["macro_f1"]
    header = ["score", "ood_set", "threshold", "tpr", "fpr", "macro_f1"]
    assert [*stored[0]] == header


def test_without_held_out_images_only_the_known_ones_set_a_threshold():
    whole = table()
    rows = whole.split > 0
    columns = {name: getattr(whole, name)[rows] for name in ("ids", "labels", "predictions")}
    samples = Samples(("id", "near", "far"), whole.split[rows] - 1, scores={"s": whole.scores["s"][rows]}, **columns)
    for tau_source, there in (("id_val", False), ("test_known", True)):
        summary = summarize(samples, GROUPS, PRESETS["default"], 5, 0, tau_source=tau_source)
        assert ("s" in summary["thresholds"]) == there
        assert all(({"tpr", "tnr", "macro_f1"} <= row.keys()) == there for row in summary["rows"])
        assert all("oracle_f1" not in row for row in summary["rows"])


def test_the_figure_shows_every_curve_and_the_threshold():
    points = operating_points(*parts(table()), "s", 5, 0.5)
    (panel, other) = thresholds_figure({"near": points, "far": points}, "s", 0.5).axes
    assert [line.get_label() for line in panel.lines] == ["TPR", "FPR", "macro F1", "95% of ID"]
    assert panel.lines[3].get_xdata() == [0.5, 0.5]
    assert [text.get_text() for text in other.get_legend().get_texts()] == ["TPR", "FPR", "macro F1", "95% of ID"]
    np.testing.assert_array_equal(panel.lines[2].get_ydata(), points["macro_f1"])
    low, high = panel.get_xlim()
    assert -10 < low < 0.5 < high < 10
