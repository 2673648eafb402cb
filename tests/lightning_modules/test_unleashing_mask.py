"""UM and UMAP: what learns, what stays, where the loss ends, and who predicts."""

import mask_toy
import pytest
import torch
from mask_toy import draw, fit, make, state_of
from pytorch_lightning import Callback, Trainer
from torch.nn import functional

from lightning_modules.evidence import Evidence


@pytest.fixture(scope="module")
def network():
    return mask_toy.trained()


@pytest.fixture
def backbone(network):
    """A trained network of one's own, in the mode in which networks are made."""
    copy = mask_toy.Net()
    copy.load_state_dict(network.state_dict())
    return copy


class Losses(Callback):
    """What was logged in each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        names = ("cross_entropy", "scaled", "loss")
        self.steps.append({name: float(trainer.callback_metrics[f"train/{name}"]) for name in names})
        self.steps[-1]["returned"] = float(outputs["loss"])


def cosine(epochs):
    return lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)


# The loss


def test_three_losses_are_logged(backbone, network):
    losses = Losses()
    images, labels, _ = mask_toy.batches()[0]
    first = float(functional.cross_entropy(backbone(images), labels).detach())
    backbone.load_state_dict(network.state_dict())  # the statistics of before that pass
    fit(make(backbone, floor=0.3, beta=2.0), callbacks=[losses])
    assert losses.steps[0]["scaled"] == pytest.approx(2 * first, rel=1e-5)
    for step in losses.steps:
        assert step["scaled"] == pytest.approx(2 * step["cross_entropy"])
        assert step["loss"] == pytest.approx(abs(step["scaled"] - 0.3) + 0.3)
        assert step["returned"] == pytest.approx(step["loss"])
    assert losses.steps[0]["scaled"] < 0.3


def test_without_a_floor_plain_training_goes_on(backbone):
    expected = mask_toy.Net()
    expected.load_state_dict(backbone.state_dict())
    fit(make(backbone, floor=0.0, lr=0.1))
    optimizer = torch.optim.SGD(expected.train().parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    for images, labels, _ in mask_toy.batches():
        optimizer.zero_grad()
        functional.cross_entropy(expected(images), labels).backward()
        optimizer.step()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(backbone.state_dict()[name], value)


@pytest.mark.parametrize("keep", [None, 0.8])
def test_the_cross_entropy_ends_around_the_floor(backbone, keep):
    floor, epochs, losses = 0.15, 120, Losses()
    module = make(backbone, lr=0.1, floor=floor, keep=keep, lr_scheduler=cosine(epochs))
    fit(module, epochs, callbacks=[losses])
    steps = len(mask_toy.batches())
    course = torch.tensor([step["cross_entropy"] for step in losses.steps]).view(epochs, steps).mean(1)
    if keep is None:
        assert losses.steps[0]["cross_entropy"] < floor  # up from the converged network
    else:
        assert course[0] > floor  # down from a random mask
    last = course[-epochs // 10 :]
    assert ((last > 0.8 * floor) & (last < 1.2 * floor)).all(), last
    assert min(step["loss"] for step in losses.steps) >= floor


def test_with_plain_cross_entropy_the_loss_keeps_falling(backbone):
    losses = Losses()
    fit(make(backbone, floor=0.0), 30, callbacks=[losses])
    assert losses.steps[-1]["cross_entropy"] < 0.05


def test_what_is_forgotten_was_atypical():
    backbone, (images, labels, _) = mask_toy.converge(mask_toy.Net(), 100), draw()

    def margins():
        logits = backbone.eval()(images).detach()
        own = logits.gather(1, labels[:, None])
        return (own - logits.scatter(1, labels[:, None], -torch.inf).amax(1, keepdim=True)).squeeze(1)

    before = margins()
    fit(make(backbone.train(), lr=0.01, lr_scheduler=cosine(30)), 30)
    forgotten = (before > 0) & (margins() < 0)
    assert (before > 0).float().mean() > 0.99
    assert forgotten.sum() >= 5
    assert before[forgotten].mean() < 0.7 * before.mean()


def test_a_run_goes_on_with_the_floor_that_it_began_with(backbone, tmp_path):
    trainer = fit(make(backbone, floor=0.15), 1)
    trainer.save_checkpoint(tmp_path / "last.ckpt", weights_only=False)
    module = make(backbone, floor=0.3)  # an estimate that was made anew meanwhile
    options = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": False} | mask_toy.QUIET
    data = mask_toy.loader()
    Trainer(**options).fit(module, data, data, ckpt_path=tmp_path / "last.ckpt", weights_only=True)
    assert module.floor == 0.15


def test_a_checkpoint_of_another_method_has_no_floor(backbone):
    module = make(backbone, floor=0.3)
    module.on_load_checkpoint({})
    assert module.floor == 0.3


# UMAP


def test_only_scores_and_their_statistics_change(backbone):
    module = make(backbone, keep=0.8)
    before = state_of(module)
    trainer = fit(module, 4)
    after = state_of(module)
    changed = {name for name in before if not torch.equal(after[name], before[name])}
    assert changed == {name for name in before if name.startswith(("subnetwork.scores.", "subnetwork.statistics."))}
    (group,) = trainer.optimizers[0].param_groups
    assert {id(parameter) for parameter in group["params"]} == {id(p) for p in module.subnetwork.parameters()}


def test_the_whole_network_predicts_to_the_bit_as_before(backbone):
    images = draw()[0]
    before = backbone.eval()(images)
    module = make(backbone.train(), keep=0.8)
    fit(module, 4)
    module.eval()
    assert torch.equal(module.backbone(images), before)
    evidence = module.test_step((images, None, None), 0)
    assert torch.equal(evidence.predictions, before.argmax(1))
    assert not torch.equal(evidence.logits, before)
    extracted = module.backbone_of_logits
    torch.testing.assert_close(evidence.logits, extracted.eval()(images))
    torch.testing.assert_close(extracted.head(evidence.features["penultimate"]), evidence.logits)


def test_taps_are_those_of_the_subnetwork(backbone):
    module = make(backbone, keep=0.5).eval()
    module.taps = {"layer1"}
    evidence = module(draw()[0])
    _, expected = module.backbone_of_logits.eval().forward_intermediates(draw()[0], {"layer1", "penultimate"})
    assert evidence.features.keys() == expected.keys()
    for tap, features in expected.items():
        torch.testing.assert_close(evidence.features[tap], features)


def test_weights_learn_where_they_are_not_frozen_and_the_subnetwork_predicts(backbone):
    module = make(backbone, keep=0.8, freeze_weights=False)
    before = state_of(module)
    fit(module, 1)
    changed = {name for name, value in state_of(module).items() if not torch.equal(value, before[name])}
    statistics = {f"backbone.{name}" for name, _ in backbone.named_buffers()}
    assert changed == before.keys() - statistics
    module.eval()
    assert module.test_step((draw()[0], None, None), 0).predictions is None
    assert module.extra_forwards == 0


def test_validation_counts_both(backbone):
    class Watch(Callback):
        def on_validation_end(self, trainer, pl_module):
            self.logged = {name: float(value) for name, value in trainer.callback_metrics.items() if "val/" in name}

    watch, module = Watch(), make(backbone, keep=0.8)
    fit(module, 1, callbacks=[watch], limit_val_batches=1.0)
    images, labels, _ = draw()
    with torch.no_grad():
        module.eval()
        whole, masked = module.backbone(images), module(images).logits
    expected = {"val/accuracy": whole, "val/subnetwork_accuracy": masked}
    expected = {name: float((logits.argmax(1) == labels).float().mean()) for name, logits in expected.items()}
    assert watch.logged == pytest.approx(expected)
    assert expected["val/accuracy"] != expected["val/subnetwork_accuracy"]


def test_outliers_and_empty_shares_do_not_count_in_validation(backbone):
    images, labels, ids = draw()
    data = mask_toy.DataLoader([(images, labels.where(ids % 2 > 0, -1), ids), (images[:0], labels[:0], ids[:0])], None)
    module = make(backbone, keep=0.8)
    logged = Trainer(**mask_toy.QUIET).validate(module, data, verbose=False)[0]
    odd = [network.eval()(images[1::2]).argmax(1) for network in (module.backbone, module.backbone_of_logits)]
    expected = [float((predictions == labels[1::2]).float().mean()) for predictions in odd]
    assert [logged["val/accuracy"], logged["val/subnetwork_accuracy"]] == pytest.approx(expected)


def test_masks_differ_between_seeds(backbone):
    scores = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        scores.append(make(backbone, keep=0.8).subnetwork.scores["fc/weight"])
    assert torch.equal(scores[0], scores[1])
    assert not torch.equal(scores[0], scores[2])


# Refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 1.0}, "keep: 1.0 leaves nothing to learn"),
        ({"beta": float("nan")}, "beta weighs the cross-entropy and must be above 0, not nan"),
        ({"beta": 0.0}, "beta weighs the cross-entropy and must be above 0, not 0.0"),
        ({"freeze_weights": False}, "freeze_weights: false is about the weights of a subnetwork: it takes keep"),
        ({"keep": 0.0}, "keep is the share of the weights that stay"),
        ({"floor": -1.0}, "a floor is a loss of at least 0"),
        ({"floor": "auto"}, "floor: auto is read from a run"),
        ({"floor": 0.1, "estimate": "run:unleashing_mask/estimate_digits"}, "takes no estimate"),
    ],
)
def test_options_that_make_no_sense(backbone, options, message):
    with pytest.raises(ValueError, match=message):
        make(backbone, **options)


def test_outliers_are_refused(backbone):
    def with_outliers(images, labels, ids):
        return images, labels.where(ids % 5 > 0, -1), ids

    with pytest.raises(ValueError, match="the batch holds outliers, this method is trained without"):
        fit(make(backbone), data=mask_toy.loader(change=with_outliers))


def test_an_empty_batch_passes(backbone):
    for keep in (None, 0.8):
        evidence = make(backbone, keep=keep).eval()(torch.empty(0, *backbone.input_shape))
        assert isinstance(evidence, Evidence)
        assert evidence.logits.shape == (0, 3)
