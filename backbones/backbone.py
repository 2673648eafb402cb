"""The contract that every network keeps."""

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence

import torch
from torch import Tensor, nn

POOLS = ("penultimate", "std", "max")


def pool(maps: Tensor) -> Tensor:
    """Mean over positions: (B, D, h, w) to (B, D); what has no positions stays as it is."""
    return maps.mean((2, 3)) if maps.ndim == 4 else maps


class Backbone(nn.Module, ABC):
    """A network that yields class logits, and every feature a score may ask for, in one pass.

    A subclass gives ``stem`` and a linear classifier ``fc``, and may name its ``stages`` and give ``finish``; the rest
    is done here.

    Attributes:
        num_features: D, the width of the features that enter the head.
        num_classes: K, the number of classes.
        input_shape: (C, H, W) of the images it accepts; anything else is an error in words.
        stages: names of the submodules that run one after the other behind the stem; each is a tap.
        mean, std: constants of each channel where the network normalises images in [0, 1] itself, else None: then the
            data module normalises.

    Args:
        num_features: see above.
        num_classes: see above.
        input_shape: see above.
        mean: see above; given together with ``std`` or not at all.
        std: see above.
    """

    stages: tuple[str, ...] = ()
    fc: nn.Linear
    mean: Tensor | None
    std: Tensor | None

    def __init__(
        self,
        num_features: int,
        num_classes: int,
        input_shape: tuple[int, int, int],
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if (mean is None) != (std is None):
            raise ValueError(f"mean and std belong together, give both or neither: mean={mean}, std={std}")
        self.num_features, self.num_classes, self.input_shape = num_features, num_classes, tuple(input_shape)
        for name, values in (("mean", mean), ("std", std)):
            if values is not None and len(values) not in (1, input_shape[0]):
                raise ValueError(f"{name} has {len(values)} values, the input has {input_shape[0]} channels")
            constants = None if values is None else torch.tensor(values, dtype=torch.float32).view(-1, 1, 1)
            self.register_buffer(name, constants, persistent=False)

    @property
    def head(self) -> nn.Linear:
        """The linear classifier on the penultimate features, weight (K, D); a network may call it other than ``fc``."""
        return self.fc

    @abstractmethod
    def stem(self, images: Tensor) -> Tensor:
        """Map normalised (B, C, H, W) to what the first stage reads; the whole network where there are no stages."""

    def finish(self, maps: Tensor) -> Tensor:
        """Map what the last stage yields to the last map; a network that ends with its stages leaves it as it is."""
        return maps

    @property
    def taps(self) -> tuple[str, ...]:
        """Every name that ``forward_intermediates`` understands."""
        return (*POOLS, "stem", *self.stages) if self.stages else POOLS

    def forward_intermediates(self, images: Tensor, taps: Collection[str] = ()) -> tuple[Tensor, dict[str, Tensor]]:
        """Run the network once.

        Args:
            images: (B, C, H, W), normalised unless the network does it itself.
            taps: what to return beside the last map: ``penultimate`` (what the head reads), ``std`` (unbiased, over
                positions) and ``max`` of the last map, ``stem`` or a stage (mean over positions), or a stage's map as
                it is (``layer2.map``).

        Returns:
            The last map, (B, D, h, w), or (B, D) where the network has no map; and {tap: (B, D_tap)}, of a map
            (B, D_tap, h, w).

        Raises:
            ValueError: images of another shape than ``input_shape``, an unknown tap, a spatial statistic of a
                network without a map.
        """
        if tuple(images.shape[1:]) != self.input_shape:
            raise ValueError(
                f"{type(self).__name__} reads images of shape {self.input_shape} (C, H, W), "
                f"these are {tuple(images.shape[1:])}"
            )
        if unknown := sorted(set(taps) - {*self.taps, *(f"{stage}.map" for stage in self.stages)}):
            raise ValueError(f"{type(self).__name__} has no tap {', '.join(unknown)}; its taps: {', '.join(self.taps)}")
        if self.mean is not None and self.std is not None:
            images = (images - self.mean) / self.std
        maps = self.stem(images)
        features = {"stem": pool(maps)} if "stem" in taps else {}
        for stage in self.stages:
            maps = self.get_submodule(stage)(maps)
            if stage in taps:
                features[stage] = pool(maps)
            if f"{stage}.map" in taps:
                features[f"{stage}.map"] = maps
        maps = self.finish(maps)
        if "penultimate" in taps:
            features["penultimate"] = self.forward_head(maps, pre_logits=True)
        for tap in {"std", "max"} & set(taps):
            if maps.ndim != 4 or maps.shape[2] * maps.shape[3] < 2:
                raise ValueError(f"tap {tap} needs a last map with positions, that of {type(self).__name__} has none")
            # torch.std warns of an empty batch, whose result is empty either way
            features[tap] = maps.std((2, 3)) if tap == "std" and len(maps) else maps.amax((2, 3))
        return maps, features

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last map: (B, C, H, W) to (B, D, h, w), or (B, D) where the network has no map."""
        return self.forward_intermediates(images)[0]

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the last map to (B, D) and, unless ``pre_logits``, classify it: (B, K)."""
        features = pool(maps)
        return features if pre_logits else self.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits: (B, C, H, W) to (B, K)."""
        return self.forward_head(self.forward_features(images))
