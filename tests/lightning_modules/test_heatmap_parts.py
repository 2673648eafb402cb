"""The parts of the heatmap method by themselves: loss, score, and the scaling of features."""

import os

import forked
import pytest
import torch
import torch.distributed as dist

from lightning_modules.evidence import Evidence
from lightning_modules.heatmap import MinMax, black_to_white, heatmap_score
from lightning_modules.losses.target_image import target_image_loss

# The loss


def loss_by_hand(reconstructions, targets):
    """Add up pixel by pixel."""
    total = 0.0
    for reconstruction, target in zip(reconstructions.tolist(), targets.tolist(), strict=True):
        for channel, wanted in zip(reconstruction, target, strict=True):
            for row, wanted_row in zip(channel, wanted, strict=True):
                total += sum((1 + 5 * abs(p)) * (r - p) ** 2 for r, p in zip(row, wanted_row, strict=True))
    return total / len(targets)


def images(number, side=5, seed=0):
    return 2 * torch.rand(number, 3, side, side, generator=torch.Generator().manual_seed(seed)).double() - 1


@pytest.mark.parametrize("number", [1, 4])
def test_the_loss_is_a_weighted_sum_over_an_image_and_a_mean_over_images(number):
    reconstructions, targets = 2 * images(number), images(number, seed=1)
    expected = loss_by_hand(reconstructions, targets)
    assert float(target_image_loss(reconstructions, targets)) == pytest.approx(expected, rel=1e-12)
    twice = target_image_loss(reconstructions.repeat(2, 1, 1, 1), targets.repeat(2, 1, 1, 1))
    assert float(twice) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("image", "heatmap", "target", "expected"), [(0.5, 0.0, -0.5, 10_752), (0.0, 0.1, 0.0, 30.72), (1, -1, -1, 18_432)]
)
def test_the_loss_of_constant_images(image, heatmap, target, expected):
    image, heatmap, target = (torch.full((7, 3, 32, 32), float(value)) for value in (image, heatmap, target))
    assert float(target_image_loss(image + heatmap, target)) == pytest.approx(expected, rel=1e-5)


def test_there_is_no_loss_where_the_heatmap_is_the_difference_to_the_target():
    image, target = images(4), images(4, seed=1)
    assert target_image_loss(image + torch.zeros_like(image), image) == 0
    difference = (target - image).clamp(-0.99, 0.99)
    reached = image + difference
    assert target_image_loss(reached, reached) == 0
    assert float(target_image_loss(image + difference, image + difference.clone())) == 0
    assert target_image_loss(image, target) > 1


def test_the_loss_does_not_depend_on_the_order_of_the_batch():
    reconstructions, targets, order = images(6), images(6, seed=1), torch.randperm(6)
    shuffled = target_image_loss(reconstructions[order], targets[order])
    torch.testing.assert_close(shuffled, target_image_loss(reconstructions, targets))


def test_the_gradient_is_that_of_the_weighted_squares():
    heatmaps, targets = images(2).requires_grad_(), images(2, seed=1)
    (gradient,) = torch.autograd.grad(target_image_loss(heatmaps, targets), heatmaps)
    torch.testing.assert_close(gradient, (1 + 5 * targets.abs()) * (heatmaps - targets))  # 2 / B is 1


def test_pixels_go_from_minus_1_for_black_to_1_for_white():
    bytes_ = torch.arange(256, dtype=torch.uint8)
    pixels = black_to_white(bytes_)
    assert (pixels[0], pixels[255]) == (-1, 1)
    torch.testing.assert_close(pixels, torch.linspace(-1, 1, 256))
    torch.testing.assert_close(black_to_white(bytes_ / 255), pixels)


# The score


def test_the_score_is_the_mean_of_the_largest_absolute_values():
    heatmaps = images(5)
    expected = [
        sum(max(abs(float(heatmap[c, i, j])) for c in range(3)) for i in range(5) for j in range(5)) / 25
        for heatmap in heatmaps
    ]
    assert heatmap_score(heatmaps).tolist() == pytest.approx(expected, rel=1e-12)
    one_channel = heatmap_score(heatmaps[:, :1])
    torch.testing.assert_close(one_channel, heatmaps[:, 0].abs().flatten(1).mean(1))


def test_scores_worked_out_by_hand():
    assert heatmap_score(torch.zeros(2, 3, 8, 8)).tolist() == [0, 0]
    constant = torch.tensor([0.2, -0.7, 0.1]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    assert heatmap_score(constant).tolist() == pytest.approx([0.7])
    assert heatmap_score(torch.zeros(0, 3, 8, 8)).shape == (0,)


def test_neither_sign_nor_order_of_channels_counts_and_scores_lie_in_0_to_1():
    heatmaps = torch.randn(50, 3, 6, 6).mul(3).tanh()
    scores = heatmap_score(heatmaps)
    assert torch.equal(heatmap_score(-heatmaps), scores)
    for order in ([1, 2, 0], [2, 1, 0]):
        assert torch.equal(heatmap_score(heatmaps[:, order]), scores)
    assert ((scores > 0) & (scores <= 1)).all()
    assert heatmap_score(torch.ones(1, 3, 6, 6)).tolist() == [1]


# The scaling of features


def seen(features):
    return Evidence(torch.zeros(len(features), 2), {"penultimate": features}, {}, None)


def fitted(*batches):
    minmax = MinMax("penultimate")
    for features in batches:
        minmax.update(seen(features), torch.zeros(len(features), dtype=torch.int64))
    minmax.finalize()
    return minmax


RANGES = {  # features; m, M
    "positive": ([[0.5, 2.0], [3.0, 1.0]], 0.0, 3.0),
    "both signs": ([[-0.5, 2.0], [3.0, -4.0]], -4.0, 3.0),
    "negative": ([[-0.5, -2.0], [-1.0, -1.0]], -2.0, 0.0),
    "largest first": ([[9.0, 2.0], [3.0, 1.0], [8.0, 0.0]], 0.0, 9.0),
}


@pytest.mark.parametrize("case", RANGES)
def test_features_are_scaled_from_their_smallest_or_0_to_their_largest_or_0(case):
    rows, low, high = RANGES[case]
    features = torch.tensor(rows)
    for minmax in (fitted(features), fitted(*features.split(1)), fitted(features[:0], features.flip(0))):
        assert (minmax.low, minmax.high) == (low, high)
        scaled = minmax(features)
        torch.testing.assert_close(scaled, (features - low) / (high - low))
        assert scaled.min() >= 0
        assert scaled.max() <= 1


def test_every_row_is_scaled_alike_whatever_its_shape():
    minmax = fitted(torch.tensor([[-1.0, 3.0]]))
    values = torch.randn(5, 4, 2, 2)
    torch.testing.assert_close(minmax(values), (values + 1) / 4)
    for row in range(5):
        assert torch.equal(minmax(values[row : row + 1])[0], minmax(values)[row])


def test_what_was_fitted_is_saved_and_loaded():
    minmax, loaded = fitted(torch.tensor([[-1.5, 3.25]])), MinMax("penultimate")
    assert set(minmax.state_dict()) == {"low", "high", "finished"}
    with pytest.raises(RuntimeError, match="MinMax is not fitted"):
        loaded(torch.ones(1))
    loaded.load_state_dict(minmax.state_dict())
    assert (loaded.low, loaded.high, loaded.fitted) == (-1.5, 3.25, True)


def test_features_that_are_all_0_are_refused():
    with pytest.raises(ValueError, match="features penultimate of all ID training images are 0: is the network train"):
        fitted(torch.zeros(4, 3))


def test_half_precision_is_widened():
    minmax = fitted(torch.tensor([[0.0, 2.0]], dtype=torch.bfloat16))
    assert minmax.high.dtype == torch.float32


def values():
    return torch.randn(7, 4, generator=torch.Generator().manual_seed(2))


def fit_a_share(folder):
    rank = int(os.environ["LOCAL_RANK"])
    dist.init_process_group("gloo", rank=rank, world_size=2)
    share = values()[:0] if rank else values()
    others = fitted(values()[rank::2])
    torch.save([part.state_dict() for part in (others, fitted(share))], folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_take_the_extremes_of_both(tmp_path):
    codes = forked.run(fit_a_share, tmp_path, processes=2, log=tmp_path / "log")
    assert codes == [0, 0], (tmp_path / "log").read_text()[-3000:]
    low, high = values().min(), values().max()
    extremes = [(share.min(), share.max()) for share in (values()[::2], values()[1::2])]
    assert extremes[0] != extremes[1]
    for rank in (0, 1):
        for state in torch.load(tmp_path / f"{rank}.pt", weights_only=True):
            assert (state["low"], state["high"], state["finished"]) == (low, high, 1)
