"""What an image costs: the time of the network, and of each score."""

import time
from collections import defaultdict

import numpy as np
import torch


class Stopwatch:
    """Takes the time of parts of the work on batches.

    Args:
        device: whatever was asked of a GPU is waited for, before time is taken.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._laps: dict[str, list[float]] = defaultdict(list)

    def start(self) -> None:
        """Start anew."""
        self._started = self._now()

    def lap(self, name: str, images: int) -> None:
        """Take the time since the start, for a part of the work on so many images; on none it does not count."""
        if images:
            self._laps[name].append(1000 * (self._now() - self._started) / images)

    def milliseconds(self) -> dict[str, float]:
        """Return, for each part, milliseconds per image: the median over batches, which the first, slow one is not."""
        return {name: float(np.median(laps)) for name, laps in self._laps.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
