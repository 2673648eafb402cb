"""Length of a gradient that needs no backward pass."""

from torch import Tensor

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence
from lightning_modules.scores.score import Score, read_tap, widen


class GradNorm(Score):
    """Negative L1 norm of the gradient of KL(uniform || softmax(logits)) with respect to the head's weights.

    For logits W z + b the gradient is the outer product of softmax - 1/K and the penultimate features z, and its L1
    norm the product of theirs: the score is -||softmax - 1/K||_1 ||z||_1. Higher = more OOD: confident answers to
    strong features have the longer gradients, hence the minus. Huang, Geng and Li, "On the Importance of Gradients for
    Detecting Distributional Shifts in the Wild", NeurIPS 2021; their code sums over the classes where the paper takes
    the mean, which multiplies every score by K.
    """

    taps = frozenset({"penultimate"})

    def bind(self, backbone: Backbone | None) -> None:
        """Make sure that there is a head.

        Raises:
            ValueError: there is no classifier.
        """
        if backbone is None:
            raise ValueError("GradNorm reads the head: it needs a method with a classifier, this one has none")

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        excess = widen(evidence.logits).softmax(1) - 1 / evidence.logits.shape[1]
        return -excess.abs().sum(1) * read_tap(evidence, "penultimate").abs().sum(1)
