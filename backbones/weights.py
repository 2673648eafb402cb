"""Weights: where they lie, how they enter a network, and what identifies them."""

import hashlib
import json
import logging
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from backbones import layouts, published
from backbones.subnetwork import extract_state

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINTS = Path(os.environ.get("OOD_CHECKPOINTS", ROOT / "checkpoints")).absolute()
EXPERIMENTS = ROOT / "experiments"
CONTAINERS = ("state_dict", "model_state")
PARTS = ("net_state_dict", "cls_state_dict")  # of one network, in the files of heatmap
WRAPPERS = ("module.", "model.", "backbone.", "_orig_mod.")
log = logging.getLogger(__name__)
STUBBED = (  # classes and functions that published files need beside the weights, for what is not read
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)


def load_weights(module: nn.Module, source: str) -> None:
    """Load all weights of a network, or none; ``origins`` then says which file they are from.

    Args:
        module: the network; it is changed only when every name and every shape fits. Counters of batch-norm
            (``num_batches_tracked``) may be absent from the file.
        source: one of

            - a file of ``torch.save``, relative to the repository root or absolute;
            - ``run:<method>/<setting>[/<name>]``, the checkpoint of an experiment of ours (``name`` is ``seed0`` unless
              given), ``best.ckpt`` if there, else ``last.ckpt``; ``@last``, ``@epochs/049`` and the like behind it
              choose another;
            - the name of published weights, ``<source>/<weights>`` (``backbones.published``);
            - a name of torchvision's, such as ``ResNet50_Weights.IMAGENET1K_V1``.

            The state dict may lie under ``state_dict`` or ``model_state`` or be split into ``net_state_dict`` and
            ``cls_state_dict``, and its names may carry the prefix of a wrapper; of a Lightning checkpoint the network's
            part is taken, of one with a subnetwork that. Names of published layouts are translated
            (``backbones.layouts``).

    Raises:
        FileNotFoundError: there is no such file; for a run it names the make target that trains it, for published
            weights it says where to get them.
        ValueError: the file is damaged, holds more than plain data, is not the one that was published, or does not fit
            the network: then every missing, unexpected and mis-shaped name is listed.
    """
    path, digest = _locate_verified(source)
    _fill({module: adapt(read_state_dict(path), module.state_dict())}, path, source, digest)


def load_latent_space(backbone: nn.Module, heads: Mapping[str, nn.Module], source: str) -> None:
    """Load backbone and latent heads of the variational/metric latent space, or nothing.

    The backbone's classifier ``fc`` has no part in it: it stays as it is.

    Args:
        backbone: the network.
        heads: linear maps by the names that they have in files, ``fc_mu`` and ``fc_var``.
        source: as for ``load_weights``.

    Raises:
        FileNotFoundError: as for ``load_weights``.
        ValueError: as for ``load_weights``.
    """
    path, digest = _locate_verified(source)
    state = read_state_dict(path, whole=True)
    own, prefix = backbone.state_dict(), "backbone."
    if not any(name.startswith(prefix) for name in state):
        state, prefix = layouts.latent_space(state), "encoder."
    encoder = {name: v for name, v in state.items() if name.startswith(prefix) and not name.startswith(f"{prefix}fc.")}
    classifier = {name: value for name, value in own.items() if name.startswith("fc.")}
    parts = {backbone: adapt(encoder, own) | classifier}
    for name, head in heads.items():
        parts[head] = {entry: state[key] for entry in head.state_dict() if (key := f"{name}.{entry}") in state}
    _fill(parts, path, source, digest)


def _locate_verified(source: str) -> tuple[Path, str]:
    path = locate(source)
    digest = file_sha256(path)
    if published.is_published(source):
        published.check_digest(path, digest)
    return path, digest


def _fill(parts: Mapping[nn.Module, dict[str, Tensor]], path: Path, source: str, digest: str) -> None:
    """Load what was read from a file into every module, or into none."""
    for module, state in parts.items():
        if misfits := compare(state, module.state_dict()):
            lines = "\n  ".join(misfits)
            raise ValueError(f"{path} does not fit {type(module).__name__}, nothing was loaded:\n  {lines}")
    for module, state in parts.items():
        module.load_state_dict(module.state_dict() | state)
        module.origin = {"source": source, "file": path.name, "sha256": digest}  # type: ignore[assignment]


def origins(module: nn.Module) -> dict[str, dict[str, str]]:
    """Name the parts of a module that ``load_weights`` filled: ``source``, name and SHA-256 of the file of each."""
    return {name: part.origin for name, part in module.named_modules() if "origin" in vars(part)}


def locate(source: str) -> Path:
    """Find the file that ``source`` names, as for ``load_weights``."""
    if source.startswith("run:"):
        return _locate_run(source)
    if published.is_torchvision(source):
        return published.torchvision_file(source)
    if published.is_published(source):
        return published.published_file(source, CHECKPOINTS)
    if not (path := ROOT / source).is_file():
        raise FileNotFoundError(
            f"no weights at {path} (a relative path counts from the repository root)"
            + published.did_you_mean(source, published.FILES)
        )
    return path


def _locate_run(source: str) -> Path:
    source, _, checkpoint = source.partition("@")
    return locate_in_run(source, [f"{checkpoint}.ckpt"] if checkpoint else ["best.ckpt", "last.ckpt"])


def locate_in_run(source: str, files: Sequence[str]) -> Path:
    """Find the first that there is of some ``files`` of a finished run, ``run:<method>/<setting>[/<name>]``."""
    if not (parts := re.fullmatch(r"run:([^/@]+)/([^/@]+)(?:/([^/@]+))?", source)):
        raise ValueError(f"a run is named run:<method>/<setting> or run:<method>/<setting>/<name>, not {source}")
    method, setting, name = parts.group(1), parts.group(2), parts.group(3) or "seed0"
    folder = CHECKPOINTS / method / setting / name
    given = f", given the name {name}" if parts.group(3) else ""
    experiments = {f"run:{path.parent.name}/{path.stem}" for path in EXPERIMENTS.glob("[!_]*/*.yaml")}
    wanted = f"run:{method}/{setting}"
    remedy = f"`make {method}-{setting}` makes it{given}"
    if wanted not in experiments:
        remedy = f"experiments/{method}/{setting}.yaml would make it, which is not there either"
        remedy += published.did_you_mean(wanted, experiments)
    record = folder / "run.json"
    status = json.loads(record.read_text(encoding="utf-8")).get("status") if record.is_file() else None
    if status not in (None, "finished"):
        raise ValueError(
            f"{source} is {status}, not finished: {folder}. The same command continues it; to start from it as it is, "
            "give the path of its checkpoint"
        )
    for file in files:
        if (folder / file).is_file():
            return folder / file
    if status is None:
        raise FileNotFoundError(f"{source} is not trained yet: {folder} has no {' or '.join(files)}; {remedy}")
    there = ", ".join(sorted(str(path.relative_to(folder)) for path in folder.rglob("*.ckpt")))
    raise FileNotFoundError(f"{source} has no {' or '.join(files)} in {folder}; there is {there or 'no checkpoint'}")


class Stub:
    """Takes the place of ``STUBBED``, so that nothing of theirs runs."""

    def __init__(self, *arguments: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


def read_checkpoint(path: Path) -> Any:
    """Read a file of ``torch.save``; nothing in the file is executed."""
    with path.open("rb") as file, safe_globals([(Stub, name) for name in STUBBED]):
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises nearly any type, from KeyError to RuntimeError
            foreign = re.search(r"GLOBAL (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
            if foreign is None:
                raise ValueError(f"{path} is damaged, cut short, or not a file of torch.save") from error
            raise ValueError(
                f"{path} is refused: to unpickle it means to run {foreign.group(1)}, and weights are read as plain "
                "data only. If you trust the file, save the network's state_dict() alone and give that"
            ) from error


def read_state_dict(path: Path, whole: bool = False) -> dict[str, Tensor]:
    """Read the state dict in a file of ``torch.save``; nothing in the file is executed."""
    return unwrap(read_checkpoint(path), path, whole)


def unwrap(checkpoint: Any, path: Path, whole: bool = False) -> dict[str, Tensor]:
    """Take the state dict of a network out of what ``path`` holds; ``whole``: that of the method around it."""
    state = checkpoint
    if isinstance(checkpoint, dict) and {"min", "max"} <= checkpoint.keys():
        return layouts.heatmap_decoder(checkpoint)
    if isinstance(checkpoint, dict):
        state = next((checkpoint[key] for key in CONTAINERS if key in checkpoint), checkpoint)
        if all(isinstance(checkpoint.get(part), dict) for part in PARTS):
            state = {name: value for part in PARTS for name, value in checkpoint[part].items()}
    named = isinstance(state, dict) and all(isinstance(name, str) for name in state)
    if not named or not all(isinstance(value, Tensor) for value in state.values()):
        held = f"keys {', '.join(map(str, checkpoint))}" if isinstance(checkpoint, dict) else type(checkpoint).__name__
        raise ValueError(
            f"{path} holds no state dict (names of tensors), bare, under {' or '.join(CONTAINERS)}, or under "
            f"{' and '.join(PARTS)}; it holds {held}"
        )
    # beside the network, a Lightning checkpoint holds what the method adds to it
    if "pytorch-lightning_version" in checkpoint and not whole:
        network = {name: value for name, value in state.items() if name.startswith("backbone.")}
        if any(name.startswith("subnetwork.") for name in state):  # what the method has made of the network
            network = extract_state(state, checkpoint["keep"])
        if not network and "fc_mu.weight" in state:  # its encoder may carry a classifier that was never trained
            network = {name: value for name, value in state.items() if re.match(r"encoder\.(?!fc\.)", name)}
        return network or state
    return state


def adapt(state: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring ``state`` (a file) to the names of ``own`` (a network) as far as prefixes and published layouts differ."""
    state = strip_prefixes(state, set(own))
    wrapper = next(iter(own)).partition(".")[0] + "."  # as around a model of timm
    if all(name.startswith(wrapper) for name in own) and not any(name.startswith(wrapper) for name in state):
        state = {wrapper + name: value for name, value in state.items()}
    filled = layouts.fill_affine(layouts.translate(state, own), own)
    if len(filled) > len(state):
        log.warning("batch-norm has neither scale nor shift in the file: they are 1 and 0")
    return filled


def strip_prefixes(state: dict[str, Tensor], names: set[str]) -> dict[str, Tensor]:
    """Drop each wrapper's prefix that all of ``state`` carries, while nothing of it is among a network's ``names``.

    >>> strip_prefixes({"model.module.fc.bias": torch.zeros(1)}, {"fc.bias", "fc.weight"})
    {'fc.bias': tensor([0.])}
    """
    for prefix in (*WRAPPERS, *WRAPPERS, "encoder."):  # wrappers may be wrapped
        if names.isdisjoint(state) and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def compare(state: dict[str, Tensor], own: dict[str, Tensor]) -> list[str]:
    """Say in words each name or shape of ``state`` (a file) that differs from ``own`` (a network)."""
    missing = [f"missing: {name}" for name in own if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [f"unexpected: {name}" for name in state if name not in own]
    misshaped = [
        f"mis-shaped: {name} is {tuple(state[name].shape)} in the file, {tuple(value.shape)} in the network"
        for name, value in own.items()
        if name in state and state[name].shape != value.shape
    ]
    return missing + unexpected + misshaped


def file_sha256(path: str | Path) -> str:
    """Hash the bytes of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_sha256(module: nn.Module) -> str:
    """Hash a state dict: names, dtypes, shapes and bytes in the order of the names, on whatever device it lies."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
