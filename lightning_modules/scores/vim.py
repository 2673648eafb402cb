"""Virtual-logit matching: the energy, and how far features lie off the principal subspace."""

import torch
from torch import Tensor

from backbones.backbone import Backbone
from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.scores.head import HeadScore
from lightning_modules.scores.logits import energy
from lightning_modules.scores.pca import principal_directions
from lightning_modules.scores.score import widen


class ViM(HeadScore):
    """Residual against evidence, alpha ||R^T (z - u)|| - logsumexp_c(logits_c); higher = more OOD.

    z are the penultimate features and u = -pinv(W) b is the point where the head's logits vanish. The columns of R
    are the eigenvectors of E[(z - u)(z - u)^T] over the ID training data, but for the leading ``dim``; alpha is their
    mean maximum logit over their mean ||R^T (z - u)||. Ranks as the paper's softmax over logits and virtual logit does,
    without its saturation. Wang et al., "ViM: Out-Of-Distribution with Virtual-logit Matching", CVPR 2022.

    Args:
        dim: dimensions of the principal subspace, in 1..D-1. None = the authors' choice: 1000 from D = 2048 on, else
            512 from D = 768 on, else D / 2.

    Attributes:
        origin: u, (D,).
        residual: R, (D, D - dim).
        alpha: the scale.
    """

    passes = 2
    origin: Tensor
    residual: Tensor
    alpha: Tensor

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        if dim is not None and dim < 1:
            raise ValueError(f"the principal subspace of ViM has at least 1 dimension, not {dim}")
        self.dim = dim
        self._moment: Tensor | None = None  # (D, D) float64 sum of (z - u)(z - u)^T
        self._sums: Tensor | None = None  # float64: maximum logits, residual norms, squared distances to u, images
        for name in ("origin", "residual", "alpha"):
            self.register_buffer(name, torch.empty(0))

    def bind(self, backbone: Backbone | None) -> None:
        """Copy the head, and find the point where it vanishes."""
        super().bind(backbone)
        self.origin = -(torch.linalg.pinv(self.weight.double()) @ self.bias.double()).to(self.weight.dtype)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Add a batch to the second moment, or in the second pass to the means behind alpha."""
        offsets = self._offsets(evidence).detach().double()
        if not int(self.finished):
            if self._moment is None:
                self._moment = offsets.new_zeros(offsets.shape[1], offsets.shape[1])
            self._moment.addmm_(offsets.T, offsets)
            return
        norms = torch.linalg.vector_norm(offsets @ self.residual.double(), dim=1)
        confidence = widen(evidence.logits).detach().double().amax(1)
        sums = torch.stack([confidence.sum(), norms.sum(), offsets.square().sum(), norms.new_tensor(len(norms))])
        self._sums = sums if self._sums is None else self._sums + sums

    def _finalize(self) -> None:
        if int(self.finished):
            self._scale()
        else:
            self._split()

    def _split(self) -> None:
        """Store the residual space."""
        if self._moment is None:
            raise RuntimeError("ViM has seen no training data: call update before finalize")
        moment = sum_over_processes(self._moment)
        if not moment.isfinite().all():
            raise ValueError("ViM cannot be fitted on features that hold NaN or infinity")
        width = len(moment)
        dim = self.dim or (1000 if width >= 2048 else 512 if width >= 768 else width // 2)
        if not 0 < dim < width:
            raise ValueError(
                f"of {width} features, {dim} dimensions leave ViM no residual: dim must be in 1..{width - 1}"
            )
        self.residual = principal_directions(moment)[1][dim:].T.to(self.origin).contiguous()
        self._moment = None

    def _scale(self) -> None:
        """Store alpha."""
        if self._sums is None:
            raise RuntimeError("ViM has seen no training data in its second pass: call update before finalize")
        confidence, norm, square, images = sum_over_processes(self._sums)
        if not images:
            raise RuntimeError("ViM has seen only empty batches of training data")
        rounding = torch.finfo(self.residual.dtype).eps * len(self.residual) * (square / images).sqrt()
        if not norm / images > rounding:
            raise ValueError(
                f"the training features lie within their leading {len(self.residual) - self.residual.shape[1]} "
                "dimensions: ViM has no residual to scale; choose a smaller dim"
            )
        if not confidence > 0:
            mean = float(confidence / images)
            raise ValueError(f"the mean maximum logit is {mean:.3g}: ViM scales by it, so it must be positive")
        self.alpha = (confidence / norm).to(self.origin)
        self._sums = None

    def _offsets(self, evidence: Evidence) -> Tensor:
        return self.features(evidence) - self.origin

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        norms = torch.linalg.vector_norm(self._offsets(evidence) @ self.residual, dim=1)
        return self.alpha * norms + energy(evidence.logits)
