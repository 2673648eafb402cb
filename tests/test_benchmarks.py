import importlib.util
import re

import pytest
import torch

from benchmarks import forwards, metrics
from benchmarks.__main__ import NAMES, main
from benchmarks.job import SIZES
from benchmarks.measure import interleave, peak_growth, print_table, ratio, timing_rows

HAS_PEER = importlib.util.find_spec("pytorch_ood") is not None


@pytest.fixture
def run(capsys):
    """Run in as many threads as the tests have, return what was printed."""

    def _run(*args):
        main([*args, "--quick", "--threads", str(torch.get_num_threads())])
        return capsys.readouterr().out

    return _run


@pytest.fixture
def no_peer(monkeypatch):
    for module in ("__main__", *NAMES, "features"):
        monkeypatch.setattr(f"benchmarks.{module}.has_peer", lambda: False, raising=False)


@pytest.mark.parametrize("name", NAMES)
def test_runs_without_the_peer_and_says_so(name, run, no_peer):
    printed = run(name)
    assert f"{name}: " in printed
    assert "pytorch-ood is not installed" in printed
    assert not [other for other in NAMES if other != name and f"\n{other}: " in printed]


@pytest.mark.skipif(not HAS_PEER, reason="pytorch-ood is not installed")
@pytest.mark.parametrize("name", NAMES)
def test_runs_beside_the_peer_and_finds_the_same(name, run):
    printed = run(name)
    assert "not installed" not in printed
    assert name in ("forwards", "training") or "same values" in printed  # those two compute nothing to compare


def test_forwards_are_the_images_of_the_job_and_what_gradient_scores_add(run, no_peer):
    sizes = {name: round(size / 500) for name, size in SIZES.items()}
    images, fitted, held_out = sum(sizes.values()), sizes["fit"], sizes["fit"] // 5
    odin = images + 2 * (images - fitted)
    layers = images + 3 * (images - fitted + held_out) + 7 * held_out
    printed = run("forwards")
    for scores, count in (("eight", images), ("eight, ODIN", odin), ("eight, LayeredMahalanobis", layers)):
        assert re.search(rf"ours +{scores} +{count} +{count} +1 += limit: met", printed), scores


def test_a_forward_too_many_is_an_error(run, no_peer, monkeypatch):
    def one_job_twice(network, images):
        (who, scores, job), *_ = our_jobs(network, images)
        return [(who, scores, lambda: (job(), job()))]

    our_jobs = forwards.our_jobs
    monkeypatch.setattr(forwards, "our_jobs", one_job_twice)
    with pytest.raises(RuntimeError, match="ours ran images through the network that need not: eight: "):
        run("forwards")


@pytest.mark.parametrize("who", ["with_sklearn", "with_pytorch_ood"])
def test_metrics_that_differ_are_an_error(who, run, monkeypatch):
    if who == "with_pytorch_ood" and not HAS_PEER:
        pytest.skip("pytorch-ood is not installed")
    measure = getattr(metrics, who)
    monkeypatch.setattr(metrics, who, lambda *drawn: {**measure(*drawn), "fpr95": 0.5})
    with pytest.raises(AssertionError, match="fpr95"):
        run("metrics")


def test_help_lists_every_benchmark(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    assert all(re.search(rf"^  {name} +\w+", printed, re.MULTILINE) for name in NAMES)


def test_an_unknown_name_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        main(["knnn"])
    assert f"no benchmark knnn; there are {', '.join(NAMES)}" in capsys.readouterr().err


def test_contenders_take_turns_after_one_call_each(monkeypatch):
    monkeypatch.setattr("benchmarks.measure.LEAST", 0)
    order = []
    seconds = interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, repetitions=3)
    assert "".join(order) == "ab" + 3 * "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}


def test_ratios_are_taken_pair_by_pair():
    assert ratio([1.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == (2.0, 1.0, 3.0, True)


def test_one_outlier_is_no_noise():
    assert ratio([1.0, 9.0, 1.1, 1.0, 1.2], [1.0] * 5) == (1.1, 1.0, 9.0, False)


def test_a_missed_target_is_called_missed():
    seconds = {"limit": [1.0], "ours": [1.4], "slow": [70.0], "quick": [1.4]}
    rows = timing_rows("case", seconds, 1.3, {"slow": 50, "quick": 2, "absent": 2}, judge=True)
    assert rows[0][4] == "<= 1.3: MISSED"
    assert [row[-1] for row in rows] == [">= 50: met", ">= 2: MISSED", ""]
    assert rows[2][6] == "not installed"
    noise = {"limit": [1.0, 1.0], "ours": [1.0, 3.0]}
    assert timing_rows("case", noise, 9, {"slow": 50}, judge=True)[0][4] == "<= 9: too noisy"
    assert "not judged" in timing_rows("case", seconds, 1.3, {"slow": 50}, judge=False)[0][4]


def test_peak_growth_sees_memory_that_is_freed_again():
    growth = peak_growth(lambda: torch.ones(2**24).sum())
    # the kernel adds pages up in batches on each CPU, so that it may know of a few hundred KiB too little
    assert growth is None or 0.98 * 2**26 < growth < 2**27


def test_columns_align(capsys):
    print_table(("a", "b"), [("long", "x"), ("s", "y")])
    assert len({line.find(last) for line, last in zip(capsys.readouterr().out.splitlines(), "b-xy", strict=True)}) == 2
