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
    from experiments.cli import OODCLI
    from experiments.verbs import VERBS

    try:
        if args and args[0] in VERBS:
            VERBS[args[0]](args[1:])
        else:
            OODCLI(args)
    except (ValueError, OSError) as error:
        if "OOD_TRACEBACK" in os.environ:
            raise
        sys.stderr.write(f"error: {error}\n(set OOD_TRACEBACK=1 for the traceback)\n")
        return 2
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
