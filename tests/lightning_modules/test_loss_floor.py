"""The floor of a loss: values, gradients, and where the number comes from."""

import json

import pytest
import torch
from torch import nn
from torch.nn import functional

from backbones import weights
from backbones.digits_net import DigitsNet
from lightning_modules.losses.loss_floor import loss_floor, resolve_floor


@pytest.mark.parametrize(("loss", "value", "slope"), [(0.10, 0.20, -1), (0.50, 0.50, 1), (0.15, 0.15, 0)])
def test_below_the_floor_the_loss_is_reflected(loss, value, slope):
    loss = torch.tensor(loss, dtype=torch.float64, requires_grad=True)
    floored = loss_floor(loss, 0.15)
    assert float(floored.detach()) == pytest.approx(value, abs=1e-12)
    assert torch.autograd.grad(floored, loss)[0] == slope


def test_no_loss_is_below_the_floor():
    losses = 3 * torch.rand(1000)
    assert (loss_floor(losses, 1.0) >= 1.0).all()


def test_a_floor_of_0_leaves_a_loss_as_it_is_to_the_bit():
    losses = torch.rand(1000)
    assert torch.equal(loss_floor(losses, 0.0), losses)


@pytest.mark.parametrize("beta", [1.0, 2.0])
@pytest.mark.parametrize("above", [False, True])
def test_gradients_are_those_of_the_cross_entropy_with_a_sign(above, beta):
    network, images, labels = nn.Linear(5, 3), torch.randn(8, 5), torch.arange(8) % 3
    cross_entropy = functional.cross_entropy(network(images), labels)
    floor = (
        beta * float(cross_entropy.detach()) * (0.99 if above else 1.01)
    )  # so the loss crosses at cross-entropy floor / beta
    expected = torch.autograd.grad(cross_entropy, network.parameters(), retain_graph=True)
    found = torch.autograd.grad(loss_floor(beta * cross_entropy, floor), network.parameters())
    for gradient, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(gradient, plain * (beta if above else -beta))


def test_the_floor_of_a_mean_is_not_the_mean_of_floors():
    losses = torch.tensor([8.0, *[0.0] * 7])
    assert loss_floor(losses.mean(), 0.5) == 1.0
    assert loss_floor(losses, 0.5).mean() == (8.0 + 7 * 1.0) / 8


def test_a_share_of_a_batch_follows_the_mean_of_the_whole():
    share = torch.tensor(0.3, requires_grad=True)
    floored = loss_floor(share, 0.5, level=torch.tensor(0.7))
    assert floored == share
    assert torch.autograd.grad(floored, share)[0] == 1


# Where the number comes from


@pytest.fixture
def estimated(tmp_path, monkeypatch):
    """A trained network, and a run that estimated the loss of these weights."""
    monkeypatch.setattr(weights, "CHECKPOINTS", tmp_path)
    torch.save(DigitsNet(num_classes=3).state_dict(), tmp_path / "net.pt")
    network = DigitsNet(num_classes=3, weights=str(tmp_path / "net.pt"))
    folder = tmp_path / "unleashing_mask" / "estimate_digits" / "seed0"
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"status": "finished"}')
    content = {"floor": 0.25, "whole": {"loss": 0.1}, "weights": network.origin}
    (folder / "estimate.json").write_text(json.dumps(content))
    return network, folder


SOURCE = "run:unleashing_mask/estimate_digits"


def test_auto_reads_the_estimate_of_the_very_weights(estimated):
    network, _ = estimated
    assert resolve_floor("auto", SOURCE, network) == 0.25
    assert resolve_floor("auto", f"{SOURCE}/seed0", network, beta=2.0) == 0.5


def test_without_an_estimate_auto_names_the_target_that_makes_it(estimated):
    network, folder = estimated
    (folder / "run.json").unlink()
    (folder / "estimate.json").unlink()
    expected = r"is not trained yet: .*has no estimate.json; `make unleashing_mask-estimate_digits` makes it"
    with pytest.raises(FileNotFoundError, match=expected):
        resolve_floor("auto", SOURCE, network)


@pytest.mark.parametrize("named", [True, False])
def test_an_estimate_of_other_weights_is_refused(estimated, named):
    network, folder = estimated
    other = network.origin | {"source": "run:classifier/mine", "sha256": "0"} if named else None
    (folder / "estimate.json").write_text(json.dumps({"floor": 0.25, "weights": other}))
    with pytest.raises(ValueError, match=r"is an estimate of (run:classifier/mine \(SHA-256 0\)|weights of no file)"):
        resolve_floor("auto", SOURCE, network)


def test_a_network_that_is_not_converged_is_told(estimated, caplog):
    network, folder = estimated
    content = {"floor": 0.25, "whole": {"loss": 0.5}, "weights": network.origin}
    (folder / "estimate.json").write_text(json.dumps(content))
    assert resolve_floor("auto", SOURCE, network) == 0.25
    assert "floor of 0.25, and without masks the loss is 0.5" in caplog.text


def test_an_estimate_for_a_network_without_weights_is_refused(estimated):
    with pytest.raises(ValueError, match="starts from weights of no file: estimate it anew"):
        resolve_floor("auto", SOURCE, DigitsNet(num_classes=3))


@pytest.mark.parametrize(
    ("floor", "estimate", "message"),
    [
        (-0.1, None, "a floor is a loss of at least 0, or auto, not -0.1"),
        (float("nan"), None, "at least 0, or auto, not nan"),
        (0.1, SOURCE, "floor: 0.1 takes no estimate"),
        ("auto", None, "floor: auto is read from a run: say which"),
    ],
)
def test_what_contradicts_itself_is_said(floor, estimate, message):
    with pytest.raises(ValueError, match=message):
        resolve_floor(floor, estimate, DigitsNet(num_classes=3))
