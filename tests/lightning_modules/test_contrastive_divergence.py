import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from lightning_modules.losses.contrastive_divergence import contrastive_divergence


def test_value_by_hand():
    assert contrastive_divergence(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 2.0]), 0.5) == 4.5


@pytest.mark.parametrize("regularization", [0.0, 0.1, 20.0])
def test_value_and_gradient_equal_those_of_numpy(regularization):
    generator = torch.Generator().manual_seed(0)
    real, negative = (torch.randn(n, dtype=torch.float64, generator=generator).requires_grad_() for n in (5, 8))
    loss = contrastive_divergence(real, negative, regularization)
    loss.backward()
    r, n = real.detach().numpy(), negative.detach().numpy()
    assert loss.item() == pytest.approx(
        np.mean(r) - np.mean(n) + regularization * (np.mean(r**2) + np.mean(n**2)), rel=1e-12
    )
    np.testing.assert_allclose(real.grad.numpy(), (1 + 2 * regularization * r) / 5, rtol=1e-12)
    np.testing.assert_allclose(negative.grad.numpy(), (2 * regularization * n - 1) / 8, rtol=1e-12)


def test_least_loss_is_that_of_the_stated_energy():
    """Four places that real features and negatives visit in different shares, each with an energy of its own."""
    regularization = 0.7
    real, negative = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2]), torch.tensor([1, 1, 2, 2, 2, 3, 3, 3])
    p, m = (np.bincount(places, minlength=4) / 8 for places in (real.numpy(), negative.numpy()))

    def loss(energies):
        energies = torch.from_numpy(energies).requires_grad_()
        value = contrastive_divergence(energies[real], energies[negative], regularization)
        value.backward()
        return value.item(), energies.grad.numpy()

    found = minimize(loss, np.zeros(4), jac=True, tol=1e-12).x
    np.testing.assert_allclose(found, (m - p) / (2 * regularization * (m + p)), atol=1e-8)
    assert np.abs(found).max() <= 1 / (2 * regularization) + 1e-8
