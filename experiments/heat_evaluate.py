"""``heat-evaluate``: trained runs of HEAT and their compositions, in one pass over the images."""

import argparse
import re
import tempfile
from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pytorch_lightning.cli import ArgsType, LightningArgumentParser

from backbones import weights
from callbacks.run_record import describe_training, differences, read_config, read_run
from experiments.cli import EXPERIMENTS, OODCLI

METHOD = "lightning_modules.heat.HEAT"
CLASSIFIER = "lightning_modules.classifier.Classifier"
MEMBER = "lightning_modules.scores.hybrid_energy.HybridEnergy"
COMPOSITION = "lightning_modules.scores.composition.Composition"
NEGATIVE = re.compile(r"-(inf|[\d.]+(e[+-]?\d+)?)")


def heat_evaluate(args: Sequence[str]) -> None:
    """``heat-evaluate --runs RUN... [--beta 0 -1 inf] [options]``: test trained runs of HEAT and their compositions."""
    parser = argparse.ArgumentParser(
        "python -m experiments heat-evaluate", description=heat_evaluate.__doc__, add_help=False, allow_abbrev=False
    )
    parser.add_argument("--runs", nargs="+", required=True)
    parser.add_argument("--beta", nargs="+", type=float, default=[0.0])
    parser.add_argument("--experiment")
    parser.add_argument("--name")
    # argparse takes -1 for a value, but -inf and -1e-3 for options
    options, rest = parser.parse_known_args([f" {arg}" if NEGATIVE.fullmatch(arg) else arg for arg in args])
    runs = [find_run(run) for run in options.runs]
    check_alike(runs)
    common, names = name_members([run.config["experiment"] for run in runs], [run.config["name"] for run in runs])
    called = list(dict.fromkeys(run.config["name"] for run in runs))
    if not options.experiment and (not common or (EXPERIMENTS / f"{common}.yaml").is_file()):
        taken = f"only the name of an experiment, {common}," if common else "no name"
        raise ValueError(f"{', '.join(options.runs)} have {taken} in common: give --experiment heat/<what to call it>")
    if not options.name and len(called) > 1:
        raise ValueError(f"the runs are called {', '.join(called)}: give --name <what to call their composition>")
    members = {name: run.member for name, run in zip(names, runs, strict=True)}
    compositions = {
        f"composition_{beta:g}": {"class_path": COMPOSITION, "init_args": {"members": members, "beta": beta}}
        for beta in options.beta
    }
    evaluation = runs[0].evaluation | {"experiment": options.experiment or common, "name": options.name or called[0]}
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder, "heat_evaluate.yaml")
        config.write_text(yaml.safe_dump(evaluation, sort_keys=False), encoding="utf-8")
        MembersCLI(["--config", str(config), *rest], members | compositions, runs[0].data)


class MembersCLI(OODCLI):
    """``test`` with some scores beside those that the arguments name, on the data that these were trained on."""

    def __init__(self, args: Sequence[str], scores: dict[str, Any], data: dict[str, Any]) -> None:
        self.scores, self.data = scores, data
        super().__init__(["test", *args])

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Join the scores with those of the arguments, of which a later YAML would replace an earlier one."""
        super().parse_arguments(parser, args)
        own = {name: score.as_dict() for name, score in self.config["test"].evaluation.scores.items()}
        if taken := sorted(self.scores.keys() & own.keys()):
            raise ValueError(f"{', '.join(taken)} is what members and compositions are called: rename your own scores")
        scores = yaml.safe_dump(own | self.scores, sort_keys=False)
        super().parse_arguments(parser, [*args, "--evaluation.scores", scores])  # type: ignore[misc]

    def after_instantiate_classes(self) -> None:
        """Refuse other data, as the test of a run does."""
        super().after_instantiate_classes()
        self.datamodule.setup("test")
        if changed := differences(self.data, describe_training(self.datamodule)):
            raise ValueError(f"these are not the data that the runs were fitted on\n{changed}")


class Run(NamedTuple):
    """A finished run of HEAT.

    Attributes:
        source: what ``weights`` calls it in YAML.
        checkpoint: the file.
        config: the resolved configuration.
        data: the record of what it was trained on.
    """

    source: str
    checkpoint: Path
    config: dict[str, Any]
    data: dict[str, Any]

    @property
    def member(self) -> dict[str, Any]:
        """Its energy, as a score in YAML."""
        model = self.config["model"]["init_args"]
        kept = {key: model[key] for key in ("prior", "residual", "temperature", "prior_temperature")}
        return {"class_path": MEMBER, "init_args": kept | {"weights": self.source}}

    def backbone(self, source: str | None) -> dict[str, Any]:
        """Its network in YAML, with the weights of some source."""
        backbone = self.config["model"]["init_args"]["backbone"]
        return backbone | {"init_args": backbone["init_args"] | {"weights": source}}

    @property
    def evaluation(self) -> dict[str, Any]:
        """What ``test`` is told of network and data; no scores yet, and these are fitted on all training images."""
        config = self.config
        model = {"backbone": self.backbone(self.source), "optimizer": "torch.optim.SGD"}
        return config | {
            "model": {"class_path": CLASSIFIER, "init_args": model},
            "data": config["data"] | {"init_args": config["data"]["init_args"] | {"fit_limit": None}},
            "trainer": config["trainer"] | {"callbacks": None},
            "evaluation": config["evaluation"] | {"scores": {}},
        }


def find_run(run: str) -> Run:
    """Find a finished run of HEAT by ``[run:]<method>/<setting>[/<name>]`` or by its folder.

    Raises:
        FileNotFoundError: it is not trained yet.
        ValueError: it is not finished, or of another method.
    """
    folder, source = Path(run).absolute(), f"run:{run.removeprefix('run:')}"
    if folder.is_relative_to(weights.CHECKPOINTS):
        source = f"run:{folder.relative_to(weights.CHECKPOINTS).as_posix()}"
    elif (folder / "run.json").is_file():
        source = str(folder / "last.ckpt")
    checkpoint = weights.locate(source)
    config, record = read_config(checkpoint.parent), read_run(checkpoint.parent)
    method, status = config.get("model", {}).get("class_path"), record.get("status")
    if method != METHOD or status != "finished":
        raise ValueError(f"{run} is a run of {method} that is {status}; wanted is one of {METHOD} that is finished")
    return Run(source, checkpoint, config, record["data"])


def check_alike(runs: Sequence[Run]) -> None:
    """Raise a ``ValueError`` that says in what runs differ of backbone and ID data."""
    first, *others = runs
    state = weights.read_state_dict(first.checkpoint)
    for run in others:
        there, here = ({"backbone": each.backbone(None), "data": each.data} for each in (first, run))
        changed = [differences(there, here)]
        other = weights.read_state_dict(run.checkpoint)
        if state.keys() != other.keys() or not all(values.equal(other[name]) for name, values in state.items()):
            changed.append("  the weights of the backbone")
        if text := "\n".join(filter(None, changed)):
            raise ValueError(f"{first.source} (there) and {run.source} (here) differ in\n{text}")


def name_members(settings: Sequence[str], names: Sequence[str]) -> tuple[str, list[str]]:
    """Call members by what tells their settings apart, and where that is nothing, by the names of the runs as well.

    Returns:
        The experiment that is called by what the settings have in common, empty if nothing; and the members' names.

    >>> name_members(["heat/digits_gmm", "heat/digits_gmm_std"], ["seed0", "seed0"])
    ('heat/digits', ['gmm', 'gmm_std'])
    >>> name_members(["heat/digits_gmm", "heat/digits_gmm"], ["seed0", "seed1"])
    ('heat/digits', ['gmm_seed0', 'gmm_seed1'])
    """
    words = [setting.partition("/")[2].split("_") for setting in settings]
    shared = takewhile(lambda column: len(set(column)) == 1, zip(*(parts[:-1] for parts in words), strict=False))
    common = [column[0] for column in shared]
    short = ["_".join(parts[len(common) :]) for parts in words]
    known = [f"{name}_{run}" if short.count(name) > 1 else name for name, run in zip(short, names, strict=True)]
    if twice := [name for name, count in Counter(known).items() if count > 1]:
        raise ValueError(f"two runs would both be called {', '.join(twice)}: give each run once")
    return f"heat/{'_'.join(common)}" if common else "", known
