"""Entry point of the command line; ``main`` runs the same in one process, for the demo and the tests."""

import logging
import os
import sys
import warnings
from collections.abc import Sequence

os.environ.setdefault("WANDB_MODE", "offline")  # nothing ever asks for a login
os.environ.setdefault("WANDB_SILENT", "true")

PACKAGES = ("backbones", "callbacks", "datamodules", "experiments", "lightning_modules")


def main(args: Sequence[str] | None = None) -> int:
    """Run one command; wrong input ends in a message and exit status 2, not in a traceback."""
    args = sys.argv[1:] if args is None else list(args)
    quieten()
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # a user's own classes, as `python -m` finds them
    from lightning_fabric.utilities.exceptions import MisconfigurationException

    from experiments.cli import OODCLI
    from experiments.errors import explain
    from experiments.verbs import VERBS

    try:
        verb = args[0] if args else "--help"
        if verb in VERBS:
            VERBS[verb](args[1:])
        elif verb in OODCLI.subcommands():
            OODCLI(args)
        elif verb in ("-h", "--help"):
            print("fit, validate, test: LightningCLI; `fit --help` lists the options")
            for command in VERBS.values():
                print((command.__doc__ or "").replace("``", "`"))
        else:
            known = ", ".join([*OODCLI.subcommands(), *VERBS])
            raise ValueError(f"the first word says what to do: {known}; got {verb!r}")
    except (ValueError, OSError, MisconfigurationException) as error:
        if "OOD_TRACEBACK" in os.environ:
            raise
        sys.stderr.write(f"error: {explain(str(error))}\n(set OOD_TRACEBACK=1 for the traceback)\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    return 0


def quieten() -> None:
    """Let our own packages report, and leave out what third parties print at every start."""
    for package in PACKAGES:
        logging.getLogger(package).setLevel(logging.INFO)
    advertising = logging.getLogger("pytorch_lightning.utilities.rank_zero")
    advertising.addFilter(lambda record: "Tip:" not in record.getMessage())
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")  # inside Lightning
    warnings.filterwarnings(
        "ignore", message="Checkpoint directory .* exists and is not empty"
    )  # that is where it belongs


if __name__ == "__main__":
    sys.exit(main())
