"""The bounds against a bootstrap that redraws the scores themselves and asks scikit-learn and numpy."""

import math

import numpy as np
import pytest
from sklearn.metrics import auc, average_precision_score, precision_recall_curve, roc_auc_score, roc_curve

from callbacks import bootstrap as module
from callbacks.bootstrap import bootstrap, redraw
from callbacks.metrics import PRESETS, Ranking, auroc, headline, rank


def two_sets(seed: int = 0, known: int = 120, unknown: int = 90) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=known), rng.normal(1, size=unknown)


def sklearn_metrics(known: np.ndarray, unknown: np.ndarray) -> dict[str, dict[str, float]]:
    is_ood, scores = np.repeat([False, True], [len(known), len(unknown)]), np.concatenate([known, unknown])
    fpr_id, tpr_id, _ = roc_curve(~is_ood, -scores, drop_intermediate=False)
    fpr_ood, tpr_ood, _ = roc_curve(is_ood, scores, drop_intermediate=False)
    step = {
        "auroc": roc_auc_score(is_ood, scores),
        "aupr_in": average_precision_score(~is_ood, -scores),
        "aupr_out": average_precision_score(is_ood, scores),
    }
    trapezoid = {
        key: auc(*precision_recall_curve(labels, signed)[1::-1])
        for key, labels, signed in (("aupr_in", ~is_ood, -scores), ("aupr_out", is_ood, scores))
    }
    first = {
        side: fpr[np.argmax(tpr >= 0.95)] for side, fpr, tpr in (("id", fpr_id, tpr_id), ("ood", fpr_ood, tpr_ood))
    }
    return {
        "default": step | {"fpr95": first["id"]},
        "heat": step | {"fpr95": np.mean(unknown < np.percentile(known, 95))},
        "openood": step | trapezoid | {"fpr95": first["ood"]},
    }


@pytest.mark.parametrize("tied", [False, True])
def test_bounds_are_quantiles_of_naively_redrawn_sets(tied):
    known, unknown = (np.round(4 * scores) / 4 if tied else scores for scores in two_sets())
    rng, draws = np.random.default_rng(1), 300
    naive = [sklearn_metrics(rng.choice(known, len(known)), rng.choice(unknown, len(unknown))) for _ in range(draws)]
    for preset in naive[0]:
        bounds = bootstrap(rank(known, unknown), PRESETS[preset], 2000, confidence=0.8)
        assert list(bounds) == ["auroc", "aupr_in", "aupr_out", "fpr95"]
        for metric, pair in bounds.items():
            values = np.array([draw[preset][metric] for draw in naive])
            for bound, share in zip(pair, (0.1, 0.9), strict=True):
                # a share of a finite number of draws; the metrics take few values, hence from both sides
                error = 3.5 * math.sqrt(0.1 * 0.9 / draws)
                assert np.mean(values < bound - 1e-9) < share + error, (preset, metric)
                assert np.mean(values <= bound + 1e-9) > share - error, (preset, metric)


def test_bounds_cover_the_true_auroc_as_often_as_they_say():
    truth = 0.5 * (1 + math.erf(0.5))  # P(N(1, 1) > N(0, 1))
    covered = 0
    for seed in range(100):
        low, high = bootstrap(rank(*two_sets(seed, 60, 60)), PRESETS["default"], 150, confidence=0.8)["auroc"]
        covered += low < truth < high
    assert 0.66 < covered / 100 < 0.93


@pytest.mark.parametrize("preset", PRESETS)
def test_bounds_hold_the_point_value(preset):
    ranking = rank(*two_sets(3, 400, 300))
    values, bounds = headline(ranking, PRESETS[preset]), bootstrap(ranking, PRESETS[preset], 300)
    for metric, (low, high) in bounds.items():
        assert isinstance(low, float)
        assert 0 <= low < values[metric] < high <= 1


def test_more_confidence_and_fewer_samples_widen_the_bounds():
    widths = []
    for confidence, count in ((0.5, 400), (0.95, 400), (0.95, 50)):
        low, high = bootstrap(rank(*two_sets(0, count, count)), PRESETS["default"], 300, confidence)["auroc"]
        widths.append(high - low)
    assert widths[0] < widths[1] < widths[2]


def test_equal_seeds_give_equal_bounds():
    ranking, rules = rank(*two_sets()), PRESETS["default"]
    assert bootstrap(ranking, rules, 50, seed=3) == bootstrap(ranking, rules, 50, seed=3)
    assert bootstrap(ranking, rules, 50, seed=3) != bootstrap(ranking, rules, 50, seed=4)
    assert bootstrap(ranking, rules) == bootstrap(ranking, rules, 1000, 0.95, 0)


def test_each_side_is_redrawn_in_its_own_number(monkeypatch):
    ranking, seen = rank(*(np.round(scores) for scores in two_sets(0, 40, 7))), []

    def spy(redrawn, rules):
        seen.append(redrawn)
        return {"auroc": auroc(redrawn)}

    monkeypatch.setattr(module, "headline", spy)
    bootstrap(ranking, PRESETS["default"], 200)
    assert len(seen) == 200
    for redrawn in seen:
        assert isinstance(redrawn, Ranking)
        assert (redrawn.id_counts.sum(), redrawn.ood_counts.sum()) == (40, 7)
        assert not redrawn.id_counts[ranking.id_counts == 0].any()
        assert not redrawn.ood_counts[ranking.ood_counts == 0].any()
    mean = np.mean([redrawn.id_counts for redrawn in seen], axis=0)
    np.testing.assert_allclose(mean, ranking.id_counts, atol=1.2)


@pytest.mark.parametrize("preset", PRESETS)
def test_degenerate_sets_have_bounds(preset):
    one = bootstrap(rank([0.0], [1.0]), PRESETS[preset], 20)
    assert one == {"auroc": (1, 1), "aupr_in": (1, 1), "aupr_out": (1, 1), "fpr95": (0, 0)}
    constant = bootstrap(rank(np.zeros(5), np.zeros(5)), PRESETS[preset], 20)
    assert constant["auroc"] == (0.5, 0.5)
    assert constant["fpr95"] == ((0, 0) if preset == "heat" else (1, 1))


def test_senseless_requests_are_refused_in_words():
    ranking, rules = rank([0.0], [1.0]), PRESETS["default"]
    with pytest.raises(ValueError, match="at least one bootstrap replicate, got 0"):
        bootstrap(ranking, rules, 0)
    for confidence in (0, 1, 95):
        with pytest.raises(ValueError, match=r"share in \(0, 1\).*got"):
            bootstrap(ranking, rules, confidence=confidence)


def test_the_id_samples_of_a_replicate_are_the_same_for_every_ood_set(monkeypatch):
    rng, drawn = np.random.default_rng(0), []
    known = rng.normal(size=40)

    def spy(redrawn, rules):
        drawn[-1].append(np.repeat(redrawn.values, redrawn.id_counts))
        return {"auroc": auroc(redrawn)}

    monkeypatch.setattr(module, "headline", spy)
    for size in (7, 90):
        drawn.append([])
        redraw(rank(known, rng.normal(size=size)), PRESETS["default"], 20)
    np.testing.assert_array_equal(*drawn)
    assert not np.array_equal(drawn[0][0], drawn[0][1])
