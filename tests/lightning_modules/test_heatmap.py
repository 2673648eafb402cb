"""The heatmap method: what stays frozen, what is optimised, what is scored and logged, and what is refused."""

import hashlib

import pytest
import torch
from heatmap_toy import (
    CLASSES,
    QUIET,
    Pixels,
    Planted,
    Watched,
    adam,
    decode,
    digits_net,
    fit,
    liven,
    make,
    published,
    scaled,
    small_decoder,
)
from pytorch_lightning import Callback, Trainer

from lightning_modules.evidence import EvidenceBatch, TargetBatch


def hashes(network):
    """Hash every parameter and buffer."""
    named = [*network.named_parameters(), *network.named_buffers()]
    return {name: hashlib.sha256(value.detach().numpy().tobytes()).hexdigest() for name, value in named}


class Modes(Callback):
    """Looks at the modes where training and validation take place; somebody switches them all."""

    def __init__(self):
        self.seen = set()

    def look(self, module, training):
        assert {part.training for part in module.backbone.modules()} == {False}
        assert {part.training for part in module.decoder.modules()} == {training}
        self.seen.add(training)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.train()
        self.look(pl_module, True)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.look(pl_module, True)

    def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        self.look(pl_module, False)

    def on_train_epoch_end(self, trainer, pl_module):  # after validation
        self.look(pl_module, True)


class Step(Watched):
    def training_step(self, batch, batch_idx):
        assert {part.training for part in self.backbone.modules()} == {False}
        assert {part.training for part in self.decoder.modules()} == {True}
        return super().training_step(batch, batch_idx)


@pytest.mark.parametrize("layers", [1, 3])
def test_nothing_of_the_classifier_changes_and_all_of_the_decoder_does(tmp_path, layers):
    network, modes = digits_net().train(), Modes()
    before = hashes(network)
    assert "layer2.1.num_batches_tracked" in before
    module = Step(network, small_decoder(widths=(64, 32)), adam, fw_layers=layers)
    fresh = {name: value.clone() for name, value in module.decoder.state_dict().items()}
    fit(tmp_path, module, Planted(val_split=0.2), callbacks=[modes], epochs=2, num_sanity_val_steps=2)
    assert hashes(network) == before
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in network.parameters())
    assert modes.seen == {True, False}
    assert not any(part.training for part in module.train().backbone.modules())
    assert all(not torch.equal(value, fresh[name]) for name, value in module.decoder.state_dict().items())


def test_the_optimiser_has_the_parameters_of_the_decoder_and_the_published_numbers(tmp_path):
    rates = set()

    class Rates(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            rates.add(trainer.optimizers[0].param_groups[0]["lr"])

    module, data, _ = fit(tmp_path, make(digits_net()), callbacks=[Rates()], epochs=3)
    ((optimizer,), (group,)) = data.trainer.optimizers, data.trainer.optimizers[0].param_groups
    assert type(optimizer) is torch.optim.Adam
    assert {id(parameter) for parameter in group["params"]} == {id(p) for p in module.decoder.parameters()}
    assert len(group["params"]) == len(list(module.decoder.parameters())) == 9
    assert (group["lr"], group["betas"], group["weight_decay"], group["amsgrad"]) == (2e-4, (0.5, 0.999), 0, False)
    assert data.trainer.lr_scheduler_configs == []
    assert rates == {2e-4}


# A training step


def alone(module):
    """Keep the log of a module without trainer."""
    module.logged = {}
    module.log = lambda name, value, **kwargs: module.logged.update({name: value})
    return module


def batch_of(module, number=12, floats=False):
    generator = torch.Generator().manual_seed(5)
    images, targets = torch.randint(0, 256, (2, number, 1, 8, 8), dtype=torch.uint8, generator=generator)
    if floats:
        images, targets = images / 255, targets / 255
    inputs, labels, ids = torch.randn(number, 1, 8, 8, generator=generator), torch.arange(number), torch.arange(number)
    with torch.no_grad():
        evidence = module.encode(inputs)
    return TargetBatch(EvidenceBatch(evidence, labels, ids), (inputs, labels, ids), images, targets)


def rows_of(batch, rows):
    evidence, *rest = batch.seen
    features = {name: values[rows] for name, values in evidence.features.items()}
    evidence = evidence._replace(logits=evidence.logits[rows], features=features)
    seen = EvidenceBatch(evidence, *(part[rows] for part in rest))
    return TargetBatch(seen, tuple(part[rows] for part in batch.inputs), batch.images[rows], batch.targets[rows])


@pytest.mark.parametrize("norm", ["minmax", "none"])
@pytest.mark.parametrize("floats", [False, True])
def test_the_loss_is_of_image_plus_heatmap_whatever_the_network_reads(norm, floats):
    module = scaled(alone(make(feature_norm=norm)))
    batch, state = batch_of(module, floats=floats), published(module.decoder)
    evidence = batch.seen.evidence
    features = evidence.features["penultimate"] if norm == "none" else (evidence.features["penultimate"] + 0.5) / 2.5
    classes = evidence.logits.max(1).indices
    assert len(classes.unique()) > 1
    assert (classes != batch.seen.labels).any()
    heatmaps = decode(state, features, classes, CLASSES, training=True)
    white = 1 if floats else 255
    images, targets = (2 * (part.double() / white) - 1 for part in (batch.images, batch.targets))
    expected = ((1 + 5 * targets.abs()) * (images + heatmaps - targets) ** 2).sum() / len(images)
    for inputs in (batch.inputs[0], 3 * batch.inputs[0] + 1):
        loss = module.train().training_step(batch._replace(inputs=(inputs, *batch.inputs[1:])), 0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-4)
        assert module.logged == {"train/loss": loss}


@pytest.mark.parametrize("layers", [1, 2])
def test_the_loss_has_gradients_for_the_decoder_alone(layers):
    module = scaled(alone(make(digits_net(), small_decoder(widths=(64, 64)), fw_layers=layers)))
    assert all(parameter.requires_grad for parameter in module.backbone.parameters())  # nobody has frozen it yet
    batch = batch_of(module, floats=True)
    images = batch.inputs[0].requires_grad_()
    Watched.training_step(module.train(), batch, 0).backward()
    assert all(parameter.grad is None for parameter in module.backbone.parameters())
    assert images.grad is None
    assert all(parameter.grad.abs().sum() > 0 for parameter in module.decoder.parameters())


def test_the_loss_does_not_depend_on_the_order_of_the_batch_and_averages_over_it():
    module = scaled(alone(make())).train()
    batch = batch_of(module)
    loss = module.training_step(batch, 0)
    torch.testing.assert_close(module.training_step(rows_of(batch, torch.randperm(12)), 0), loss, rtol=1e-5, atol=0)
    twice = module.training_step(rows_of(batch, torch.arange(12).repeat(2)), 0)
    torch.testing.assert_close(twice, loss, rtol=1e-5, atol=0)


def test_the_loss_falls(tmp_path):
    module, _, _ = fit(tmp_path, make(optimizer=lambda parameters: torch.optim.Adam(parameters, 0.01)), epochs=15)
    assert len(module.losses) == 15 * 9
    first, last = (torch.tensor(losses).mean() for losses in (module.losses[:9], module.losses[-9:]))
    assert last < 0.8 * first


@pytest.mark.parametrize("layers", [1, 3])
def test_mixed_precision_trains(tmp_path, layers):
    module = Watched(digits_net(), small_decoder(widths=(64, 32)), adam, fw_layers=layers)
    fit(tmp_path, module, Planted(val_split=0.2), precision="bf16-mixed", epochs=2)
    assert all(torch.tensor(loss).isfinite() for loss in module.losses)
    assert {parameter.dtype for parameter in module.decoder.parameters()} == {torch.float32}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        evidence = module.eval()(torch.randn(3, 1, 8, 8))
    assert evidence.maps.dtype == evidence.scores["heatmap"].dtype == torch.float32


def test_images_without_targets_are_refused():
    trainer = Trainer(max_epochs=1, enable_checkpointing=False, num_sanity_val_steps=0, **QUIET)
    with pytest.raises(
        ValueError, match=r"trains on pairs of images: add callbacks\.frozen_.* callbacks\.pairing\.Pai"
    ):
        trainer.fit(make(feature_norm="none"), Planted())


# Scores


@pytest.fixture(params=["minmax", "none"])
def module(request):
    return scaled(make(decoder=liven(small_decoder()), feature_norm=request.param)).eval()


@torch.no_grad()
def scores(module, images):
    return module(images).scores["heatmap"]


@pytest.mark.parametrize("size", [1, 7, 200])
def test_the_score_of_an_image_does_not_depend_on_the_others(module, size):
    """Where the first row of a batch is scaled unlike the others, it does."""
    images = torch.randn(200, 1, 8, 8)
    everything = scores(module, images)
    assert everything.std() > 0.01
    torch.testing.assert_close(
        torch.cat([scores(module, some) for some in images.split(size)]), everything, atol=1e-5, rtol=0
    )
    image = images[11:12]
    for batch, place in ((image, 0), (torch.cat([image, images]), 0), (torch.cat([images, image]), 200)):
        torch.testing.assert_close(scores(module, batch)[place], everything[11], atol=1e-5, rtol=0)


def test_heatmaps_are_of_the_scaled_features_and_the_predicted_class(module):
    images = torch.randn(30, 1, 8, 8)
    with torch.no_grad():
        evidence = module(images)
    features = images.flatten(1)
    logits = features[:, :CLASSES]
    assert len(logits.argmax(1).unique()) == CLASSES
    if module.minmax is not None:
        features = (features + 0.5) / 2.5
    expected = decode(published(module.decoder), features, logits.argmax(1), CLASSES)
    torch.testing.assert_close(evidence.maps, expected)
    torch.testing.assert_close(evidence.logits, logits)
    torch.testing.assert_close(evidence.scores["heatmap"], expected.abs().max(1).values.mean((1, 2)))
    assert evidence.scores.keys() == {"heatmap"}
    assert module(images[:0]).scores["heatmap"].shape == (0,)


def test_what_a_checkpoint_holds_scores_the_same(module):
    images = torch.randn(9, 1, 8, 8)
    options = {"feature_norm": "none" if module.minmax is None else "minmax"}
    loaded = make(**options).eval()
    loaded.load_state_dict(module.state_dict())
    assert torch.equal(scores(loaded, images), scores(module, images))
    assert torch.equal(scores(module, images), scores(module, images))


def test_before_it_is_fitted_the_evidence_has_no_scores():
    evidence = make(digits_net()).eval()(torch.randn(3, 1, 8, 8))
    assert (evidence.scores, evidence.maps) == ({}, None)
    assert evidence.features["penultimate"].shape == (3, 64)


def test_features_are_scaled_by_those_of_the_id_training_images(tmp_path):
    module, data, _ = fit(tmp_path, make(digits_net()), Planted(val_split=0.2))
    data.trainer = None
    images = data.on_after_batch_transfer(data.sets["train"][torch.arange(data.sizes["train"])], 0).images
    with torch.no_grad():
        features = module.backbone.forward_features(images).mean((2, 3))
    assert module.minmax.low == 0
    torch.testing.assert_close(module.minmax.high, features.max())
    module, _, _ = fit(tmp_path, make(Pixels()))  # signed
    assert (module.minmax.low, module.minmax.high) == (-1, 1)


def test_features_that_are_all_0_are_refused(tmp_path):
    network = digits_net()
    torch.nn.init.constant_(network.layer3[1].bias, -100)
    with pytest.raises(
        ValueError, match="features penultimate of all ID training images are 0: is the network trained"
    ):
        fit(tmp_path, make(network))


# Validation


def test_validation_logs_the_mean_score_of_id_images_and_that_of_the_others_apart(tmp_path):
    data = Planted(val_split=0.2, val_ood="far", eval_batch_size=7)
    module, _, _ = fit(tmp_path, make(decoder=liven(small_decoder())), data, epochs=2)
    logged = {name: value.item() for name, value in data.trainer.callback_metrics.items() if name.startswith("val/")}
    data.trainer = None
    expected = {}
    for key, name in (("val/heatmap", "calibration"), ("val/heatmap_ood", "far")):
        images = data.on_after_batch_transfer(data.sets[name][torch.arange(data.sizes[name])], 0).images
        expected[key] = scores(module.eval(), images).mean().item()
    assert logged == pytest.approx(expected, rel=1e-5)
    assert abs(logged["val/heatmap"] - logged["val/heatmap_ood"]) > 1e-3


def test_validation_without_ood_images_logs_id_images_alone(tmp_path):
    _, data, _ = fit(tmp_path, data=Planted(val_split=0.2), epochs=2)
    assert {name for name in data.trainer.callback_metrics if name.startswith("val/")} == {"val/heatmap"}
