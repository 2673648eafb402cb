"""A trained backbone joins later: who learns when, at which rate."""

import pytest
import torch
from latent_toy import make, state_of, train
from pytorch_lightning import Callback
from pytorch_lightning.cli import ReduceLROnPlateau

from lightning_modules.variational_metric import Finetune, Margin


class Watch(Callback):
    """Notes the rate of each step, how it differs from one without momentum, and the backbone at each epoch's end."""

    def __init__(self):
        self.rates, self.backbones, self.momenta = [], [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        (group,) = optimizer.param_groups
        self.rates.append(group["lr"])
        weight = pl_module.fc_mu.weight
        self.expected = (weight - group["lr"] * weight.grad).detach()

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.momenta.append(float((pl_module.fc_mu.weight.detach() - self.expected).abs().max()))

    def on_train_epoch_end(self, trainer, pl_module):
        self.backbones.append(state_of(pl_module.backbone))


def step_lr(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.1)


@pytest.mark.parametrize("batch_norm", [True, False])
def test_only_the_heads_learn_until_the_backbone_does(batch_norm):
    watch, module = Watch(), make(finetune=Finetune(2, 0.02, batch_norm), lr_scheduler=step_lr)
    first = state_of(module.backbone)
    train(module, 6, callbacks=[watch])
    assert watch.rates == pytest.approx(8 * [0.02] + 8 * [0.01] + 8 * [0.001])
    learned = [name for name, _ in module.backbone.named_parameters() if not name.startswith("fc.")]
    for epoch, state in enumerate(watch.backbones):
        for name in learned:
            assert torch.equal(state[name], first[name]) == (epoch < 2), (epoch, name)
        moves = not torch.equal(state["layer1.running_mean"], first["layer1.running_mean"])
        assert moves == (batch_norm or epoch >= 2)
        assert torch.equal(state["fc.weight"], first["fc.weight"])


def test_momenta_of_the_heads_are_not_carried_over():
    watch = Watch()
    train(make(finetune=Finetune(2, 0.02)), 3, callbacks=[watch])
    assert [step for step, momentum in enumerate(watch.momenta) if momentum < 1e-6] == [0, 8]


def plateau(optimizer):
    return ReduceLROnPlateau(optimizer, monitor="latent/margin", patience=0)  # which does not change


SCHEDULES = {  # schedule, interval, rates of the steps from where the backbone learns
    "by step": (step_lr, "step", [0.01, 0.01, 0.001, 0.001, 1e-4, 1e-4, 1e-5, 1e-5, 1e-6, 1e-6, 1e-7, 1e-7]),
    "growing": (
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.25, total_iters=2),
        "epoch",
        4 * [0.0025] + 4 * [0.00625] + 4 * [0.01],
    ),
    "plateau": (plateau, "epoch", 8 * [0.01] + 4 * [0.001]),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedules_begin_where_the_backbone_learns(name):
    schedule, interval, expected = SCHEDULES[name]
    watch = Watch()
    options = {"margin": Margin(first_epoch=99), "lr_scheduler": schedule, "lr_interval": interval}
    train(make(finetune=Finetune(2, 0.02), **options), 5, callbacks=[watch])
    assert watch.rates == pytest.approx(8 * [0.02] + expected)


@pytest.mark.parametrize("length", [2, 3, 4])
def test_a_schedule_is_made_for_the_epochs_in_which_it_steps(length):
    module = make(
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length),
        finetune=Finetune(unfreeze_epoch=2, lr=0.5),
    )
    if length == 2:
        with pytest.raises(ValueError, match="made for 2 epochs, and the run has 3 after the first 2 epochs"):
            train(module, 5)
    else:
        train(module, 5)


def test_without_finetuning_everything_learns_from_the_start():
    module = make(kl_epoch=0)
    first = state_of(module)
    train(module, 1)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, first[name]) == name.startswith("backbone.fc."), name
