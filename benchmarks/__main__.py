"""Measure: ``python -m benchmarks [names] [--quick] [--threads N]``."""

import argparse
from collections.abc import Sequence
from importlib import import_module

from benchmarks.measure import environment, fixed_threads, has_peer

NAMES = (
    "forwards",
    "evaluation",
    "mahalanobis",
    "gmm",
    "knn",
    "metrics",
    "images",
    "feature_batches",
    "training",
    "heat",
    "class_density",
    "triplets",
    "subnetwork",
    "outliers",
    "heatmap",
)


def main(args: Sequence[str] | None = None) -> None:
    """Run the benchmarks that are named, or all."""
    modules = {name: import_module(f"benchmarks.{name}") for name in NAMES}
    listing = "\n".join(f"  {name:15} {(module.__doc__ or '').splitlines()[0]}" for name, module in modules.items())
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=f"Measure ours against peers and physical limits, side by side.\n\nbenchmarks:\n{listing}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("names", nargs="*", metavar="name", help="what to run; all of them where nothing is named")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that everything runs; judges nothing")
    parser.add_argument("--threads", type=int, default=2, help="threads of torch, BLAS and OpenMP (default: 2)")
    options = parser.parse_args(args)
    if unknown := sorted(set(options.names) - set(NAMES)):
        parser.error(f"no benchmark {', '.join(unknown)}; there are {', '.join(NAMES)}")
    if options.threads < 1:
        parser.error(f"--threads must be at least 1, got {options.threads}")
    with fixed_threads(options.threads):
        print(environment())
        if not has_peer():
            print("pytorch-ood is not installed, its columns stay empty: `make bench` installs it")
        for name in dict.fromkeys(options.names or NAMES):
            print(f"\n{name}: {(modules[name].__doc__ or '').splitlines()[0]}")
            modules[name].run(options.quick)


if __name__ == "__main__":
    main()
