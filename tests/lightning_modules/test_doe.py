"""DOE's perturbation and its two steps, against an explicit copy of the network and an optimiser of its own."""

import copy

import pytest
import torch
from outlier_toy import KNOWN, STEPS, Dropping, Net, batches, make, train, weights
from pytorch_lightning.cli import ReduceLROnPlateau
from torch import nn
from torch.nn import functional
from torch.nn.utils import clip_grad_norm_

from lightning_modules.doe import DOE

THREE = 1 / 3


def uniform(logits):
    return functional.cross_entropy(logits[KNOWN:], torch.full((len(logits) - KNOWN, 3), THREE))


def known_loss(logits, labels):
    return functional.cross_entropy(logits[:KNOWN], labels[:KNOWN])


def proxy_step(backbone, images, ascent):
    """Return the perturbation of each weight that a step of SGD on a copy without dropout makes."""
    proxy = copy.deepcopy(backbone).train()
    for layer in proxy.modules():
        if isinstance(layer, nn.Dropout):
            layer.p = 0.0
    outliers = proxy(images)[KNOWN:]
    regularizer = (outliers.mean(1) - (outliers.softmax(1) * outliers).sum(1)).mean() ** 2
    (-regularizer if ascent else regularizer).backward()
    torch.optim.SGD(proxy.parameters(), 1.0).step()
    changes = {}
    for (name, weight), moved in zip(backbone.named_parameters(), proxy.parameters(), strict=True):
        if weight.ndim >= 2:
            change = moved.detach() - weight.detach()
            changes[name] = weight.detach().norm() / (change.norm() + 1e-20) * change
    return changes


@pytest.mark.parametrize("direction", ["official", "ascent"])
@pytest.mark.parametrize("backbone", [Net, Dropping])
def test_a_perturbation_is_a_step_on_a_copy_without_dropout_to_the_length_of_the_weight(direction, backbone):
    module, (first, second, _) = make(DOE, backbone, direction=direction).double(), batches()
    module.train()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    module.perturb(first[0].double(), first[1])
    expected = proxy_step(module.backbone, first[0].double(), direction == "ascent")
    assert expected.keys() == module.perturbation.keys() == {"conv1.weight", "fc.weight"}
    for name, change in module.perturbation.items():
        torch.testing.assert_close(change, expected[name], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(change.norm(), module.backbone.get_parameter(name).detach().norm())
    module.perturb(second[0].double(), second[1])
    newest = proxy_step(module.backbone, second[0].double(), direction == "ascent")
    for name, change in module.perturbation.items():
        torch.testing.assert_close(change, 0.6 * expected[name] + 0.4 * newest[name], rtol=1e-6, atol=1e-9)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())  # statistics, too
    assert all(layer.training for layer in module.backbone.modules())
    assert all(weight.grad is None for weight in module.parameters())


def test_directions_are_opposite():
    images, labels, _ = batches()[0]
    falls, rises = (make(DOE, direction=direction).train() for direction in ("official", "ascent"))
    for module in (falls, rises):
        module.perturb(images, labels)
    for name, change in falls.perturbation.items():
        torch.testing.assert_close(change, -rises.perturbation[name])


def reference(floor, warmup, strength, epochs):
    """Train by the book: copies for the perturbation, one optimiser for both steps."""
    backbone = make(DOE).double().backbone.train()
    optimizer = torch.optim.SGD(backbone.parameters(), 0.1, momentum=0.9)
    running = {}

    def step(loss):
        optimizer.zero_grad()
        loss.backward()
        clip_grad_norm_(backbone.parameters(), 1.0)
        optimizer.step()

    def floored(logits, labels):
        return (known_loss(logits, labels) - floor).abs() + floor

    for epoch in range(epochs):
        for images, labels, _ in batches():
            images = images.double()
            if epoch < warmup:
                logits = backbone(images)
                step(floored(logits, labels) + uniform(logits))
                continue
            new = proxy_step(backbone, images, ascent=False)
            running = {name: 0.6 * running[name] + 0.4 * new[name] if running else new[name] for name in new}
            for sign in (1, -1):
                with torch.no_grad():
                    for name, change in running.items():
                        backbone.get_parameter(name).add_(sign * strength * change)
                logits = backbone(images)
                step(uniform(logits) if sign == 1 else floored(logits, labels))
    return backbone.state_dict()


@pytest.mark.parametrize("floor", [0.0, 0.4, 50.0])
def test_training_is_that_of_the_book(floor):
    module = make(DOE, floor=floor, warmup=1, strengths=[0.1]).double()
    trainer = train(module, epochs=3, data=[(images.double(), *rest) for images, *rest in batches()])
    assert trainer.global_step == 3 * STEPS
    for name, value in reference(floor, 1, 0.1, 3).items():
        torch.testing.assert_close(module.backbone.state_dict()[name], value, rtol=1e-5, atol=1e-6)


def test_without_a_rate_the_weights_come_back():
    module = make(DOE, lr=0.0, warmup=0)
    before = weights(module)
    train(module, epochs=2)
    assert module.perturbation
    for name, value in weights(module).items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("warmup", "steps"), [(0, 4), (1, 3), (2, 2)])
def test_one_step_before_the_warmup_ends_and_two_after(warmup, steps):
    taken = []

    class Counting(torch.optim.SGD):
        def step(self, *args, **kwargs):
            taken.append(1)
            return super().step(*args, **kwargs)

    trainer = train(make(DOE, warmup=warmup, optimizer=lambda parameters: Counting(parameters, 0.01)), epochs=2)
    assert len(taken) == steps * STEPS
    assert trainer.global_step == 2 * STEPS


def test_gradients_are_clipped_to_1():
    module = make(DOE, backbone=Net, floor=0.0, warmup=0, optimizer=lambda parameters: torch.optim.SGD(parameters, 1.0))
    lengths, step = [], torch.optim.SGD.step

    def watched(self, closure=None):
        lengths.append(torch.stack([p.grad.norm() for p in module.backbone.parameters()]).norm())
        return step(self, closure)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", watched)
        train(module, data=[(100 * images, *rest) for images, *rest in batches()])
    assert len(lengths) == 2 * STEPS
    assert max(lengths) == pytest.approx(1, abs=1e-4)


def test_every_strength_is_drawn():
    module, drawn = make(DOE, warmup=0), set()
    move = module.move
    module.move = lambda strength: drawn.add(strength) or move(strength)
    train(module, epochs=20)
    assert {abs(strength) for strength in drawn} == {1e-1, 1e-2, 1e-3, 1e-4}


def scheduled(kind, interval, epochs=2, **options):
    module = make(DOE, warmup=1, lr_scheduler=lambda optimizer: kind(optimizer, **options), lr_interval=interval)
    (group,) = train(module, epochs).optimizers[0].param_groups
    return group["lr"]


def test_schedules_step_once_an_epoch_or_once_an_iteration():
    kind = torch.optim.lr_scheduler.StepLR
    assert scheduled(kind, "epoch", step_size=1, gamma=0.5) == pytest.approx(0.1 * 0.5**2)
    assert scheduled(kind, "step", step_size=1, gamma=0.5) == pytest.approx(0.1 * 0.5 ** (2 * STEPS))


def test_a_schedule_that_waits_for_a_plateau_steps_once_an_epoch():
    never = {"monitor": "train/loss", "patience": 0, "threshold": 1e9, "threshold_mode": "abs", "factor": 0.5}
    assert scheduled(ReduceLROnPlateau, "epoch", epochs=3, **never) == pytest.approx(0.1 * 0.5**2)


@pytest.mark.parametrize(("interval", "length"), [("epoch", 2), ("step", 2 * STEPS)])
def test_a_schedule_for_another_length_is_noticed(interval, length, caplog):
    scheduled(torch.optim.lr_scheduler.CosineAnnealingLR, interval, T_max=length)
    assert "is made for" not in caplog.text
    scheduled(torch.optim.lr_scheduler.CosineAnnealingLR, interval, T_max=length + 1)
    assert f"is made for {length + 1}" in caplog.text
    with pytest.raises(ValueError, match=f"is made for {length - 1}"):
        scheduled(torch.optim.lr_scheduler.CosineAnnealingLR, interval, T_max=length - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"warmup": -1}, "warmup and strengths must be at least 0"),
        ({"strengths": []}, "there is at least one strength"),
        ({"strengths": [-0.1]}, "warmup and strengths must be at least 0"),
        ({"direction": "descent"}, "direction is official or ascent, not 'descent'"),
        ({"floor": -1.0}, "a floor is a loss of at least 0"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(DOE, **options)


def test_a_precision_that_loses_small_steps_is_refused():
    with pytest.raises(ValueError, match="choose 32-true, not bf16-true"):
        train(make(DOE), precision="bf16-true")
