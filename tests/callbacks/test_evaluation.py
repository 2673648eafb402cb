import dataclasses
import json

import numpy as np
import pytest
import torch
from pytorch_lightning import Trainer
from sklearn.metrics import average_precision_score, roc_auc_score

from backbones.digits_net import DigitsNet
from callbacks.compatibility import Compatibility
from callbacks.evaluation import OODEvaluation
from callbacks.results import summarize
from callbacks.samples import Samples
from datamodules.datamodule import OODDataModule
from datamodules.images import ArrayImages
from datamodules.sets import OODSet, Sets
from datamodules.splits import OODSubset, Subset
from experiments.verbs import metrics
from lightning_modules.classifier import Classifier
from lightning_modules.scores.gaussian import Mahalanobis
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.layered_mahalanobis import LayeredMahalanobis
from lightning_modules.scores.logits import MSP, Energy, MaxLogit
from lightning_modules.scores.odin import ODIN
from lightning_modules.scores.pca import PCA
from lightning_modules.scores.prototypes import KLMatching
from lightning_modules.scores.react import ReAct
from lightning_modules.scores.score import InputScore, Score
from lightning_modules.scores.vim import ViM

OOD_SIZES = {"a": 31, "b": 17, "c": 1, "d": 20, "e": 8, "f": 40}
TRAIN, TEST = 90, 50


class Pixels(OODDataModule):
    """Random images; the OOD sets are darker the later their name."""

    def __init__(self, ood_sizes=OOD_SIZES, **kwargs):
        super().__init__(batch_size=16, **({"mean": [0.5], "std": [0.5]} | kwargs))
        self.ood_sizes = ood_sizes

    def load(self):
        generator = torch.Generator().manual_seed(0)

        def images(size, ceiling=256):
            pixels = torch.randint(0, ceiling, (size, 1, 8, 8), generator=generator, dtype=torch.uint8)
            return ArrayImages(pixels, torch.arange(size) % 3, "random pixels")

        ood = {
            name: OODSet(images(size, 200 - 25 * index), "near" if index < 2 else "far")
            for index, (name, size) in enumerate(self.ood_sizes.items())
        }
        return Sets(images(TRAIN), images(TEST), ood, None, ["x", "y", "z"])


class WithOutliers(Pixels):
    def load(self):
        outliers = ArrayImages(torch.zeros(24, 1, 8, 8, dtype=torch.uint8), torch.full((24,), -1), "darkness")
        return dataclasses.replace(super().load(), outliers=outliers)


class TwoPass(Score):
    """Counts what it sees in each pass."""

    passes = 2

    def __init__(self):
        super().__init__()
        self.seen = [0, 0]

    def update(self, evidence, labels):
        self.seen[int(self.finished)] += len(labels)

    def forward(self, evidence):
        return evidence.logits.sum(1)


class Calibrated(InputScore):
    """Remembers what it is calibrated on, and that nothing was scored before."""

    passes, forwards, calibration_forwards = 1, 0, 3

    def __init__(self):
        super().__init__()
        self.fitted_on, self.images, self.labels = 0, [], []

    def update(self, evidence, labels):
        assert not self.images
        self.fitted_on += len(labels)

    def calibrate(self, module, images, labels):
        assert not module.training
        self.images.append(images)
        self.labels.append(labels)

    def forward(self, module, images):
        return images.sum((1, 2, 3))


class Broken(Score):
    """NaN for dark images."""

    def forward(self, evidence):
        return torch.where(evidence.logits[:, 0] > -1e9, torch.nan, 0.0)


class WithOwnScore(Classifier):
    def forward(self, images):
        evidence = super().forward(images)
        return evidence._replace(scores={"own": -images.mean((1, 2, 3))})


def module(cls=Classifier, **kwargs):
    torch.manual_seed(0)
    backbone = DigitsNet(num_classes=3, **kwargs)
    return cls(backbone, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1)).eval()


def one_pass_scores():
    scores = [MSP(), MaxLogit(), Energy(), KLMatching(), Mahalanobis(), GMMEnergy(), KNN(k=5), ReAct()]
    return {type(score).__name__: score for score in scores}


def evaluate(evaluation, model=None, data=None, **kwargs):
    model, data = model or module(), data or Pixels()
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(**options, inference_mode=False, callbacks=[Compatibility(), evaluation], **kwargs)
    trainer.test(model, data, verbose=False)
    return evaluation


@pytest.fixture
def count_images(monkeypatch):
    seen = []
    stem = DigitsNet.stem
    monkeypatch.setattr(DigitsNet, "stem", lambda self, images: seen.append(len(images)) or stem(self, images))
    return seen


def test_eight_scores_on_six_sets_take_one_forward_for_each_image(count_images):
    evaluation = evaluate(OODEvaluation(one_pass_scores(), bootstrap=0, figures=False))
    images = TRAIN + TEST + sum(OOD_SIZES.values())
    assert sum(count_images) == images
    assert evaluation.results["forwards"] == {"images": images}
    assert len(evaluation.results["rows"]) == 8 * 6


def test_a_gradient_score_declares_and_takes_two_more(count_images):
    scored = TEST + sum(OOD_SIZES.values())
    evaluation = evaluate(OODEvaluation({"msp": MSP(), "odin": ODIN()}, bootstrap=0, figures=False))
    assert sum(count_images) == scored + 2 * scored
    assert evaluation.results["forwards"] == {"images": scored, "odin": 2 * scored}


@pytest.mark.parametrize("truncated", [False, True])
def test_calibration_sees_the_held_out_images_before_any_is_scored(truncated, count_images):
    data, score = Pixels(val_split=0.2), Calibrated()
    evaluation = OODEvaluation({"calibrated": score, "msp": MSP()}, bootstrap=0, figures=False)
    evaluate(evaluation, data=data, **({"limit_test_batches": 1} if truncated else {}))
    assert score.fitted_on == (16 if truncated else TRAIN - 18)
    held_out = [data.on_after_batch_transfer(batch, 0) for batch in data.val_dataloader()][: 1 if truncated else None]
    images, labels = (torch.cat(parts) for parts in list(zip(*held_out, strict=True))[:2])
    assert len(images) == (16 if truncated else 18)
    assert torch.equal(torch.cat(score.images), images)
    assert torch.equal(torch.cat(score.labels), labels)
    np.testing.assert_allclose(
        evaluation.samples.of("calibration").scores["calibrated"], images.sum((1, 2, 3)).numpy(), rtol=1e-5
    )
    assert evaluation.results["forwards"] == {"images": sum(count_images), "calibrated": 3 * len(images)}
    seen = len(score.images)
    evaluate(evaluation, data=Pixels())  # once calibrated, it needs no held-out images
    assert len(score.images) == seen
    assert evaluation.results["forwards"]["calibrated"] == 0


def test_calibration_needs_images_that_are_held_out():
    with pytest.raises(ValueError, match=r"^taps: to be calibrated .* none are: set val_split"):
        evaluate(OODEvaluation({"taps": LayeredMahalanobis(["layer1"]), "msp": MSP()}, bootstrap=0))


def test_what_a_calibration_lacks_is_named():
    evaluation = OODEvaluation({"taps": LayeredMahalanobis(["layer1"])}, bootstrap=0)
    with pytest.raises(ValueError, match="calibrating taps on the held-out ID images: it takes at least 4"):
        evaluate(evaluation, data=Pixels(val_split=0.03))


def test_layers_take_the_forwards_that_the_record_counts(count_images):
    score = LayeredMahalanobis(["stem", "layer2", "penultimate"], magnitudes=(0.01, 0.1))
    data = Pixels(val_split=0.2)
    evaluation = evaluate(OODEvaluation({"taps": score}, bootstrap=0, figures=False), data=data)
    scored = 18 + TEST + sum(OOD_SIZES.values())
    forwards = 18 * (1 + 2 * (1 + 3 * 2)) + scored * (1 + 3)
    assert evaluation.results["forwards"] == {"images": TRAIN - 18 + scored, "taps": forwards}
    assert sum(count_images) == sum(evaluation.results["forwards"].values())
    assert np.isfinite(evaluation.samples.scores["taps"]).all()


def test_nested_scores_get_as_many_passes_as_they_need(count_images):
    scores = {"vim": ViM(), "pca": PCA(PCA(KNN(k=5), components=8), components=16, whiten=True)}
    evaluation = evaluate(OODEvaluation(scores, bootstrap=0, figures=False))
    assert sum(count_images) == 3 * TRAIN + TEST + sum(OOD_SIZES.values())
    assert all(score.fitted for score in scores.values())
    assert len(evaluation.samples.ids) == TEST + sum(OOD_SIZES.values())


def test_fitted_scores_need_no_training_image(count_images):
    evaluation = OODEvaluation(one_pass_scores(), bootstrap=0, figures=False)
    first = evaluate(evaluation).results["rows"]
    count_images.clear()
    assert evaluate(evaluation).results["rows"] == first
    assert sum(count_images) == TEST + sum(OOD_SIZES.values())


def test_a_score_of_two_passes_sees_the_training_images_twice():
    score = TwoPass()
    evaluate(OODEvaluation({"two": score, "knn": KNN(k=5)}, bootstrap=0, figures=False))
    assert score.seen == [TRAIN, TRAIN]


def test_numbers_equal_scikit_learn_on_the_scores_of_the_record(tmp_path):
    evaluation = evaluate(OODEvaluation(one_pass_scores(), bootstrap=50, folder=str(tmp_path)))
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["rows"] == evaluation.results["rows"]
    with np.load(tmp_path / "scores.npz") as stored:
        split = stored["splits"][stored["split"]]
        for row in results["rows"]:
            rows = (split == "id") | (split == row["ood_set"])
            labels, values = stored["labels"][rows] < 0, stored[f"score/{row['score']}"][rows]
            assert row["auroc"] == pytest.approx(roc_auc_score(labels, values), abs=1e-12)
            assert row["aupr_out"] == pytest.approx(average_precision_score(labels, values), abs=1e-12)
            assert row["aupr_in"] == pytest.approx(average_precision_score(~labels, -values), abs=1e-12)
            assert row["auroc_low"] <= row["auroc"] <= row["auroc_high"]
        accuracy = (stored["labels"] == stored["predictions"])[split == "id"].mean()
    assert results["id_accuracy"] == pytest.approx(accuracy)
    near = [row["fpr95"] for row in results["rows"] if row["score"] == "MSP" and row["group"] == "near"]
    (mean,) = [mean for mean in results["means"] if mean["score"] == "MSP" and mean["group"] == "near"]
    assert mean["sets"] == 2
    assert mean["fpr95"] == pytest.approx(np.mean(near))
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"roc.png", *(f"histogram_{name}.png" for name in one_pass_scores())}


def test_scores_do_not_depend_on_the_batch_or_on_what_else_is_scored():
    alone = evaluate(OODEvaluation({"gmm": GMMEnergy()}, bootstrap=0, figures=False)).samples
    among = evaluate(
        OODEvaluation({"gmm": GMMEnergy(), "odin": ODIN(), "react": ReAct()}, bootstrap=0, figures=False),
        data=Pixels(eval_batch_size=7),
    ).samples
    np.testing.assert_allclose(alone.scores["gmm"], among.scores["gmm"], rtol=1e-4)


def test_the_methods_own_scores_join():
    samples = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False), module(WithOwnScore)).samples
    assert set(samples.scores) == {"own", "msp"}
    darker = samples.of("f").scores["own"].mean()
    assert darker > samples.of("id").scores["own"].mean()


def test_held_out_images_set_the_thresholds_and_are_no_test_images():
    evaluation = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False), data=Pixels(val_split=0.2))
    held_out = evaluation.samples.of("calibration").scores["msp"]
    assert len(held_out) == 18
    accepted = (held_out <= evaluation.results["thresholds"]["msp"]).mean()
    assert accepted >= 0.95
    assert (held_out < evaluation.results["thresholds"]["msp"]).mean() < 0.95
    assert {row["id_count"] for row in evaluation.results["rows"]} == {TEST}


def test_known_test_images_set_the_thresholds_where_that_is_asked_for(tmp_path, capsys):
    evaluation = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False, folder=str(tmp_path)))
    assert evaluation.results["metric_rules"]["tau_source"] == "id_val"
    assert evaluation.results["thresholds"] == {}
    assert not any("macro_f1" in row for row in evaluation.results["rows"])
    optimistic = evaluate(
        OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False, tau_source="test_known", folder=str(tmp_path / "t"))
    )
    known = optimistic.samples.of("id").scores["msp"]
    tau = optimistic.results["thresholds"]["msp"]
    assert (known <= tau).mean() >= 0.95 > (known < tau).mean()
    metrics([str(tmp_path), "--tau_source", "test_known"])
    *again, _ = capsys.readouterr().out.splitlines()  # the last line names the folder
    metrics([str(tmp_path / "t")])
    assert again == capsys.readouterr().out.splitlines()[:-1]
    printed = " ".join(" ".join(again).split())
    assert "where 95% of ID test images are accepted" in printed
    assert all(f"{100 * row['macro_f1']:.1f} " in printed for row in optimistic.results["rows"])
    metrics([str(tmp_path)])
    assert "F1 ┃" not in capsys.readouterr().out


def test_thresholds_are_left_as_table_and_figure_and_go_with_a_later_evaluation(tmp_path):
    options = {"bootstrap": 0, "tau_source": "test_known", "folder": str(tmp_path)}
    sizes = {"a": 31, "c": 1}
    results = evaluate(OODEvaluation({"msp": MSP()}, thresholds=True, **options), data=Pixels(sizes)).results
    lines = (tmp_path / "thresholds.csv").read_text().splitlines()
    assert lines[0] == "score,ood_set,threshold,tpr,fpr,macro_f1"
    assert {line.split(",")[1] for line in lines[1:]} == sizes.keys()
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures == {"roc.png", "histogram_msp.png", "thresholds_msp.png"}
    assert all(row["oracle_f1"] >= row["macro_f1"] for row in results["rows"])
    evaluate(OODEvaluation({"msp": MSP()}, **options), data=Pixels(sizes))
    assert not (tmp_path / "thresholds.csv").exists()
    assert not (tmp_path / "figures" / "thresholds_msp.png").exists()


def test_an_unknown_source_of_thresholds_is_refused():
    with pytest.raises(ValueError, match="tau_source is id_val or test_known, not 'test'"):
        OODEvaluation({"msp": MSP()}, tau_source="test")


def test_nan_names_the_score_and_the_set():
    with pytest.raises(ValueError, match=r"broken on a, ID: 50 of 50 scores are NaN"):
        evaluate(OODEvaluation({"broken": Broken()}, bootstrap=0, figures=False))


def test_a_truncated_evaluation_says_so():
    whole = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False), limit_test_batches=100)
    cut = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False), limit_test_batches=1)
    assert not whole.results["truncated"]
    assert cut.results["truncated"]
    assert len(cut.samples.of("id").ids) == 16


def test_an_image_in_several_drawings_is_scored_once_and_counts_in_each(tmp_path, count_images, capsys):
    data = Pixels(ood_subset=OODSubset("random", 12, 3), val_split=0.2)
    evaluation = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=20, figures=False, folder=str(tmp_path)), data=data)
    assert sum(count_images) == TEST + TRAIN // 5 + sum(data.sizes[name] for name in OOD_SIZES)
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["ood_subset"] == {"rule": "random", "count": 12, "repeats": 3}
    rows = {row["ood_set"]: row for row in results["rows"]}
    assert rows.keys() == OOD_SIZES.keys()
    with np.load(tmp_path / "scores.npz") as stored:
        names, columns = stored["splits"].tolist(), {name: stored[name] for name in stored.files}
    known = columns["score/msp"][columns["split"] == names.index("id")]
    for name, row in rows.items():
        whole = OOD_SIZES[name] <= 12
        assert ("repeats" in row, "auroc_std" in row, f"repeats/{name}" in columns) == (not whole,) * 3
        assert row["ood_count"] == (OOD_SIZES[name] if whole else 12)
        if whole:
            continue
        in_set = columns["split"] == names.index(name)
        score_of = dict(zip(columns["ids"][in_set], columns["score/msp"][in_set], strict=True))
        assert [ids.tolist() for ids in columns[f"repeats/{name}"]] == [ids.tolist() for ids in data.repeats[name]]
        truth = np.repeat([0, 1], [TEST, 12])
        values = [
            roc_auc_score(truth, np.append(known, [score_of[id_] for id_ in ids])) for ids in columns[f"repeats/{name}"]
        ]
        assert row["repeats"] == 3
        assert row["auroc"] == pytest.approx(np.mean(values), abs=1e-12)
        assert row["auroc_std"] == pytest.approx(np.std(values, ddof=1), abs=1e-12)
    again = summarize(Samples.load(tmp_path / "scores.npz"), data.groups, evaluation.rules, 3, replicates=20)
    assert again["rows"] == results["rows"]
    metrics([str(tmp_path), "--rules", "openood", "--bootstrap", "0"])
    printed = capsys.readouterr().out
    assert f"{100 * rows['a']['auroc']:.1f} ± {100 * rows['a']['auroc_std']:.1f}" in printed
    assert "OOD: 3 random draws of 12 of each larger set" in printed


def test_a_truncated_evaluation_has_no_drawings():
    data = Pixels(ood_subset=OODSubset("random", 12, 3), eval_batch_size=20)
    cut = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False), data=data, limit_test_batches=1)
    assert data.sizes["f"] > 20 >= data.sizes["b"]
    rows = {row["ood_set"]: row for row in cut.results["rows"]}
    assert (rows["f"]["ood_count"], "repeats" in rows["f"]) == (20, False)
    assert (rows["b"]["ood_count"], rows["b"]["repeats"]) == (12, 3)


@pytest.mark.parametrize("ood_subset", [OODSubset(), OODSubset("first", 12), OODSubset("random", 12)])
def test_without_repeats_a_row_has_no_standard_deviation(ood_subset):
    evaluation = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False), data=Pixels(ood_subset=ood_subset))
    assert evaluation.samples.repeats == {}
    assert not {key for row in evaluation.results["rows"] for key in row if key == "repeats" or key.endswith("_std")}
    assert evaluation.results["rows"][0]["ood_count"] == (ood_subset.count or OOD_SIZES["a"])


def test_the_record_says_what_data_it_is_about():
    plain = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False)).results
    keys = ("protocol", "known", "subset", "ood_subset", "outliers")
    everything = {"fraction": 1.0, "num_labels": None}
    all_images = {"rule": "all", "count": None, "repeats": 1}
    assert [plain[key] for key in keys] == [None, None, everything, all_images, None]

    options = {"known": 2, "subset": Subset(fraction=0.5), "ood_subset": OODSubset("first", 5)}
    data = WithOutliers(**options, outlier_feed="paired")
    data.protocol = "heatmap"
    torch.manual_seed(0)
    classifier = Classifier(DigitsNet(num_classes=2), lambda parameters: torch.optim.SGD(parameters, 0.1))
    special = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False), classifier, data).results
    outliers = special.pop("outliers")
    assert (outliers["source"], outliers["size"], outliers["feed"]) == ("darkness", 24, "paired")
    first = {"rule": "first", "count": 5, "repeats": 1}
    assert [special[key] for key in keys[:-1]] == ["heatmap", 2, {"fraction": 0.5, "num_labels": None}, first]


def test_the_record_names_checkpoint_splits_and_no_outliers(tmp_path):
    results = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False, folder=str(tmp_path))).results
    assert results["checkpoint"] is None
    assert results["outliers"] is None
    assert results["splits"]["a"]["size"] == OOD_SIZES["a"]
    assert len({split["fingerprint"] for split in results["splits"].values()}) == 2 + len(
        OOD_SIZES
    )  # fit is all of train
    assert results["method"] == "Classifier"


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ({"num_classes": 4}, {}, "DigitsNet has 4 classes, the ID data of Pixels 3"),
        ({"input_shape": (1, 12, 12)}, {}, r"reads images of shape \(1, 12, 12\).*serves \(1, 8, 8\)"),
        ({"input_shape": (3, 8, 8)}, {}, r"\(3, 8, 8\).*\(1, 8, 8\)"),
        ({"mean": [0.5], "std": [0.5]}, {}, "normalised twice"),
        ({}, {"mean": None, "std": None}, "nobody normalises"),
    ],
)
def test_data_and_network_that_do_not_fit_are_told_apart_in_words(model, data, message):
    torch.manual_seed(0)
    network = DigitsNet(**({"num_classes": 3} | model))
    classifier = Classifier(network, optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1))
    with pytest.raises(ValueError, match=message):
        evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0), classifier, Pixels(**data))


def test_the_record_says_what_an_image_costs():
    evaluation = evaluate(OODEvaluation({"msp": MSP(), "odin": ODIN()}, bootstrap=0, figures=False))
    times = evaluation.results["milliseconds"]
    assert times.keys() == {"network", "msp", "odin"}
    assert 0 < times["msp"] < times["odin"]  # which takes passes of its own
    assert evaluation.results["parameters"] == sum(parameter.numel() for parameter in module().parameters())


def test_an_unknown_preset_lists_the_known():
    with pytest.raises(ValueError, match="openood"):
        OODEvaluation({"msp": MSP()}, rules="openod")


def test_samples_survive_the_file_and_a_damaged_file_is_named(tmp_path):
    samples = evaluate(OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False)).samples
    samples.save(tmp_path / "scores.npz")
    loaded = Samples.load(tmp_path / "scores.npz")
    assert loaded.splits == samples.splits
    np.testing.assert_array_equal(loaded.scores["msp"], samples.scores["msp"])
    (tmp_path / "scores.npz").write_bytes((tmp_path / "scores.npz").read_bytes()[:200])
    with pytest.raises(ValueError, match=r"scores\.npz is not a readable"):
        Samples.load(tmp_path / "scores.npz")
    with pytest.raises(ValueError, match="no split 'zz' here; there are id, a"):
        samples.of("zz")
