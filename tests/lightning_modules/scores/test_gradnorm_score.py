import pytest
import torch
from torch import nn

from lightning_modules.evidence import Evidence
from lightning_modules.scores.gradnorm import GradNorm


def network(num_classes=6):
    torch.manual_seed(0)
    return nn.Linear(20, num_classes).double()


def evidence(head, features):
    return Evidence(head(features).detach(), {"penultimate": features}, {}, None)


@pytest.mark.parametrize("num_classes", [2, 6, 100])
@pytest.mark.parametrize("scale", [0.1, 10.0])
def test_equals_the_norm_of_the_gradient(num_classes, scale):
    head, features = network(num_classes), scale * torch.randn(15, 20, dtype=torch.float64)
    expected = []
    for row in features:
        uniform = torch.full((num_classes,), 1 / num_classes, dtype=torch.float64)
        divergence = nn.functional.kl_div(head(row).log_softmax(0), uniform, reduction="sum")
        expected.append(-torch.autograd.grad(divergence, head.weight)[0].abs().sum())
    actual = GradNorm()(evidence(head, features))
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-9, atol=1e-12)


def test_weak_features_score_higher():
    head, features = network(), torch.randn(15, 20, dtype=torch.float64)
    assert (GradNorm()(evidence(head, features / 10)) > GradNorm()(evidence(head, features))).all()


def test_nothing_known_is_the_highest_score():
    assert GradNorm()(evidence(network(), torch.zeros(2, 20).double())).tolist() == [0, 0]
    assert GradNorm()(Evidence(torch.zeros(2, 4), {"penultimate": torch.ones(2, 3)}, {}, None)).tolist() == [0, 0]
    assert GradNorm()(evidence(network(1), torch.ones(2, 20).double())).tolist() == [0, 0]


def test_half_precision_evidence():
    logits, features = torch.randn(15, 6).bfloat16(), torch.randn(15, 2048).bfloat16()
    actual = GradNorm()(Evidence(logits, {"penultimate": features}, {}, None))
    exact = GradNorm()(Evidence(logits.double(), {"penultimate": features.double()}, {}, None))
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), exact, rtol=1e-5, atol=0)


def test_needs_a_classifier():
    with pytest.raises(ValueError, match="needs a method with a classifier, this one has none"):
        GradNorm().bind(None)
