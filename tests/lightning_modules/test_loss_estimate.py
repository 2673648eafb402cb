"""The estimate of the floor: against a loop over masks, and what it leaves alone."""

import math

import mask_toy
import pytest
import torch
from mask_toy import QUIET, batches, state_of
from pytorch_lightning import Trainer
from torch.nn import functional

from backbones.subnetwork import maskable
from lightning_modules.loss_estimate import LossEstimate, estimate_loss, masked_networks


@pytest.fixture(scope="module")
def network():
    return mask_toy.trained()


def pairs(size=None):
    images, labels, _ = mask_toy.draw()
    return [(images[i : i + size], labels[i : i + size]) for i in range(0, len(labels), size)] if size else []


def whole_loss(network):
    images, labels, _ = mask_toy.draw()
    with torch.no_grad():
        return float(functional.cross_entropy(network(images), labels))


@pytest.mark.parametrize("size", [240, 100])  # with 100, the last batch has 40
def test_the_estimate_is_the_mean_over_images_then_over_masks(network, size):
    found = estimate_loss(network, pairs(size), keep=0.8, masks=4)
    losses = [whole_loss(masked) for masked in masked_networks(network, 0.8, 4, 0)[1:]]
    assert found["losses"] == pytest.approx(losses, rel=1e-5)
    assert found["floor"] == pytest.approx(sum(losses) / 4, rel=1e-5)
    assert found["std"] == pytest.approx(float(torch.tensor(losses).std()), rel=1e-4)
    assert found["whole"]["loss"] == pytest.approx(whole_loss(network), rel=1e-5)
    assert found["whole"]["accuracy"] == 1.0
    assert found["images"] == 240


def test_with_all_weights_it_is_the_loss_of_the_network(network):
    found = estimate_loss(network, pairs(100), keep=1.0, masks=1)
    assert found["floor"] == found["whole"]["loss"] == pytest.approx(whole_loss(network), abs=1e-5)
    assert found["std"] is None


def test_every_layer_loses_its_share_and_keeps_the_other_values(network):
    _, *masked = masked_networks(network, 0.8, 3, 0)
    for copy in masked:
        for (_, weight), (_, original) in zip(maskable(copy), maskable(network), strict=True):
            kept = weight != 0
            assert kept.sum() == weight.numel() - math.floor(0.2 * weight.numel() + 1e-9)
            assert torch.equal(weight[kept], original[kept])
    assert not torch.equal(masked[0].fc.weight, masked[1].fc.weight)


def test_it_grows_as_fewer_weights_are_kept(network):
    floors = [estimate_loss(network, pairs(240), keep, masks=20)["floor"] for keep in (1.0, 0.95, 0.8, 0.5)]
    assert floors == sorted(floors)
    assert floors[-1] > 5 * floors[0]


def test_the_same_seed_draws_the_same_masks(network):
    first, again, other = (estimate_loss(network, pairs(240), 0.8, mask_seed=seed) for seed in (3, 3, 4))
    assert first == again
    assert first["losses"] != other["losses"]


def test_network_mode_and_random_numbers_are_left_alone(network):
    before, random = state_of(network), torch.get_rng_state()
    network.train()
    estimate_loss(network, pairs(100))
    assert network.training
    network.eval()
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_no_image_is_no_estimate(network):
    with pytest.raises(ValueError, match="no image was seen"):
        estimate_loss(network, [])


def test_outliers_are_refused(network):
    def with_outliers(images, labels, ids):
        return images, labels.where(ids % 5 > 0, -1), ids

    options = QUIET | {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    data = mask_toy.loader(change=with_outliers)
    with pytest.raises(ValueError, match="the batch holds outliers, an estimate is of ID images"):
        Trainer(**options).fit(LossEstimate(network), data, data)


def test_what_was_counted_is_exact_in_half_precision_and_survives():
    network = mask_toy.Net()
    module = LossEstimate(network, masks=1)
    module.bfloat16()
    assert module.sums.dtype == torch.float64
    module.sums += 1 / 3
    checkpoint, other = {}, LossEstimate(network, masks=1)
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert torch.equal(other.sums, module.sums)


def test_no_mask_is_no_estimate(network):
    with pytest.raises(ValueError, match="an estimate takes at least one mask, not 0"):
        LossEstimate(network, masks=0)
    with pytest.raises(ValueError, match="keep is the share of the weights that stay"):
        LossEstimate(network, keep=96.5)


def test_an_epoch_of_the_method_finds_the_same_and_trains_nothing(network):
    module, before = LossEstimate(network, keep=0.8, masks=2), state_of(network)
    options = QUIET | {"max_epochs": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer = Trainer(**options)
    trainer.fit(module, mask_toy.loader(), mask_toy.loader())
    expected = estimate_loss(network, [batch[:2] for batch in batches()], keep=0.8, masks=2)
    settings = {"keep": 0.8, "masks": 2, "mask_seed": 0, "weights": None}
    assert module.findings() == {"estimate": expected | settings}
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert float(trainer.callback_metrics["estimate/floor"]) == pytest.approx(expected["floor"])
