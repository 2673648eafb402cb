"""Verbs beside LightningCLI's own: each takes the rest of the command line."""

import argparse
import contextlib
import io
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from pytorch_lightning.cli import LightningCLI
from pytorch_lightning.utilities import rank_zero_only

from callbacks.compatibility import Compatibility
from callbacks.frozen_features import FrozenFeatures
from callbacks.metrics import PRESETS, metric_rules
from callbacks.results import TauSource, read_results, summarize
from callbacks.run_record import FinishedRunError
from callbacks.samples import Samples
from callbacks.tables import print_results
from experiments.cli import EXPERIMENTS, OODCLI, naming
from experiments.data import data
from experiments.heat_evaluate import heat_evaluate
from experiments.heat_toy import heat_toy
from experiments.heatmap_latest import heatmap_latest
from experiments.report import report, write_report
from experiments.stages import stages


def run(args: Sequence[str]) -> None:
    """``run --config YAML [options]``: fit, then test the checkpoint that the method selects; skips what is done."""
    fit_and_test(args)


def demo(args: Sequence[str]) -> None:
    """``demo [options]``: run every YAML of ``experiments/demo`` anew and compare them in one report."""
    configs = sorted((EXPERIMENTS / "demo").glob("*.yaml"))
    folders = [
        fit_and_test(["--config", str(config), "--overwrite", "true", *args], show_results=False) for config in configs
    ]
    for folder in folders:
        rank_zero_only(print)(
            f"{folder}: results.json, results.csv, scores.npz, figures/, best.ckpt or last.ckpt, config.yaml, log.txt"
        )
    write_report(folders)


def metrics(args: Sequence[str]) -> None:
    """``metrics FOLDER... [options]``: compute the metrics of finished runs again, from ``scores.npz`` alone."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments metrics", description=metrics.__doc__, allow_abbrev=False
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER", help="a run folder that was tested")
    parser.add_argument("--rules", choices=PRESETS, help="reading of FPR95 and AUPR; default: that of the run")
    parser.add_argument(
        "--tau_source", choices=get_args(TauSource), help="whose scores set the threshold; default: as in the run"
    )
    parser.add_argument("--bootstrap", type=int, help="replicates behind the bounds, 0 = none; default: as in the run")
    options = parser.parse_args(args)
    runs = []
    for folder in options.folders:
        results = read_results(folder)
        groups = {row["ood_set"]: row["group"] for row in results["rows"]}
        stored = results["metric_rules"]
        rules = metric_rules(options.rules or stored["preset"])
        replicates = stored["bootstrap_replicates"] if options.bootstrap is None else options.bootstrap
        tau_source = options.tau_source or stored.get("tau_source", "id_val")
        samples = Samples.load(folder / "scores.npz")
        classes = results["num_classes"]
        runs.append(results | summarize(samples, groups, rules, classes, replicates, tau_source=tau_source))
    print_results(runs)


def features(args: Sequence[str]) -> None:
    """``features --config YAML [options]``: extract what an experiment caches of a frozen network, without training."""
    extraction = Extraction(["fit", *args])
    cache = extraction.extractor.cache
    if extraction.trainer.is_global_zero:
        print(f"{cache.folder}: {cache.length:,} rows of {', '.join(cache.arrays)}, {cache.nbytes:,} bytes")


class Extraction(OODCLI):
    """Goes through ``fit`` without a run folder and without a step: its callback extracts on the way."""

    def before_instantiate_classes(self) -> None:
        """Leave out the loggers."""
        self.settings.trainer.logger = False

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Leave out the callbacks that every run has."""
        self.trainer_defaults["callbacks"] = []
        return LightningCLI.instantiate_trainer(self, **kwargs)

    def after_instantiate_classes(self) -> None:
        """Keep the callback that extracts."""
        callbacks = self.trainer.callbacks  # type: ignore[attr-defined]
        extractors = [callback for callback in callbacks if isinstance(callback, FrozenFeatures)]
        if not extractors:
            raise ValueError(
                "this experiment caches no features: there is no callbacks.frozen_features.FrozenFeatures among its "
                "trainer.callbacks"
            )
        self.extractor = extractors[0]
        callbacks[:] = [Compatibility(), self.extractor]
        self.trainer.limit_train_batches = 0


def evaluate(args: Sequence[str]) -> None:
    """``evaluate [--config YAML] [options]``: test any network on any data with any scores, without a run behind it."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[], type=Path)
    parser.add_argument("--experiment")
    options, _ = parser.parse_known_args(args)
    given = ["--config", str(EXPERIMENTS / "_evaluate.yaml"), *args]
    if options.experiment is None:
        given += ["--experiment", f"evaluate/{naming(options.config).stem if options.config else 'network'}"]
    OODCLI(["test", *given])


def completion(args: Sequence[str]) -> None:
    """``completion [bash|zsh]``: print shell completion of the command ``ood``."""
    shell = args[0] if args else "bash"
    if shell not in ("bash", "zsh"):
        raise ValueError(f"completion exists for bash and zsh, not for {shell}")
    # Not by shtab, which jsonargparse offers: it follows every class that could be nested, to 77 MB.
    help_text = io.StringIO()
    with contextlib.redirect_stdout(help_text), contextlib.suppress(SystemExit):
        OODCLI(["fit", "--help"])
    options = sorted(set(re.findall(r"--[a-z][\w.]+", help_text.getvalue())))
    words = {"verbs": " ".join([*OODCLI.subcommands(), *VERBS]), "options": " ".join(options)}
    print("autoload -U +X bashcompinit && bashcompinit\n" * (shell == "zsh") + COMPLETION % words)


def fit_and_test(args: Sequence[str], show_results: bool = True) -> Path:
    """Fit, then test from the record of the run, and return its folder; what is there already is not done again."""
    try:
        cli = OODCLI(["fit", *args])
        folder = cli.folder
        if cli.settings.trainer.fast_dev_run:  # which leaves no checkpoint to test
            return folder
    except FinishedRunError as finished:
        folder = finished.folder
        print(f"{folder} is fitted already")
    if not (folder / "results.json").is_file():
        OODCLI(["test", "--config", str(folder / "config.yaml")], show_results)
    elif show_results:
        print_results([read_results(folder)])
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
    "features": features,
    "evaluate": evaluate,
    "heat-evaluate": heat_evaluate,
    "heat-toy": heat_toy,
    "heatmap-latest": heatmap_latest,
    "stages": stages,
    "report": report,
    "data": data,
    "completion": completion,
}
