"""What a method costs: numbers to learn, seconds to fit, milliseconds an image."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from experiments.reports.runs import Run


@dataclass(frozen=True)
class Cost:
    """What was recorded; None = it was not.

    Attributes:
        parameters: of the networks of the method; those of scores that come with weights are not counted.
        trained: how many of them training changed.
        seconds: wall time of training, mean over the seeds.
        at_least: whether that lacks the time of starts that were killed.
        milliseconds: of an image in a test, network and score, mean over the seeds.
    """

    parameters: int | None
    trained: int | None
    seconds: float | None
    at_least: bool
    milliseconds: float | None


def cost_of(runs: Sequence[Run], score: str) -> Cost:
    """Sum up what the runs of one setting recorded, for one of their scores."""
    uncounted = [run.record.get("uncounted", 0) for run in runs]
    return Cost(
        parameters=runs[0].results.get("parameters"),
        trained=runs[0].record.get("trained_parameters"),
        seconds=_mean([run.record.get("seconds") for run in runs]),
        at_least=any(uncounted),
        milliseconds=_mean([_milliseconds(run, score) for run in runs]),
    )


def _milliseconds(run: Run, score: str) -> float | None:
    """Add the time of the score to that of the network, in which a method computes its own scores."""
    times = run.results.get("milliseconds") or {}
    return times["network"] + times.get(score, 0.0) if "network" in times else None


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known and len(known) == len(values) else None
