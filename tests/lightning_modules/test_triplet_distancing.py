"""The metric loss against a loop over triplets and against the library, and the schedule of its margin."""

from fractions import Fraction
from itertools import product

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance
from pytorch_metric_learning.reducers import AvgNonZeroReducer, ClassWeightedReducer, MeanReducer
from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_triplets_indices

from lightning_modules.losses.triplet_distancing import EuclideanDistance, TripletDistancingLoss, distancing_margin

BATCHES = {  # labels of (B,) embeddings
    "balanced": [0, 1, 2, 2, 0, 1, 1, 2, 0, 2, 1, 0],
    "two classes": [1, 0, 0, 1, 1, 0],
    "unequal": [0, 3, 0, 1, 0, 2, 1, 0, 1, 2, 0],
    "pair and the rest": [4, 4, 5, 6, 7],
}
NO_TRIPLETS = {"empty": [], "single": [3], "one class": [3, 3, 3], "all different": [0, 1, 2, 3]}


def draw(labels, width=4, spread=1.0, dtype=torch.float64):
    """Embeddings (B, L) round random centres of their classes."""
    generator = torch.Generator().manual_seed(len(labels))
    centres = torch.randn(100, width, generator=generator, dtype=torch.float64)
    noise = torch.randn(len(labels), width, generator=generator, dtype=torch.float64)
    labels = torch.tensor(labels, dtype=torch.long)
    return (spread * centres[labels] + noise).to(dtype), labels


def balanced(classes, samples):
    return torch.arange(classes).repeat_interleave(samples)[torch.randperm(classes * samples)].tolist()


def loop(embeddings, labels, margin, normalize=False):
    """The loss, what each hinge contributes, and the share of active triplets: triplet by triplet."""
    points = embeddings.detach().double().numpy()
    if normalize:
        points = points / np.linalg.norm(points, axis=1, keepdims=True)
    distances = [[float(np.linalg.norm(x - y)) for y in points] for x in points]
    classes, hinges = labels.tolist(), []
    for a, p, n in product(range(len(points)), repeat=3):
        if a != p and classes[a] == classes[p] and classes[a] != classes[n]:
            near, far = distances[a][p], distances[a][n]
            hinges.append((max(0, near - far + 0.1), max(0, margin - far)))
    active = [pair for pair in hinges if sum(pair) > 0]
    first, second = (sum(hinge) / len(active) for hinge in zip(*active, strict=True))
    return first + second, first, second, len(active) / len(hinges)


def assert_same(found, expected, tolerance):
    *parts, active = (float(value) for value in found)
    assert parts == pytest.approx(expected[:3], rel=tolerance, abs=tolerance)
    assert active == pytest.approx(expected[3], abs=1e-6)


def library(embeddings, labels, margin, distance, reducer):
    """The loss from the library's own indices of all triplets."""
    a, p, n = indices = get_all_triplets_indices(labels)
    distances = distance(embeddings)
    losses = (distances[a, p] - distances[a, n] + 0.1).relu() + (margin - distances[a, n]).relu()
    return reducer({"loss": {"losses": losses, "indices": indices, "reduction_type": "triplet"}}, embeddings, labels)


@pytest.mark.parametrize("margin", [0.15, 1.0, 3.0])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_loss_and_parts_are_those_of_a_loop_over_triplets(labels, normalize, margin):
    embeddings, labels = draw(labels)
    found = TripletDistancingLoss(EuclideanDistance(normalize))(embeddings, labels, margin)
    assert_same(found, loop(embeddings, labels, margin, normalize=normalize), 1e-9)


def test_only_active_triplets_count():
    embeddings, labels = torch.tensor([[0.0], [1.0], [2.0], [100.0]]), torch.tensor([0, 0, 1, 1])
    found = TripletDistancingLoss(triplet_margin=0.5)(embeddings, labels, 1.5)
    # three of eight: anchor 1 with negative 2, and anchor 2 with either negative
    assert_same(found, ((1.0 + 96.5 + 98.0) / 3, (0.5 + 96.5 + 97.5) / 3, (0.5 + 0 + 0.5) / 3, 3 / 8), 1e-6)


@pytest.mark.parametrize("scale", [0.1, 2.0, 6.0])
@pytest.mark.parametrize(("normalize", "tolerance"), [(True, 1e-5), (False, 1e-3)])
def test_loss_is_that_of_the_library(normalize, tolerance, scale):
    embeddings, labels = draw(balanced(10, 8), width=32, spread=scale, dtype=torch.float32)
    distance = LpDistance(normalize_embeddings=normalize)
    expected = library(embeddings, labels, 1.0 if normalize else 10.0, distance, AvgNonZeroReducer())
    found = TripletDistancingLoss(EuclideanDistance(normalize))(embeddings, labels, 1.0 if normalize else 10.0)
    assert float(found.loss) == pytest.approx(float(expected), rel=tolerance)


@pytest.mark.parametrize(
    "reducer", [AvgNonZeroReducer(), MeanReducer(), ClassWeightedReducer(torch.tensor([1.0, 5.0, 0.0, 2.0]))], ids=str
)
@pytest.mark.parametrize("name", ["balanced", "unequal"])
def test_distance_and_reducer_may_be_the_library_s(name, reducer):
    embeddings, labels = draw(BATCHES[name], dtype=torch.float32)
    distance = LpDistance(normalize_embeddings=False, p=1)
    found = TripletDistancingLoss(distance, reducer)(embeddings, labels, 3.0)
    assert float(found.loss) == pytest.approx(float(library(embeddings, labels, 3.0, distance, reducer)), rel=1e-5)
    assert float(found.triplet + found.distancing) == pytest.approx(float(found.loss), rel=1e-5)


def test_a_configuration_names_normalised_distances():
    parser = ArgumentParser()
    parser.add_subclass_arguments(TripletDistancingLoss, "loss")
    room = "lightning_modules.losses.triplet_distancing"
    for distance in (
        {"class_path": f"{room}.EuclideanDistance", "init_args": {"normalize_embeddings": True}},
        {"class_path": "pytorch_metric_learning.distances.LpDistance"},
    ):
        config = {"class_path": f"{room}.TripletDistancingLoss", "init_args": {"distance": distance}}
        loss = parser.instantiate_classes(parser.parse_object({"loss": config})).loss
        assert loss.distance.normalize_embeddings
    assert not TripletDistancingLoss().distance.normalize_embeddings


def test_distances_of_long_embeddings_are_exact():
    embeddings, _ = draw(balanced(10, 8), width=32, spread=60.0)
    embeddings = (embeddings / 10).float()  # norms of about 35, deviations of 0.1 within a class
    offsets = embeddings.double()[:, None] - embeddings.double()
    torch.testing.assert_close(EuclideanDistance()(embeddings), offsets.norm(dim=2).float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_gradients_are_those_of_finite_differences(labels, normalize):
    embeddings, labels = draw(labels)
    loss = TripletDistancingLoss(EuclideanDistance(normalize))
    margin = 1.0 if normalize else 3.0
    assert torch.autograd.gradcheck(lambda points: loss(points, labels, margin).loss, embeddings.requires_grad_())


@pytest.mark.parametrize("normalize", [False, True])
def test_gradients_are_finite_where_points_coincide(normalize):
    embeddings, labels = draw(BATCHES["balanced"])
    embeddings[4] = embeddings[2] = embeddings[0].clone()  # one of its own class, one of another
    embeddings.requires_grad_()
    TripletDistancingLoss(EuclideanDistance(normalize))(embeddings, labels, 3.0).loss.backward()
    assert embeddings.grad.isfinite().all()
    assert (embeddings.grad[0] != 0).any()


@pytest.mark.parametrize("labels", NO_TRIPLETS.values(), ids=NO_TRIPLETS)
def test_a_batch_without_triplets_gives_zero_with_a_live_graph(labels):
    embeddings, labels = draw(labels)
    embeddings.requires_grad_()
    found = TripletDistancingLoss()(embeddings, labels, 3.0)
    found.loss.backward()
    assert [float(value.detach()) for value in found] == [0, 0, 0, 0]
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


@pytest.mark.parametrize("reducer", [None, AvgNonZeroReducer()], ids=str)
def test_a_batch_without_active_triplets_gives_zero_with_a_live_graph(reducer):
    embeddings = torch.tensor([[0.0], [0.1], [9.0], [9.1]], requires_grad=True)
    found = TripletDistancingLoss(reducer=reducer)(embeddings, torch.tensor([0, 0, 1, 1]), 3.0)
    found.loss.backward()
    assert [float(value.detach()) for value in found] == [0, 0, 0, 0]
    assert torch.equal(embeddings.grad, torch.zeros_like(embeddings))


def step(embeddings, labels, margin, normalize):
    embeddings = embeddings.clone().requires_grad_()
    loss = TripletDistancingLoss(EuclideanDistance(normalize))(embeddings, labels, margin).loss
    loss.backward()
    return loss.detach(), embeddings.grad


def test_normalised_loss_ignores_scale_and_margins_that_are_out_of_reach():
    embeddings, labels = draw(balanced(5, 4), width=32)
    (small, gradient), (large, _) = (step(scale * embeddings, labels, 3.0, normalize=True) for scale in (1, 50))
    torch.testing.assert_close(small, large, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, step(embeddings, labels, 32.0, normalize=True)[1])


def test_raw_loss_heeds_scale_and_margin():
    embeddings, labels = draw(balanced(5, 4), width=32)
    apart = torch.cdist(embeddings, embeddings)[labels[:, None] != labels]
    assert apart.min() > 3
    assert apart.max() < 32
    (small, gradient), (large, _) = (step(scale * embeddings, labels, 3.0, normalize=False) for scale in (1, 50))
    assert abs(small - large) > 0.1
    assert (gradient - step(embeddings, labels, 32.0, normalize=False)[1]).abs().max() > 1e-3


def test_half_precision_is_widened_and_autocast_changes_nothing():
    embeddings, labels = draw(balanced(10, 8), width=32, dtype=torch.bfloat16)
    expected = loop(embeddings, labels, 8.0)
    for distance in (EuclideanDistance(), LpDistance(normalize_embeddings=False)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = TripletDistancingLoss(distance)(embeddings, labels, 8.0)
        assert found.loss.dtype == torch.float32
        assert_same(found, expected, 1e-4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_embeddings_that_are_not_finite_are_an_error(value):
    embeddings, labels = draw(BATCHES["balanced"])
    embeddings[3, 1] = embeddings[5, 0] = value
    with pytest.raises(ValueError, match="2 of 12 embeddings are not finite"):
        TripletDistancingLoss()(embeddings, labels, 3.0)


def test_a_similarity_is_no_distance():
    with pytest.raises(ValueError, match="CosineSimilarity grows with similarity"):
        TripletDistancingLoss(CosineSimilarity())


@pytest.mark.parametrize(
    ("first_epoch", "final", "values"),
    [
        (10, 32, {0: 0.15, 9: 0.15, 10: 1.15, 40: 31.15, 41: 32.15, 499: 32.15}),
        (30, 32, {29: 0.15, 30: 1.15, 60: 31.15, 61: 32.15}),
        (40, 64, {39: 0.15, 102: 63.15, 103: 64.15, 104: 64.15}),
    ],
)
def test_the_margin_is_that_of_the_published_settings(first_epoch, final, values):
    assert {e: distancing_margin(e, first_epoch, final) for e in values} == pytest.approx(values)


@pytest.mark.parametrize(
    ("first_epoch", "final", "jump"),
    [(0, "2.15", "1"), (3, "0.75", "0.1"), (1, "0.15", "0.3"), (2, "0.1", "0.02"), (2, "5.05", "0.7")],
)
def test_the_margin_is_that_of_additions_epoch_by_epoch(first_epoch, final, jump):
    margin = Fraction("0.15")
    for epoch in range(60):
        if epoch >= first_epoch and margin <= Fraction(final):
            margin += Fraction(jump)
        assert distancing_margin(epoch, first_epoch, float(final), float(jump)) == pytest.approx(float(margin))


def test_a_margin_that_does_not_grow_is_an_error():
    with pytest.raises(ValueError, match="jumps that must be positive, got 0"):
        distancing_margin(3, 1, 32, jump=0)
