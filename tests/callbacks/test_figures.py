"""Figures of scores that are hard to draw."""

import numpy as np

from callbacks.figures import histogram_figure
from callbacks.samples import Samples


def test_scores_that_hardly_differ_are_drawn():
    """As those of a network before the first step."""
    scores = (1 + np.arange(40) % 3 * np.finfo(np.float32).eps).astype(np.float32)
    split = np.repeat([0, 1], 20)
    samples = Samples(("id", "noise"), split, np.tile(np.arange(20), 2), -split, -split, {"msp": scores})
    (panel,) = histogram_figure(samples, "msp").axes
    assert len(panel.patches) == 2 * 50
