"""Class-conditional Gaussians, each with a full covariance of its own, on several taps at once."""

import logging
import math
from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.scores.energy import EnergyScore
from lightning_modules.scores.score import full_precision, read_tap

logger = logging.getLogger(__name__)

WAITING = 32  # rows of each class, on average, that are worth a product: it reads and writes D^2 numbers for each class
JITTERS = (0.0, *(10.0**exponent for exponent in range(-12, -1)))  # times the mean variance within the classes


class ClassScatters:
    """Counts, means and scatter of each class, streamed in K (D^2 + D + 1) float64 numbers.

    Batches, and at the end processes, are merged by the shift of their means, as in ``ClassStatistics``. Before that,
    rows wait until there are ``WAITING`` K of them.

    Attributes:
        counts: (K,) samples of each class.
        means: (K, D), zero for a class without samples.
        scatters: (K, D, D), sum over the samples of a class of r r^T with r the sample minus the mean of its class.
    """

    def __init__(self, num_classes: int, num_features: int, device: torch.device) -> None:
        self.counts = torch.zeros(num_classes, dtype=torch.float64, device=device)
        self.means = torch.zeros(num_classes, num_features, dtype=torch.float64, device=device)
        self.scatters = torch.zeros(num_classes, num_features, num_features, dtype=torch.float64, device=device)
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def update(self, features: Tensor, labels: Tensor) -> None:
        """Take in a batch of (B, D) features with labels (B,); B may be 0."""
        outside = labels[(labels < 0) | (labels >= len(self.counts))].unique()
        if len(outside):
            raise ValueError(f"labels must lie in 0..{len(self.counts) - 1}, this batch also holds {outside.tolist()}")
        self._waiting.append((features.detach(), labels))
        if sum(len(labels) for _, labels in self._waiting) >= WAITING * len(self.counts):
            self._merge()

    def _merge(self) -> None:
        features, labels = map(torch.cat, zip(*self._waiting, strict=True))
        self._waiting.clear()
        added = labels.bincount(minlength=len(self.counts))
        by_class = features.double()[labels.argsort(stable=True)].split(added.tolist())
        for index, rows in enumerate(by_class):
            if len(rows):
                mean, before = rows.mean(0), self.counts[index]
                shift, share = mean - self.means[index], len(rows) / (before + len(rows))
                deviations = torch.cat([rows - mean, (before * share).sqrt() * shift[None]])
                self.scatters[index].addmm_(deviations.T, deviations)
                self.means[index] += share * shift
        self.counts += added

    def reduce(self) -> None:
        """Merge the statistics of all processes; every process must call it and ends with the same."""
        if self._waiting:
            self._merge()
        counts = sum_over_processes(self.counts)
        means = sum_over_processes(self.counts[:, None] * self.means) / counts.clamp(min=1)[:, None]
        # Class by class, lest memory doubles.
        for count, shift, scatter in zip(self.counts, self.means - means, self.scatters, strict=True):
            scatter.copy_(sum_over_processes(scatter.addr_(count * shift, shift)))
        self.counts, self.means = counts, means

    def select(self, columns: Tensor) -> None:
        """Forget all features but those of the columns."""
        self.means = self.means[:, columns]
        self.scatters = self.scatters[:, columns[:, None], columns]

    def covariance(self, index: int, jitter: float) -> Tensor:
        """Return the biased (D, D) covariance of a class that has samples, plus jitter on its diagonal."""
        scatter = self.scatters[index]
        covariance = (scatter + scatter.T) / (2 * self.counts[index])
        covariance.diagonal().add_(jitter)
        return covariance


def factorise(covariance: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Factorise a (D, D) float64 covariance into L L^T; None where a pivot may be a rounding error of zero.

    The pivot of a feature that is a function of the ones before it is what rounding leaves there: of D operations on
    variances in float64, of D operations on features in their own type. A factor that exists thanks to that rest makes
    distances of rounding errors.

    Args:
        covariance: of the features.
        mean: (D,) of the features; what they are rounded by grows with it.
        dtype: the type that they were computed in.
    """
    factor, failure = torch.linalg.cholesky_ex(covariance)
    variances = covariance.diagonal()
    per_operation = torch.finfo(torch.float64).eps * variances + torch.finfo(dtype).eps ** 2 * (
        variances + mean.square()
    )
    certain = factor.diagonal().square() > len(covariance) * per_operation
    return factor if not failure and certain.all() else None


def smallest_jitter(statistics: ClassScatters, jitters: Sequence[float], dtype: torch.dtype) -> float | None:
    """Return the first of ascending jitters with which all classes factorise; None where even the last does not do.

    Whatever factorises does so with more jitter, hence one pass over the classes is enough.
    """
    position = 0
    for index in statistics.counts.nonzero()[:, 0].tolist():
        while factorise(statistics.covariance(index, jitters[position]), statistics.means[index], dtype) is None:
            position += 1
            if position == len(jitters):
                return None
    return jitters[position]


def class_log_densities(points: Tensor, means: Tensor, whitening: Tensor, log_scale: Tensor) -> Tensor:
    """Log-densities (B, K) of (B, D) points under K Gaussians, in one product and O(B D) numbers for each class.

    Args:
        points: x.
        means: (K, D).
        whitening: (K, D, D), W with precisions W^T W.
        log_scale: (K,) log-density of each Gaussian at its mean.
    """
    # From the differences: an expanded square would cancel where features lie far from zero and jitter is small.
    gaussians = zip(means, whitening, log_scale, strict=True)
    return torch.stack([scale - ((points - mean) @ rows.T).square().sum(1) / 2 for mean, rows, scale in gaussians], 1)


def weighted_score(
    log_likelihood: Tensor, error: Tensor, ceiling: float | Tensor, largest_error: float | Tensor = 1.0
) -> Tensor:
    """Log-likelihood times reconstruction weight, -w (min(l - A, 0) - 1) with w = e / e_max: (B,), higher = more OOD.

    It is strictly increasing in e and at least w: the minimum keeps a likelihood above A from turning the sign. An OOD
    image that is drawn well, as smooth ones are, has a weight near 0 and looks ID, however unlikely it is.

    >>> weighted_score(torch.tensor([-7.0, -5.0, 9.0]), error=torch.tensor([0.5, 0.5, 0.5]), ceiling=-5.0)
    tensor([1.5000, 0.5000, 0.5000])

    Args:
        log_likelihood: (B,) of the likeliest class, l.
        error: (B,) reconstruction errors, e, at least 0.
        ceiling: A, the largest log-likelihood of ID images.
        largest_error: e_max; a scale, which changes no ranks.
    """
    return error / largest_error * (1 + (ceiling - log_likelihood).clamp_min(0))


class ClassDensity(EnergyScore):
    """Negative log-likelihood of the likeliest class, -max_c log N(phi; a_c, S_c + eps I); higher = more OOD.

    phi concatenates several taps, a_c and S_c are mean and biased covariance of a class, eps is one jitter for all
    classes. Dinari and Freifeld, "Variational- and Metric-based Deep Latent Space for Out-of-Distribution Detection",
    UAI 2022.

    Fitting takes K D^2 float64 numbers, of all taps with a name of their own; K D^2 numbers in the module's type are
    kept. Statistics and factors are float64. Likelihoods are computed in the module's type: float32 ranks images as
    float64 does even where features are functions of others, since ``factorise`` counts as noise what rounding leaves
    there, so that the jitter outweighs it. Without that, not even likelihoods in float64 would help, at twice the time
    and memory: the features themselves are rounded.

    Args:
        taps: what is concatenated, in this order.
        deduplicate: whether to leave out a tap that equals an earlier one on all ID training data.
        jitter: eps; None = the smallest with which all classes factorise, of 0 and the powers of 10 from 1e-12 to 1e-2
            times the mean variance within the classes.

    Attributes:
        kept: which of the taps are concatenated, by their indices.
        epsilon: the jitter that was added.
        means: (K, D), zero for a class without samples.
        whitening: (K, D, D) lower triangular L_c^-1 with S_c + eps I = L_c L_c^T.
        log_scale: (K,) log-density at the mean, -inf for a class without samples.
    """

    passes = 1
    kept: Tensor
    epsilon: Tensor
    means: Tensor
    whitening: Tensor
    log_scale: Tensor

    def __init__(self, taps: Sequence[str], deduplicate: bool = True, jitter: float | None = None) -> None:
        super().__init__()
        if not taps:
            raise ValueError("there are no features without taps: name at least one")
        if jitter is not None and not 0 <= jitter < math.inf:
            raise ValueError(f"jitter is a finite variance of at least 0, or None to be searched for, not {jitter}")
        self.names = tuple(dict.fromkeys(taps) if deduplicate else taps)
        self.taps, self.deduplicate, self.jitter = frozenset(taps), deduplicate, jitter
        self._statistics: ClassScatters | None = None
        self._widths: list[int] = []
        self._differ = torch.empty(0)
        self.register_buffer("kept", torch.arange(len(self.names)))
        for name in ("epsilon", "means", "whitening", "log_scale"):
            self.register_buffer(name, torch.empty(0))

    def _read(self, evidence: Evidence) -> list[Tensor]:
        return [read_tap(evidence, self.names[i]).to(self.means.dtype) for i in self.kept.tolist()]

    def embed(self, evidence: Evidence) -> Tensor:
        """Return the (B, D) features that the Gaussians live on."""
        return torch.cat(self._read(evidence), 1)

    def update(self, evidence: Evidence, labels: Tensor) -> None:
        """Take in a batch; K is the width of its logits."""
        features = self._read(evidence)
        if self._statistics is None:
            self._widths = [tap.shape[1] for tap in features]
            self._statistics = ClassScatters(evidence.logits.shape[1], sum(self._widths), labels.device)
            self._differ = torch.zeros(len(features), len(features), device=labels.device)
        for i, j in combinations(range(len(features)), 2):
            if not (self.deduplicate and torch.equal(features[i], features[j])):
                self._differ[i, j] = 1
        self._statistics.update(torch.cat(features, 1), labels)

    def _finalize(self) -> None:
        statistics = self._statistics
        if statistics is None:
            raise RuntimeError(f"{type(self).__name__} has seen no training data: call update before finalize")
        statistics.reduce()
        if not statistics.counts.any():
            raise RuntimeError(f"{type(self).__name__} has seen only empty batches of training data")
        self._select(statistics)
        jitter = self._choose_jitter(statistics)
        self._store(statistics, jitter)
        self._statistics = None

    def _select(self, statistics: ClassScatters) -> None:
        """Keep the taps that differ from each earlier one."""
        differ = sum_over_processes(self._differ) > 0
        kept = [j for j in range(len(differ)) if differ[:j, j].all()]
        if len(kept) < len(differ):
            logger.info("taps that differ from each other: %s", ", ".join(self.names[j] for j in kept))
            columns = torch.arange(sum(self._widths), device=differ.device).split(self._widths)
            statistics.select(torch.cat([columns[j] for j in kept]))
        self.kept = self.kept.new_tensor(kept)

    def _choose_jitter(self, statistics: ClassScatters) -> float:
        counts, width = statistics.counts, statistics.means.shape[1]
        total = statistics.scatters.diagonal(dim1=1, dim2=2).sum()
        if not total.isfinite():
            raise ValueError("the covariances hold NaN or infinity: so do the features they were fitted on")
        if few := int(((counts > 0) & (counts <= width)).sum()):
            logger.warning(
                "%d of %d classes have no more samples than there are features, %d: no sample varies in some "
                "directions, where the likelihood of these classes is up to the jitter alone",
                few,
                int((counts > 0).sum()),
                width,
            )
        variance = float(total / counts.sum() / width)
        jitters = [share * variance for share in JITTERS] if self.jitter is None else [self.jitter]
        jitter = smallest_jitter(statistics, jitters, self.means.dtype)
        if jitter is None:
            raise ValueError(
                f"the covariances of {width} features cannot all be factorised, not even with {jitters[-1]:.3g} added "
                f"to variances of {variance:.3g} on average; do the features vary within the classes?"
            )
        logger.info("jitter of all classes: %.3g, beside variances of %.3g on average", jitter, variance)
        return jitter

    def _store(self, statistics: ClassScatters, jitter: float) -> None:
        """Factorise class by class, each whitening in place of its scatter, and round to the module's type."""
        counts, means, whitening = statistics.counts, statistics.means, statistics.scatters
        log_scale = torch.full_like(counts, -math.inf)
        identity = torch.eye(means.shape[1], dtype=means.dtype, device=means.device)
        for index in counts.nonzero()[:, 0].tolist():
            factor = torch.linalg.cholesky(statistics.covariance(index, jitter))
            whitening[index] = torch.linalg.solve_triangular(factor, identity, upper=False)
            log_scale[index] = -(len(factor) / 2 * math.log(2 * math.pi) + factor.diagonal().log().sum())
        self.epsilon = means.new_tensor(jitter).to(self.epsilon)
        self.means, self.whitening = means.to(self.means), whitening.to(self.whitening)
        self.log_scale = log_scale.to(self.log_scale)

    def energy(self, features: Tensor) -> Tensor:
        """Energy (B,) of (B, D) embedded features; differentiable."""
        return -class_log_densities(features, self.means, self.whitening, self.log_scale).amax(1)

    def log_likelihoods(self, evidence: Evidence) -> Tensor:
        """Log-likelihoods log N(phi; a_c, S_c + eps I) of (B,) images, constants included: (B, K)."""
        if not self.fitted:
            raise RuntimeError(f"{type(self).__name__} is not fitted: it needs {self.needs}")
        with full_precision(self.means.device):
            return class_log_densities(self.embed(evidence), self.means, self.whitening, self.log_scale)
