"""How far images are from what they are to become."""

from torch import Tensor

WEIGHT = 5.0  # of a target pixel that is black or white, beside the 1 that each has


def target_image_loss(reconstructions: Tensor, targets: Tensor) -> Tensor:
    """Squared differences, weighted by 1 + 5 |target|, summed over an image and averaged over images.

    Hornauer and Belagiannis, "Heatmap-based Out-of-Distribution Detection", WACV 2023, as in the authors' code: the
    weight goes by the target image, so grey counts once, black and white six times.

    Args:
        reconstructions: (B, C, H, W); B at least 1.
        targets: (B, C, H, W), in [-1, 1] from black to white.

    >>> import torch
    >>> target_image_loss(torch.full((2, 3, 32, 32), 0.5), torch.full((2, 3, 32, 32), -0.5))
    tensor(10752.)
    """
    return ((1 + WEIGHT * targets.abs()) * (reconstructions - targets).square()).sum((1, 2, 3)).mean()
