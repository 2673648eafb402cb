"""The data module that all others are: from named sets of images to loaders of batches."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence, Sized
from typing import Any, Literal, cast

import torch
from pytorch_lightning import LightningDataModule
from pytorch_lightning.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset

from datamodules.augmentation import Augmentation
from datamodules.batch import Batch, TrainingBatch
from datamodules.images import ImageSet, Rows, WithOutliers, data_root, to_float
from datamodules.loader import Loader
from datamodules.outliers import draw_outliers
from datamodules.packed import pack
from datamodules.plans import Balanced, BatchPlan, GivenPlan, PairedPlan, Plan
from datamodules.sets import Group, Sets
from datamodules.splits import OODSubset, Subset, draw, stratified_split

SMALL = 64  # pixels of a side, up to which images are kept decoded


class OODDataModule(LightningDataModule, ABC):
    """Serves ID, OOD and outlier images as ``Batch``; a subclass says in ``load`` what the sets are.

    Image files are decoded whenever their images are asked for; but where these are served with sides of at most 64
    pixels, the first ``setup`` decodes each set once, into ``.packed`` below the root of all data, and only that takes
    long. What lies there may be deleted while no run uses it.

    Attributes:
        num_classes, classes, image_shape, groups, sets, sizes, fingerprints: known after ``setup``: K; names of the K
            classes; (C, H, W); OOD set -> near or far; and by name of split (``train``, ``fit``, ``calibration``,
            ``id``, ``outliers``, or an OOD set) the images, their number, and the SHA-256 of what they are.
        repeats: known after ``setup``: OOD set -> for each repeat of ``ood_subset``, the ids of its images.
        fit_rows: known after ``setup``: which of the ID training images, as they are trained on, scores are fitted on.
        removed: known after ``setup``: set of ID images -> how many outliers were left out for being among these, pixel
            for pixel; larger images, which are decoded each time they are served, are not compared.
        normalizes: whether images are normalised here rather than by the network.
        fit_passes: how often ``test_dataloader`` presents the training images first; the evaluation says so.
        before_test: what ``test_dataloader`` calls first; by then, the network has its weights.
        protocol: whose experiments the data follow, where a subclass knows any.
        root: folder of all data.
        remedy: what a subclass lets a user do about sets of different shape.

    Args:
        batch_size: rows of a training batch, over all devices together; where ``outlier_feed`` is ``paired``, ID rows.
            Training batches that are ``balanced`` have a size of their own.
        drop_last: whether an epoch leaves out the training images that do not fill a batch.
        eval_batch_size: rows of any other batch, over all devices together; as ``batch_size`` where not given.
        num_workers: worker processes of a loader on each device; 0 is best for small images, which lie in memory.
        seed: decides training order and augmentation.
        split_seed: decides what is held out; stays the same over training seeds, so that their results compare.
        val_split: share of each class of the ID training images that is held out for validation and calibration.
        val_ood: an OOD set whose images join the held-out ones in validation, with label -1, for methods that look at
            them: to watch, never to select.
        mean: constants of each channel, or one for all, for images in [0, 1]; left out with ``std`` where the network
            normalises itself. Mean [0], std [1] leaves images in [0, 1].
        std: see ``mean``.
        augmentation: what is done to training images at random; nothing where not given.
        known: only the first so many classes are ID; the test images of the others are the OOD set ``unknown``.
        subset: take less ID data than there is.
        ood_subset: which images of each OOD set are tested on; all where not given.
        outlier_feed: how outliers come into training: ``paired`` puts a fixed number into each batch, ``mixed``
            shuffles them among the ID images; ``None``: not at all.
        outlier_ratio: outliers for each ID row of a paired batch.
        num_outliers: train on so many of the outliers that the data has, drawn by ``split_seed``; all where not given.
            0 is the same as no ``outlier_feed``.
        balanced: train on batches of equally many images of each of some classes, without outliers; each device draws
            the classes of its share itself.
        fit_limit: fit scores on at most so many ID training images, drawn by ``split_seed``.
    """

    num_classes: int
    classes: list[str]
    image_shape: tuple[int, int, int]
    groups: dict[str, Group]
    sets: dict[str, ImageSet]
    sizes: dict[str, int]
    fingerprints: dict[str, str]
    repeats: dict[str, list[Tensor]]
    fit_rows: Tensor
    fit_passes: int = 0
    before_test: Callable[[], None] | None = None
    protocol: str | None = None
    remedy: str = ""

    def __init__(
        self,
        batch_size: int,
        drop_last: bool = True,
        eval_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        val_split: float = 0.0,
        val_ood: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        augmentation: Augmentation | None = None,
        known: int | None = None,
        subset: Subset | None = None,
        ood_subset: OODSubset | None = None,
        outlier_feed: Literal["paired", "mixed"] | None = None,
        outlier_ratio: float = 1.0,
        num_outliers: int | None = None,
        balanced: Balanced | None = None,
        fit_limit: int | None = None,
    ) -> None:
        super().__init__()
        at_least_1 = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, "fit_limit": fit_limit}
        at_least_0 = {
            "num_workers": num_workers,
            "seed": seed,
            "split_seed": split_seed,
            "num_outliers": num_outliers,
        }
        for least, values in ((1, at_least_1), (0, at_least_0)):
            for name, value in values.items():
                if value is not None and value < least:
                    raise ValueError(f"{name} must be at least {least}, got {value}")
        if not 0 <= val_split < 1:
            raise ValueError(f"val_split is a share of the ID training images, 0 <= val_split < 1, got {val_split}")
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std belong together, give both or neither: mean={mean}, std={std}")
        if mean is not None and std is not None and not (max(mean) <= 1 and 0 < min(std) <= max(std) <= 1):
            raise ValueError(f"mean and std are for images in [0, 1], std above 0; got mean={mean}, std={std}")
        if num_outliers and outlier_feed is None:
            raise ValueError(f"num_outliers={num_outliers}, but not how they come into training: set outlier_feed")
        if num_outliers == 0:
            outlier_feed = None
        if balanced is not None and outlier_feed is not None:
            raise ValueError(f"balanced batches have no place for outliers: leave out outlier_feed={outlier_feed!r}")
        self.batch_size, self.drop_last, self.eval_batch_size = batch_size, drop_last, eval_batch_size or batch_size
        self.num_workers, self.seed, self.split_seed, self.val_split = num_workers, seed, split_seed, val_split
        self.val_ood = val_ood
        self.mean, self.std, self.augmentation = mean, std, augmentation or Augmentation()
        self.known, self.subset, self.ood_subset = known, subset or Subset(), ood_subset or OODSubset()
        self.outlier_feed, self.outlier_ratio, self.fit_limit = outlier_feed, outlier_ratio, fit_limit
        self.num_outliers, self.removed = num_outliers, dict[str, int]()
        self.balanced, self.normalizes, self.root = balanced, mean is not None, data_root()
        self.sets, self.repeats = {}, {}
        self._packs = True
        self._served: Dataset[Any] | None = None
        self._paired: PairedPlan | None = None

    @abstractmethod
    def load(self) -> Sets:
        """Say what the sets are; called once, on every process, and must give the same on each."""

    def setup(self, stage: str | None = None) -> None:
        """Load, check and split the sets; a second call does nothing."""
        if self.sets:
            return
        sets = self.load()
        sets.check(self.remedy)
        self._check(sets)
        sets = sets.subset(self.subset, self.split_seed)
        if self.known is not None:
            sets = sets.open(self.known)
        sets.check(self.remedy)
        self.ood_subset = self.ood_subset.resolve(len(sets.test))
        self.classes, self.num_classes, self.image_shape = sets.classes, len(sets.classes), sets.test.shape
        self.groups = {name: ood.group for name, ood in sets.ood.items()}
        splits = self._split(self._pack(sets.train)) if sets.train is not None else {}
        splits["id"] = self._pack(sets.test)
        for name, ood in sets.ood.items():
            repeats = self.ood_subset.draw(len(ood.images), self.split_seed)
            rows = torch.cat(repeats).unique()
            self.repeats[name] = [torch.searchsorted(rows, repeat) for repeat in repeats]
            chosen = Rows(ood.images, rows) if len(rows) < len(ood.images) else ood.images
            splits[name] = self._pack(chosen).as_outliers()
        if sets.outliers is not None:
            fed = self.outlier_feed is not None
            outliers = self._pack(self._draw_outliers(sets.outliers, splits)) if fed else sets.outliers
            splits["outliers"] = outliers.as_outliers()
        if self.val_ood is not None and (self.val_ood not in self.groups or "calibration" not in splits):
            raise ValueError(
                f"val_ood={self.val_ood!r} joins held-out ID images: it takes a val_split, which is {self.val_split}, "
                f"and an OOD set, of {', '.join(self.groups)}"
            )
        self.sizes = {name: len(images) for name, images in splits.items()}
        self.fingerprints = {name: images.fingerprint() for name, images in splits.items()}
        self.sets = splits

    def train_dataloader(self) -> Loader:
        """Serve shuffled training batches, with outliers as ``outlier_feed`` says, or balanced."""
        known = self._training_images()
        rows: Dataset[Any] = self._served if self._served is not None else self.training_rows()
        length = len(cast(Sized, rows))
        plan: BatchPlan
        if self.balanced is not None:
            if length != len(known):
                raise ValueError(
                    f"balanced batches need a row for each of the {len(known)} ID training images, whose labels they "
                    f"go by; {length} are served"
                )
            plan = self.balanced.plan(known.labels, self.seed)
        elif self.outlier_feed == "paired":
            outliers = length - len(known)
            plan = PairedPlan(len(known), outliers, self.batch_size, self.outlier_ratio, self.seed, self.drop_last)
            self._paired = plan
        else:
            plan = Plan(length, self.batch_size, self.seed, shuffle=True, drop_last=self.drop_last, even=True)
        return self._loader(rows, plan, persistent=True, collate_fn=_mark_for_training)

    def training_rows(self) -> ImageSet:
        """Return the images that training batches are made of: ID images, then the outliers where any are fed."""
        known = self._training_images()
        return known if self.outlier_feed is None else WithOutliers(known, self.sets["outliers"])

    def given_dataloader(self, images: ImageSet, batches: Sequence[Tensor]) -> Loader:
        """Serve batches of rows of a set that the caller chose, unaugmented, all of them on this process."""
        return self._loader(images, GivenPlan(batches), persistent=False)

    def val_dataloader(self) -> Loader | list[Loader]:
        """Serve held-out ID images, then those of ``val_ood``; without any, an empty list, which skips validation."""
        if "calibration" not in self.sets:
            return []
        if self.val_ood is None:
            return self._in_order("calibration", persistent=True)
        images = WithOutliers(self.sets["calibration"], self.sets[self.val_ood])
        return self._loader(images, Plan(len(images), self.eval_batch_size), persistent=True)

    def fit_dataloader(self) -> Loader:
        """Serve the ID training images that are not held out, in order and unaugmented."""
        self._training_images()
        return self._in_order("fit")

    def calibration_dataloader(self) -> Loader:
        """Serve the held-out ID images in order."""
        return self._in_order("calibration")

    def test_dataloader(self) -> dict[str, Loader]:
        """Serve in this order: ``fit`` and ``fit_2`` as asked, ``calibration`` if any is held out, ``id``, OOD sets."""
        if self.before_test is not None:
            self.before_test()
        fit = {"fit" if i == 0 else f"fit_{i + 1}": self.fit_dataloader() for i in range(self.fit_passes)}
        calibration = {"calibration": self.calibration_dataloader()} if "calibration" in self.sets else {}
        return fit | calibration | self.predict_dataloader()

    def predict_dataloader(self) -> dict[str, Loader]:
        """Serve ``id`` and the OOD sets."""
        return {name: self._in_order(name) for name in ("id", *self.groups)}

    def serve(self, rows: Dataset[Any] | None) -> None:
        """Train on these rows from the next ``train_dataloader`` on; ``None``: on the images again.

        Args:
            rows: what ``rows[LongTensor]`` yields is the training batch. Where there is an ``outlier_feed``, the first
                rows stand for the ID training images one by one, and those that follow are the outliers; where
                batches are balanced, all do. Rows that are image batches are augmented, others are left alone.
        """
        self._served = rows

    def choose_outliers(self, rows: Tensor) -> None:
        """Train on these outliers alone, from the next epoch on; paired batches only.

        Args:
            rows: (M,) of the set ``outliers``.
        """
        if self._paired is None:
            raise ValueError(f"outliers are chosen for paired batches: outlier_feed is {self.outlier_feed!r}")
        if not len(rows):
            raise ValueError("at least one outlier must be chosen, got none")
        self._paired.chosen = rows

    def augment(self, batch: Batch, epoch: int) -> Batch:
        """Return a batch of training rows, as loaded, as the training of an epoch sees it."""
        augmented = self.augmentation(batch.images, batch.ids, self.seed, epoch)
        if self.outlier_feed is not None and self.sets["outliers"].final:
            augmented = torch.where((batch.labels >= 0).view(-1, 1, 1, 1), augmented, batch.images)
        return batch._replace(images=augmented)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Turn bytes into float32 in [0, 1]; augment batches for training; normalise if that is done here.

        So with each ``Batch`` that is a part of a named tuple; all else stays as it is.
        """
        if not isinstance(batch, Batch):
            if any(isinstance(part, Batch) for part in batch if isinstance(batch, tuple)):
                return type(batch)(*(self.on_after_batch_transfer(part, dataloader_idx) for part in batch))
            return batch
        if isinstance(batch, TrainingBatch):
            batch = self.augment(batch, self.trainer.current_epoch if self.trainer is not None else 0)
        images, labels, ids = batch
        images = to_float(images)
        if self.mean is not None and self.std is not None:
            mean, std = (torch.tensor(values, device=images.device).view(-1, 1, 1) for values in (self.mean, self.std))
            images = (images - mean) / std
        batch = Batch(images, labels, ids)
        # Lightning converts to the trainer's precision before the transfer, when the images are still bytes.
        return batch if self.trainer is None else self.trainer.precision_plugin.convert_input(batch)

    def _training_images(self) -> ImageSet:
        if "train" not in self.sets:
            raise ValueError(f"{type(self).__name__} has no ID training images to train or fit on: say what `train` is")
        return self.sets["train"]

    def _in_order(self, name: str, persistent: bool = False) -> Loader:
        return self._loader(self.sets[name], Plan(self.sizes[name], self.eval_batch_size), persistent)

    def _loader(
        self, rows: Dataset[Any], plan: BatchPlan, persistent: bool, collate_fn: Callable[[Any], Any] | None = None
    ) -> Loader:
        # Only the loaders that are read again and again keep their workers: there are many test sets.
        return Loader(
            rows,
            sampler=plan,
            num_workers=self.num_workers,
            persistent_workers=persistent and self.num_workers > 0,
            collate_fn=collate_fn,
        )

    def _split(self, train: ImageSet) -> dict[str, ImageSet]:
        """Divide the ID training images into those to train on, those to fit scores on, and those held out."""
        splits = {"train": train}
        if self.val_split:
            kept, held_out = stratified_split(train.labels, self.val_split, self.split_seed, self.classes)
            splits = {"train": Rows(train, kept), "calibration": Rows(train, held_out)}
        fit = splits["train"]
        self.fit_rows = torch.arange(len(fit))
        if self.fit_limit is not None and self.fit_limit < len(fit):
            self.fit_rows = draw(len(fit), self.fit_limit, self.split_seed)
            fit = Rows(fit, self.fit_rows)
        return {"train": splits.pop("train"), "fit": fit} | splits

    def _pack(self, images: ImageSet) -> ImageSet:
        """Return small images as they are once they are decoded, and others as they are."""
        if not self._packs or max(images.shape[1:]) > SMALL or images.stamp() is None:
            return images
        folder = self.root / ".packed"
        try:
            return pack(images, folder, self.num_workers)
        except OSError as error:
            self._packs = False
            rank_zero_warn(
                f"images are decoded each time they are served, for they cannot be kept in {folder}: {error}"
            )
            return images

    def _draw_outliers(self, outliers: ImageSet, splits: dict[str, ImageSet]) -> ImageSet:
        """Draw the outliers that are fed, without those that are ID images; to decode large ones for it takes long."""
        known: dict[str, ImageSet] = {}
        if max(outliers.shape[1:]) <= SMALL or outliers.stamp() is None:
            known = {name: splits[name] for name in ("train", "calibration", "id") if name in splits}
        outliers, self.removed = draw_outliers(outliers, known, self.num_outliers, self.split_seed, self._pack)
        for name, count in self.removed.items():
            rank_zero_info(f"{count} outliers are left out, which are also images of {name}")
        return outliers

    def _check(self, sets: Sets) -> None:
        """Raise a ``ValueError`` in words where the options do not go with the sets."""
        if self.val_split and sets.train is None:
            raise ValueError(f"val_split={self.val_split} holds out ID training images, but there are none")
        if self.outlier_feed is not None and sets.outliers is None:
            raise ValueError(
                f"outlier_feed={self.outlier_feed!r} needs outliers, but the data has none: without any, set it to null"
            )
        for option, values in (("mean", self.mean), ("std", self.std)):
            if values is not None and len(values) not in (1, sets.test.shape[0]):
                raise ValueError(f"{option} has {len(values)} values, the images have {sets.test.shape[0]} channels")


def _mark_for_training(batch: Any) -> Any:
    return TrainingBatch(*batch) if isinstance(batch, Batch) else batch
