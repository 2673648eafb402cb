"""A prior energy of features and the residual energy that corrects it."""

import copy
import hashlib
from collections.abc import Mapping

from torch import Tensor

from backbones.backbone import Backbone
from backbones.residual_energy import ResidualEnergy
from backbones.weights import file_sha256, locate, read_checkpoint
from lightning_modules.evidence import Evidence
from lightning_modules.scores.energy import EnergyScore

PART = "energy."  # what the module of HEAT calls it


class HybridEnergy(EnergyScore):
    """E_h(z) = E_theta(z) / T + E_q(z) / T_q of features z: a residual and a prior; higher = more OOD.

    Lafon et al., "Hybrid Energy Based Model in the Feature Space for Out-of-Distribution Detection", ICML 2023. The
    prior is fitted on ID training data like any score, the residual is trained by ``lightning_modules.heat``.

    Args:
        prior: E_q.
        residual: E_theta.
        temperature: T.
        prior_temperature: T_q; it brings the prior to the scale of the residual.
        weights: a trained run of HEAT, ``run:heat/<setting>[/<name>]``, or the path of its checkpoint, with the fitted
            prior in it; None = a prior still to be fitted and a residual that is random.
    """

    def __init__(
        self,
        prior: EnergyScore,
        residual: ResidualEnergy,
        temperature: float = 1.0,
        prior_temperature: float = 1.0,
        weights: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("temperature", temperature), ("prior_temperature", prior_temperature)):
            if not value > 0:
                raise ValueError(f"{name} must be positive, not {value}")
        self.prior, self.residual = prior.requires_grad_(False), residual
        self.temperature, self.prior_temperature = temperature, prior_temperature
        self.passes, self.taps, self.unit_length = prior.passes, prior.taps, prior.unit_length
        if weights is not None:
            self._load(weights)

    def bind(self, backbone: Backbone | None) -> None:
        """Let the prior copy what it needs; what was loaded stays, and raises a ``ValueError`` on another network."""
        if not hasattr(self, "origin"):
            self.prior.bind(backbone)
        elif backbone is None or fingerprint(backbone.state_dict()) != self._network:
            raise ValueError(f"{self.origin['source']} was trained on the features of a network with other weights")

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Fit the prior."""
        self.prior.update(evidence, labels)

    def _finalize(self) -> None:
        self.prior.finalize()

    def embed(self, evidence: Evidence) -> Tensor:
        """Return the (B, D) features of the prior."""
        if not self.fitted:
            raise RuntimeError(f"the prior of {type(self).__name__} is not fitted: it needs {self.needs}")
        features = self.prior.embed(evidence)
        if features.shape[1] != self.residual.num_features:
            raise ValueError(
                f"the prior is about {features.shape[1]} features, the residual reads {self.residual.num_features}: "
                f"give it num_features {features.shape[1]}"
            )
        return features

    def parts(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """E_theta / T and E_q / T_q, each (B,), of (B, D) embedded features; the hybrid energy is their sum."""
        return self.residual(features) / self.temperature, self.prior.energy(features) / self.prior_temperature

    def energy(self, features: Tensor) -> Tensor:
        """Energy (B,) of (B, D) embedded features; differentiable."""
        residual, prior = self.parts(features)
        return residual + prior

    def gradient(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Gradient (B, D) of the energy; of the prior's energy given the class where there are ``classes``."""
        residual = self.residual.gradient(features) / self.temperature
        return residual.add_(self.prior.gradient(features, classes), alpha=1 / self.prior_temperature)

    def _load(self, source: str) -> None:
        path = locate(source)
        checkpoint = read_checkpoint(path)
        state = checkpoint.get("state_dict", {}) if isinstance(checkpoint, dict) else {}
        network = {
            name.removeprefix("backbone."): value for name, value in state.items() if name.startswith("backbone.")
        }
        own = {name.removeprefix(PART): value for name, value in state.items() if name.startswith(PART)}
        if not own:
            raise ValueError(f"{path} holds no energy of HEAT: it is the checkpoint of another method")
        try:
            copy.deepcopy(self).load_state_dict(own)  # which loads what it can before it fails
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit this energy, nothing was loaded: {error}") from error
        self.load_state_dict(own)
        self._network = fingerprint(network)
        self.origin = {"source": source, "file": path.name, "sha256": file_sha256(path)}


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Hash the values of a state dict in float32, which a network keeps in any wider type."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(name.encode() + value.detach().float().cpu().numpy().tobytes())
    return digest.hexdigest()
