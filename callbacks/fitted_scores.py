"""Fitted scores beside the run, so that a second evaluation of the same network fits nothing again."""

import hashlib
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_modules.scores import score as contract
from lightning_modules.scores.score import Score

SCORES = Path(contract.__file__).parent
log = logging.getLogger(__name__)


def fitting_key(score: Score, *dependencies: Any) -> str:
    """Hash what a fitted score depends on: JSON values, the code of its module and that of all our scores."""
    digest = hashlib.sha256(json.dumps(dependencies, sort_keys=True).encode())
    own = Path(sys.modules[type(score).__module__].__file__ or "")
    for path in (own, *sorted(SCORES.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def keep_fitted(path: Path, score: Score, key: str) -> None:
    """Write a score, whole or not at all; what was there is replaced."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".part")
    torch.save({"key": key, "state": score.state_dict()}, unfinished)
    unfinished.replace(path)


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
