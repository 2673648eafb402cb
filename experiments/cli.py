"""``python -m experiments fit|validate|test``: LightningCLI with run folders, exact resume and short errors."""

import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import yaml
from pytorch_lightning import Callback, LightningModule
from pytorch_lightning.callbacks import ModelCheckpoint
from pytorch_lightning.cli import ArgsType, LightningArgumentParser, LightningCLI

from backbones.weights import CHECKPOINTS, ROOT, read_state_dict
from callbacks.checkpoints import FirstCheckpoint, LastCheckpoint
from callbacks.compatibility import Compatibility
from callbacks.evaluation import OODEvaluation
from callbacks.randomness import SeedSteps
from callbacks.run_record import IGNORED, RunRecord, differences, prepare_folder, read_config, read_run, restore_folder
from callbacks.tables import print_results
from datamodules.datamodule import OODDataModule
from experiments.errors import explain
from lightning_modules.ood_module import OODModule

EXPERIMENTS = ROOT / "experiments"
DEFAULTS = EXPERIMENTS / "_defaults.yaml"


class Parser(LightningArgumentParser):
    """LightningCLI's parser with short errors, and without argparse's guessing of abbreviated flags."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what was wrong and what would be right, and exit with 2; nested parsers raise as before."""
        if not self.exit_on_error:
            super().error(message, ex)
        parsers = [parser for action in self._actions for parser in getattr(action, "_name_parser_map", {}).values()]
        keys = [action.dest for parser in parsers or [self] for action in parser._actions]
        sys.stderr.write(f"error: {explain(message, keys)}\n")
        raise SystemExit(2)

    def _get_option_tuples(self, option_string: str) -> list[Any]:
        return []  # allow_abbrev=False does not reach the parsers of the subcommands


class OODCLI(LightningCLI):
    """One run folder for each experiment and name; the configuration of the fit is the record of the run.

    Lightning's ``predict`` is left out: from a command line it keeps everything in memory and shows nothing, and
    ``test`` writes the scores and the predicted class of every image to ``scores.npz``.
    """

    def __init__(self, args: ArgsType = None, show_results: bool = True) -> None:
        self.show_results = show_results
        defaults = {"default_config_files": [str(DEFAULTS)]}
        try:
            super().__init__(
                OODModule,
                OODDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                save_config_callback=None,
                seed_everything_default=0,
                parser_class=Parser,
                parser_kwargs={"prog": "ood", **{name: dict(defaults) for name in self.subcommands()}},
                auto_configure_optimizers=False,
                args=args,
            )
        except BaseException:
            if hasattr(self, "folder"):
                restore_folder(self.folder)
            raise
        finally:
            if "wandb" in sys.modules:  # else the next command in this process would write into the same wandb run
                sys.modules["wandb"].finish()

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The verbs that take every option."""
        return {verb: skipped for verb, skipped in LightningCLI.subcommands().items() if verb != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what every experiment has."""
        parser.add_argument(
            "--experiment", type=str | None, help="<method>/<setting>; default: from the path of --config"
        )
        parser.add_argument("--name", type=str | None, help="name of the run; default: seed<seed_everything>")
        parser.add_argument(
            "--overwrite",
            type=bool,
            default=False,
            help="fit: discard a run of the same name; test: replace its results",
        )
        parser.add_argument("--save_every_n_steps", type=int | None, help="write last.ckpt in mid-epoch too")
        parser.add_argument(
            "--keep_every_n_epochs", type=int | None, help="keep the first, best and every n-th checkpoint, in epochs/"
        )
        parser.add_lightning_class_args(OODEvaluation, "evaluation")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse; unlike the stock CLI without a warning when called from Python."""
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Take nothing from a checkpoint: config.yaml is the record, and the command line stands."""

    @property
    def settings(self) -> Any:
        """The configuration of the chosen subcommand."""
        return self.config[self.subcommand]

    def before_instantiate_classes(self) -> None:
        """Resolve experiment, name and run folder, and tell everything that writes."""
        settings = self.settings
        if settings.experiment is None:
            settings.experiment = _experiment_of(settings.config)
        if settings.trainer.get("fast_dev_run"):
            settings.name, settings.overwrite = "fast_dev_run", True
        settings.name = settings.name or f"seed{settings.seed_everything}"
        word = r"\w[\w.-]*"
        if not re.fullmatch(f"{word}/{word}", settings.experiment) or not re.fullmatch(word, settings.name):
            raise ValueError(
                "an experiment is called <method>/<setting> and a run by one word, of letters, digits, _ . and -; "
                f"these are {settings.experiment!r} and {settings.name!r}"
            )
        self.record = self.config_yaml()  # before any path of this machine enters
        self.folder = CHECKPOINTS / settings.experiment / settings.name
        settings.evaluation.folder = str(self.folder)
        settings.trainer.default_root_dir = str(self.folder)
        loggers = settings.trainer.logger
        for logger in loggers if isinstance(loggers, list) else [loggers]:
            if logger and "save_dir" in logger.init_args:
                logger.init_args.save_dir = str(self.folder)
        self.resume: Path | None = None
        if self.subcommand == "fit":
            self.resume = prepare_folder(self.folder, self.record, settings.overwrite)

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        """Add the callbacks that no experiment goes without."""
        settings = self.settings
        own = [Compatibility(), RunRecord(self.folder, self.record), SeedSteps(settings.seed_everything)]
        self._get(self.config_init, "evaluation").configuration = self.configuration
        self.trainer_defaults["callbacks"] = [*own, *self._checkpoints()]
        return super().instantiate_trainer(**kwargs)

    def _checkpoints(self) -> list[Callback]:
        common: dict[str, Any] = {
            "dirpath": self.folder,
            "enable_version_counter": False,
            "save_on_train_epoch_end": True,
        }
        checkpoints: list[Callback] = []
        best: dict[str, Any] = {"filename": "best", "monitor": self.model.best_by, "mode": "max"}
        if self._selection() == "best":  # before the last one, which stores its state
            checkpoints += [ModelCheckpoint(**common, **best)]
        if epochs := self.settings.keep_every_n_epochs:
            kept = common | {"dirpath": self.folder / "epochs"}
            every: dict[str, Any] = {"filename": "{epoch:03d}", "save_top_k": -1, "auto_insert_metric_name": False}
            checkpoints += [FirstCheckpoint(self.folder / "epochs" / "first.ckpt")]
            checkpoints += [ModelCheckpoint(**kept, **every, every_n_epochs=epochs)]
            validates = self.datamodule.val_split and self.settings.trainer.limit_val_batches != 0
            classifies = self.model.num_classes and "backbone" not in self.model.frozen
            if self._selection() == "last" and validates and classifies:
                checkpoints += [ModelCheckpoint(**kept, **best)]
        if self.settings.save_every_n_steps:
            steps = self.settings.save_every_n_steps
            checkpoints += [LastCheckpoint(**common, filename="last", every_n_train_steps=steps)]
        return [*checkpoints, LastCheckpoint(**common, filename="last")]

    def after_instantiate_classes(self) -> None:
        """Choose the checkpoint: the one to continue from, or the one that the method selects."""
        chosen = self.config_init[self.subcommand]
        results = self.folder / self.settings.evaluation.subfolder / "results.json"
        if self.subcommand == "test" and results.is_file() and not self.settings.overwrite:
            raise FileExistsError(f"{results} is there already: replace it with --overwrite true")
        if chosen.ckpt_path is None:
            checkpoint = self.resume if self.subcommand == "fit" else self._trained()
            chosen.ckpt_path = None if checkpoint is None else str(checkpoint)
        if chosen.ckpt_path is not None:
            read_state_dict(Path(chosen.ckpt_path))  # says in words what is wrong with a damaged or foreign file

    def _trained(self) -> Path | None:
        """The checkpoint to test; None = the weights that the configuration names."""
        trained = self.folder / f"{self._selection()}.ckpt"
        if trained.is_file():
            self._check_model_of_run()
            return trained
        untrained = _untrained(self.model, _has_weights(self.settings.model.as_dict()))
        if read_run(self.folder) or untrained:
            method, _, setting = self.settings.experiment.partition("/")
            trainable = (EXPERIMENTS / method / f"{setting}.yaml").is_file()
            remedy = f"train it with make {method}-{setting}" if trainable else "give the backbone `weights`"
            raise FileNotFoundError(
                f"nothing to evaluate: there is no {trained}, and the model names no weights"
                f"{' of ' if untrained else ''}{', '.join(untrained)}; "
                f"{remedy}, or give --ckpt_path"
            )
        return None

    def _selection(self) -> str:
        """``best`` or ``last``; without held-out images there is nothing to select on, and the last one counts."""
        return self.model.selection if self.datamodule.val_split else "last"

    def _check_model_of_run(self) -> None:
        stored, here = read_config(self.folder), yaml.safe_load(self.record)
        if changed := differences(stored.get("model"), here["model"], "model"):
            raise ValueError(
                f"the run was fitted with another model; take --config {self.folder / 'config.yaml'}\n{changed}"
            )

    def after_test(self) -> None:
        """Print the table, once, on the first process."""
        results = self._get(self.config_init, "evaluation").results
        if results and self.show_results:
            print_results([results])

    @property
    def configuration(self) -> Any:
        """The record as results.json holds it."""
        return _without_infinity(yaml.safe_load(self.record))

    def config_yaml(self) -> str:
        """The resolved configuration, ready to be given to ``--config`` again."""
        parser = self._parser(self.subcommand)
        text = parser.dump(self.settings, skip_none=False, skip_link_targets=True)
        config = {key: value for key, value in yaml.safe_load(text).items() if key not in IGNORED}
        return yaml.safe_dump(config, sort_keys=False)


def naming(configs: Sequence[Any]) -> Any:
    """Return the YAML that names the experiment: the last one that is no fragment, whose name begins with ``_``."""
    return next((path for path in reversed(configs) if not Path(os.fspath(path)).name.startswith("_")), configs[-1])


def _experiment_of(configs: list[Any] | None) -> str:
    if not configs:
        raise ValueError("which experiment? Give --config experiments/<method>/<setting>.yaml or --experiment a/b")
    path = Path(os.fspath(naming(configs))).absolute()  # a link counts where it stands
    return f"{path.parent.name}/{path.stem}"


def _without_infinity(config: Any) -> Any:
    """Spell infinite numbers, which JSON does not know, as YAML does."""
    if isinstance(config, dict):
        return {key: _without_infinity(value) for key, value in config.items()}
    if isinstance(config, list):
        return [_without_infinity(value) for value in config]
    return yaml.safe_dump(config).split()[0] if isinstance(config, float) and not math.isfinite(config) else config


def _untrained(module: LightningModule, backbone_has_weights: bool) -> list[str]:
    """Name the parts of a method that would be trained and whose weights come from no file."""
    loaded = {"backbone"} if backbone_has_weights else set()
    loaded |= {name for name, part in module.named_modules() if "origin" in vars(part)}
    names = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    left = [name for name in names if not any(f"{name}.".startswith(f"{part}.") for part in loaded)]
    return list(dict.fromkeys(name.partition(".")[0] for name in left))


def _has_weights(model: Any) -> bool:
    if isinstance(model, dict):
        return bool(model.get("weights")) or any(_has_weights(value) for value in model.values())
    return False
