"""Scores that compare an image with one prototype for each class: a weight vector, a mean feature, a mean softmax."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.scores.head import HeadScore
from lightning_modules.scores.score import Score, read_tap


class RunningMeans:
    """Mean vector of each of G groups, streamed as G(D + 1) float64 sums whatever the number of vectors."""

    def __init__(self) -> None:
        self._sums: Tensor | None = None  # (G, D + 1), the last column counts

    def update(self, vectors: Tensor, groups: Tensor, num_groups: int) -> None:
        """Add (B, D) vectors to their groups (B,), int64 in 0..G-1; B may be 0."""
        rows = F.pad(vectors.detach().double(), (0, 1), value=1.0)
        if self._sums is None:
            self._sums = rows.new_zeros(num_groups, rows.shape[1])
        self._sums.index_add_(0, groups, rows)

    def reduce(self) -> Tensor:
        """Return the (G', D) means of the groups that have vectors, over all processes, and start anew."""
        if self._sums is None:
            raise RuntimeError("the score has seen no training data: call update before finalize")
        sums, self._sums = sum_over_processes(self._sums), None
        sums = sums[sums[:, -1] > 0]
        if not len(sums):
            raise RuntimeError("the score has seen only empty batches of training data")
        if not sums.isfinite().all():
            raise ValueError("what it is to average holds NaN or infinity")
        return sums[:, :-1] / sums[:, -1:]


class KLMatching(Score):
    """Divergence from the nearest class's typical softmax, min_c KL(p || t_c); higher = more OOD.

    p = softmax(logits), and t_c is the mean softmax of the ID training images that the network takes for class c; a
    class it never predicts has none. 0 log 0 counts as 0. Hendrycks et al., "Scaling Out-of-Distribution Detection for
    Real-World Settings", ICML 2022.

    Attributes:
        log_templates: (K', K) log t_c, one row for each predicted class.
    """

    passes = 1
    log_templates: Tensor

    def __init__(self) -> None:
        super().__init__()
        self._means = RunningMeans()
        self.register_buffer("log_templates", torch.empty(0))

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Add a batch's softmax; the labels are not used."""
        probabilities = evidence.logits.double().softmax(1)
        self._means.update(probabilities, probabilities.argmax(1), probabilities.shape[1])

    def _finalize(self) -> None:
        # A number instead of log 0, with which a matrix product would make NaN of 0 log 0; finite in either precision.
        lowest = torch.finfo(torch.float32).min
        self.log_templates = self._means.reduce().log().clamp(min=lowest).to(self.log_templates)

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        probabilities = evidence.logits.to(self.log_templates.dtype).softmax(1)
        cross_entropy = -probabilities @ self.log_templates.T
        return cross_entropy.amin(1) - torch.special.entr(probabilities).sum(1)


class ClassMean(Score):
    """Inner product with the nearest class mean, -max_c <z, m_c>; higher = more OOD.

    m_c is the mean feature of the ID training images labelled c; a class without images has none. A baseline of Lafon
    et al., "Hybrid Energy Based Model in the Feature Space for Out-of-Distribution Detection", ICML 2023.

    Args:
        tap: the features z.
        normalize: whether to divide each feature vector by its L2 norm first, before the means are taken too.
        reduce: ``max``, or ``logsumexp`` over the classes in its place.

    Attributes:
        means: (K', D), one row for each class with images.
    """

    passes = 1
    means: Tensor

    def __init__(
        self, tap: str = "penultimate", normalize: bool = False, reduce: Literal["max", "logsumexp"] = "max"
    ) -> None:
        super().__init__()
        if reduce not in ("max", "logsumexp"):
            raise ValueError(f"the inner products are reduced by max or logsumexp, not by {reduce!r}")
        self.tap, self.normalize, self.reduce, self.taps = tap, normalize, reduce, frozenset({tap})
        self._means = RunningMeans()
        self.register_buffer("means", torch.empty(0))

    def _embed(self, evidence: Evidence) -> Tensor:
        features = read_tap(evidence, self.tap).to(self.means.dtype)
        return F.normalize(features, dim=1) if self.normalize else features

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Add a batch's features; K is the width of its logits."""
        num_classes = evidence.logits.shape[1]
        if len(outside := labels[(labels < 0) | (labels >= num_classes)].unique()):
            raise ValueError(f"labels must lie in 0..{num_classes - 1}, this batch also holds {outside.tolist()}")
        self._means.update(self._embed(evidence), labels, num_classes)

    def _finalize(self) -> None:
        self.means = self._means.reduce().to(self.means)

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        products = self._embed(evidence) @ self.means.T
        return -(products.amax(1) if self.reduce == "max" else products.logsumexp(1))


class Cosine(HeadScore):
    """Angle to the classes' weight vectors, -logsumexp_c cos(z, w_c), in [-1 - log K, 1 - log K]; higher = more OOD.

    z are the penultimate features and w_c the rows of the head, whose bias is left out; the cosine of a zero vector is
    0. A baseline of Lafon et al., "Hybrid Energy Based Model in the Feature Space for Out-of-Distribution Detection",
    ICML 2023.
    """

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        cosines = F.normalize(self.features(evidence), dim=1) @ F.normalize(self.weight, dim=1).T
        return -cosines.logsumexp(1)


class Norm(Score):
    """Negative length of the feature vector, -||z||_2; higher = more OOD: networks answer weakly to the unknown.

    A baseline of Lafon et al., "Hybrid Energy Based Model in the Feature Space for Out-of-Distribution Detection", ICML
    2023, whose code has the opposite sign.

    Args:
        tap: the features z.
    """

    def __init__(self, tap: str = "penultimate") -> None:
        super().__init__()
        self.tap, self.taps = tap, frozenset({tap})

    def forward(self, evidence: Evidence) -> Tensor:
        """Score (B,) images."""
        return -torch.linalg.vector_norm(read_tap(evidence, self.tap), dim=1)
