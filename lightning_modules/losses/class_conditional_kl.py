"""The Kullback-Leibler divergence of Gaussian posteriors from the narrow Gaussian of their class."""

import math

from torch import Tensor

from lightning_modules.scores.score import widen


def class_conditional_kl(
    mean: Tensor, log_variance: Tensor, labels: Tensor, centres: Tensor, scale: float = 0.1, draws: Tensor | None = None
) -> Tensor:
    """KL(N(mean, exp(log_variance)) || N(centre of the class, scale² I)), averaged.

    The mean is over dimensions and the samples of a class, then over the classes that are present: every class weighs
    the same, however often it was drawn. Computed in float32 or wider. Dinari and Freifeld, "Variational- and
    Metric-based Deep Latent Space for Out-of-Distribution Detection", UAI 2022.

    Args:
        mean: (B, L).
        log_variance: (B, L).
        labels: (B,), in 0..K-1.
        centres: (K, L) means of the priors.
        scale: standard deviation of the priors, in every dimension.
        draws: (B, L) samples of the posteriors, made as mean + deviation * noise: the divergence is then estimated from
            this one sample of each, and the gradient goes through it, too; None = closed form.

    Returns:
        A scalar; 0 with a live graph where the batch is empty. The closed form is never negative, an estimate may be.

    Raises:
        ValueError: a label without a centre, or a scale that is not positive.

    >>> import torch
    >>> mean, log_variance, labels = torch.tensor([[1.0], [1.0], [2.0]]), torch.zeros(3, 1), torch.tensor([0, 0, 1])
    >>> float(class_conditional_kl(mean, log_variance, labels, torch.zeros(2, 1), scale=1.0))  # (0.5 + 2) / 2
    1.25
    """
    if scale <= 0:
        raise ValueError(f"the priors' scale is a standard deviation and must be positive, got {scale}")
    if (strange := (labels < 0) | (labels >= len(centres))).any():
        raise ValueError(f"none of the {len(centres)} centres is for labels {labels[strange].unique().tolist()}")
    mean, log_variance = widen(mean), widen(log_variance)
    offset = mean - centres[labels].to(mean.dtype)
    if draws is None:
        excess = (log_variance.exp() + offset.square()) / scale**2 - 1
    else:
        noise = widen(draws) - mean
        excess = (noise + offset).square() / scale**2 - noise.square() * (-log_variance).exp()
    divergence = (math.log(scale) + (excess - log_variance) / 2).mean(1)
    counts = labels.bincount(minlength=len(centres))
    return (divergence / counts[labels]).sum() / counts.count_nonzero().clamp(min=1)
