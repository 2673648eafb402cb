"""What every loader yields."""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """B images of one set.

    Attributes:
        images: (B, C, H, W); as loaded uint8, or float32 with 1 for white; float32 in [0, 1] or normalised once on the
            device.
        labels: (B,) int64 in 0..K-1; -1 = outlier, or not an ID image.
        ids: (B,) int64, the row of each image in the loader's set; each row has its own.
    """

    images: Tensor
    labels: Tensor
    ids: Tensor


class TrainingBatch(Batch):
    """A batch as loaded for training: the transfer to the device augments it and returns a plain ``Batch``.

    Where a batch comes from decides on augmentation, not what the trainer is doing: callbacks read the unaugmented
    training images while the trainer already counts as training.
    """

    __slots__ = ()
