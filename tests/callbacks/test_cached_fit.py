"""Scores that are parts of a method are fitted on cached features as they would be on the images."""

import os

import forked
import numpy as np
import pytest
import torch
from frozen_toy import Pixels, Toy
from pytorch_lightning import Trainer

from backbones.digits_net import DigitsNet
from backbones.residual_energy import ResidualEnergy
from callbacks import cached_fit
from callbacks.frozen_features import PROBES, FrozenFeatures
from lightning_modules.evidence import Evidence
from lightning_modules.scores.clipped import Clipped
from lightning_modules.scores.energy import FeatureEnergy
from lightning_modules.scores.gmm import GMMEnergy
from lightning_modules.scores.hybrid_energy import HybridEnergy
from lightning_modules.scores.knn import KNN
from lightning_modules.scores.logits import Energy
from lightning_modules.scores.pca import PCA

TRAIN, BATCH = 300, 64
pytestmark = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")  # nothing is held out


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(cached_fit, "ROWS", BATCH)


class Scored(Toy):
    """A method that is made of several scores."""

    def __init__(self, backbone=None, **scores):
        super().__init__(backbone)
        for name, score in scores.items():
            self.add_module(name, score)


def of_every_kind():
    """Scores that need two passes, none but the classifier, and a sample of rows."""
    hybrid = HybridEnergy(PCA(GMMEnergy(), components=8), ResidualEnergy(8, 4, 1))
    return Scored(hybrid=hybrid, head=FeatureEnergy(Energy()), rows=Clipped(KNN(k=3, subsample=100)))


def fit(folder, module, data, **options):
    """Go through a fit without a step."""
    options |= {"accelerator": "cpu", "precision": "64-true", "max_epochs": 1, "use_distributed_sampler": False}
    options |= dict.fromkeys(("limit_train_batches", "limit_val_batches", "num_sanity_val_steps"), 0)
    options |= dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    Trainer(callbacks=[FrozenFeatures(folder=str(folder / "features"))], **options).fit(module, data)
    data.trainer = None
    return module


def scores_of(module):
    kept = ("hybrid", "head", "rows")
    return {name: value for name, value in module.state_dict().items() if name.startswith(kept) and "mlp" not in name}


def from_the_images(data, backbone):
    """Estimate class means, pooled covariance and class shares from the images to fit on."""
    batches = [data.on_after_batch_transfer(batch, 0) for batch in data.fit_dataloader()]
    labels = torch.cat([batch.labels for batch in batches]).numpy()
    with torch.no_grad():
        maps = torch.cat([backbone.double().forward_features(batch.images.double()) for batch in batches])
    features = maps.mean((2, 3)).numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    means = np.stack([features[labels == label].mean(0) for label in range(backbone.num_classes)])
    centred = features - means[labels]
    return means, centred.T @ centred / len(labels), np.bincount(labels) / len(labels), len(labels)


DATA = {
    "all": ({}, 300),
    "limited": ({"fit_limit": 200}, 200),
    "held out": ({"val_split": 0.2}, 240),
    "with outliers": ({"outlier_feed": "mixed"}, 300),
    "of known classes, limited": ({"known": 2, "val_split": 0.1, "fit_limit": 150, "outlier_feed": "paired"}, 150),
}


@pytest.mark.parametrize("case", DATA)
def test_a_prior_is_fitted_on_the_images_to_fit_on(tmp_path, case):
    options, number = DATA[case]
    data = Pixels(train=TRAIN, **options)
    module = Scored(DigitsNet(options.get("known", 3)), prior=GMMEnergy())
    fit(tmp_path, module, data)
    means, covariance, shares, fitted_on = from_the_images(data, module.backbone)
    assert fitted_on == number
    prior = {name: value.numpy() for name, value in module.prior.state_dict().items()}
    factor = np.linalg.inv(prior["whitening"])
    np.testing.assert_allclose(np.exp(prior["log_prior"]), shares, rtol=1e-12)
    np.testing.assert_allclose(prior["centre"] + prior["centroids"] @ factor.T, means, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(factor @ factor.T, covariance, rtol=1e-6, atol=1e-6 * np.abs(covariance).max())


def test_all_scores_of_a_method_are_fitted_while_the_network_runs_once(tmp_path):
    module = fit(tmp_path, of_every_kind(), Pixels(train=TRAIN))
    assert sum(module.seen) == PROBES + TRAIN
    assert (int(module.hybrid.finished), int(module.hybrid.prior.finished), int(module.rows.finished)) == (2, 2, 2)
    assert module.rows.score.bank.shape == (100, 64)
    again = fit(tmp_path, of_every_kind(), Pixels(train=TRAIN))
    assert again.seen == [PROBES]
    assert all(torch.equal(scores_of(again)[name], value) for name, value in scores_of(module).items())


def test_a_score_without_a_fit_is_bound_to_the_network(tmp_path):
    module = fit(tmp_path, Scored(head=FeatureEnergy(Energy())), Pixels(train=120))
    features = torch.rand(5, 64, dtype=torch.float64)
    expected = -torch.logsumexp(features @ module.backbone.fc.weight.T + module.backbone.fc.bias, 1)
    torch.testing.assert_close(module.head(Evidence(torch.empty(5, 0), {"penultimate": features}, {}, None)), expected)


def test_what_a_checkpoint_brought_is_not_fitted_again(tmp_path):
    fitted = scores_of(fit(tmp_path, of_every_kind(), Pixels(train=TRAIN)))
    module = of_every_kind().double()
    module.load_state_dict(fitted, strict=False)
    fit(tmp_path, module, Pixels(train=TRAIN - 100))
    assert all(torch.equal(scores_of(module)[name], value) for name, value in fitted.items())


def fit_a_share(folder, processes):
    cached_fit.ROWS = BATCH
    data = Pixels(train=TRAIN, batch_size=60, fit_limit=2 * BATCH + 1)  # the last batch is of one row
    module = fit(folder, of_every_kind(), data, strategy="ddp", devices=processes)
    torch.save(scores_of(module), folder / f"{processes}_{module.global_rank}.pt")


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_several_processes_fit_what_one_does(tmp_path, processes):
    data = Pixels(train=TRAIN, batch_size=60, fit_limit=2 * BATCH + 1)
    expected = scores_of(fit(tmp_path, of_every_kind(), data))
    log = tmp_path / "log"
    codes = forked.run(fit_a_share, tmp_path, processes, processes=processes, log=log)
    assert codes == [0] * processes, log.read_text()[-3000:]
    for rank in range(processes):
        found = torch.load(tmp_path / f"{processes}_{rank}.pt", weights_only=True)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10, msg=name)


class FailsOnOne(GMMEnergy):
    def update(self, evidence, labels):
        if os.environ["LOCAL_RANK"] == "1":
            raise ValueError("this process cannot go on")
        super().update(evidence, labels)


def fail_on_one(folder):
    fit(folder, Scored(prior=FailsOnOne()), Pixels(train=120), strategy="ddp", devices=2)


def test_where_one_process_fails_to_fit_none_waits(tmp_path):
    log = tmp_path / "log"
    assert forked.run(fail_on_one, tmp_path, processes=2, log=log, timeout=60) == [1, 1]
    assert "ValueError: this process cannot go on" in log.read_text()
    assert "another process of this run failed on cached features, and says why" in log.read_text()
