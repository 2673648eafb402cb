"""Fitted scores beside the run, so that a second evaluation of the same network fits nothing again."""

import hashlib
import json
import logging
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from callbacks.provenance import package_versions
from lightning_modules.scores.score import Fitted

INSTALLED = tuple(Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib"))
log = logging.getLogger(__name__)


def code_sha256() -> str:
    """Hash the versions of packages and all code that is not installed: ours and the user's, as far as it is imported.

    Which of it decides what a network sees cannot be told.
    """
    digest = hashlib.sha256(json.dumps(package_versions(), sort_keys=True).encode())
    files = {getattr(module, "__file__", None) for module in list(sys.modules.values())}
    for path in sorted({Path(file).resolve() for file in files if file and file.endswith(".py")}):
        if path.is_file() and not any(path.is_relative_to(folder) for folder in INSTALLED):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def fitting_key(*dependencies: Any) -> str:
    """Hash what a fitted score depends on, as JSON."""
    return hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode()).hexdigest()


def keep_fitted(path: Path, score: Fitted, key: str) -> None:
    """Write a score, whole or not at all; what was there is replaced. Where that fails, there is a warning."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            torch.save({"key": key, "state": score.state_dict()}, file)
        Path(file.name).replace(path)
    except OSError as error:  # the evaluation is done; that it cannot be kept is no reason to lose it
        log.warning("what %s has learned is not kept: %s", path.stem, error)


def read_fitted(path: Path, key: str) -> dict[str, Tensor] | None:
    """Read the state of a score that was kept under this key; None where there is none."""
    if not path.is_file():
        return None
    try:
        kept = torch.load(path, map_location="cpu", weights_only=True)
        return kept["state"] if kept["key"] == key else None
    except Exception as error:  # a damaged file raises nearly any type; to fit again is right after all of them
        log.warning("%s is damaged, the score is fitted again: %s", path, error)
        return None
