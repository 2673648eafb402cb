"""A floor under a loss, from which descent turns into ascent."""

from torch import Tensor


def loss_floor(loss: Tensor, floor: float | Tensor, level: Tensor | None = None) -> Tensor:
    """Reflect a loss at ``floor``: |loss - floor| + floor, whose gradient points uphill below it.

    Zhu et al., "Unleashing Mask: Explore the Intrinsic Out-of-Distribution Detection Capability", ICML 2023, apply it
    to the mean of a batch, which is not the mean of what it makes of single images.

    Args:
        loss: of any shape, usually the mean of a batch.
        floor: at least 0; at 0 a loss that is not negative stays as it is.
        level: what is compared with the floor, where that is not ``loss``: the mean of the whole batch, while ``loss``
            is that of this process's share.

    Returns:
        As ``loss``; at the very floor, the gradient is 0.

    >>> import torch
    >>> loss = torch.tensor([0.1, 0.5], requires_grad=True)
    >>> loss_floor(loss, 0.15)
    tensor([0.2000, 0.5000], grad_fn=<AddBackward0>)
    >>> torch.autograd.grad(loss_floor(loss, 0.15).sum(), loss)[0].tolist()
    [-1.0, 1.0]
    """
    excess = (loss if level is None else level).detach() - floor
    return excess.sign() * (loss - floor) + floor
