"""Statistics of an epoch's latent vectors, against numpy and torch.distributions."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import MultivariateNormal

from lightning_modules.losses.latent_statistics import COURSE, LatentStatistics

CLASSES, WIDTH = 4, 3


def draw(number=240, seed=0, offset=0.0):
    """Latents of classes 0, 1 and 2 with a scale each, and their deviations."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES - 1, (number,), generator=generator)
    noise = torch.randn(number, WIDTH, dtype=torch.float64, generator=generator)
    latents = offset + 2 * labels[:, None] + (1 + labels[:, None]) * noise
    return latents, labels, 0.1 + torch.rand(number, WIDTH, dtype=torch.float64, generator=generator)


def see(statistics, *epochs, batch=64):
    for margin, rows in enumerate(epochs):
        for part in torch.arange(len(rows[0])).split(batch):
            statistics.update(*(values[part] for values in rows))
        statistics.finish(float(margin))
    return statistics


@pytest.mark.parametrize("batch", [1, 7, 240])
def test_means_and_covariances_are_those_of_numpy_for_any_batches(batch):
    latents, labels, deviations = draw()
    statistics = see(LatentStatistics(CLASSES, WIDTH), (latents, labels, deviations), batch=batch)
    for label in range(CLASSES - 1):
        rows = latents[labels == label].numpy()
        np.testing.assert_allclose(statistics.means[label], rows.mean(0), rtol=1e-8)
        np.testing.assert_allclose(statistics.covariances[label], np.cov(rows.T, bias=True), rtol=1e-8)


def test_float32_latents_far_from_zero_keep_their_covariance():
    latents, labels, deviations = draw(offset=1000.0)
    statistics = see(LatentStatistics(CLASSES, WIDTH), (latents.float(), labels, deviations.float()))
    rows = latents.float().double()[labels == 0].numpy()
    np.testing.assert_allclose(statistics.covariances[0], np.cov(rows.T, bias=True), rtol=1e-6)


def test_a_class_that_is_not_seen_keeps_its_statistics():
    statistics = see(LatentStatistics(CLASSES, WIDTH), draw(), draw(seed=1))
    assert not statistics.means[3].any()
    assert torch.equal(statistics.covariances[3], torch.eye(WIDTH, dtype=torch.float64))
    before = {name: getattr(statistics, name)[1].clone() for name in ("means", "covariances", "bounds")}
    latents, labels, deviations = draw(seed=2)
    see(statistics, (latents, labels.where(labels != 1, 0), deviations))
    for name, value in before.items():
        assert torch.equal(getattr(statistics, name)[1], value), name
    assert statistics.bounds[3] == -math.inf


def test_statistics_hold_through_an_epoch_and_are_of_that_epoch_alone():
    first, second = draw(), draw(seed=1, offset=5.0)
    statistics = see(LatentStatistics(CLASSES, WIDTH), first)
    before = statistics.means.clone()
    statistics.update(*second)
    assert torch.equal(statistics.means, before)
    statistics.finish(0.0)
    expected = np.stack([second[0][second[1] == label].mean(0) for label in range(3)])
    np.testing.assert_allclose(statistics.means[:3], expected, rtol=1e-8)


def test_log_likelihoods_are_those_of_torch():
    statistics, points = see(LatentStatistics(CLASSES, WIDTH), draw()), draw(30, seed=1)[0].float()
    gaussians = MultivariateNormal(statistics.means, statistics.covariances)
    found = statistics.log_likelihoods(points)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, gaussians.log_prob(points.double()[:, None]), rtol=1e-10, atol=1e-10)
    assert statistics.log_likelihoods(points[:0]).shape == (0, CLASSES)


@pytest.mark.parametrize("spoil", ["singular", "no numbers"])
def test_a_covariance_that_cannot_be_factorised_counts_as_standard_normal(spoil):
    statistics, points = see(LatentStatistics(CLASSES, WIDTH), draw()), draw(30, seed=1)[0]
    others = statistics.log_likelihoods(points)[:, [0, 2, 3]]
    statistics.covariances[1] = 0.0 if spoil == "singular" else math.nan
    found = statistics.log_likelihoods(points)
    standard = MultivariateNormal(torch.zeros(WIDTH, dtype=torch.float64), torch.eye(WIDTH, dtype=torch.float64))
    torch.testing.assert_close(found[:, 1], standard.log_prob(points), rtol=1e-10, atol=1e-10)
    assert torch.equal(found[:, [0, 2, 3]], others)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5])
def test_a_bound_rejects_its_share_of_the_class_by_the_gaussian_of_the_epoch_before(share):
    first, (latents, labels, deviations) = draw(), draw(seed=1)
    statistics = see(LatentStatistics(CLASSES, WIDTH, share), first)
    assert statistics.bounds.isneginf().all()
    see(statistics, (latents, labels, deviations))
    for label in range(CLASSES - 1):
        rows = first[0][first[1] == label].numpy()
        gaussian = MultivariateNormal(torch.from_numpy(rows.mean(0)), torch.from_numpy(np.cov(rows.T, bias=True)))
        own = gaussian.log_prob(latents[labels == label]).sort().values
        below = int(share * len(own))
        assert float(statistics.bounds[label]) == pytest.approx(float(own[below]), rel=1e-10)


def test_the_course_is_what_the_columns_say():
    epochs = draw(), draw(seed=1, offset=3.0)
    statistics = see(LatentStatistics(CLASSES, WIDTH), *epochs)
    assert statistics.course.shape == (2, len(COURSE))
    for epoch, ((latents, labels, deviations), row) in enumerate(zip(epochs, statistics.course, strict=True)):
        means = np.stack([latents[labels == label].mean(0) for label in range(3)] + [np.zeros(WIDTH)])
        norms = np.linalg.norm(means, axis=1)
        distances = [np.linalg.norm(a - b) for i, a in enumerate(means) for b in means[:i]]
        expected = epoch, deviations.mean(), norms.min(), norms.mean(), norms.max(), min(distances)
        np.testing.assert_allclose(row, expected, rtol=1e-8)


def test_an_unfinished_epoch_survives_a_checkpoint(tmp_path):
    first, second = draw(), draw(seed=1)
    whole = see(LatentStatistics(CLASSES, WIDTH), first, second)
    broken = see(LatentStatistics(CLASSES, WIDTH), first)
    broken.update(*(values[:100] for values in second))
    torch.save(broken.state_dict(), tmp_path / "half.pt")
    resumed = LatentStatistics(CLASSES, WIDTH)
    resumed.load_state_dict(torch.load(tmp_path / "half.pt", weights_only=True))
    resumed.update(*(values[100:] for values in second))
    resumed.finish(1.0)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], value, rtol=1e-12, atol=1e-12)


def test_what_a_checkpoint_lacks_is_named():
    partial = LatentStatistics(CLASSES, WIDTH).state_dict()
    del partial["course"]
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "course"'):
        LatentStatistics(CLASSES, WIDTH).load_state_dict(partial)


def test_updates_leave_no_graph():
    latents, labels, deviations = draw()
    statistics = see(LatentStatistics(CLASSES, WIDTH), (latents.requires_grad_(), labels, deviations.requires_grad_()))
    assert not any(buffer.requires_grad for buffer in statistics.buffers())


@pytest.mark.parametrize("share", [-0.1, 1.0, 95])
def test_a_share_that_is_none_is_refused(share):
    with pytest.raises(ValueError, match=rf"lower_bound is the share .* in \[0, 1\), not {share}"):
        LatentStatistics(CLASSES, WIDTH, share)
