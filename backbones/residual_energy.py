"""The residual network of HEAT: features to one number, an energy."""

import torch
from torch import Tensor, nn

SLOPE = 0.2  # of the leaky ReLU below 0


class ResidualEnergy(nn.Module):
    """A perceptron with leaky ReLUs, (B, D) to (B,).

    Lafon et al., "Hybrid Energy Based Model in the Feature Space for Out-of-Distribution Detection", ICML 2023. Its
    authors use two shapes: one layer of ``hidden_dim`` and ``hidden_layers`` more of the same width; or, with
    ``reduce_width``, ``hidden_layers`` blocks of three, the last of which halves the width.

    Args:
        num_features: D, the width of the features of the prior.
        hidden_dim: width.
        hidden_layers: n.
        reduce_width: see above.
        tie_hidden: whether the n layers of one width are one and the same, applied n times, as in the authors' code;
            with ``reduce_width`` there is nothing to tie.
    """

    def __init__(
        self,
        num_features: int,
        hidden_dim: int = 1024,
        hidden_layers: int = 4,
        reduce_width: bool = False,
        tie_hidden: bool = True,
    ) -> None:
        super().__init__()
        if min(num_features, hidden_dim) < 1 or hidden_layers < 0:
            raise ValueError(
                "a residual energy has at least 1 feature, width 1 and 0 hidden layers, not "
                f"num_features={num_features}, hidden_dim={hidden_dim}, hidden_layers={hidden_layers}"
            )
        if reduce_width and hidden_dim % 2**hidden_layers:
            raise ValueError(f"hidden_dim {hidden_dim} cannot be halved {hidden_layers} times")
        self.num_features = num_features
        linears = [nn.Linear(num_features, hidden_dim)]
        if reduce_width:
            for width in (hidden_dim >> layer for layer in range(hidden_layers)):
                linears += [nn.Linear(width, width), nn.Linear(width, width), nn.Linear(width, width // 2)]
        elif tie_hidden and hidden_layers:
            linears += [nn.Linear(hidden_dim, hidden_dim)] * hidden_layers
        else:
            linears += [nn.Linear(hidden_dim, hidden_dim) for _ in range(hidden_layers)]
        layers = [layer for linear in linears for layer in (linear, nn.LeakyReLU(SLOPE, inplace=True))]
        self.mlp = nn.Sequential(*layers, nn.Linear(linears[-1].out_features, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Energy (B,) of (B, D) features."""
        return self.mlp(features).squeeze(1)

    def gradient(self, features: Tensor) -> Tensor:
        """Gradient (B, D) of the energy of each row with respect to the row, without any of the parameters'."""
        with torch.enable_grad():
            features = features.detach().requires_grad_()
            return torch.autograd.grad(self(features).sum(), features)[0]
