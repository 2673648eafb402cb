"""Every metric against scikit-learn, numpy, a scan of all thresholds, or a number worked out by hand."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from sklearn.metrics import (
    accuracy_score,
    auc,
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    precision_recall_curve,
    roc_auc_score,
    roc_curve,
)

from callbacks.metrics import (
    PRESETS,
    MetricRules,
    OODMetrics,
    Ranking,
    aupr,
    auroc,
    cauroc,
    detection_accuracy,
    fpr_at_tpr,
    headline,
    macro_f1,
    metric_rules,
    oscr,
    rank,
    threshold_at_tpr,
)

Pair = tuple[np.ndarray, np.ndarray]


def exactly(value: float):
    return pytest.approx(value, rel=0, abs=1e-12)


def pairs() -> Iterator[tuple[str, Pair]]:
    for seed, (known, unknown) in enumerate([(200, 300), (57, 19), (5, 1000), (1000, 5), (10, 10), (1, 1), (1, 50)]):
        rng = np.random.default_rng(seed)
        smooth = rng.normal(size=known), rng.normal(1, 1.5, size=unknown)
        size = f"{known}-{unknown}"
        yield f"smooth-{size}", smooth
        yield f"tied-{size}", (np.round(smooth[0] * 8) / 8, np.round(smooth[1] * 8) / 8)
        yield f"coarse-{size}", (np.round(smooth[0]), np.round(smooth[1]))
        yield f"constant-{size}", (np.full(known, 0.3), np.full(unknown, 0.3))
        yield f"large-{size}", (300 + smooth[0], 300 + smooth[1])
        yield f"large_negative-{size}", (-300 + smooth[0], -300 + smooth[1])
        yield f"tiny-{size}", (1e-30 * smooth[0], 1e-30 * smooth[1])
        yield f"separated-{size}", (smooth[0] - 100, smooth[1] + 100)
        yield f"reversed-{size}", (smooth[0] + 100, smooth[1] - 100)


PAIRS = dict(pairs())


@pytest.fixture(params=PAIRS.values(), ids=PAIRS.keys())
def pair(request) -> Pair:
    return request.param


def as_binary(pair: Pair, positive: str) -> Pair:
    """Labels with 1 = positive, and scores that are high for the positive side: what scikit-learn reads."""
    is_ood = np.repeat([0, 1], [len(pair[0]), len(pair[1])])
    scores = np.concatenate(pair)
    return (is_ood, scores) if positive == "ood" else (1 - is_ood, -scores)


def test_auroc_equals_sklearn(pair):
    expected = roc_auc_score(*as_binary(pair, "ood"))
    assert auroc(rank(*pair)) == exactly(expected)
    assert auroc(rank(-pair[0], -pair[1])) == exactly(1 - expected)
    assert auroc(rank(pair[1], pair[0])) == exactly(1 - expected)


@pytest.mark.parametrize("positive", ["id", "ood"])
def test_aupr_equals_sklearn(pair, positive):
    labels, scores = as_binary(pair, positive)
    precision, recall, _ = precision_recall_curve(labels, scores)
    ranking = rank(*pair)
    assert aupr(ranking, positive) == exactly(average_precision_score(labels, scores))
    assert aupr(ranking, positive, "trapezoid") == exactly(auc(recall, precision))


@pytest.mark.parametrize("positive", ["id", "ood"])
def test_first_rule_is_the_first_point_of_the_roc_curve(pair, positive):
    labels, scores = as_binary(pair, positive)
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    found, ranking = np.rint(tpr * labels.sum()).astype(int), rank(*pair)
    for percent in (1, 7, 50, 80, 95, 99, 100):
        expected = fpr[np.argmax(100 * found >= percent * labels.sum())]
        assert fpr_at_tpr(ranking, percent / 100, positive) == exactly(expected)


@pytest.mark.parametrize("positive", ["id", "ood"])
def test_closest_rule_equals_a_scan_of_all_thresholds(pair, positive):
    labels, scores = as_binary(pair, positive)
    total, ranking = int(labels.sum()), rank(*pair)
    points = [(0, 0)]
    for threshold in -np.unique(-scores):
        if points[-1][0] < total:  # the first threshold of recall 1 ends the curve
            passed = labels[scores >= threshold]
            points.append((int(passed.sum()), int((1 - passed).sum())))
    for percent in (1, 30, 50, 95, 100):
        # nearest recall, then the larger recall, then the most permissive threshold
        _, _, misses = min((abs(100 * hit - percent * total), -hit, -miss) for hit, miss in points)
        assert fpr_at_tpr(ranking, percent / 100, positive, "closest") == exactly(-misses / (len(labels) - total))


def test_closest_rule_worked_out_by_hand():
    # 10 ID scores: recalls 0.9 and 1.0 are equally near to 0.95, the larger counts, at its strictest threshold
    assert fpr_at_tpr(rank(range(10), [8.5, 9.0, 9.5, 20.0]), rule="closest") == 2 / 4
    # 30 ID scores: 29 / 30 is nearer than 28 / 30; 28.5 is accepted too, because no ID score lies between 28 and 29
    ranking = rank(range(30), [27.5, 28.0, 28.5, 40.0])
    assert fpr_at_tpr(ranking, rule="closest") == 3 / 4
    assert fpr_at_tpr(ranking, rule="first") == 2 / 4
    # 4 ID scores: 1 / 4 is nearer to 0.3 than 2 / 4, so the rule may fall below the target; "first" may not
    ranking = rank([1.0, 3.0, 5.0, 7.0], [2.0, 4.0])
    assert fpr_at_tpr(ranking, 0.3, rule="closest") == 1 / 2
    assert fpr_at_tpr(ranking, 0.6, rule="closest") == 2 / 2
    assert fpr_at_tpr(ranking, 0.1, rule="closest") == 0
    # 1 ID score: separation stays perfect
    assert fpr_at_tpr(rank([0.0], [1.0, 2.0]), rule="closest") == 0


def test_percentile_rule_equals_numpy(pair):
    for percent in (5, 50, 95, 100):
        expected = np.mean(pair[1] < np.percentile(pair[0], percent))
        assert fpr_at_tpr(rank(*pair), percent / 100, rule="percentile") == exactly(expected)


def test_percentile_is_interpolated_and_strict():
    ranking = rank(range(101), [94.0, 95.0, 95.0, 96.0])
    assert fpr_at_tpr(ranking, rule="percentile") == 1 / 4  # tau is 95 itself
    assert fpr_at_tpr(ranking) == 3 / 4
    ranking = rank(range(100), [94.04, 94.06])
    assert fpr_at_tpr(ranking, rule="percentile") == 1 / 2  # tau is 94.05


def test_percentile_rule_orders_infinite_scores_like_any_other():
    inf = np.inf
    for known in ([0.0, inf], [-inf, 0.0], [-inf, inf]):
        assert fpr_at_tpr(rank(known, [-inf, inf]), rule="percentile") == 1 / 2
    for known in (inf, -inf):
        assert fpr_at_tpr(rank([known] * 3, [known, 0.0]), rule="percentile") == (1 / 2 if known > 0 else 0)


@pytest.mark.parametrize("count", [1, 3, 20, 60, 100, 1000, 10_000])
def test_a_percentage_of_n_samples_is_never_off_by_one(count):
    ranking = rank(range(count), range(count))
    for percent in range(1, 101):
        needed = -(-percent * count // 100)
        assert threshold_at_tpr(np.arange(count), percent / 100) == needed - 1
        assert fpr_at_tpr(ranking, percent / 100) == needed / count
        assert fpr_at_tpr(ranking, percent / 100, "ood") == needed / count


def test_threshold_is_the_smallest_that_accepts_enough(pair):
    known = pair[0]
    threshold = threshold_at_tpr(known)
    assert threshold in known
    assert 20 * np.sum(known <= threshold) >= 19 * len(known)
    assert 20 * np.sum(known < threshold) < 19 * len(known)


def test_detection_accuracy_equals_a_scan_of_all_thresholds(pair):
    labels, scores = as_binary(pair, "ood")
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    assert detection_accuracy(rank(*pair)) == exactly(max(tpr + 1 - fpr) / 2)
    if len(scores) < 100:
        flagged = [scores > threshold for threshold in np.append(-np.inf, scores)]
        assert detection_accuracy(rank(*pair)) == exactly(max(balanced_accuracy_score(labels, f) for f in flagged))


def test_values_without_samples_change_nothing(pair):
    ranking = rank(*pair)
    rng = np.random.default_rng(1)
    places = np.sort(rng.choice(3 * len(ranking.values) + 2, len(ranking.values), replace=False) + 1)
    values = np.interp(np.arange(places[-1] + 3), places, ranking.values, left=-1e3, right=1e3)
    padded = Ranking(values, *(np.zeros(len(values), dtype=np.int64) for _ in range(2)))
    padded.id_counts[places], padded.ood_counts[places] = ranking.id_counts, ranking.ood_counts
    for rules in PRESETS.values():
        assert headline(padded, rules) == pytest.approx(headline(ranking, rules), rel=0, abs=1e-12)
    assert detection_accuracy(padded) == detection_accuracy(ranking)


def test_only_the_order_of_the_scores_counts():
    known, unknown = PAIRS["tied-200-300"]
    for rules in (rules for name, rules in PRESETS.items() if name != "heat"):
        expected = headline(rank(known, unknown), rules)
        for increasing in (np.exp, np.arctan, lambda x: 1e-6 * x - 400, lambda x: x**3):
            assert headline(rank(increasing(known), increasing(unknown)), rules) == expected
        low, high = np.unique(np.concatenate([known, unknown]))[[0, -1]]
        stretched = (np.where(s == low, -np.inf, np.where(s == high, np.inf, s)) for s in (known, unknown))
        assert headline(rank(*stretched), rules) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_perfect_and_reversed_separation(preset):
    rng = np.random.default_rng(0)
    known, unknown = rng.uniform(0, 1, 200), rng.uniform(2, 3, 300)
    good, bad = headline(rank(known, unknown), PRESETS[preset]), headline(rank(unknown, known), PRESETS[preset])
    assert good == {"auroc": 1, "aupr_in": 1, "aupr_out": 1, "fpr95": 0}
    assert (bad["auroc"], bad["fpr95"]) == (0, 1)
    assert detection_accuracy(rank(known, unknown)) == 1


def test_the_worked_example_of_every_rule():
    ranking = rank(np.arange(100.0), np.array([94.0, 95.0, 50.0, 200.0]))
    for rule in ("first", "closest", "percentile"):
        assert fpr_at_tpr(ranking, rule=rule) == 0.5
    # OOD positive: the strictest threshold that flags 4 of 4 is 50, and 50 of 100 ID scores are that large
    assert fpr_at_tpr(ranking, positive="ood") == 0.5
    assert auroc(ranking) == exactly((94.5 + 95.5 + 50.5 + 100) / 400)


def test_two_heat_values_that_leave_nothing_to_choose():
    # 90% of ID and half of OOD have no heat at all: 95% of ID is accepted only together with everything
    known, unknown = np.repeat([0.0, 0.1], [900, 100]), np.repeat([0.0, 0.1], [50, 50])
    for scale in (1, 1e-12):
        assert fpr_at_tpr(rank(scale * known, scale * unknown)) == 1
    assert fpr_at_tpr(rank(np.zeros(900), np.zeros(100))) == 1


@pytest.mark.parametrize("count", [1, 19, 20, 21, 100, 999])
def test_first_rule_is_the_n_over_20th_score_of_the_reversed_order(count):
    rng = np.random.default_rng(count)
    known, unknown = rng.normal(size=count), rng.normal(size=500)
    tau = np.sort(-known)[count // 20]
    assert fpr_at_tpr(rank(known, unknown)) == np.mean(-unknown >= tau)


def test_first_rule_is_0_only_where_no_ood_score_reaches_the_threshold(pair):
    known, unknown = pair
    accepted = -unknown >= np.sort(-known)[len(known) // 20]
    assert fpr_at_tpr(rank(known, unknown)) == exactly(accepted.mean())
    assert (fpr_at_tpr(rank(known, unknown)) == 0) == (not accepted.any())


def test_random_scores_give_chance():
    rng = np.random.default_rng(0)
    chance = headline(rank(rng.random(10_000), rng.random(2_000)), PRESETS["heatmap"])
    assert chance == pytest.approx({"auroc": 0.5, "aupr_in": 5 / 6, "aupr_out": 1 / 6, "fpr95": 0.95}, abs=0.025)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_rank_reads_tensors_of_any_float_type(dtype):
    known, unknown = torch.tensor([1.5, 0.5, 1.5], dtype=dtype), torch.tensor([1.5, 2.0], dtype=dtype)
    ranking = rank(known.requires_grad_(), unknown)
    assert ranking.values.dtype == np.float64
    np.testing.assert_array_equal(ranking.values, [0.5, 1.5, 2.0])
    np.testing.assert_array_equal(ranking.id_counts, [1, 2, 0])
    np.testing.assert_array_equal(ranking.ood_counts, [0, 1, 1])
    assert threshold_at_tpr(known) == 1.5


def test_rank_keeps_float64_apart():
    assert auroc(rank(np.array([1.0]), np.array([1.0 + 1e-15]))) == 1


def test_rank_refuses_in_words():
    fine = np.zeros(3)
    with pytest.raises(ValueError, match="energy on svhn, ID: 2 of 3 scores are NaN"):
        rank([0.0, np.nan, np.nan], fine, name="energy on svhn")
    with pytest.raises(ValueError, match="energy on svhn, OOD: 1 of 2 scores are NaN"):
        rank(fine, torch.tensor([torch.nan, torch.inf]), name="energy on svhn")
    with pytest.raises(ValueError, match=r"scores, ID: .*N > 0, got \(0,\)"):
        rank([], fine)
    with pytest.raises(ValueError, match=r"scores, OOD: .*N > 0, got \(0,\)"):
        rank(fine, [])
    with pytest.raises(ValueError, match=r"shape \(N,\).*got \(3, 1\)"):
        rank(fine[:, None], fine)


def test_unknown_rules_are_refused_in_words():
    ranking = rank([0.0], [1.0])
    with pytest.raises(ValueError, match="positive side is id or ood, not 'in'"):
        aupr(ranking, "in")
    with pytest.raises(ValueError, match="step or trapezoid, not 'first'"):
        aupr(ranking, rule="first")
    with pytest.raises(ValueError, match="first or closest or percentile, not 'last'"):
        fpr_at_tpr(ranking, rule="last")
    with pytest.raises(ValueError, match="positive='id'"):
        MetricRules("ood", "percentile")
    for tpr in (0, 95, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"share in \(0, 1\].*got"):
            fpr_at_tpr(ranking, tpr)
    with pytest.raises(ValueError, match=r"no metric rules 'vos'; there are default, heat, .*openood"):
        metric_rules("vos")


def test_headline_follows_the_preset():
    pair = PAIRS["coarse-57-19"]
    ranking = rank(*pair)
    labels, scores = as_binary(pair, "ood")
    fpr, tpr, _ = roc_curve(labels, scores, drop_intermediate=False)
    precision, recall, _ = precision_recall_curve(labels, scores)
    openood = headline(ranking, metric_rules("openood"))
    assert list(openood) == ["auroc", "aupr_in", "aupr_out", "fpr95"]
    assert openood["fpr95"] == exactly(fpr[np.argmax(tpr >= 0.95)])
    assert openood["aupr_out"] == exactly(auc(recall, precision))
    heat = headline(ranking, metric_rules("heat"))
    assert heat["fpr95"] == exactly(np.mean(pair[1] < np.percentile(pair[0], 95)))
    assert heat["aupr_out"] == exactly(average_precision_score(labels, scores))
    assert heat["aupr_in"] == exactly(average_precision_score(*as_binary(pair, "id")))
    for preset in ("default", "heatmap", "variational_metric"):
        assert metric_rules(preset) == MetricRules("id", "first", "step")
    assert metric_rules("unleashing_mask") == MetricRules("id", "closest", "step")
    values = {headline(ranking, metric_rules(name))["fpr95"] for name in ("default", "heat", "openood")}
    assert len(values) == 3


def test_cauroc_and_oscr_equal_their_definitions(pair):
    known, unknown = pair
    correct = np.random.default_rng(0).random(len(known)) < 0.7
    correct[0] = True
    thresholds = np.unique(np.concatenate(pair))
    expected = roc_auc_score(*as_binary((known[correct], unknown), "ood"))
    assert cauroc(known, unknown, correct) == exactly(expected)
    accepted = np.array([np.sum((known <= t) & correct) for t in thresholds]) / len(known)
    passed = np.array([np.sum(unknown <= t) for t in thresholds]) / len(unknown)
    area = np.trapezoid(np.append(0, accepted), np.append(0, passed))
    assert oscr(torch.tensor(known), torch.tensor(unknown), torch.tensor(correct)) == exactly(area)
    assert oscr(known, unknown, np.ones(len(known), dtype=bool)) == exactly(auroc(rank(*pair)))


def test_closed_set_metrics_refuse_in_words():
    for metric in (cauroc, oscr):
        with pytest.raises(ValueError, match="none of 2 ID samples is classified correctly"):
            metric([0.0, 1.0], [2.0], [False, False])
        with pytest.raises(ValueError, match=r"2 ID scores need as many entries of correct, got the shape \(3,\)"):
            metric([0.0, 1.0], [2.0], [True, True, True])
        with pytest.raises(ValueError, match="OOD: 1 of 1 scores are NaN"):
            metric([0.0, 1.0], [np.nan], [True, True])


@pytest.mark.parametrize("seed", range(20))
def test_macro_f1_equals_sklearn(seed):
    rng = np.random.default_rng(seed)
    classes, count = int(rng.integers(2, 12)), int(rng.integers(1, 60))
    labels, predictions = rng.integers(-1, classes, count), rng.integers(0, classes, count)
    predictions = np.where((rng.random(count) < 0.7) & (labels >= 0), labels, predictions)
    scores = np.round(4 * rng.normal(np.where(labels < 0, 1, 0))) / 4
    for threshold in (0.0, 0.5, np.inf, -np.inf):
        truth = [classes if label == -1 else label for label in labels]
        guess = [classes if score > threshold else p for p, score in zip(predictions, scores, strict=True)]
        expected = f1_score(truth, guess, labels=range(classes + 1), average="macro", zero_division=0)
        tensors = (torch.tensor(column) for column in (labels, predictions, scores))
        assert macro_f1(labels, predictions, scores, threshold, classes) == exactly(expected)
        assert macro_f1(*tensors, threshold, classes) == exactly(expected)


def test_macro_f1_refuses_in_words():
    with pytest.raises(ValueError, match=r"labels of 3 classes lie in -1\.\.2, these in -2\.\.1"):
        macro_f1([-2, 1], [0, 0], [0.0, 0.0], 0.5, 3)
    with pytest.raises(ValueError, match=r"predictions of 3 classes lie in 0\.\.2, these in 0\.\.3"):
        macro_f1([-1, 1], [0, 3], [0.0, 0.0], 0.5, 3)
    with pytest.raises(ValueError, match="2 scores need as many predictions"):
        macro_f1([-1, 1], [0], [0.0, 0.0], 0.5, 3)
    with pytest.raises(ValueError, match="1 of 2 scores are NaN"):
        macro_f1([-1, 1], [0, 0], [0.0, np.nan], 0.5, 3)


def columns(seed: int = 0, count: int = 300) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(-1, 4, count)
    scores = 400 + rng.normal(np.where(labels < 0, 2.0, 0.0))
    predictions = np.where(rng.random(count) < 0.8, np.maximum(labels, 0), rng.integers(0, 4, count))
    return torch.tensor(scores), torch.tensor(labels), torch.tensor(predictions)


def expected_metrics() -> dict[str, float]:
    scores, labels, predictions = (column.numpy() for column in columns())
    known, unknown, correct = scores[labels >= 0], scores[labels < 0], (labels == predictions)[labels >= 0]
    is_ood = labels < 0
    fpr, tpr, _ = roc_curve(~is_ood, -scores, drop_intermediate=False)
    partial = roc_auc_score(np.repeat([0, 1], [correct.sum(), len(unknown)]), np.append(known[correct], unknown))
    accuracy = accuracy_score(labels[labels >= 0], predictions[labels >= 0])
    return {
        "auroc": roc_auc_score(is_ood, scores),
        "aupr_in": average_precision_score(~is_ood, -scores),
        "aupr_out": average_precision_score(is_ood, scores),
        "fpr95": fpr[np.argmax(tpr >= 0.95)],
        "detection_accuracy": max(tpr + 1 - fpr) / 2,
        "accuracy": accuracy,
        "cauroc": partial,
        "oscr": accuracy * partial,
    }


def test_ood_metrics_collect_batches_of_scores_far_outside_the_unit_interval():
    metrics = OODMetrics()
    for batch in zip(*(column.split(64) for column in columns()), strict=True):
        metrics.update(*batch)
        metrics.update(*(rows[:0] for rows in batch))
    assert metrics.compute() == pytest.approx(expected_metrics(), rel=0, abs=1e-12)
    assert 0.85 < metrics.compute()["auroc"] < 0.97
    metrics.reset()
    with pytest.raises(ValueError, match=r"ID: .*N > 0"), pytest.warns(UserWarning, match="before the ``update``"):
        metrics.compute()


def test_ood_metrics_keep_float64_and_follow_their_rules():
    metrics = OODMetrics(metric_rules("openood"))
    metrics.update(torch.tensor([400.0, 400.0 + 1e-9], dtype=torch.float64), torch.tensor([0, -1]))
    values = metrics.compute()
    assert values.pop("detection_accuracy") == 1
    assert values == headline(rank([0.0], [1.0]), metric_rules("openood"))
    metrics.reset()
    scores, labels, _ = columns()
    metrics.update(scores.float().requires_grad_(), labels)
    assert not metrics.scores[0].requires_grad
    ranking = rank(scores[labels >= 0].float(), scores[labels < 0].float())
    assert metrics.compute()["fpr95"] == fpr_at_tpr(ranking, positive="ood") != fpr_at_tpr(ranking)


def test_merged_ood_metrics_equal_one():
    one, other = OODMetrics(), OODMetrics()
    first, second = zip(*(column.split(200) for column in columns()), strict=True)
    one.update(*first)
    other.update(*second)
    one.merge_state(other)
    assert one.compute() == pytest.approx(expected_metrics(), rel=0, abs=1e-12)


def test_ood_metrics_without_a_correct_sample_leave_out_what_is_undefined():
    metrics = OODMetrics()
    metrics.update(torch.tensor([0.0, 1.0]), torch.tensor([0, -1]), torch.tensor([1, 1]))
    values = metrics.compute()
    assert values["accuracy"] == 0
    assert {"cauroc", "oscr"}.isdisjoint(values)


def test_ood_metrics_refuse_in_words():
    scores, labels, predictions = columns(count=4)
    with pytest.raises(ValueError, match=r"one shape \(B,\), got scores \(4,\), labels \(3,\)"):
        OODMetrics().update(scores, labels[:3])
    with pytest.raises(ValueError, match=r"predictions \(4, 1\)"):
        OODMetrics().update(scores, labels, predictions[:, None])
    metrics = OODMetrics()
    metrics.update(scores, torch.tensor([0, -1, -2, 0]))
    with pytest.raises(ValueError, match="labels are classes, or -1 = OOD; the smallest here is -2"):
        metrics.compute()
    for given, missing in (((predictions,), ()), ((), (predictions,))):
        metrics = OODMetrics()
        metrics.update(scores, labels, *given)
        with pytest.raises(ValueError, match="predictions came with some batches only"):
            metrics.update(scores, labels, *missing)


def compute_a_share(process: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 2), rank=process, world_size=2)
    share = [column[:300] if process == 0 else column[300:] for column in columns()]
    metrics, without = OODMetrics(), OODMetrics()
    metrics.update(*share)
    without.update(*share[:2])
    torch.save((metrics.compute(), without.compute()), folder / f"{process}.pt")
    dist.destroy_process_group()


def test_two_processes_one_of_them_without_a_sample_equal_one(tmp_path):
    torch.multiprocessing.spawn(compute_a_share, (tmp_path,), nprocs=2)
    expected = expected_metrics()
    for process in range(2):
        metrics, without = torch.load(tmp_path / f"{process}.pt", weights_only=True)
        assert metrics == pytest.approx(expected, rel=0, abs=1e-12)
        assert without == {key: metrics[key] for key in without}
        assert set(expected) - set(without) == {"accuracy", "cauroc", "oscr"}
