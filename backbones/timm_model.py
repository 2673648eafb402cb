"""Any classifier of the library timm, by its name."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn

from backbones.backbone import Backbone, pool
from backbones.weights import load_weights, weights_sha256


class TimmModel(Backbone):
    """A network of timm (``pip install timm``); its logits are timm's own.

    The last map is timm's, (B, D, h, w), where the classifier reads the mean of it. Elsewhere (tokens, channels last, a
    layer between pooling and classifier) there is no map, and what the classifier reads, (B, D), stands for it. There
    are no stages.

    Args:
        name: as in ``timm.list_models()``, with or without the tag of the pretrained weights.
        num_classes: K; where the pretrained weights have another number, the classifier alone is random.
        input_shape: (C, H, W) of the images; a network made for one size is made for this one.
        pretrained: whether to download timm's weights. ``mean`` and ``std`` are not taken from them: those of timm's
            ``pretrained_cfg`` belong here or to the data module.
        weights: where to load from instead, see ``backbones.weights.load_weights``; None = random.
        mean: see ``Backbone``.
        std: see ``Backbone``.

    Raises:
        ModuleNotFoundError: timm is not installed.
        ValueError: no model of this name, one that does not end with a single linear layer, or two sources of weights.
    """

    network: Any

    def __init__(
        self,
        name: str,
        num_classes: int,
        input_shape: tuple[int, int, int] = (3, 224, 224),
        pretrained: bool = False,
        weights: str | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
    ) -> None:
        if pretrained and weights is not None:
            raise ValueError(f"{name}: pretrained weights of timm, or those in {weights}? Give one of the two")
        network = create(name, num_classes, input_shape, pretrained)
        maps, features, logits = try_out(network, input_shape)
        head = network.get_classifier()
        if not isinstance(head, nn.Linear) or not torch.equal(head(features), logits):
            raise ValueError(
                f"timm's {name} does not end with a single nn.Linear on its features, but with another or a further "
                f"layer ({type(head).__name__}); the scores read the weight of that one layer"
            )
        super().__init__(head.in_features, num_classes, input_shape, mean, std)
        self.network = network
        self.has_map = torch.equal(pool(maps), features)
        if pretrained:  # from a cache of the hub's, whose file is not always one: the hash is that of the values
            self.origin = {"source": "timm", "file": name, "sha256": weights_sha256(network)}
        if weights is not None:
            load_weights(self, weights)

    @property
    def head(self) -> nn.Linear:
        """Timm's classifier, weight (K, D)."""
        return self.network.get_classifier()

    def stem(self, images: Tensor) -> Tensor:
        """Map (B, C, H, W) to the last map, (B, D, h, w), or to what the classifier reads, (B, D)."""
        if not len(images):  # timm's attention cannot reshape an empty batch
            return self.stem(images.new_zeros(2, *self.input_shape))[:0]
        maps = self.network.forward_features(images)
        return maps if self.has_map else self.network.forward_head(maps, pre_logits=True)


def create(name: str, num_classes: int, input_shape: tuple[int, int, int], pretrained: bool) -> Any:
    """Let timm make a network for images of ``input_shape``."""
    try:
        import timm  # optional, and it takes seconds to import
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("TimmModel needs the library timm, which is not there: pip install timm") from error
    if not timm.is_model(name):
        near = get_close_matches(name, timm.list_models(), cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "timm.list_models() lists them"
        raise ValueError(f"timm {timm.__version__} has no model {name!r}; {hint}")
    facts = timm.get_pretrained_cfg(name)
    size: dict[str, Any] = {"img_size": input_shape[1:]} if facts is not None and facts.fixed_input_size else {}
    return timm.create_model(name, pretrained, num_classes=num_classes, in_chans=input_shape[0], **size)


@torch.no_grad()
def try_out(network: Any, input_shape: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Run a timm network on one random image: its last map, what its classifier reads, its logits."""
    image = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    maps = network.eval().forward_features(image)
    features, logits = network.forward_head(maps, pre_logits=True), network.forward_head(maps)
    network.train()
    return maps, features, logits
