"""The variational/metric latent space: Gaussian latent vectors of each class, far from those of others and from 0.

Two linear heads on a backbone give each image a posterior N(mean, diag(exp(log_variance))) over a latent vector z. A
triplet loss with a growing distance between classes acts on draws of z, and a Kullback-Leibler divergence pulls each
posterior to N(m_c, 0.1^2 I) around the mean of its class in the epoch before. There is no classifier: after training,
a Gaussian for each class on features of several depths and the latent mean says how likely an image is. Dinari and
Freifeld, "Variational- and Metric-based Deep Latent Space for Out-of-Distribution Detection", UAI 2022.
"""

import logging
from dataclasses import dataclass
from typing import Literal, cast

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from pytorch_lightning.cli import LRSchedulerCallable, OptimizerCallable
from pytorch_lightning.utilities.types import LRSchedulerTypeUnion, OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.classification import MulticlassConfusionMatrix

from backbones.autoencoders import Autoencoder
from backbones.backbone import Backbone
from backbones.weights import load_latent_space, origins
from lightning_modules.evidence import Evidence
from lightning_modules.losses.class_conditional_kl import class_conditional_kl
from lightning_modules.losses.latent_figure import course_figure
from lightning_modules.losses.latent_statistics import COURSE, LatentStatistics
from lightning_modules.losses.triplet_distancing import TripletDistancingLoss, distancing_margin
from lightning_modules.ood_module import Batch, Column, Images, OODModule
from lightning_modules.scores.class_density import ClassDensity, weighted_score
from lightning_modules.scores.score import full_precision, widen
from lightning_modules.scores.weighted_density import ERROR, WeightedDensity, check_scales

log = logging.getLogger(__name__)

LATENT = "latent"  # the tap of the latent means
OWN_RATE = "own_lr"  # of a parameter group, while it has the rate of the heads; checkpoints hold it, too


@dataclass(frozen=True)
class Margin:
    """How far apart classes are to be, by epoch; see ``distancing_margin``.

    Attributes:
        final: where growth ends, but for a last step.
        first_epoch: counted from 0, in which the margin grows first.
        jump: growth in an epoch.
    """

    final: float = 32.0
    first_epoch: int = 10
    jump: float = 1.0

    def __post_init__(self) -> None:
        distancing_margin(0, self.first_epoch, self.final, self.jump)  # which refuses what makes no sense


@dataclass(frozen=True)
class Finetune:
    """How a trained backbone joins: at first only the heads learn.

    Attributes:
        unfreeze_epoch: counted from 0, in which the backbone begins to learn, with a new optimiser and schedule.
        lr: learning rate until then.
        batch_norm: whether the backbone's batch-norm follows the batches until then.
    """

    unfreeze_epoch: int = 20
    lr: float = 1e-2
    batch_norm: bool = True


class VariationalMetric(OODModule):
    """Trains backbone and latent heads; its scores come from class Gaussians that are fitted before a test.

    ``likelihood`` is minus the largest class log-likelihood; with an autoencoder there are also ``reconstruction``, how
    much its image of an image differs for the backbone's first tap, and ``weighted``, the score of the paper, which
    weighs the first by the second. The logits are the class log-likelihoods.

    Args:
        backbone: the network; its classifier has no part in this.
        density: of the classes, on taps of the backbone and ``latent``, the latent mean.
        optimizer: makes the optimiser from the parameters.
        lr_scheduler: makes the schedule from the optimiser; None = constant.
        lr_interval: whether the schedule steps after each epoch or after each step.
        latent_dim: L.
        metric: the loss of draws; with normalised distances, as in the authors' code, margins beyond 2 do nothing.
        margin: how far apart it drives classes.
        kl_weight: weight of the divergence.
        kl_epoch: counted from 0, the first in which it counts.
        kl_estimator: ``analytic``, or ``mc``, from the draw of the triplets.
        lower_bound: share of training images below the bound of their class; for the log of the open set alone.
        autoencoder: trained, with its ``weights``; None = no weighting.
        calibration: where the largest log-likelihood comes from that weighting starts at: the ID ``train`` images, the
            held-out ones (``id_val``), or all test images, as in the authors' code (``test``; a score then depends on
            the other images).
        finetune: where the backbone is trained already; None = everything learns from the start.
        weights: of backbone and heads, both trained, as ``backbones.weights.load_latent_space`` finds them: of a run,
            or published; None = what the backbone has, and random heads.
    """

    def __init__(
        self,
        backbone: Backbone,
        density: ClassDensity,
        optimizer: OptimizerCallable,
        lr_scheduler: LRSchedulerCallable | None = None,
        lr_interval: Literal["epoch", "step"] = "epoch",
        latent_dim: int = 32,
        metric: TripletDistancingLoss | None = None,
        margin: Margin | None = None,
        kl_weight: float = 0.1,
        kl_epoch: int = 1,
        kl_estimator: Literal["analytic", "mc"] = "analytic",
        lower_bound: float = 0.05,
        autoencoder: Autoencoder | None = None,
        calibration: Literal["train", "id_val", "test"] = "train",
        finetune: Finetune | None = None,
        weights: str | None = None,
    ) -> None:
        super().__init__(backbone, optimizer, lr_scheduler, lr_interval)
        for name, value, known in (
            ("kl_estimator", kl_estimator, ("analytic", "mc")),
            ("calibration", calibration, ("train", "id_val", "test")),
        ):
            if value not in known:
                raise ValueError(f"{name} is {' or '.join(known)}, not {value!r}")
        if self.num_classes < 2:
            raise ValueError(f"classes are told apart by this method, so it takes at least 2, not {self.num_classes}")
        if latent_dim < 1 or kl_weight < 0:
            raise ValueError(
                f"latent_dim must be at least 1 and kl_weight at least 0, got latent_dim={latent_dim}, "
                f"kl_weight={kl_weight}"
            )
        if finetune is not None:
            self.epochs_without_schedule = finetune.unfreeze_epoch
        backbone.head.requires_grad_(False)
        self.fc_mu = nn.Linear(backbone.num_features, latent_dim)  # called as in the published weights
        self.fc_var = nn.Linear(backbone.num_features, latent_dim)
        if weights is not None:
            load_latent_space(backbone, {"fc_mu": self.fc_mu, "fc_var": self.fc_var}, weights)
        self.statistics = LatentStatistics(self.num_classes, latent_dim, lower_bound)
        self.metric, self.margin, self.finetune = metric or TripletDistancingLoss(), margin or Margin(), finetune
        self.kl_weight, self.kl_epoch, self.kl_estimator = kl_weight, kl_epoch, kl_estimator
        self.autoencoder, self.calibration = autoencoder, calibration
        self.density: ClassDensity | WeightedDensity = density
        self.taps = set(density.taps) - {LATENT}
        if unknown := sorted(self.taps - set(backbone.taps)):
            raise ValueError(
                f"the density reads {', '.join(unknown)}, which {type(backbone).__name__} does not yield: "
                f"{', '.join(backbone.taps)}, {LATENT}"
            )
        self.first_tap = next((name for name in density.names if name != LATENT), "penultimate")
        if autoencoder is not None:
            self.frozen, self.extra_forwards = ("autoencoder",), 2  # and the backbone on what it draws
            self.density = WeightedDensity(density)  # so that a checkpoint goes with any calibration
            if calibration != "train":
                self.density.passes = density.passes  # ``complete`` looks for the maxima
        self.confusion = MulticlassConfusionMatrix(self.num_classes + 1)

    @property
    def backbone_of_logits(self) -> None:
        """None: the backbone's head is as it came, and the logits are class log-likelihoods."""

    def setup(self, stage: str) -> None:
        """Refuse what would go wrong silently."""
        if (precision := self.trainer.precision) in ("bf16-true", "16-true"):
            raise ValueError(f"class densities do not survive {precision}: choose 32-true or bf16-mixed")
        searches = getattr(self.trainer.strategy, "_ddp_kwargs", {}).get("find_unused_parameters", False)
        if self.finetune is not None and stage == "fit" and self.trainer.world_size > 1 and not searches:
            raise ValueError(
                "finetuning leaves the backbone out at first: several processes take --trainer.strategy "
                "ddp_find_unused_parameters_true"
            )
        if self.finetune is not None and stage == "fit" and not origins(self.backbone):
            log.warning("the backbone is to be fine-tuned, but it is not trained: it has no `weights`")
        if self.autoencoder is not None and stage == "fit" and not origins(self.autoencoder):
            log.warning("the autoencoder is not trained: without `weights`, `weighted` is a score by random images")

    def forward(self, images: Images) -> Evidence:
        """Observe (B, C, H, W) images: class log-likelihoods (B, K), features and ``latent`` (B, L), scores."""
        _, features = self.backbone.forward_intermediates(images, {"penultimate", *self.taps} - {LATENT, ERROR})
        with full_precision(self.device):
            features[LATENT] = self.fc_mu(widen(features["penultimate"]))
        if self.autoencoder is not None:
            features[ERROR] = self._reconstruction_error(images, features)
        density = self.density.density if isinstance(self.density, WeightedDensity) else self.density
        with full_precision(self.device):
            logits = self.statistics.log_likelihoods(features[LATENT]).to(features[LATENT].dtype)
            evidence = Evidence(logits, features, {}, None)
            if not density.fitted:
                return evidence
            logits = density.log_likelihoods(evidence)
        scores = {"likelihood": -logits.amax(1)}
        if isinstance(self.density, WeightedDensity):
            scores["reconstruction"] = features[ERROR].squeeze(1)
            if self.calibration == "train" and self.density.fitted:
                scores["weighted"] = self.density.weigh(logits.amax(1), scores["reconstruction"])
        return evidence._replace(logits=logits, scores=scores)

    def complete(self, scores: dict[str, Column], splits: NDArray[np.str_]) -> dict[str, Column]:
        """Add ``weighted`` where it depends on many images."""
        if self.autoencoder is None or self.calibration == "train":
            return scores
        rows = splits == "calibration" if self.calibration == "id_val" else splits != "calibration"
        if not rows.any():
            raise ValueError("calibration: id_val takes held-out ID images: set val_split of the data")
        likelihood, error = (torch.from_numpy(scores[name]) for name in ("likelihood", "reconstruction"))
        known = torch.from_numpy(rows)
        scales = check_scales(-likelihood[known].amin(), error[known].amax())
        weighted = weighted_score(-likelihood, error, *scales)
        return scores | {"weighted": weighted.numpy()}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Return the metric loss of a draw of each image's latent vector, and the divergence from ``kl_epoch`` on."""
        images, labels, _ = batch
        labels = cast(Tensor, self.all_gather(labels)).flatten()  # where one process raises, all do
        if (labels < 0).any():
            raise ValueError("this method is trained without outliers: leave out outlier_feed")
        features = self._encode(images)
        with full_precision(self.device):  # of latent vectors that are 33 long, bfloat16 would round off the deviation
            features = widen(features)
            mean, log_variance = self.fc_mu(features), self.fc_var(features).clamp(-10, 10)
            draws = mean + (log_variance / 2).exp() * torch.randn_like(mean)
            # the triplets and classes of all processes; to average the gradients of parts would be another loss
            posteriors = cast(Tensor, self.all_gather(torch.stack([mean, log_variance, draws], 1), sync_grads=True))
            mean, log_variance, draws = posteriors.view(-1, 3, mean.shape[1]).unbind(1)
            loss, triplet, distancing, active = self.metric(draws, labels, self.current_margin)
            self.statistics.update(draws.detach(), labels, (log_variance.detach() / 2).exp())
            if self.current_epoch >= self.kl_epoch:
                centres = self.statistics.means.to(mean)
                shown = draws if self.kl_estimator == "mc" else None
                divergence = self.kl_weight * class_conditional_kl(mean, log_variance, labels, centres, draws=shown)
                self.log("train/kl", divergence)
                loss = loss + divergence
        self.log_dict({"train/triplet": triplet, "train/distancing": distancing, "train/active": active})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Start the backbone's own training when its time has come: with the schedule's own rate, and no momenta."""
        if self._only_heads:
            return
        for optimizer in self.trainer.optimizers:
            for group in optimizer.param_groups:
                if OWN_RATE in group:
                    group["lr"] = group.pop(OWN_RATE)
                    optimizer.state.clear()

    def on_train_epoch_end(self) -> None:
        """End the statistics of the epoch, and log what the latent space looks like."""
        if not self._only_heads:
            super().on_train_epoch_end()
        self.statistics.finish(self.current_margin)
        for name, value in zip(COURSE, self.statistics.course[-1], strict=True):
            self.log(f"latent/{name}", value)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Begin with the rate of the heads where only they learn at first."""
        configured = super().configure_optimizers()
        if self.finetune is not None and self.finetune.unfreeze_epoch:
            optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
            for group in optimizer.param_groups:  # type: ignore[union-attr]
                group |= {"lr": self.finetune.lr, OWN_RATE: group["lr"]}
        return configured

    def lr_scheduler_step(self, scheduler: LRSchedulerTypeUnion, metric: float | None) -> None:
        """Count the schedule from where the backbone learns."""
        if not self._only_heads:
            super().lr_scheduler_step(scheduler, metric)

    def figures(self) -> dict[str, Figure]:
        """Draw how the latent space took shape, where it was trained here."""
        course = self.statistics.course
        return {"latent_space": course_figure(course)} if len(course) else {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Classify held-out ID images, and images labelled -1, by the latent Gaussians of the epoch before."""
        images, labels, _ = batch
        _, features = self.backbone.forward_intermediates(images, {"penultimate"})
        with full_precision(self.device):
            likelihoods = self.statistics.log_likelihoods(self.fc_mu(widen(features["penultimate"])))
        known = labels >= 0
        if known.any():  # a process's share may hold none
            self.val_accuracy.update(likelihoods[known], labels[known])
        if len(labels):
            accepted = likelihoods.masked_fill(likelihoods < self.statistics.bounds, -torch.inf)
            rejected = accepted.isneginf().all(1)
            self.confusion.update(
                accepted.argmax(1).masked_fill(rejected, self.num_classes), labels.masked_fill(~known, self.num_classes)
            )
        self.log("val/accuracy", self.val_accuracy, on_epoch=True, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        """Log how well the bounds of the classes tell known from unknown; nothing is selected by it."""
        matrix = self.confusion.compute().double()
        self.confusion.reset()
        known, unknown = matrix[:-1], matrix[-1]
        self.log("val/known_accepted", 1 - known[:, -1].sum() / known.sum())
        if unknown.sum():
            self.log("val/unknown_rejected", unknown[-1] / unknown.sum())
            hits = matrix.diagonal()
            self.log("val/open_f1", (2 * hits / (matrix.sum(0) + matrix.sum(1)).clamp(min=1)).mean())

    @property
    def current_margin(self) -> float:
        """The distance between classes that this epoch asks for."""
        return distancing_margin(self.current_epoch, self.margin.first_epoch, self.margin.final, self.margin.jump)

    @property
    def _only_heads(self) -> bool:
        return self.finetune is not None and self.current_epoch < self.finetune.unfreeze_epoch

    def _encode(self, images: Images) -> Tensor:
        """Map training images to (B, E) features, without gradients where only the heads learn."""
        follows = not self._only_heads or (self.finetune is not None and self.finetune.batch_norm)
        if self.backbone.training != follows:
            self.backbone.train(follows)
        with torch.set_grad_enabled(not self._only_heads):
            return self.backbone.forward_intermediates(images, {"penultimate"})[1]["penultimate"]

    def _reconstruction_error(self, images: Images, features: dict[str, Tensor]) -> Tensor:
        """Mean squared difference (B, 1) of the backbone's first tap between images and what is drawn of them."""
        assert self.autoencoder is not None
        tap = self.first_tap
        _, drawn = self.backbone.forward_intermediates(self.autoencoder(images), {tap})
        return (widen(features[tap]) - widen(drawn[tap])).square().mean(1, keepdim=True)
