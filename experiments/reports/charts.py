"""Small charts as SVG, to stand in a page: ROC curves, and histograms of scores."""

from collections.abc import Sequence

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray

from callbacks.metrics import rank

Scores = NDArray[np.floating]
POINTS = 120  # of a curve, at most


def roc_chart(curves: Sequence[tuple[Scores, Scores]]) -> Markup:
    """Draw the share of ID accepted over the share of OOD accepted: a curve for each pair of ID and OOD scores.

    Curve i has the class ``c<i>`` and the ``colour`` of i.
    """
    lines = []
    for i, (known, unknown) in enumerate(curves):
        ranking = rank(known, unknown)
        y, x = (np.append(0, np.cumsum(counts)) / counts.sum() for counts in ranking[1:])
        kept = _corners(x, y)
        points = " ".join(f"{40 + 200 * a:.1f},{210 - 200 * b:.1f}" for a, b in zip(x[kept], y[kept], strict=True))
        lines.append(f'<polyline class="c{i}" points="{points}" style="--c: {colour(i)}"/>')
    ticks = "".join(
        f'<text x="{40 + 2 * share}" y="224" text-anchor="middle">{share}</text>'
        f'<text x="35" y="{214 - 2 * share}" text-anchor="end">{share}</text>'
        for share in (0, 50, 100)
    )
    return Markup(
        '<svg class="roc" viewBox="0 0 250 245" role="img" aria-label="ROC curves">'
        '<path class="frame" d="M40 10V210H240"/><path class="guide" d="M40 210L240 10M40 20H240"/>'
        f'{"".join(lines)}{ticks}<text x="140" y="240" text-anchor="middle">OOD accepted, %</text>'
        '<text x="10" y="110" text-anchor="middle" transform="rotate(-90 10 110)">ID accepted, %</text></svg>'
    )


def colour(i: int) -> str:
    """Return the colour of curve i: hues a golden angle apart, so that neighbours differ however many there are."""
    return f"hsl({(210 + 137.508 * i) % 360:.0f} 75% {(42, 30, 55)[i // 8 % 3]}%)"


def histogram(known: Scores, unknown: Scores, tau: float, bins: int = 40) -> Markup:
    """Draw how the scores of ID and of OOD images are distributed, and the threshold ``tau``."""
    both = np.concatenate([known, unknown]).astype(np.float64)
    finite = both[np.isfinite(both)]
    low, high = np.quantile(finite, (0.005, 0.995)).tolist() if len(finite) else (0.0, 0.0)
    if np.isfinite(tau):
        low, high = min(low, tau), max(high, tau)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # equal, or too near each other to be divided
        low, high = low - 0.5 * max(abs(low), 1), high + 0.5 * max(abs(high), 1)
    heights = [
        np.histogram(scores.astype(np.float64).clip(low, high), bins, (low, high))[0] / len(scores)
        for scores in (known, unknown)
    ]
    top, width = max(float(height.max()) for height in heights), 240 / bins
    areas = []
    for name, height in zip(("id", "ood"), heights, strict=True):
        steps = "".join(f"V{90 - 80 * value / top:.1f}h{width:g}" for value in height)
        areas.append(f'<path class="{name}" d="M5 90{steps}V90Z"/>')
    place = 5 + 240 * (min(max(tau, low), high) - low) / (high - low)
    return Markup(
        '<svg class="histogram" viewBox="0 0 250 104" role="img" aria-label="histogram of scores">'
        f'{"".join(areas)}<path class="frame" d="M5 90H245"/><path class="tau" d="M{place:.1f} 6V90"/>'
        f'<text x="5" y="101">{low:.3g}</text><text x="245" y="101" text-anchor="end">{high:.3g}</text></svg>'
    )


def _corners(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.int64]:
    """Keep the first and last point, those where a curve turns, and of many those that lie far apart."""
    turns = np.flatnonzero(np.diff(x[:-1]) * np.diff(y[1:]) != np.diff(x[1:]) * np.diff(y[:-1]))
    kept = np.concatenate([[0], turns + 1, [len(x) - 1]])
    if len(kept) <= POINTS:
        return kept
    way = np.concatenate([[0], np.cumsum(np.hypot(np.diff(x[kept]), np.diff(y[kept])))])
    return kept[np.unique(np.searchsorted(way, np.linspace(0, way[-1], POINTS)))]
