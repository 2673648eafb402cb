"""One mixed pass, a floor on the ID images alone, and batches that hold only one kind."""

import pytest
import torch
from outlier_toy import KNOWN, Net, batches, make, train
from torch.nn import functional

from lightning_modules.losses.outlier_exposure import EnergyMargins, UniformTarget


def gradients(loss, module):
    return torch.autograd.grad(loss, list(module.backbone.parameters()))


def step(module, batch):
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module.train().training_step(batch, 0)


def by_hand(module, batch):
    """Return the cross-entropy of the ID rows and the loss of the outliers, of one pass of both."""
    images, labels, _ = batch
    logits = module.backbone(images)
    outliers = functional.cross_entropy(logits[KNOWN:], torch.full((len(labels) - KNOWN, 3), 1 / 3))
    return functional.cross_entropy(logits[:KNOWN], labels[:KNOWN]), 0.5 * outliers


@pytest.mark.parametrize(("floor", "sign"), [(0.0, 1), (0.2, 1), (50.0, -1)])
def test_the_floor_turns_the_gradient_of_the_id_images_alone(floor, sign):
    module, (batch, *_) = make(floor=floor).double(), batches()
    batch = (batch[0].double(), *batch[1:])
    known, outliers = by_hand(module.train(), batch)
    assert known > 0.2
    expected = [
        sign * of_known + of_outliers
        for of_known, of_outliers in zip(
            gradients(known, module), gradients(by_hand(module, batch)[1], module), strict=True
        )
    ]
    loss = step(module, batch)
    torch.testing.assert_close(loss, (known - floor).abs() + floor + outliers)
    for found, of_both in zip(gradients(loss, module), expected, strict=True):
        torch.testing.assert_close(found, of_both)


def test_id_images_and_outliers_pass_together(monkeypatch):
    module, (batch, *_) = make(), batches()
    passes, forward = [], Net.forward
    monkeypatch.setattr(Net, "forward", lambda self, images: passes.append(len(images)) or forward(self, images))
    step(module, batch)
    assert passes == [len(batch[0])]
    seen = module.backbone.conv1(batch[0]).mean((0, 2, 3))
    torch.testing.assert_close(module.backbone.layer1.running_mean, 0.1 * seen)


@pytest.mark.parametrize("loss", [UniformTarget(), EnergyMargins()])
@pytest.mark.parametrize("rows", [slice(0, KNOWN), slice(KNOWN, None), slice(0, 0)])
def test_a_share_of_one_kind_or_none_can_be_learned_from(loss, rows):
    module, (batch, *_) = make(outlier_loss=loss), batches()
    module.eval()  # batch-norm refuses an empty batch in training
    module.log = module.log_dict = lambda *args, **kwargs: None
    loss = module.training_step(tuple(part[rows] for part in batch), 0)
    assert loss.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients(loss, module))


def test_what_is_logged_shows_whether_the_loss_is_under_the_floor():
    trainer = train(make(floor=50.0, lr=0.0), log_every_n_steps=1)
    logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
    known, outliers = (loss.detach() for loss in by_hand(make().train(), batches()[-1]))
    assert logged["train/cross_entropy"] == pytest.approx(float(known), rel=1e-5)
    assert logged["train/outliers"] == pytest.approx(float(outliers), rel=1e-5)
    assert logged["train/loss"] == pytest.approx(100 - float(known) + float(outliers), rel=1e-5)


def test_a_run_goes_on_with_the_floor_it_began_with():
    began, resumed, checkpoint = make(floor=0.3), make(floor=0.0), {}
    began.on_save_checkpoint(checkpoint)
    resumed.on_load_checkpoint(checkpoint)
    assert resumed.floor == 0.3


def test_a_floor_below_0_is_refused():
    with pytest.raises(ValueError, match="a floor is a loss of at least 0"):
        make(floor=-0.1)
