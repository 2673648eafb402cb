"""A score of classes, fitted without labels."""

import torch
from sklearn.cluster import KMeans as LloydKMeans
from torch import Tensor

from lightning_modules.distributed import rank, sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.scores.gaussian import squared_distances
from lightning_modules.scores.row_sample import RowSample
from lightning_modules.scores.score import Score, read_tap
from lightning_modules.scores.wrapper import Wrapper


class KMeans(Wrapper):
    """Another score, fitted with the nearest of K cluster centres as the label of each training image.

    The features are clustered as they are, whatever the inner score does with them afterwards; K is the number of
    classes. Around a ``Mahalanobis`` on normalised features, this is the unsupervised SSD of Sehwag et al., "SSD: A
    Unified Framework for Self-Supervised Outlier Detection", ICLR 2021.

    Args:
        score: the other score.
        rows: the centres come from at most so many training images, drawn uniformly. While fitting, a process holds
            twice their features; at the end, and for D features, 4 D rows bytes of each process.
        restarts: the best of so many runs of Lloyd's algorithm, each from other k-means++ centres.
        tap: the features that are clustered.

    Attributes:
        centres: (K, D).
    """

    centres: Tensor

    def __init__(self, score: Score, rows: int = 50_000, restarts: int = 5, tap: str = "penultimate") -> None:
        super().__init__(score, tap)
        if min(rows, restarts) < 1:
            raise ValueError(f"k-means needs at least 1 training image and 1 run, not rows={rows}, restarts={restarts}")
        self.rows, self.restarts = rows, restarts
        self._sample, self._clusters = RowSample(rows), 0
        self.register_buffer("centres", torch.empty(0))

    def learn(self, evidence: Evidence, labels: Tensor) -> None:
        """Sample a batch's features; K is the width of its logits."""
        self._clusters = evidence.logits.shape[1]
        if not self._clusters:
            raise ValueError("k-means looks for as many clusters as there are classes, but this method has none")
        self._sample.update(read_tap(evidence, self.tap).detach().to(self.centres.dtype))

    def conclude(self) -> None:
        """Store the centres."""
        if not self._sample.seen:
            raise RuntimeError("KMeans has seen no training data: call update before finalize")
        sample = self._sample.reduce()
        if len(sample) < self._clusters:
            raise ValueError(f"k-means looks for {self._clusters} clusters among only {len(sample)} training images")
        if not sample.isfinite().all():
            raise ValueError("k-means cannot cluster features that hold NaN or infinity")
        centres = sample.new_zeros(self._clusters, sample.shape[1])
        if rank() == 0:  # threads add up in any order: two processes may end with different centres
            lloyd = LloydKMeans(self._clusters, n_init=self.restarts, max_iter=1000, random_state=0)
            centres.copy_(torch.from_numpy(lloyd.fit(sample.cpu().numpy()).cluster_centers_))
        self.centres = sum_over_processes(centres)
        self._sample = RowSample(self.rows)

    def relabel(self, evidence: Evidence, labels: Tensor) -> Tensor:
        """Return the nearest cluster of each image, (B,)."""
        features = read_tap(evidence, self.tap).to(self.centres.dtype)
        origin = self.centres.mean(0)
        everywhere = torch.zeros(len(self.centres), dtype=torch.bool, device=self.centres.device)
        return squared_distances(features - origin, self.centres - origin, everywhere).argmin(1)

    def gradient(self, features: Tensor, classes: Tensor | None = None) -> Tensor:
        """Gradient (B, D) of the inner energy; its classes are clusters, of which labels say nothing."""
        if classes is not None:
            raise ValueError("the classes of KMeans are clusters, not labels: leave conditional off")
        return super().gradient(features)
