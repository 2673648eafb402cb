"""Training on what a frozen network sees, computed once for each image and kept on disk."""

import fcntl
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

import torch
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.utilities import rank_zero_info
from rich.console import Console
from rich.progress import track
from torch import Tensor

from backbones import weights
from callbacks.cached_evidence import CachedEvidence, DeviceEvidence, to_columns
from callbacks.cached_fit import fit_parts
from callbacks.feature_cache import FeatureCache
from callbacks.processes import evaluating, together
from datamodules.augmentation import Augmentation
from datamodules.batch import Batch
from datamodules.datamodule import OODDataModule
from datamodules.images import ImageSet, anchored, sha256
from lightning_modules.ood_module import OODModule

PROBES = 16  # images that are encoded at every start
# relative differences that other batches and devices explain
ROUNDING = {"full": 1e-3, "half": 5e-3, "mixed": 0.05}
PATIENCE = 0.5  # seconds between two looks whether another run is done


class FrozenFeatures(Callback):
    """Extracts what ``encode`` says of every training image, ID and outliers alike, and trains on that.

    Where training starts, what is not in the cache yet is extracted and the data module serves ``EvidenceBatch``, in
    float32, in place of images; scores that are parts of the method, such as a prior, are fitted on it first, unless a
    checkpoint has brought them. A cache belongs to the weights and the structure of what is frozen, to the training
    images and how they are normalised, to the arrays and the precision; not to the seed or the batch size. What a key
    cannot tell, such as changed code, is found by encoding some images again. Runs that want the same cache at once
    wait for the first; processes of a run share the work, and the folder.

    Attributes:
        cache: known from the start of training on.
        rows: what is served, evidence by the rows of the training images; known from then on, too.

    Args:
        dtype: in which the cache holds numbers; ``float16`` takes half the space and keeps 3 digits, up to 65504.
        on_device: hold all of it in the memory of each device, instead of mapping the files into memory.
        folder: where caches lie, relative to the repository root; ``features`` among the run folders where not given.
    """

    cache: FeatureCache
    rows: CachedEvidence | DeviceEvidence

    def __init__(
        self,
        dtype: Literal["float32", "float16"] = "float32",
        on_device: bool = False,
        folder: str | None = None,
    ) -> None:
        self.dtype, self.on_device, self.folder = dtype, on_device, folder

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Complete the cache and let the data module serve it.

        Raises:
            ValueError: the experiment does not go with cached features, or a cache holds others than it should.
        """
        module: OODModule = pl_module  # type: ignore[assignment]
        data: OODDataModule = trainer.datamodule  # type: ignore[attr-defined]
        check(module, data, self.on_device)
        images = data.training_rows()
        with evaluating(module):
            self.cache, probes = together(trainer, lambda: self._identify(trainer, module, data, images))
            with _alone(trainer, self.cache.folder):
                self._complete(trainer, module, data, images, probes)
        rows = CachedEvidence(self.cache, images.labels)
        fit_parts(trainer, module, rows, data.fit_rows)
        self.rows = together(trainer, lambda: DeviceEvidence(rows, trainer)) if self.on_device else rows
        data.serve(self.rows)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the data module serve images again: another network may come."""
        if stage == "fit":
            trainer.datamodule.serve(None)  # type: ignore[attr-defined]

    def _identify(
        self, trainer: Trainer, module: OODModule, data: OODDataModule, images: ImageSet
    ) -> tuple[FeatureCache, dict[str, Tensor]]:
        """Find the cache, and encode some images."""
        probes = self._encode(trainer, module, images[_spread(len(images))])
        widths = {name: values.shape[1] for name, values in probes.items()}
        root = weights.CHECKPOINTS / "features" if self.folder is None else anchored(self.folder)
        identity = identify(module, data, images, trainer.precision)
        return FeatureCache(root, identity, len(images), widths, self.dtype), probes

    def _complete(
        self, trainer: Trainer, module: OODModule, data: OODDataModule, images: ImageSet, probes: Mapping[str, Tensor]
    ) -> None:
        """Extract the chunks that are missing, each on one of the processes, if those that are there are right."""
        cache = self.cache
        rank_zero_info(f"features of {cache.length:,} images, {cache.nbytes / 1e6:,.1f} MB, in {cache.folder}")
        together(trainer, lambda: cache.prepare() if trainer.is_global_zero else None)
        missing = together(trainer, cache.missing)
        together(trainer, lambda: self._compare(probes, missing, trainer.precision))
        if missing:
            started = time.perf_counter()
            mine = missing[trainer.global_rank :: trainer.world_size]
            together(trainer, lambda: self._extract(trainer, module, data, images, mine))
            extracted = sum(len(cache.rows(chunk)) for chunk in missing)
            rank_zero_info(f"extracted those of {extracted:,} images in {time.perf_counter() - started:.1f} s")

    def _extract(
        self, trainer: Trainer, module: OODModule, data: OODDataModule, images: ImageSet, chunks: list[int]
    ) -> None:
        """Encode and write chunks, in batches that do not depend on which are asked for."""
        size = max(1, data.eval_batch_size // trainer.world_size)
        batches = {chunk: self.cache.rows(chunk).split(size) for chunk in chunks}
        loader = iter(data.given_dataloader(images, [rows for chunk in batches.values() for rows in chunk]))
        console = Console(stderr=True)
        shown = trainer.is_global_zero and console.is_terminal
        for chunk in track(chunks, "features", console=console, disable=not shown):
            parts = [self._encode(trainer, module, next(loader)) for _ in batches[chunk]]
            self.cache.write(chunk, {name: torch.cat([part[name] for part in parts]).numpy() for name in parts[0]})

    def _encode(self, trainer: Trainer, module: OODModule, batch: Batch) -> dict[str, Tensor]:
        """Name the arrays of a batch that comes from a loader, as they are cached."""
        on_device = trainer.strategy.batch_to_device(batch)  # the data module normalises on the way
        with torch.no_grad(), trainer.precision_plugin.forward_context():
            evidence = module.encode(on_device.images)
        return {name: self._round(name, values) for name, values in to_columns(evidence).items()}

    def _round(self, name: str, values: Tensor) -> Tensor:
        rounded = values.to(getattr(torch, self.dtype))
        if values.isnan().any():
            raise ValueError(f"{name} is not a number for some images")
        if (rounded.isinf() & values.isfinite()).any():
            raise ValueError(
                f"{name} reaches {values.abs().max():.6g}, {self.dtype} only {torch.finfo(rounded.dtype).max:.6g}: "
                "cache it as float32"
            )
        return rounded.cpu()

    def _compare(self, probes: Mapping[str, Tensor], missing: Sequence[int], precision: Any) -> None:
        """Raise a ``ValueError`` where the chunks that are there do not hold what the network sees now.

        Of each image by itself, and before anything is added to a cache.
        """
        rows = _spread(self.cache.length)
        there = torch.tensor([row // self.cache.chunk not in set(missing) for row in rows.tolist()])
        kind = "mixed" if "16" in str(precision) else "half" if self.dtype == "float16" else "full"
        for chunk in (rows[there] // self.cache.chunk).unique().tolist():
            stored = self.cache.read(chunk)
            mine = rows // self.cache.chunk == chunk
            for name, values in probes.items():
                cached = torch.from_numpy(stored[name][(rows[mine] % self.cache.chunk).numpy()]).float()
                now = values[mine].float()
                if not ((cached - now).norm(dim=1) <= ROUNDING[kind] * now.norm(dim=1) + 1e-6).all():
                    raise ValueError(
                        f"{name} in {self.cache.folder} is not what the network sees in these images now, though "
                        "weights and images are the same: the code must have changed. Remove the folder to extract anew"
                    )


def check(module: OODModule, data: OODDataModule, on_device: bool) -> None:
    """Raise a ``ValueError`` in words where an experiment does not go with cached features."""
    if not module.frozen:
        raise ValueError(f"{type(module).__name__} keeps nothing frozen, so its features change and cannot be cached")
    if data.augmentation != Augmentation():
        raise ValueError(f"features are cached of images as they are: leave out {data.augmentation}")
    if on_device and data.num_workers:
        raise ValueError(
            "features on the device are looked up in the process that trains: take num_workers 0, or on_device false"
        )


def identify(module: OODModule, data: OODDataModule, images: ImageSet, precision: Any) -> dict[str, Any]:
    """State all that cached features depend on, beside the code."""
    return {
        "method": _class_path(module),
        "frozen": {name: _describe(module.get_submodule(name)) for name in module.frozen},
        "images": images.fingerprint(),
        "mean": data.mean,
        "std": data.std,
        "precision": precision,
    }


def _describe(network: torch.nn.Module) -> dict[str, str]:
    """Identify a network by its class, what it is made of, its weights, and the constants that are not among them."""
    stored = network.state_dict().keys()
    constants = {name: buffer for name, buffer in network.named_buffers() if name not in stored}
    return {
        "class": _class_path(network),
        "structure": sha256(repr(network)),
        "weights": weights.weights_sha256(network),
        "constants": sha256(*(f"{name} {values.tolist()}\n" for name, values in constants.items())),
    }


def _class_path(instance: object) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"


def _spread(length: int) -> Tensor:
    """Choose the rows of images to encode again, spread over all."""
    number = min(length, PROBES)
    return torch.arange(number) * length // number


@contextmanager
def _alone(trainer: Trainer, folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder; the processes of this one enter and leave together.

    They ask again and again, rather than wait where a process group would give up.
    """
    together(trainer, lambda: folder.mkdir(parents=True, exist_ok=True))
    with together(trainer, lambda: (folder / "lock").open("w")) as lock:
        waiting = False
        while not trainer.strategy.reduce_boolean_decision(not trainer.is_global_zero or _takes(lock)):
            if not waiting:
                rank_zero_info(f"waiting for another run that extracts into {folder}")
            waiting = True
            time.sleep(PATIENCE)
        yield


def _takes(lock: IO[str]) -> bool:
    """Try to lock a file, until it is closed or the process dead."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
