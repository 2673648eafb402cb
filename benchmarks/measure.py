"""What every benchmark shares: fixed threads, interleaved timing, peak memory, and tables."""

import ctypes
import gc
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from threadpoolctl import threadpool_limits

PROC = Path("/proc/self")
LEAST = 0.02  # seconds: shorter calls are repeated within one measurement until it takes that long
COLUMNS = ("case", "ours", "limit", "ours / limit", "target", "peer", "peer takes", "peer / ours", "target")

Seconds = dict[str, list[float]]  # contender -> duration of one call, one entry for each repetition


def has_peer() -> bool:
    """Whether pytorch-ood can be imported."""
    return find_spec("pytorch_ood") is not None


def environment() -> str:
    """Name processor, load of the last minute, threads and packages in one line."""
    packages = []
    for name in ("torch", "scikit-learn", "pytorch-ood"):
        try:
            packages.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            packages.append(f"no {name}")
    threads = f"threads: {torch.get_num_threads()} on {os.cpu_count()} cores"
    if hasattr(os, "getloadavg"):
        threads += f" of load {os.getloadavg()[0]:.1f}"
    return ", ".join([_processor(), threads, f"Python {platform.python_version()}", *packages])


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


@contextmanager
def fixed_threads(threads: int) -> Iterator[None]:
    """Let torch, BLAS and OpenMP use so many threads, and as many as before afterwards."""
    before = torch.get_num_threads()
    with threadpool_limits(threads):
        torch.set_num_threads(threads)
        try:
            yield
        finally:
            torch.set_num_threads(before)


def interleave(contenders: Mapping[str, Callable[[], Any]], repetitions: int) -> Seconds:
    """Time contenders in turn, A B A B, so that a change of the machine's load meets all of them alike.

    One call of each goes before, to warm up and to see how many calls fill a measurement.
    """
    gc.collect()
    calls = {name: max(1, round(LEAST / _seconds(call, 1))) for name, call in contenders.items()}
    seconds: Seconds = {name: [] for name in contenders}
    for _ in range(repetitions):
        for name, call in contenders.items():
            seconds[name].append(_seconds(call, calls[name]))
    return seconds


def _seconds(call: Callable[[], Any], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - start) / calls


class Ratio(NamedTuple):
    """How many times as long one contender takes as another: median, least and most over the repetitions.

    ``noisy``: the middle half of the repetitions alone spans a factor of 1.5, as on a machine that others use.
    """

    median: float
    low: float
    high: float
    noisy: bool

    def __str__(self) -> str:
        return f"{self.median:.3g} [{self.low:.3g}-{self.high:.3g}]"


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Ratio:
    """Divide pair by pair: both of a pair were measured right after each other."""
    ratios = [above / below for above, below in zip(numerators, denominators, strict=True)]
    lower, median, upper = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return Ratio(median, min(ratios), max(ratios), noisy=upper > 1.5 * lower)


def timing_rows(
    case: str, seconds: Seconds, to_limit: float, to_peer: Mapping[str, float | None], judge: bool
) -> list[tuple[str, ...]]:
    """Turn the seconds of ``ours``, ``limit`` and the peers into rows under ``COLUMNS``, one for each peer.

    Args:
        case: what was measured.
        seconds: from ``interleave``; a peer without an entry was not installed.
        to_limit: ours may take so many times the limit.
        to_peer: peer -> it should take at least so many times ours; None = no target.
        judge: whether sizes are such that the targets mean something.
    """

    def verdict(measured: Ratio, met: bool) -> str:
        return "not judged" if not judge else "too noisy" if measured.noisy else "met" if met else "MISSED"

    over = ratio(seconds["ours"], seconds["limit"])
    own = (case, duration(seconds["ours"]), duration(seconds["limit"]), str(over))
    own += (f"<= {to_limit:g}: {verdict(over, over.median <= to_limit)}",)
    rows = []
    for peer, bound in to_peer.items():
        cells = ("not installed", "", "")
        if peer in seconds:
            slower = ratio(seconds[peer], seconds["ours"])
            target = "" if bound is None else f">= {bound:g}: {verdict(slower, slower.median >= bound)}"
            cells = (duration(seconds[peer]), str(slower), target)
        rows.append((*(own if not rows else ("",) * len(own)), peer, *cells))
    return rows


def duration(seconds: Sequence[float]) -> str:
    """Write the median with its unit."""
    median = statistics.median(seconds)
    return f"{median:.3g} s" if median >= 1 else f"{1e3 * median:.3g} ms"


def peak_growth(call: Callable[[], Any]) -> float | None:
    """Return by how many bytes resident memory rises at most while ``call`` runs; None where Linux does not tell."""
    if not (PROC / "clear_refs").exists():
        return None
    gc.collect()
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # else freed memory that is still resident hides new use
    (PROC / "clear_refs").write_text("5", encoding="ascii")  # 5 sets the high-water mark back to the present
    before = _status("VmRSS")
    call()
    return max(0, _status("VmHWM") - before)


def _status(field: str) -> int:
    lines = (PROC / "status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def mebibytes(size: float | None) -> str:
    """Write a number of bytes in MiB."""
    return "not measured" if size is None else f"{size / 2**20:.1f} MiB"


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print aligned columns."""
    widths = [max(len(cell) for cell in cells) for cells in zip(columns, *rows, strict=True)]
    for row in (columns, ["-" * width for width in widths], *rows):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
