import pytest
import torch
from pytorch_lightning import Trainer
from torch import nn
from torch.utils.data import DataLoader

from backbones.digits_net import DigitsNet
from lightning_modules.classifier import Classifier
from lightning_modules.losses.cross_entropy import cross_entropy
from lightning_modules.ood_module import OODModule


def classifier(cls=Classifier, **kwargs):
    torch.manual_seed(0)
    return cls(DigitsNet(num_classes=3), optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1), **kwargs)


class FrozenStage(Classifier):
    frozen = ("backbone",)


def batch(size=8):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(size, 1, 8, 8, generator=generator)
    return images, torch.arange(size) % 3, torch.arange(size)


def test_cross_entropy_leaves_outliers_out():
    logits, labels = torch.randn(4, 3), torch.tensor([0, -1, 2, -1])
    expected = -(logits[0].log_softmax(0)[0] + logits[2].log_softmax(0)[2]) / 2
    torch.testing.assert_close(cross_entropy(logits, labels), expected)


@pytest.mark.parametrize("labels", [[], [-1, -1]])
def test_cross_entropy_without_a_known_row_is_zero_with_a_graph(labels):
    logits = torch.randn(len(labels), 3, requires_grad=True)
    loss = cross_entropy(logits, torch.tensor(labels, dtype=torch.int64))
    loss.backward()
    assert loss == 0
    assert logits.grad.abs().sum() == 0


def test_forward_is_one_pass_and_returns_the_requested_taps(monkeypatch):
    module = classifier().eval()
    calls = []
    stem = DigitsNet.stem
    monkeypatch.setattr(DigitsNet, "stem", lambda self, images: calls.append(1) or stem(self, images))
    module.taps = {"std", *module.backbone.stages}
    evidence = module(batch()[0])
    assert len(calls) == 1
    assert set(evidence.features) == {"penultimate", "std", *module.backbone.stages}
    torch.testing.assert_close(evidence.logits, module.backbone.head(evidence.features["penultimate"]))
    assert evidence.scores == {}
    assert evidence.maps is None


def test_an_empty_share_of_a_batch_passes_through():
    module = classifier().eval()
    evidence = module(torch.empty(0, 1, 8, 8))
    assert evidence.logits.shape == (0, 3)
    module.log = lambda *args, **kwargs: None
    module.validation_step((torch.empty(0, 1, 8, 8), torch.empty(0, dtype=torch.int64), None), 0)


def test_training_on_one_batch_lowers_its_loss():
    module = classifier().train()
    module.log = lambda *args, **kwargs: None
    optimizer = module.configure_optimizers()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = module.training_step(batch(), 0)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_what_is_frozen_stays_in_eval_mode_without_gradients_and_out_of_the_optimiser():
    module = classifier(FrozenStage)
    module.extra = nn.Linear(2, 2)
    module.configure_model()
    module.train()
    assert not any(part.training for part in module.backbone.modules())
    assert module.extra.training
    (group,) = module.configure_optimizers().param_groups
    assert {id(parameter) for parameter in group["params"]} == {
        id(parameter) for parameter in module.extra.parameters()
    }


def test_the_schedule_steps_at_the_asked_interval():
    module = classifier(
        lr_scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1), lr_interval="step"
    )
    configured = module.configure_optimizers()["lr_scheduler"]
    assert configured["interval"] == "step"
    assert isinstance(configured["scheduler"], torch.optim.lr_scheduler.StepLR)


def test_the_contract_is_abstract():
    with pytest.raises(TypeError, match="abstract"):
        classifier(OODModule)


@pytest.mark.filterwarnings(
    "ignore:You defined a `validation_step`", "ignore:The .train_dataloader. does not have many workers"
)
def test_what_is_frozen_does_not_change_in_training_not_even_its_statistics():
    class Probe(FrozenStage):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.scale = nn.Parameter(torch.ones(()))

        def training_step(self, batch, batch_idx):
            return (self(batch[0]).logits * self.scale).square().mean()

    module = classifier(Probe)
    before = {name: value.clone() for name, value in module.backbone.state_dict().items()}
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    Trainer(max_epochs=1, enable_model_summary=False, **options).fit(
        module, DataLoader([batch(), batch()], batch_size=None)
    )
    assert module.scale != 1
    assert all(torch.equal(value, before[name]) for name, value in module.backbone.state_dict().items())
