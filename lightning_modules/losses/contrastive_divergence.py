"""The loss of HEAT."""

from torch import Tensor


def contrastive_divergence(real: Tensor, negative: Tensor, regularization: float) -> Tensor:
    """Mean energy of real features less that of negatives, and the regularization times the mean squares of both.

    The first part is the gradient of the likelihood where the negatives are drawn from the model. The second keeps the
    energies small: for negatives of density m and real features of density p, the least loss is that of
    E(z) = (m - p) / (2 regularization (m + p)), so |E| stays below 1 / (2 regularization). Lafon et al., "Hybrid Energy
    Based Model in the Feature Space for Out-of-Distribution Detection", ICML 2023, equation 6.

    Args:
        real: (B,) residual energies of real features, B > 0.
        negative: (N,) those of negatives, N > 0.
        regularization: at least 0.

    >>> import torch
    >>> float(contrastive_divergence(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), 0.5))
    4.5
    """
    squares = real.square().mean() + negative.square().mean()
    return real.mean() - negative.mean() + regularization * squares
