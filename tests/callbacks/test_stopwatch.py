import time

import pytest
import torch

from callbacks.stopwatch import Stopwatch


def test_time_is_the_median_per_image_over_the_batches(monkeypatch):
    stopwatch, now = Stopwatch(torch.device("cpu")), [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    for seconds, images in ((9.0, 10), (0.02, 10), (0.01, 10), (7.0, 0), (0.03, 10)):
        stopwatch.start()
        now[0] += seconds
        stopwatch.lap("network", images)
    assert stopwatch.milliseconds() == {"network": pytest.approx((2 + 3) / 2)}
