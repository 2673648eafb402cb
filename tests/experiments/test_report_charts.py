import re

import numpy as np
import pytest

from callbacks.metrics import auroc, rank
from experiments.reports.charts import POINTS, colour, histogram, roc_chart


def points(chart):
    (text,) = re.findall(r'<polyline class="c0" points="([^"]*)"', chart)
    x, y = np.array([pair.split(",") for pair in text.split()], dtype=float).T
    return (x - 40) / 200, (210 - y) / 200


@pytest.mark.parametrize("size", [5, 3000])
def test_a_curve_runs_from_corner_to_corner_over_its_area(size):
    rng = np.random.default_rng(0)
    known, unknown = rng.normal(size=size), rng.normal(1, size=size)
    x, y = points(roc_chart([(known, unknown)]))
    assert len(x) <= POINTS
    assert (x[0], y[0], x[-1], y[-1]) == (0, 0, 1, 1)
    area = np.sum(np.diff(x) * (y[1:] + y[:-1]) / 2)
    assert area == pytest.approx(auroc(rank(known, unknown)), abs=0.005)


def test_a_curve_each():
    chart = roc_chart([(np.zeros(3), np.ones(2)), (np.ones(3), np.ones(2))])
    assert re.findall(r'polyline class="(c\d)"', chart) == ["c0", "c1"]
    assert points(chart)[1].tolist() == [0, 1, 1]


def test_curves_have_colours_of_their_own():
    colours = [colour(i) for i in range(30)]
    assert len(set(colours)) == 30
    chart = roc_chart([(np.zeros(3), np.ones(2))] * 30)
    assert re.findall(r'style="--c: ([^"]*)"', chart) == colours


@pytest.mark.parametrize(
    ("known", "unknown", "tau"),
    [
        ([0.0, 1.0, 2.0], [1.0, 5.0], 1.5),
        ([1.0, 1.0], [1.0], 1.0),
        ([1e9, np.nextafter(1e9, 2e9)], [1e9], 1e9),
        ([-np.inf, 0.0], [np.inf], 0.0),
        ([np.inf], [np.inf], np.inf),
        (np.float32([0.1, 0.2]), np.float32([0.3]), 0.2),
    ],
)
def test_a_histogram_holds_whatever_scores_there_are(known, unknown, tau):
    chart = histogram(np.asarray(known), np.asarray(unknown), tau)
    assert "nan" not in chart.replace("tau", "")
    places = [float(place) for place in re.findall(r'class="tau" d="M([\d.]+) ', chart)]
    assert len(places) == 1
    assert 5 <= places[0] <= 245
