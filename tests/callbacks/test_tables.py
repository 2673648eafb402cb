import numpy as np
import pytest

from callbacks.metrics import PRESETS
from callbacks.results import HEADLINE
from callbacks.tables import describe, over_seeds, print_results

IMAGES = "10,000 ID test images (8f4b12); "
ALL = {"rule": "all", "count": None, "repeats": 1}


def run(
    name="seed0", auroc=0.5, std=None, preset="default", rule=("all", None, 1), protocol=None, outliers=None, lr=0.1
):
    row = {"score": "msp", "ood_set": "svhn", "group": "far"} | dict.fromkeys(HEADLINE, auroc)
    if std is None:
        row |= {f"{metric}_{side}": auroc for metric in HEADLINE for side in ("low", "high")}
    else:
        row |= {"repeats": rule[2]} | {f"{metric}_std": std for metric in HEADLINE}
    rules = vars(PRESETS[preset]) | {"preset": preset, "bootstrap_replicates": 0, "confidence": 0.95}
    return {
        "experiment": "heatmap/cifar10",
        "name": name,
        "method": "Heatmap",
        "protocol": protocol,
        "splits": {"id": {"size": 10_000, "fingerprint": "8f4b12aa"}},
        "configuration": {"model": {"lr": lr, "weights": f"run:a/b/{name}"}, "data": {"root": name}},
        "known": None,
        "subset": {"fraction": 1.0, "num_labels": None},
        "ood_subset": dict(zip(ALL, rule, strict=True)),
        "outliers": outliers,
        "metric_rules": rules,
        "id_accuracy": 0.9,
        "truncated": False,
        "rows": [row],
        "means": [{"score": "msp", "group": "far", "sets": 1} | dict.fromkeys(HEADLINE, auroc)],
    }


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (("all", None, 1), ""),
        (("first", 2000, 1), "OOD: first 2,000 of each set; "),
        (("random", 2000, 1), "OOD: a random draw of 2,000 of each set; "),
        (
            ("random", 2000, 5),
            "OOD: 5 random draws of 2,000 of each larger set (± over the draws, or over the seeds where there are "
            "several); ",
        ),
    ],
)
def test_a_caption_names_protocol_and_subset_where_there_are_any(rule, words):
    assert describe(run(rule=rule)).startswith(IMAGES + words + "FPR95: ")
    assert describe(run(rule=rule, protocol="heatmap")).startswith(IMAGES + "protocol: heatmap; " + words + "FPR95: ")


def test_over_drawings_the_table_shows_the_standard_deviation(capsys):
    print_results([run(auroc=0.5, std=0.0123, rule=("random", 2000, 5))])
    printed = capsys.readouterr().out
    assert printed.count("50.0 ± 1.2") == 2
    assert "5 random draws of 2,000" in printed


def test_the_standard_deviation_over_seeds_wins_over_that_of_drawings():
    runs = [run(f"seed{k}", auroc, std=0.25, rule=("random", 9, 5)) for k, auroc in enumerate((0.5, 0.6, 0.9))]
    ((row,),) = (joined["rows"] for joined in over_seeds(runs))
    assert row["auroc"] == pytest.approx(2 / 3)
    assert row["auroc_std"] == pytest.approx(np.std([0.5, 0.6, 0.9], ddof=1))
    assert "repeats" not in row


def test_what_does_not_compare_stands_in_tables_of_its_own(capsys):
    runs = [
        run("seed0", 0.5),
        run("seed1", 0.7, rule=("first", 9, 1)),
        run("seed2", 0.8, protocol="openood"),
        run("seed3", 0.6, preset="heatmap"),  # reads the metrics as the default does
    ]
    print_results(runs)
    printed = capsys.readouterr().out
    assert printed.count("OOD detection, %") == 3
    assert "55.0 ± 7.1" in printed


def with_f1(run, f1, tau_source=None):
    """As of a run whose images set a threshold; the files of earlier versions do not say which."""
    rules = {} if tau_source is None else {"tau_source": tau_source}
    rows = [row | {"macro_f1": f1} for row in run["rows"]]
    return run | {"rows": rows, "metric_rules": run["metric_rules"] | rules}


def test_the_f1_stands_in_the_table_where_there_is_one(capsys):
    print_results([run(), with_f1(run("lr", lr=0.2), 0.8125)])
    printed = capsys.readouterr().out
    assert "F1 ┃" in printed
    assert (printed.count("OOD detection, %"), printed.count(" 81.2 ")) == (1, 1)
    assert "where 95% of held-out ID training images are accepted" in " ".join(printed.split())
    print_results([run()])
    assert "F1 ┃" not in capsys.readouterr().out


def test_seeds_average_the_f1_where_all_have_one(capsys):
    runs = [with_f1(run("seed0"), 0.5, "id_val"), with_f1(run("seed1"), 0.7)]
    print_results(runs)
    assert "60.0 ± 14.1" in capsys.readouterr().out
    ((row,),) = (joined["rows"] for joined in over_seeds([*runs, run("seed2")]))
    assert "macro_f1" not in row


def test_thresholds_of_different_images_stand_in_tables_of_their_own(capsys):
    print_results([with_f1(run("seed0"), 0.5, "id_val"), with_f1(run("seed1"), 0.7, "test_known")])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.count("OOD detection, %") == 2
    assert printed.count("where 95% of ID test images are accepted") == 1
    assert "±" not in printed


def test_outliers_are_named(capsys):
    source = "/data/[old]/places"
    outliers = {"source": source, "size": 60, "feed": "paired", "fingerprint": "", "duplicates": None}
    print_results([run(), run("seed1", outliers=outliers)])
    printed = capsys.readouterr().out
    assert "seed0: ID accuracy 90.00%, outliers: none\n" in printed
    assert f"outliers: 60 images of {source}, paired\n" in printed
    print_results([run(outliers=outliers | {"duplicates": {"svhn": 7}})])
    assert "paired (7 of them also in svhn)\n" in capsys.readouterr().out


def test_runs_of_other_settings_are_no_seeds_of_each_other(capsys):
    runs = [run("seed0", 0.5), run("seed1", 0.7), run("lr", 0.9, lr=0.2)]
    assert [joined["rows"][0]["auroc"] for joined in over_seeds(runs)] == [pytest.approx(0.6), 0.9]
    print_results(runs)
    printed = capsys.readouterr().out
    assert "Heatmap seed0" in printed
    assert "Heatmap lr" in printed


def test_runs_on_other_id_images_stand_in_another_table(capsys):
    other = run("seed1") | {"splits": {"id": {"size": 10_000, "fingerprint": "00112233"}}}
    print_results([run(), other])
    assert capsys.readouterr().out.count("OOD detection, %") == 2


def test_a_set_near_to_one_and_far_from_another_has_a_row_for_each(capsys):
    other = run("lr", lr=0.2)
    other["rows"] = [row | {"group": "near"} for row in other["rows"]]
    print_results([run(), other])
    printed = capsys.readouterr().out
    assert (printed.count("svhn (far)"), printed.count("svhn (near)"), printed.count("msp")) == (1, 1, 2)


def test_a_caption_names_what_id_data_were_left_out():
    caption = describe(run() | {"known": 6, "subset": {"fraction": 0.125, "num_labels": 20}})
    assert caption.startswith(
        IMAGES + "open set: the first 6 classes are ID; 20 of the classes; 12.5% of the ID training images; "
    )


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("trainer", {"max_epochs": 3}),
        ("trainer", {"callbacks": [{"class_path": "some.Callback"}]}),
        ("evaluation", {"scores": {"knn": {"k": 5}}}),
        ("model", {"lr": 0.1, "weights": "weights/another.pt"}),
        ("model", {"lr": 0.1, "weights": "run:a/other/seed0"}),
    ],
)
def test_what_training_or_scores_differ_in_is_another_setting(part, value):
    other = run("seed1")
    other["configuration"] |= {part: value}
    assert len(over_seeds([run(), other])) == 2


@pytest.mark.parametrize(
    "pattern", ["run:a/b/seed{}", "run:a/b/seed{}@last", "run:a/b/mine_s{}", "openood/resnet18_s{}"]
)
def test_the_seed_of_the_weights_that_a_run_starts_from_makes_no_other_setting(pattern):
    runs = [run(f"seed{k}") for k in range(2)]
    for k, member in enumerate(runs):
        member["configuration"]["model"]["weights"] = pattern.format(k)
        member["configuration"] |= {"trainer": {"devices": k + 1, "logger": [k]}, "evaluation": {"bootstrap": k}}
    assert len(over_seeds(runs)) == 1


@pytest.mark.parametrize("pattern", ["poolformer_s{}", "timm/poolformer_s{}.sail_in1k", "run:a/s{}/seed0"])
def test_a_size_in_a_name_is_no_seed(pattern):
    runs = [run(f"seed{k}") for k in range(2)]
    for member, size in zip(runs, (12, 36), strict=True):
        member["configuration"]["model"] = {"name": pattern.format(size)}
    assert len(over_seeds(runs)) == 2


@pytest.mark.parametrize(
    "change",
    [
        {"splits": run()["splits"] | {"train": {"fingerprint": "1"}}},
        {"outliers": {"source": "x", "size": 1, "feed": "paired", "fingerprint": "1", "duplicates": None}},
        {"checkpoint": "best.ckpt"},
    ],
)
def test_other_images_in_training_or_another_kind_of_checkpoint_are_another_setting(change):
    outliers = {"source": "x", "size": 1, "feed": "paired", "fingerprint": "0", "duplicates": None}
    plain = {
        "splits": run()["splits"] | {"train": {"fingerprint": "0"}},
        "outliers": outliers,
        "checkpoint": "last.ckpt",
    }
    same, other = run("seed1") | plain, run("seed1") | plain | change
    assert len(over_seeds([run() | plain, same])) == 1
    assert len(over_seeds([run() | plain, other])) == 2


def test_over_seeds_means_bounds_and_accuracy_are_averaged_too():
    runs = [run("seed0", 0.5), run("seed1", 0.7)]
    runs[1]["id_accuracy"] = 0.8
    (joined,) = over_seeds(runs)
    assert joined["id_accuracy"] == pytest.approx(0.85)
    assert joined["id_accuracy_std"] == pytest.approx(np.std([0.8, 0.9], ddof=1))
    (mean,) = joined["means"]
    assert (mean["auroc"], mean["sets"]) == (pytest.approx(0.6), 1)
    assert joined["rows"][0]["auroc_low"] == pytest.approx(0.6)
    without = [member | {"id_accuracy": None} for member in runs]
    assert over_seeds(without)[0]["id_accuracy"] is None


def test_runs_with_other_rows_cannot_be_averaged():
    other = run("seed1")
    other["rows"] = [*other["rows"], *other["rows"]]
    with pytest.raises(ValueError, match="have different scores or OOD sets, they cannot be averaged"):
        over_seeds([run(), other])


def test_a_truncated_evaluation_stands_in_a_table_of_its_own(capsys):
    print_results([run(), run("seed1") | {"truncated": True}])
    printed = " ".join(capsys.readouterr().out.split())
    assert (printed.count("OOD detection, %"), printed.count("TRUNCATED: not all images were tested")) == (2, 1)
