"""A floor under a loss, from which descent turns into ascent."""

import json
import logging
import math
from typing import Literal

from torch import Tensor

from backbones.backbone import Backbone
from backbones.weights import locate_in_run, origins

log = logging.getLogger(__name__)


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


def resolve_floor(floor: float | Literal["auto"], estimate: str | None, backbone: Backbone, beta: float = 1.0) -> float:
    """Return the number that is meant by a method's options.

    Args:
        floor: at least 0, or ``auto``: beta times the estimate.
        estimate: see ``read_estimate``.
        backbone: the network that is to be trained.
        beta: weight of the cross-entropy.

    Raises:
        FileNotFoundError: as for ``read_estimate``.
        ValueError: a floor below 0, options that contradict each other, an estimate of other weights.
    """
    if floor == "auto":
        if estimate is None:
            raise ValueError("floor: auto is read from a run: say which, estimate: run:unleashing_mask/estimate_digits")
        return beta * read_estimate(estimate, backbone)
    if not 0 <= floor < math.inf:
        raise ValueError(f"a floor is a loss of at least 0, or auto, not {floor}")
    if estimate is not None:
        raise ValueError(f"floor: {floor:g} takes no estimate, but there is {estimate}: say estimate: null, too")
    return floor


def read_estimate(source: str, backbone: Backbone) -> float:
    """Return the cross-entropy that a finished run of ``LossEstimate`` found for the weights that a network came with.

    Args:
        source: ``run:unleashing_mask/<setting>[/<name>]``.
        backbone: the network.

    Raises:
        FileNotFoundError: there is no such run yet; the make target that makes it is named.
        ValueError: the estimate is of other weights.
    """
    path = locate_in_run(source, ["estimate.json"])
    found = json.loads(path.read_text(encoding="utf-8"))
    theirs, ours = found["weights"], origins(backbone).get("")
    if theirs is None or ours is None or theirs["sha256"] != ours["sha256"]:
        named = [
            f"{of['source']} (SHA-256 {of['sha256'][:8]})" if of else "weights of no file" for of in (theirs, ours)
        ]
        raise ValueError(
            f"{path} is an estimate of {named[0]}, the network starts from {named[1]}: estimate it anew, over the old "
            "one with --overwrite true"
        )
    if found["floor"] <= found["whole"]["loss"]:
        log.warning(
            "%s found a floor of %.4g, and without masks the loss is %.4g: a network that is not converged has nothing "
            "to forget",
            *(source, found["floor"], found["whole"]["loss"]),
        )
    return float(found["floor"])
