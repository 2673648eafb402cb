import copy

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.evidence import Evidence
from lightning_modules.scores.odin import ODIN


class Net(nn.Module):
    """Batch norm, dropout and a linear map, with a forward that yields evidence and is counted."""

    def __init__(self, cut=False):
        super().__init__()
        self.norm, self.drop, self.fc, self.cut, self.calls = nn.BatchNorm2d(2), nn.Dropout(), nn.Linear(8, 3), cut, 0

    def forward(self, images):
        self.calls += 1
        features = self.drop(self.norm(images)).flatten(1)
        return Evidence(self.fc(features.detach() if self.cut else features), {}, {}, None)


def network():
    torch.manual_seed(0)
    return Net().eval()


def softmax(logits):
    exponents = np.exp(logits - logits.max(1, keepdims=True))
    return exponents / exponents.sum(1, keepdims=True)


@pytest.mark.parametrize(("temperature", "epsilon"), [(1.0, 0.1), (1000.0, 0.0014), (5.0, 0.0)])
def test_linear_model_with_analytic_gradient(temperature, epsilon):
    module, images = network().double(), torch.randn(40, 2, 2, 2, dtype=torch.float64)
    scale = 1 / np.sqrt(1 + module.norm.eps)  # batch norm at its initial statistics
    weight, bias = scale * module.fc.weight.detach().numpy(), module.fc.bias.detach().numpy()
    flat = images.flatten(1).numpy()
    probabilities = softmax((flat @ weight.T + bias) / temperature)
    gradient = (weight[probabilities.argmax(1)] - probabilities @ weight) / temperature
    moved = flat + epsilon * np.sign(gradient)
    expected = -softmax((moved @ weight.T + bias) / temperature).max(1)
    actual = ODIN(temperature, epsilon)(module, images)
    np.testing.assert_allclose(actual.numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_leaves_no_trace(context, frozen):
    module = network().requires_grad_(not frozen)
    module.fc.train()
    state, modes = copy.deepcopy(module.state_dict()), [part.training for part in module.modules()]
    with context():
        images = torch.randn(4, 2, 2, 2)
        before = images.clone()
        score = ODIN()(module, images)
    assert module.calls == ODIN.forwards == 2
    assert score.shape == (4,)
    assert not score.requires_grad
    assert torch.equal(images, before)
    assert not images.requires_grad
    assert [part.training for part in module.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad != frozen for parameter in module.parameters())
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())


def test_same_in_every_context():
    module, images = network(), torch.randn(4, 2, 2, 2)
    with torch.inference_mode():
        inference = ODIN()(module, images.clone())
    with torch.no_grad():
        assert torch.equal(ODIN()(module, images), inference)


def test_empty_batch():
    assert ODIN()(network(), torch.empty(0, 2, 2, 2)).shape == (0,)


def test_half_precision_logits_keep_their_order():
    module, images = network(), torch.randn(30, 2, 2, 2)
    with torch.autocast("cpu", torch.bfloat16):  # softmax at T = 1000 in bfloat16 has one or two values
        assert len(ODIN()(module, images).unique()) > 20


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_images_whose_precision_swallows_the_step_are_refused(dtype):
    with pytest.raises(ValueError, match=f"ODIN moves images by steps that {dtype} rounds away"):
        ODIN()(network().to(dtype), torch.randn(3, 2, 2, 2).to(dtype))


def test_higher_is_more_ood():
    module, directions = network(), network().fc.weight.detach().view(3, 2, 2, 2)
    assert ODIN()(module, 0.01 * directions).min() > ODIN()(module, 50 * directions).max()


def test_inference_tensors_are_refused_in_words():
    with torch.inference_mode():
        module = network()
        with pytest.raises(RuntimeError, match=r"made in torch\.inference_mode"):
            ODIN()(module, torch.randn(4, 2, 2, 2))


def test_cut_gradient_is_refused_in_words():
    with pytest.raises(RuntimeError, match="the module cuts it"):
        ODIN()(Net(cut=True).requires_grad_(False), torch.randn(4, 2, 2, 2))


def test_temperature_must_be_positive():
    with pytest.raises(ValueError, match="must be positive, not 0"):
        ODIN(temperature=0)
