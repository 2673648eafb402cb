"""Verbs beside LightningCLI's own: each takes the rest of the command line."""

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from callbacks.metrics import PRESETS, metric_rules
from callbacks.results import read_results, summarize
from callbacks.samples import Samples
from callbacks.tables import print_results
from experiments.cli import EXPERIMENTS, OODCLI


def run(args: Sequence[str]) -> None:
    """``run --config YAML [options]``: fit, then test the checkpoint that the method selects."""
    fit_and_test(args)


def demo(args: Sequence[str]) -> None:
    """``demo [options]``: run every YAML of ``experiments/demo`` anew and print one table."""
    configs = sorted((EXPERIMENTS / "demo").glob("*.yaml"))
    folders = [
        fit_and_test(["--config", str(config), "--overwrite", "true", *args], show_results=False) for config in configs
    ]
    print_results([read_results(folder) for folder in folders])
    for folder in folders:
        print(
            f"{folder}: results.json, results.csv, scores.npz, figures/, best.ckpt or last.ckpt, config.yaml, log.txt"
        )


def metrics(args: Sequence[str]) -> None:
    """``metrics FOLDER... [--rules PRESET]``: compute the metrics of finished runs again, from ``scores.npz`` alone."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments metrics", description=metrics.__doc__, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder that was tested")
    parser.add_argument("--rules", default="default", choices=PRESETS, help="reading of FPR95 and AUPR")
    parser.add_argument("--bootstrap", type=int, default=1000, help="replicates behind the bounds; 0 = no bounds")
    options = parser.parse_args(args)
    runs = []
    for folder in options.folders:
        results = read_results(folder)
        groups = {row["ood_set"]: row["group"] for row in results["rows"]}
        samples = Samples.load(folder / "scores.npz")
        runs.append(results | summarize(samples, groups, metric_rules(options.rules), options.bootstrap))
    print_results(runs)


def completion(args: Sequence[str]) -> None:
    """``completion [bash|zsh]``: print shell completion of the command ``ood``."""
    # Not by shtab, which jsonargparse offers: it follows every class that could be nested, to 77 MB.
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        OODCLI(["fit", "--help"])
    options = sorted(set(re.findall(r"--[a-z][\w.]+", help_text.getvalue())))
    words = {"verbs": " ".join([*OODCLI.subcommands(), *VERBS]), "options": " ".join(options)}
    print("autoload -U +X bashcompinit && bashcompinit\n" * (list(args) == ["zsh"]) + COMPLETION % words)


def fit_and_test(args: Sequence[str], show_results: bool = True) -> Path:
    """Fit, then test from the record of the run; return its folder."""
    folder = OODCLI(["fit", *args]).folder
    OODCLI(["test", "--config", str(folder / "config.yaml")], show_results)
    return folder


COMPLETION = """_ood() {
  local word=${COMP_WORDS[COMP_CWORD]}
  if [ "$COMP_CWORD" -eq 1 ]; then COMPREPLY=($(compgen -W "%(verbs)s" -- "$word"))
  elif [[ "$word" == -* ]]; then COMPREPLY=($(compgen -W "%(options)s" -- "$word"))
  else COMPREPLY=($(compgen -f -- "$word")); fi
}
complete -o filenames -F _ood ood"""

VERBS: dict[str, Callable[[Sequence[str]], None]] = {
    "run": run,
    "demo": demo,
    "metrics": metrics,
    "completion": completion,
}
