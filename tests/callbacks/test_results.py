"""Results over repeated drawings, and their table of images, against loops that ask scikit-learn and numpy."""

import dataclasses
import math

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score, roc_curve

from callbacks.metrics import PRESETS
from callbacks.results import HEADLINE, summarize, write_results
from callbacks.samples import Samples

K = 3
COUNTS = {"calibration": 40, "id": 60, "drawn": 50, "whole": 20}
METRICS = (*HEADLINE, "detection_accuracy", "cauroc", "oscr", "tpr", "tnr", "macro_f1")
GROUPS = {"drawn": "far", "whole": "near"}


def table(seed: int = 0, repeats: int = 4, count: int = 30) -> Samples:
    """Random scores, rounded so that some are tied; ids with gaps, as nothing says that they count from 0."""
    rng = np.random.default_rng(seed)
    names = tuple(COUNTS)
    split = np.repeat(np.arange(len(names)), list(COUNTS.values()))
    is_ood = split >= 2
    ids = np.concatenate([np.arange(size) * 3 for size in COUNTS.values()])
    drawn = [np.sort(rng.choice(COUNTS["drawn"], count, replace=False)) * 3 for _ in range(repeats)]
    return Samples(
        names,
        split,
        ids,
        labels=np.where(is_ood, -1, rng.integers(0, K, len(split))),
        predictions=rng.integers(0, K, len(split)),
        scores={name: np.round(rng.normal(is_ood, 1), 1) for name in ("one", "two")},
        repeats={"drawn": np.stack(drawn)},
    )


def reference(samples: Samples, name: str, ood_set: str, ids: np.ndarray) -> dict[str, float]:
    """Measure one drawing, by other means."""
    column, split = samples.scores[name], np.array(samples.splits)[samples.split]
    chosen = (split == "id") | ((split == ood_set) & np.isin(samples.ids, ids))
    scores, labels, guesses = column[chosen], samples.labels[chosen], samples.predictions[chosen]
    unknown = labels < 0
    fpr, tpr, _ = roc_curve(~unknown, -scores, drop_intermediate=False)
    right = labels == guesses
    threshold = np.quantile(column[split == "calibration"], 0.95, method="inverted_cdf")
    cauroc = roc_auc_score(unknown[unknown | right], scores[unknown | right])
    return {
        "auroc": roc_auc_score(unknown, scores),
        "aupr_in": average_precision_score(~unknown, -scores),
        "aupr_out": average_precision_score(unknown, scores),
        "fpr95": fpr[np.argmax(tpr >= 0.95)],
        "detection_accuracy": ((tpr + 1 - fpr) / 2).max(),
        "cauroc": cauroc,
        "oscr": cauroc * right[~unknown].mean(),
        "tpr": np.mean(scores[~unknown] <= threshold),
        "tnr": np.mean(scores[unknown] > threshold),
        "macro_f1": f1_score(
            np.where(unknown, K, labels), np.where(scores > threshold, K, guesses), average="macro", zero_division=0
        ),
    }


def only(samples: Samples, repeat: int) -> Samples:
    """Leave of the set ``drawn`` a single drawing, as if there were no other images."""
    split = np.array(samples.splits)[samples.split]
    keep = (split != "drawn") | np.isin(samples.ids, samples.repeats["drawn"][repeat])
    columns = {name: getattr(samples, name)[keep] for name in ("split", "ids", "labels", "predictions")}
    scores = {name: values[keep] for name, values in samples.scores.items()}
    return dataclasses.replace(samples, **columns, scores=scores, repeats={})


def test_a_row_over_drawings_holds_mean_and_sample_standard_deviation():
    samples = table()
    rows = summarize(samples, GROUPS, PRESETS["default"], K, replicates=0)["rows"]
    assert [(row["score"], row["ood_set"]) for row in rows] == [
        (score, ood_set) for score in ("one", "two") for ood_set in ("drawn", "whole")
    ]
    for row in rows:
        ood_set = row["ood_set"]
        whole = [samples.ids[samples.split == samples.splits.index(ood_set)]]
        values = [reference(samples, row["score"], ood_set, ids) for ids in samples.repeats.get(ood_set, whole)]
        for metric in METRICS:
            assert row[metric] == pytest.approx(np.mean([v[metric] for v in values]), abs=1e-12), metric
        if ood_set == "whole":
            assert row.keys() == {"score", "ood_set", "group", "id_count", "ood_count", *METRICS}
            assert row["ood_count"] == 20
            continue
        assert (row["ood_count"], row["repeats"], row["id_count"]) == (30, 4, 60)
        assert {key for key in row if key.endswith("_std")} == {f"{metric}_std" for metric in HEADLINE}
        for metric in HEADLINE:
            assert row[f"{metric}_std"] == pytest.approx(np.std([v[metric] for v in values], ddof=1), abs=1e-12)


def test_bounds_over_drawings_are_the_mean_of_those_of_each():
    samples = table()
    together = summarize(samples, GROUPS, PRESETS["default"], K, replicates=40)["rows"][0]
    alone = [summarize(only(samples, r), GROUPS, PRESETS["default"], K, replicates=40)["rows"][0] for r in range(4)]
    for metric in HEADLINE:
        for side in ("low", "high"):
            values = [row[f"{metric}_{side}"] for row in alone]
            assert together[f"{metric}_{side}"] == pytest.approx(np.mean(values), abs=1e-12)


def test_bounds_over_drawings_cover_the_true_auroc_at_least_as_often_as_they_say():
    truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 1) > N(0, 1))
    covered = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        split, zeros = np.repeat([0, 1], [60, 50]), np.zeros(110, dtype=int)
        repeats = {"drawn": np.stack([np.sort(rng.choice(50, 30, replace=False)) for _ in range(3)])}
        ids, scores = np.append(np.arange(60), np.arange(50)), {"s": rng.normal(split)}
        samples = Samples(("id", "drawn"), split, ids, zeros - split, zeros, scores, repeats)
        (row,) = summarize(samples, GROUPS, PRESETS["default"], K, replicates=100, confidence=0.8)["rows"]
        covered += row["auroc_low"] < truth < row["auroc_high"]
    assert covered / 60 > 0.7  # 0.8, less two standard errors


def test_group_means_are_over_sets_not_over_drawings():
    summary = summarize(table(), {"drawn": "far", "whole": "far"}, PRESETS["default"], K, replicates=0)
    values = [row["auroc"] for row in summary["rows"] if row["score"] == "two"]
    (mean,) = [mean for mean in summary["means"] if mean["score"] == "two"]
    assert mean["sets"] == 2
    assert mean["auroc"] == pytest.approx(np.mean(values))


def test_drawings_survive_the_files(tmp_path):
    samples = table()
    samples.save(tmp_path / "scores.npz")
    loaded = Samples.load(tmp_path / "scores.npz")
    assert loaded.repeats.keys() == loaded.of("drawn").repeats.keys() == {"drawn"}
    np.testing.assert_array_equal(loaded.repeats["drawn"], samples.repeats["drawn"])
    assert loaded.scores.keys() == {"one", "two"}
    for ids, drawing in zip(samples.repeats["drawn"], loaded.drawings("drawn"), strict=True):
        np.testing.assert_array_equal(drawing.ids, ids)
    (whole,) = loaded.drawings("whole")
    assert len(whole.ids) == 20
    summary = summarize(loaded, GROUPS, PRESETS["default"], K, replicates=0)
    write_results(tmp_path, summary)
    header, *lines = (tmp_path / "results.csv").read_text().splitlines()
    assert {"repeats", "auroc_std"} <= set(header.split(","))
    assert len(lines) == 4


def test_a_file_without_drawings_loads(tmp_path):
    samples = table()
    columns = {name: getattr(samples, name) for name in ("split", "ids", "labels", "predictions")}
    np.savez(
        tmp_path / "scores.npz", splits=np.array(samples.splits), **columns, **{"score/one": samples.scores["one"]}
    )
    assert Samples.load(tmp_path / "scores.npz").repeats == {}


def test_bounds_of_a_mean_cover_the_true_mean_over_sets_that_share_their_id_images():
    truth = 0.5 * (1 + math.erf(0.5))  # of both sets
    covered, widths = 0, []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        split, zeros = np.repeat([0, 1, 2], [60, 50, 50]), np.zeros(160, dtype=int)
        ids, scores = np.concatenate([np.arange(60), *[np.arange(50)] * 2]), {"s": rng.normal(split > 0)}
        samples = Samples(("id", "drawn", "whole"), split, ids, zeros - (split > 0), zeros, scores)
        groups = {"drawn": "far", "whole": "far"}
        summary = summarize(samples, groups, PRESETS["default"], K, replicates=100, confidence=0.8)
        (mean,), rows = summary["means"], summary["rows"]
        covered += mean["auroc_low"] < truth < mean["auroc_high"]
        widths.append([part["auroc_high"] - part["auroc_low"] for part in (mean, *rows)])
    assert 0.66 < covered / 60 < 0.93  # 0.8, two and a half standard errors around
    of_mean, *of_sets = np.mean(widths, axis=0)
    assert np.hypot(*of_sets) / 2 < of_mean < np.mean(of_sets)  # wider than if the sets shared nothing


def test_a_mean_over_drawings_has_no_bounds():
    for mean in summarize(table(), GROUPS, PRESETS["default"], K, replicates=20)["means"]:
        assert ("auroc_low" in mean) == (mean["group"] == "near")
    for mean in summarize(table(), GROUPS, PRESETS["default"], K, replicates=0)["means"]:
        assert "auroc_low" not in mean
