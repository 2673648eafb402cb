"""Several scores as one."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from backbones.backbone import Backbone
from lightning_modules.evidence import Evidence
from lightning_modules.scores.gaussian import ClassStatistics
from lightning_modules.scores.score import InputScore, Score


def compose(scores: Tensor, beta: float) -> Tensor:
    """Combine (B, M) standardised scores of M members: (B,).

    beta 0 adds them up, infinity takes the greatest, minus infinity the least; any other is ``logsumexp(beta * scores)
    / beta``, which for small beta nears the mean plus ``log(M) / beta`` and so ranks as the sum does.

    >>> [round(float(compose(torch.tensor([[1.0, 3.0]]), beta)), 4) for beta in (0, 1, -1, math.inf, -math.inf)]
    [4.0, 3.1269, 0.8731, 3.0, 1.0]
    """
    if beta == 0:
        return scores.sum(1)
    if math.isinf(beta):
        return scores.amax(1) if beta > 0 else scores.amin(1)
    return (beta * scores).logsumexp(1) / beta


class Composition(Score):
    """Members' scores, standardised by their mean and deviation over the ID training data, as one; higher = more OOD.

    The rule is ``compose``: with beta = -1 an image is ID if any member says so, at beta = 0 the members' energies add
    up as in a product of experts, and with infinity the strictest decides. Lafon et al., "Hybrid Energy Based Model in
    the Feature Space for Out-of-Distribution Detection", ICML 2023, equation 7.

    Args:
        members: name -> score; each reads the evidence, none the image.
        beta: any number, ``.inf`` or ``-.inf``.

    Attributes:
        mean, deviation: (M,) of each member's scores.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, members: dict[str, Score], beta: float = 0.0) -> None:
        super().__init__()
        if not members:
            raise ValueError("a composition has at least one member")
        if unfit := [name for name, member in members.items() if isinstance(member, InputScore)]:
            raise ValueError(
                f"a composition reads the evidence of one pass, but {', '.join(unfit)} runs the network again"
            )
        if math.isnan(beta):
            raise ValueError("beta is a number, .inf or -.inf, not nan")
        self.names, self.beta = tuple(members), beta
        self.members: Sequence[Score] = nn.ModuleList(members.values())  # type: ignore[assignment]
        self.passes = 1 + max(member.passes_left for member in members.values())
        self.taps = frozenset().union(*(member.taps for member in members.values()))
        self._statistics: ClassStatistics | None = None
        for name in ("mean", "deviation"):
            self.register_buffer(name, torch.empty(0))

    def bind(self, backbone: Backbone | None) -> None:
        """Let each member copy what it needs."""
        for member in self.members:
            member.bind(backbone)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Fit the members, and in the last pass take in their scores."""
        if unfitted := self._unfitted():
            for member in unfitted:
                member.update(evidence, labels)
            return
        scores = self._standardless(evidence)
        if self._statistics is None:
            self._statistics = ClassStatistics(1, scores.shape[1], scores.device)
        self._statistics.update(scores, torch.zeros_like(labels))

    def _finalize(self) -> None:
        if unfitted := self._unfitted():
            for member in unfitted:
                member.finalize()
            return
        if self._statistics is None:
            raise RuntimeError("the composition has seen no training data: call update before finalize")
        self._statistics.reduce()
        number = int(self._statistics.counts)
        if number < 2:
            raise ValueError(f"a standard deviation needs two training images, there are {number}")
        deviation = (self._statistics.scatter.diagonal() / (number - 1)).sqrt()
        if constant := [name for name, value in zip(self.names, deviation.tolist(), strict=True) if not value > 0]:
            raise ValueError(f"{', '.join(constant)} scores all training images alike and cannot be standardised")
        self.mean, self.deviation = self._statistics.means[0].to(self.mean), deviation.to(self.deviation)
        self._statistics = None

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return compose(self.standardise(evidence), self.beta)

    def standardise(self, evidence: Evidence) -> Tensor:
        """Return the members' scores (B, M), each less its mean and in units of its deviation."""
        return (self._standardless(evidence) - self.mean) / self.deviation

    def _standardless(self, evidence: Evidence) -> Tensor:
        return torch.stack([member(evidence).to(self.mean.dtype) for member in self.members], 1)

    def _unfitted(self) -> list[Score]:
        return [member for member in self.members if not member.fitted]
