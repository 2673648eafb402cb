"""What a trained network's loss becomes where some of its weights are left out at random: the floor of Unleashing Mask.

A mild mask that does not look at the weights loses first what the network holds by least: what it memorised of atypical
images. The loss of the masked network on the ID training images, as training sees them, is the level down to which they
need not be known. Zhu et al., "Unleashing Mask", ICML 2023.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor
from torch.nn import functional

from backbones.backbone import Backbone
from backbones.subnetwork import Subnetwork
from backbones.weights import origins
from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence, observe
from lightning_modules.ood_module import Batch, Images, OODModule
from lightning_modules.scores.score import widen


def estimate_loss(
    backbone: Backbone,
    batches: Iterable[tuple[Tensor, Tensor]],
    keep: float = 0.965,
    masks: int = 3,
    mask_seed: int = 0,
) -> dict[str, Any]:
    """Return what ``LossEstimate`` finds, from (images, labels) in plain PyTorch; the network stays as it is."""
    networks = masked_networks(backbone, keep, masks, mask_seed)
    sums = torch.zeros(len(networks), 3, dtype=torch.float64)
    for images, labels in batches:
        sums += tally(networks, images, labels).cpu()
    return summarize(sums)


def masked_networks(backbone: Backbone, keep: float, masks: int, mask_seed: int) -> list[Backbone]:
    """Return copies of a network in eval mode: a whole one, then one for each mask."""
    if masks < 1:
        raise ValueError(f"an estimate takes at least one mask, not {masks}")
    drawn = [Subnetwork(backbone, keep, (mask_seed, draw)).extract(backbone) for draw in range(masks)]
    return [network.eval() for network in (deepcopy(backbone), *drawn)]


@torch.no_grad()
def tally(networks: Sequence[Backbone], images: Tensor, labels: Tensor) -> Tensor:
    """Sum over the images of a batch, for each network: cross-entropies, correct predictions, ones; (M, 3), float64."""
    rows = []
    for network in networks:
        logits = widen(network(images))
        losses = functional.cross_entropy(logits, labels, reduction="none")
        rows.append(torch.stack([losses.double(), logits.argmax(1) == labels, torch.ones_like(losses)]).sum(1))
    return torch.stack(rows)


def summarize(sums: Tensor) -> dict[str, Any]:
    """Turn the sums of ``tally`` over all images into what is written of them."""
    if not sums.any():
        raise ValueError("no image was seen: an estimate is an average over the ID training images")
    losses, accuracies = (sums[:, :2] / sums[:, 2:]).T
    return {
        "floor": float(losses[1:].mean()),
        "std": float(losses[1:].std()) if len(losses) > 2 else None,
        "losses": losses[1:].tolist(),
        "accuracies": accuracies[1:].tolist(),
        "whole": {"loss": float(losses[0]), "accuracy": float(accuracies[0])},
        "images": int(sums[0, 2]),
    }


class LossEstimate(OODModule):
    """Goes through the training images once, in eval mode, under several masks and under none; nothing is trained.

    What was found is ``estimate.json`` in the run folder: ``floor`` and ``std``, mean and sample standard deviation of
    the losses over masks; the ``losses`` and ``accuracies`` of each mask, and of the ``whole`` network; the number of
    ``images``, augmented as in training; the settings. A loss is the cross-entropy, averaged over images.

    Args:
        backbone: the trained network, with its ``weights``; a test is of it, as it came.
        keep: share of each layer's weights that a mask keeps.
        masks: how many are drawn.
        mask_seed: what they are drawn from.
    """

    def __init__(self, backbone: Backbone, keep: float = 0.965, masks: int = 3, mask_seed: int = 0) -> None:
        super().__init__(backbone, optimizer=torch.optim.SGD)  # never made
        self.automatic_optimization = False
        self.settings: dict[str, Any] = {"keep": keep, "masks": masks, "mask_seed": mask_seed}
        masked_networks(backbone, **self.settings)  # which refuses what makes no sense
        # no buffer: Lightning would round it in half precision, and processes would share that of the first
        self.sums = torch.zeros(1 + masks, 3, dtype=torch.float64)

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images by the whole network."""
        return observe(self.backbone, images, self.taps)

    def configure_optimizers(self) -> list[Any]:
        """Return none."""
        return []

    def on_train_epoch_start(self) -> None:
        """Draw the masks, always the same, and begin to count."""
        self.networks = [network.to(self.device) for network in masked_networks(self.backbone, **self.settings)]
        self.sums = torch.zeros_like(self.sums, device=self.device)

    def training_step(self, batch: Batch, batch_idx: int) -> None:  # type: ignore[override]
        """Count the losses of one batch."""
        images, labels, _ = batch
        if sum_over_processes((labels < 0).any().float()):
            raise ValueError("the batch holds outliers, an estimate is of ID images: leave out outlier_feed")
        self.sums += tally(self.networks, images, labels)

    def on_train_epoch_end(self) -> None:
        """Join the processes."""
        del self.networks
        self.sums = sum_over_processes(self.sums)
        found = summarize(self.sums)
        self.log("estimate/floor", found["floor"], rank_zero_only=True)
        deviation = "" if found["std"] is None else f", with a deviation of {found['std']:.4g} from mask to mask"
        rank_zero_info(f"floor {found['floor']:.4g}{deviation}; without masks the loss is {found['whole']['loss']:.4g}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was counted."""
        checkpoint["sums"] = self.sums.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take what was counted."""
        self.sums = checkpoint.get("sums", self.sums)

    def findings(self) -> dict[str, Any]:
        """Return the estimate, and what it is of."""
        weights = origins(self.backbone).get("")
        return {"estimate": {**summarize(self.sums), **self.settings, "weights": weights}}
