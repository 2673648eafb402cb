"""A learned composition of energies. It is NOT the paper's: a secondary account of HEAT describes it.

E(z) = sum_k softmax(w)_k s_k(z) of standardised energies s_k of features z: a generator proposes features of low
energy, a discriminator tells ID features from them, and w follows the discriminator. HEAT itself learns no weights, it
composes by a fixed rule (``lightning_modules.scores.composition``): Lafon et al., "Hybrid Energy Based Model in the
Feature Space for Out-of-Distribution Detection", ICML 2023. Both are scored, so that they can be compared.
"""

import torch
from pytorch_lightning.cli import OptimizerCallable
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence, EvidenceBatch, need_cached, observe
from lightning_modules.ood_module import Batch, Images, OODModule
from lightning_modules.scores.composition import Composition, compose
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import Energy
from lightning_modules.scores.score import Score, full_precision

NOISE, HIDDEN = 100, 100
BORDER = 2.0  # energy up to which a feature counts as ID; over ID data E has mean 0 and a deviation of at most 1


def average(values: Tensor) -> Tensor:
    """Mean of (B,) values, 0 where there are none."""
    return values.sum() / max(len(values), 1)


class LearnedComposition(OODModule):
    """Learns the weights of members' energies against a generator of features; not the paper's.

    The account leaves open how low is low. A generator that descends E without end leaves the ID features behind at the
    mode of a density: there the discriminator calls the lowest energies OOD, and the weights turn away from just those
    members that know the ID data. So the generator goes to the border of what counts as ID, and -E is a logit relative
    to that border.

    Its scores: ``learned``, the energy E, and ``sum``, the fixed rule of HEAT at beta = 0 on the same members.

    Args:
        backbone: the trained classifier.
        optimizer: makes the optimiser from the parameters of generator and discriminator and the logits of the weights.
        members: name -> differentiable score of logits or penultimate features or both, all fitted on the ID training
            images before training begins; where not given, ``gmm``, ``knn`` (k = 5) and ``energy`` of the logits.

    Attributes:
        weights: (M,), softmax(w).
    """

    frozen = ("backbone",)

    def __init__(
        self, backbone: Backbone, optimizer: OptimizerCallable, members: dict[str, Score] | None = None
    ) -> None:
        super().__init__(backbone, optimizer)
        if members is None:
            members = {"gmm": GMMEnergy(), "knn": KNN(k=5), "energy": Energy()}
        for name, member in members.items():
            if others := sorted(member.taps - {"penultimate"}):
                raise ValueError(
                    f"{name} reads {', '.join(others)}, but only penultimate features are generated: take members "
                    "that read these or the logits"
                )
        self.composition = Composition(members).requires_grad_(False)
        width = backbone.num_features
        # Softplus keeps features above 0, as ReLU does in the network, and lets gradients through everywhere.
        self.generator = nn.Sequential(nn.Linear(NOISE, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, width), nn.Softplus())
        self.discriminator = nn.Sequential(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.weight_logits = nn.Parameter(torch.zeros(len(members)))

    @property
    def weights(self) -> Tensor:
        """Shares (M,) of the members, which add up to 1."""
        return self.weight_logits.softmax(0)

    def encode(self, images: Images) -> Evidence:
        """Return logits and penultimate features."""
        return observe(self.backbone, images, self.taps)

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images; ``scores`` are ``learned`` and ``sum``."""
        evidence = observe(self.backbone, images, self.taps)
        with full_precision(self.device):
            energies = self.composition.standardise(evidence)
            return evidence._replace(scores={"learned": energies @ self.weights, "sum": compose(energies, 0)})

    def training_step(self, batch: Batch | EvidenceBatch, batch_idx: int) -> Tensor:
        """Return the sum of the three parts' losses on a batch of cached features.

        Each part has gradients of its own loss alone, and Adam scales every parameter by itself: one optimiser of the
        sum does what three would do.
        """
        batch = need_cached(batch, "LearnedComposition")
        if (batch.evidence.features["penultimate"] < 0).any():
            raise ValueError(
                "some features are below 0, where generated ones never are: take a network whose last map is "
                "that of a ReLU"
            )
        with full_precision(self.device):
            losses = self.losses(batch.evidence, batch.labels)
        self.log_dict({f"train/{name}_loss": loss for name, loss in losses.items()})
        self.log_dict(
            {f"train/weight_{name}": w for name, w in zip(self.composition.names, self.weights.detach(), strict=True)}
        )
        return torch.stack(list(losses.values())).sum()

    def losses(self, evidence: Evidence, labels: Tensor) -> dict[str, Tensor]:
        """Return the losses of ``generator``, ``discriminator`` and ``weights``, each with gradients of its part alone.

        Args:
            evidence: of B images; as many features are generated.
            labels: (B,); -1 = auxiliary outlier, which is as little ID as what is generated.
        """
        features = evidence.features["penultimate"]
        generated = self.generator(torch.randn(len(features), NOISE, device=self.device))
        proposed = self.composition.standardise(
            Evidence(self.backbone.head(generated), {"penultimate": generated}, {}, None)
        )
        with torch.no_grad():
            energies = torch.cat([self.composition.standardise(evidence), proposed])
        known = torch.cat([labels >= 0, torch.zeros_like(labels, dtype=torch.bool)]).to(features)
        found = self.discriminator(torch.cat([features, generated.detach()])).squeeze(1)
        logits = BORDER - energies @ self.weights
        return {
            "generator": average((proposed @ self.weights.detach() - BORDER).abs()),
            "discriminator": average(binary_cross_entropy_with_logits(found, known, reduction="none")),
            "weights": average(binary_cross_entropy_with_logits(logits, found.detach().sigmoid(), reduction="none")),
        }
