"""The one evaluation path: every image once through the network, whatever the number of scores and OOD sets."""

import re
import time
from collections import defaultdict
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from pytorch_lightning import Callback, LightningModule, Trainer
from pytorch_lightning.loggers import WandbLogger
from pytorch_lightning.utilities import rank_zero_info
from torch import Tensor

from backbones.weights import origins, weights_sha256
from callbacks.embedding import Embedding, FeatureSample
from callbacks.figures import save_figures, score_figures
from callbacks.fitted_scores import code_sha256, fitting_key, keep_fitted, read_fitted
from callbacks.gathering import Row, gather_samples
from callbacks.heatmaps import Heatmaps, HeatmapSample
from callbacks.identity import identify
from callbacks.metrics import metric_rules
from callbacks.results import (
    TauSource,
    check_tau_source,
    columns_of,
    log_entries,
    summarize,
    write_csv,
    write_results,
)
from callbacks.samples import Samples
from callbacks.stopwatch import Stopwatch
from callbacks.thresholds import as_rows, sweep
from datamodules.datamodule import OODDataModule
from lightning_modules.distributed import sum_over_processes
from lightning_modules.evidence import Evidence
from lightning_modules.ood_module import OODModule
from lightning_modules.scores.score import Fitted, InputScore, Score


class WithoutLogits(Evidence):
    """What scores get to see of a method without classes: the logits are refused in words to those that read them."""

    @property
    def logits(self) -> Tensor:
        """Raise a ``ValueError``."""
        raise ValueError("the score reads class logits, and the method has no classes")


class OODEvaluation(Callback):
    """Fits the scores, scores every test image, and leaves results, figures and log entries.

    During ``test`` the ID training images (loader ``fit``) come first and stream into the scores that are not fitted
    yet, those that are parts of the method included; then those that need it are calibrated on the held-out ID images.
    Of every later image only its id, label, prediction and scores are kept. Ranks are gathered by image id, so any
    number of processes gives the result of one.

    Args:
        scores: name -> score; the method's own scores join under the names that it gives them. What fitting learns is
            kept in the run folder: a second evaluation of the same weights on the same ID images fits nothing again.
        rules: preset for FPR95 and AUPR: default, heat, unleashing_mask, heatmap, variational_metric, openood.
        bootstrap: replicates behind the confidence bounds; 0 = no bounds.
        figures: whether to draw ROC curves, score histograms and, with ``thresholds``, what thresholds do.
        tau_source: whose scores the threshold behind ``macro_f1``, ``tpr`` and ``tnr`` accepts 95% of: ``id_val``, the
            held-out ID training images; ``test_known``, the ID test images, which is optimistic.
        thresholds: whether to leave TPR, FPR and macro F1 over the thresholds of each score, in ``thresholds.csv``, and
            the largest macro F1 of any, in the rows as ``oracle_f1``.
        embedding: what to draw the feature space of; None = no such pictures.
        heatmaps: which images to draw with their heatmaps, for a method that yields any; not given, as by default.
        folder: the run folder; None = write no files. Given by the command line.
        subfolder: where in the run folder the files go. Given by the command line.
    """

    def __init__(
        self,
        scores: dict[str, Score],
        rules: str = "default",
        bootstrap: int = 1000,
        figures: bool = True,
        tau_source: TauSource = "id_val",
        thresholds: bool = False,
        embedding: Embedding | None = None,
        heatmaps: Heatmaps | None = None,
        folder: str | None = None,
        subfolder: str = "",
    ) -> None:
        for name in scores:
            if not re.fullmatch(r"[\w.+-]+", name):  # it becomes the name of a figure and a part of log keys
                raise ValueError(f"a score is called by letters, digits, _ . + and -, not {name!r}")
        if bootstrap < 0:
            raise ValueError(f"bootstrap counts replicates, 0 = none; it cannot be {bootstrap}")
        if heatmaps is not None and not figures:
            raise ValueError("heatmaps are figures, and figures are false: leave one of them out")
        check_tau_source(tau_source)
        self.scores, self.bootstrap, self.figures = scores, bootstrap, figures
        self.tau_source, self.thresholds, self.embedding = tau_source, thresholds, embedding
        self.heatmaps = heatmaps
        self.rules_name, self.rules = rules, metric_rules(rules)
        self.run_folder = None if folder is None else Path(folder)
        self.folder = None if folder is None else Path(folder, subfolder)
        self.fitting: dict[str, Fitted] = dict(scores)  # with the parts of the method that are fitted, as model.<name>
        self.keys: dict[str, str] = {}  # score -> what it is fitted on, where that can be kept
        self.restored: list[str] = []
        self.configuration: dict[str, Any] = {}  # what the command line was asked for; goes into the record
        self.results: dict[str, Any] = {}
        self.samples: Samples | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Ask the method for the taps of the scores, and the data module to ask for the passes they need.

        Raises:
            ValueError: the method has no classes, or no classifier, and a score reads the logits or copies the head.
        """
        module, data = _parts(trainer, pl_module)
        if module.backbone_of_logits is None:  # at every stage: not only when the training is over
            self._check_without_classifier(module)
        if stage != "test":
            return
        if self.heatmaps is not None and self.heatmaps.paired and "train" not in data.sets:
            raise ValueError("heatmaps: paired shows ID training images, and the data has none: leave it out")
        for score in self.scores.values():
            module.taps |= score.taps
        if self.embedding is not None:
            module.taps.add(self.embedding.tap)
        own = {f"model.{name}": part for name, part in module.named_children() if isinstance(part, Fitted)}
        self.fitting = {**own, **self.scores}
        data.before_test = partial(self._ask_for_passes, trainer, module, data)
        if self._uncalibrated() and "calibration" not in data.sets:
            raise ValueError(
                f"{', '.join(self._uncalibrated())}: to be calibrated on ID training images that are held out, but "
                "none are: set val_split of the data"
            )

    def _ask_for_passes(self, trainer: Trainer, module: OODModule, data: OODDataModule) -> None:
        """Ask the data module for as many passes as the scores need that no earlier evaluation has fitted."""
        self._restore(trainer, module, data)
        data.fit_passes = max((score.passes_left for score in self.fitting.values()), default=0)

    def _restore(self, trainer: Trainer, module: OODModule, data: OODDataModule) -> None:
        """Load the scores that an earlier evaluation has fitted on the same, all of it."""
        settings = self.configuration.get("evaluation", {}).get("scores") or {}
        limit = trainer.limit_test_batches
        whole = isinstance(limit, float) and limit == 1.0  # the integer 1 means one batch
        unfitted = any(not score.fitted for score in self.fitting.values())
        if self.folder is None or settings.keys() != self.scores.keys() or not whole or not unfitted:
            return
        common = {
            "code": code_sha256(),
            "weights": weights_sha256(module),
            "model": self.configuration["model"],
            "images": [data.fingerprints.get(name) for name in ("fit", "calibration")],
            "normalization": [data.mean, data.std],
            "precision": trainer.precision,
        }
        for name, score in self.fitting.items():
            if score.fitted:  # there is nothing to fit
                continue
            self.keys[name] = fitting_key(common, settings.get(name), weights_sha256(score))  # it may come with weights
            state = read_fitted(self._fitted_file(name), self.keys[name])
            if trainer.strategy.reduce_boolean_decision(state is not None) and state is not None:
                score.to(torch.float64 if trainer.precision == "64-true" else None)
                score.load_state_dict(state)
                self.restored.append(name)

    def _fitted_file(self, name: str) -> Path:
        assert self.folder is not None
        return self.folder / "fitted" / f"{name}.pt"

    def _check_without_classifier(self, module: OODModule) -> None:
        for name, score in self.scores.items():
            score.bind(None)  # says so itself where it copies the head
            if module.num_classes:
                if score.passes and not score.taps:
                    raise ValueError(
                        f"{name} is fitted on logits, and those of {type(module).__name__} are class likelihoods, "
                        "which are fitted themselves: name only scores that are fitted on features, or on nothing"
                    )
            elif not score.taps or isinstance(score, InputScore):
                raise ValueError(
                    f"{name} reads class logits, {type(module).__name__} has no classes: name only scores that read "
                    "features, or none (scores: {})"
                )

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start with nothing; bind the scores to the network, which holds the checkpoint only now."""
        module, data = _parts(trainer, pl_module)
        self._rows: dict[str, list[Row]] = defaultdict(list)
        self._images = 0
        self._right = torch.zeros((), dtype=torch.int64, device=pl_module.device)  # by the logits that scores read
        self._calibration_forwards: dict[str, int] = {}
        self._started = time.perf_counter()
        self._stopwatch = Stopwatch(pl_module.device)
        self._features = None if self.embedding is None else FeatureSample(self.embedding, _sizes(trainer, data))
        self.heatmap_sample = (
            HeatmapSample(self.heatmaps or Heatmaps(), _sizes(trainer, data)) if self.figures else None
        )
        backbone = module.backbone_of_logits
        for score in self.fitting.values():
            score.bind(backbone)
            score.to(pl_module.device, torch.float64 if pl_module.dtype == torch.float64 else None)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Calibrate between the last image to fit on and the first to score."""
        module, data = _parts(trainer, pl_module)
        if batch_idx == 0 and dataloader_idx == data.fit_passes and self._uncalibrated():
            self._calibrate(trainer, module, data)
        self._stopwatch.start()

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Evidence,  # type: ignore[override]
        batch: tuple[Tensor, Tensor, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Fit on, or score, the evidence of one batch."""
        module, data = _parts(trainer, pl_module)
        evidence = outputs if module.num_classes else WithoutLogits(*outputs)
        images, labels, ids = batch
        if dataloader_idx >= data.fit_passes:
            self._stopwatch.lap("network", len(images))
        self._images += len(images)
        loader = list(_loaders(trainer))[dataloader_idx]
        if self._features is not None:
            self._features.add(loader, ids, labels, evidence)
        if dataloader_idx < data.fit_passes:
            last = batch_idx + 1 == trainer.num_test_batches[dataloader_idx]
            for name, score in self.fitting.items():
                if score.passes_left:
                    try:
                        score.update(evidence, labels)
                        if last:
                            score.finalize()
                    except ValueError as error:
                        raise ValueError(f"fitting {name} on the ID training images: {error}") from error
            return
        scores = {}
        for name, score in self.scores.items():
            self._stopwatch.start()
            scores[name] = score(pl_module, images) if isinstance(score, InputScore) else score(evidence)
            self._stopwatch.lap(name, len(images))
        if taken := outputs.scores.keys() & scores.keys():
            raise ValueError(
                f"{type(pl_module).__name__} itself yields {', '.join(taken)}: rename those of the evaluation"
            )
        if self.heatmap_sample is not None and outputs.maps is not None:
            self.heatmap_sample.add(loader, ids, outputs)
        elif self.heatmaps is not None:
            raise ValueError(f"heatmaps are asked for, and {type(pl_module).__name__} yields none: leave them out")
        by_logits = outputs.logits.argmax(1) if module.num_classes else torch.full_like(labels, -1)
        if loader == "id":
            self._right += (by_logits == labels).sum()
        predictions = by_logits if outputs.predictions is None else outputs.predictions
        self._rows[loader].append((ids, labels, predictions, outputs.scores | scores))

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Gather, compute, write, log."""
        module, data = _parts(trainer, pl_module)
        samples = gather_samples(self._rows, data.sizes, data.repeats)
        samples = replace(samples, scores=module.complete(samples.scores, np.array(samples.splits)[samples.split]))
        images = int(sum_over_processes(torch.tensor(self._images, device=pl_module.device)))
        right = int(sum_over_processes(self._right))
        if self._features is not None:
            self._features.gather()
        looked_at = self.heatmap_sample.gather(trainer, module, data) if self.heatmap_sample is not None else 0
        if not trainer.is_global_zero:
            return
        self.samples = samples
        scored = len(samples.ids)
        extra = {
            name: score.forwards * scored + self._calibration_forwards.get(name, 0)
            for name, score in self.scores.items()
            if isinstance(score, InputScore)
        }
        if module.extra_forwards:
            extra["model"] = module.extra_forwards * images
        if looked_at:
            extra["heatmaps"] = looked_at
        self.results = {
            **identify(trainer, module, data, self.run_folder),
            "truncated": sum(trainer.num_test_batches) < sum(map(len, _loaders(trainer).values())),
            "forwards": {"images": images, **extra},
            "weights": self._origins(module),
            "seconds": round(time.perf_counter() - self._started, 3),
            "milliseconds": self._stopwatch.milliseconds(),
            "restored": self.restored,
            **summarize(
                samples,
                data.groups,
                self.rules,
                data.num_classes,
                self.bootstrap,
                tau_source=self.tau_source,
                oracle=self.thresholds,
            ),
            "logit_accuracy": right / len(samples.of("id").ids) if module.num_classes else None,
            "configuration": self.configuration,
        }
        self.results["metric_rules"]["preset"] = self.rules_name
        self.curves = sweep(samples, self.results["thresholds"], data.num_classes) if self.thresholds else {}
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            samples.save(self.folder / "scores.npz")
            write_results(self.folder, self.results)
            (self.folder / "thresholds.csv").unlink(missing_ok=True)  # of an earlier evaluation
            if self.curves:
                write_csv(self.folder / "thresholds.csv", as_rows(self.curves))
            for name in self.keys.keys() - set(self.restored):
                keep_fitted(self._fitted_file(name), self.fitting[name], self.keys[name])
            rank_zero_info(f"results: {self.folder / 'results.json'}")
        figures = self._draw(samples, data, module)
        self._log(trainer, figures if self.folder is None else save_figures(self.folder / "figures", figures))

    def _origins(self, module: OODModule) -> dict[str, dict[str, str]]:
        """Name the files of weights of the method, and of scores that come with any."""
        scores = {
            f"{name}.{part}".rstrip("."): file for name, s in self.scores.items() for part, file in origins(s).items()
        }
        return origins(module) | scores

    def _uncalibrated(self) -> dict[str, InputScore]:
        return {
            name: score
            for name, score in self.scores.items()
            if isinstance(score, InputScore) and score.calibration_forwards and not score.fitted
        }

    def _calibrate(self, trainer: Trainer, module: OODModule, data: OODDataModule) -> None:
        """Show the held-out images, which are scored later like any others, to the scores that need them first."""
        scores, loaders = self._uncalibrated(), list(_loaders(trainer))
        batches, images_seen = int(trainer.num_test_batches[loaders.index("calibration")]), 0
        for batch in islice(data.calibration_dataloader(), batches):
            images, labels, _ = trainer.strategy.batch_to_device(batch)
            images_seen += len(images)
            for score in scores.values():
                score.calibrate(module, images, labels)
        total = int(sum_over_processes(torch.tensor(images_seen, device=module.device)))
        for name, score in scores.items():
            try:
                score.finalize()
            except ValueError as error:
                raise ValueError(f"calibrating {name} on the held-out ID images: {error}") from error
            self._calibration_forwards[name] = score.calibration_forwards * total

    def _draw(self, samples: Samples, data: OODDataModule, module: OODModule) -> dict[str, Figure]:
        figures = module.figures()
        if self.figures:
            figures |= score_figures(samples, data.groups, self.curves, self.results["thresholds"])
        if self._features is not None:
            figures |= self._features.figures(data.classes)
        if self.heatmap_sample is not None and self.heatmap_sample.maps:
            figures["heatmaps"] = self.heatmap_sample.figure(data)
        return figures

    def _log(self, trainer: Trainer, figures: dict[str, Figure] | dict[str, str]) -> None:
        """Send numbers to every logger, table and figures to wandb; ``self.log`` would round them to float32."""
        rows = self.results["rows"]
        for logger in trainer.loggers:
            logger.log_metrics(log_entries(self.results))
            if isinstance(logger, WandbLogger):
                columns = columns_of(rows)
                logger.log_table("ood/results", columns, [[row.get(column) for column in columns] for row in rows])
                for name, figure in figures.items():
                    logger.log_image(f"figures/{name}", [figure])


def _parts(trainer: Trainer, pl_module: LightningModule) -> tuple[OODModule, OODDataModule]:
    data = trainer.datamodule  # type: ignore[attr-defined]
    if not isinstance(pl_module, OODModule) or not isinstance(data, OODDataModule):
        given = f"{type(pl_module).__name__} and {type(data).__name__}"
        raise TypeError(f"OODEvaluation joins an OODModule and an OODDataModule, got {given}")
    return pl_module, data


def _loaders(trainer: Trainer) -> dict[str, Any]:
    return trainer.test_dataloaders  # type: ignore[return-value]


def _sizes(trainer: Trainer, data: OODDataModule) -> dict[str, int]:
    """Count the test images of each set, those that ``limit_test_batches`` leaves."""
    batches = dict(zip(_loaders(trainer), map(int, trainer.num_test_batches), strict=True))
    return {name: min(data.sizes[name], batches[name] * data.eval_batch_size) for name in ("id", *data.groups)}
