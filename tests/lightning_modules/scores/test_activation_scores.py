import math

import numpy as np
import pytest
import torch
from torch import nn

from lightning_modules.evidence import Evidence
from lightning_modules.scores.activations import ASH, DICE, SCALE, ash, largest, scale
from lightning_modules.scores.react import ReAct

VARIANTS = {
    **{f"ash_{variant}": lambda variant=variant: ASH(variant) for variant in "pbs"},
    "scale": SCALE,
    "dice": DICE,
    "react": lambda: ReAct(quantile=None, threshold=1.0),
}


class Stub(nn.Module):
    def __init__(self, width=40, num_classes=5, bias=True):
        super().__init__()
        self.head = nn.Linear(width, num_classes, bias=bias)


def evidence(features, num_classes=5):
    return Evidence(torch.zeros(len(features), num_classes), {"penultimate": features}, {}, None)


def relu_features(n, width=40, dtype=torch.float64, seed=0):
    return torch.randn(n, width, dtype=dtype, generator=torch.Generator().manual_seed(seed)).relu()


def ready(score, network, features):
    score.to(features.dtype)
    score.bind(network)
    for rows in features.split(64) if score.passes else ():
        score.update(evidence(rows), torch.zeros(len(rows), dtype=torch.int64))
    if score.passes:
        score.finalize()
    return score


def reference_shape(row, kind, percentile):
    """One Python list in, the reshaped one out."""
    kept = len(row) - round(len(row) * percentile / 100)
    chosen = sorted(range(len(row)), key=lambda j: -row[j])[:kept]
    before, after = sum(row), sum(row[j] for j in chosen)
    factor = math.exp(before / after) if after else 1.0
    if kind == "scale":
        return [value * factor for value in row]
    survivor = {"p": lambda v: v, "b": lambda v: before / kept, "s": lambda v: v * factor}[kind]
    return [survivor(value) if j in chosen else 0.0 for j, value in enumerate(row)]


def reference_energies(rows, weight, bias):
    neurons = list(zip(weight, bias, strict=True))
    logits = [[b + sum(w * v for w, v in zip(ws, row, strict=True)) for ws, b in neurons] for row in rows]
    return torch.tensor([-max(a) - math.log(sum(math.exp(v - max(a)) for v in a)) for a in logits], dtype=torch.float64)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("percentile", [0, 65, 90])
@pytest.mark.parametrize("kind", ["p", "b", "s", "scale"])
def test_shaping_scores_equal_a_loop(kind, percentile, bias):
    network, queries = Stub(bias=bias).double().requires_grad_(False), relu_features(20, seed=1)
    queries[3] = 0
    score = SCALE(percentile) if kind == "scale" else ASH(kind, percentile)
    shaped = [reference_shape(row, kind, percentile) for row in queries.tolist()]
    offsets = network.head.bias.tolist() if bias else [0.0] * 5
    expected = reference_energies(shaped, network.head.weight.tolist(), offsets)
    actual = ready(score, network, queries)(evidence(queries))
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("width", "kept"), [(342, 120), (256, 90), (10, 4), (1024, 358)])
def test_number_of_survivors(width, kept):
    assert largest(relu_features(3, width), 65).sum(1).tolist() == [kept] * 3


def test_of_equal_activations_the_first_survive():
    features = torch.tensor([[1.0, 2.0, 1.0, 1.0, 0.0, 1.0], [5.0] * 6])
    assert largest(features, 50).nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]


def test_known_shapes():
    features = torch.tensor([[3.0, 1.0, 2.0, 0.0]], dtype=torch.float64)
    assert ash(features, 50, "p").tolist() == [[3, 0, 2, 0]]
    assert ash(features, 50, "b").tolist() == [[3, 0, 3, 0]]
    assert ash(features, 50, "s").tolist() == [pytest.approx([3 * math.exp(6 / 5), 0, 2 * math.exp(6 / 5), 0])]
    assert scale(features, 50).tolist() == [pytest.approx([v * math.exp(6 / 5) for v in (3, 1, 2, 0)])]
    assert features.tolist() == [[3, 1, 2, 0]]  # nothing is changed in place


@pytest.mark.parametrize("percentile", [5, 70, 90])
def test_dice_equals_numpy(percentile):
    network, features, queries = Stub().double().requires_grad_(False), relu_features(300), relu_features(20, seed=1)
    weight = network.head.weight.numpy()
    contribution = weight * features.numpy().mean(0)
    sparse = np.where(contribution > np.percentile(contribution, percentile), weight, 0)
    score = ready(DICE(percentile), network, features)
    assert score.mask.dtype == torch.bool
    assert score.mask.sum() == np.count_nonzero(sparse)
    assert 1 - score.mask.double().mean() == pytest.approx(percentile / 100, abs=0.01)
    expected = reference_energies(queries.tolist(), sparse.tolist(), network.head.bias.tolist())
    torch.testing.assert_close(score(evidence(queries)), expected, rtol=1e-10, atol=1e-12)


def test_dice_drops_what_equals_the_percentile():
    network = Stub(2, 2).double().requires_grad_(False)
    network.head.weight[:] = torch.tensor([[1, 2], [2, 3]])
    assert ready(DICE(50), network, torch.ones(4, 2).double()).mask.tolist() == [[False, False], [False, True]]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("rows", [torch.zeros(2, 40), torch.full((2, 40), 7.0), -torch.ones(2, 40)])
@pytest.mark.parametrize("num_classes", [1, 5])
def test_degenerate_features(name, rows, num_classes):
    network = Stub(num_classes=num_classes).requires_grad_(False)
    score = ready(VARIANTS[name](), network, relu_features(30, dtype=torch.float32))
    actual = score(evidence(rows))
    assert actual.isfinite().all()
    if not rows.any():
        torch.testing.assert_close(actual, -network.head.bias.logsumexp(0).expand(2))


@pytest.mark.parametrize("name", VARIANTS)
def test_half_precision_features(name):
    features, network = relu_features(50).bfloat16(), Stub().requires_grad_(False)
    score = ready(VARIANTS[name](), network, features.float())
    assert score(evidence(features)).dtype == torch.float32
    assert torch.equal(score(evidence(features)), score(evidence(features.float())))


@pytest.mark.parametrize("name", VARIANTS)
def test_the_head_is_a_copy(name):
    features, network = relu_features(30), Stub().double().requires_grad_(False)
    score = ready(VARIANTS[name](), network, features)
    before = score(evidence(features))
    network.head.weight.zero_()
    assert torch.equal(score(evidence(features)), before)


def test_mask_survives_a_change_of_precision():
    score = ready(DICE(), Stub().double(), relu_features(30))
    mask = score.mask.clone()
    assert torch.equal(score.float().mask, mask)


@pytest.mark.parametrize("name", VARIANTS)
def test_needs_a_classifier(name):
    with pytest.raises(ValueError, match="needs a method with a classifier, this one has none"):
        VARIANTS[name]().bind(None)


@pytest.mark.parametrize("name", ["ash_p", "scale", "react"])
def test_unbound(name):
    with pytest.raises(RuntimeError, match="holds no classifier yet: call bind first"):
        VARIANTS[name]()(evidence(torch.zeros(2, 40)))


def test_dice_on_only_empty_batches():
    score = DICE()
    score.bind(Stub())
    score.update(evidence(torch.zeros(0, 40)), torch.zeros(0, dtype=torch.int64))
    with pytest.raises(RuntimeError, match="only empty batches"):
        score.finalize()


@pytest.mark.parametrize("make", [ASH, SCALE, DICE])
@pytest.mark.parametrize("percentile", [-1, 100])
def test_percentile_out_of_range(make, percentile):
    with pytest.raises(ValueError, match=rf"must lie in \[0, 100\), not be {percentile}"):
        make(percentile=percentile)


def test_percentile_that_leaves_nothing():
    with pytest.raises(ValueError, match="percentile 99 leaves none of the 40 activations"):
        ready(SCALE(99), Stub(), torch.ones(2, 40))(evidence(torch.ones(2, 40)))


def test_unknown_variant():
    with pytest.raises(ValueError, match="knows the variants p, b and s, not 'x'"):
        ASH("x")
