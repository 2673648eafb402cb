"""Backbone and heads of a latent space enter together, from published files and from our own runs, or not at all."""

import pytest
import torch
from published_files import densenet, drawn, latent, mnist_conv, resnet, vgg
from torch import nn

from backbones.densenet import DenseNet
from backbones.digits_net import DigitsNet
from backbones.mnist_conv import MNISTConv
from backbones.resnet import ResNet
from backbones.vgg import VGG
from backbones.weights import load_latent_space, origins

PUBLISHED = {
    "densenet": (densenet(10), lambda: DenseNet(10), 342, 64),
    "resnet": (resnet((2, 2, 2, 2), 2, "downsample"), lambda: ResNet(18, 10), 512, 32),
    "vgg": (vgg(), lambda: VGG(10), 1024, 32),
    "mnist": (mnist_conv(), lambda: MNISTConv(10), 500, 32),
}


def heads(width, dim):
    return {name: nn.Linear(width, dim) for name in ("fc_mu", "fc_var")}


def snapshot(modules):
    return [value.clone() for module in modules for value in module.state_dict().values()]


def unchanged(before, modules):
    return all(torch.equal(old, new) for old, new in zip(before, snapshot(modules), strict=True))


def save(path, state):
    torch.save({"state_dict": state, "pytorch-lightning_version": "1.1.2", "epoch": 3}, path)
    return str(path)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_fills_everything_but_the_classifier(name, tmp_path):
    encoder, build, width, dim = PUBLISHED[name]
    state = drawn(latent(encoder, width, dim))
    backbone, linear = build(), heads(width, dim)
    classifier = snapshot([backbone.head])
    load_latent_space(backbone, linear, save(tmp_path / "net.ckpt", state))
    assert unchanged(classifier, [backbone.head])
    for head, module in linear.items():
        assert torch.equal(module.weight, state[f"{head}.weight"])
        assert torch.equal(module.bias, state[f"{head}.bias"])
    ours = {entry: value for entry, value in backbone.state_dict().items() if not entry.startswith("fc.")}
    theirs = [value for entry, value in state.items() if entry.startswith("encoder.") and ".fc." not in entry]
    assert len(ours) == len(theirs)
    assert sum(v.double().sum() for v in ours.values()) == pytest.approx(sum(v.double().sum() for v in theirs))
    assert origins(nn.ModuleDict({"backbone": backbone} | linear)).keys() == {"backbone", "fc_mu", "fc_var"}


def test_a_run_of_ours_gives_its_backbone_and_heads(tmp_path):
    source, linear = DigitsNet(6), heads(64, 16)
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()}
    state |= {f"{head}.{name}": value for head, part in linear.items() for name, value in part.state_dict().items()}
    state |= {"statistics.means": torch.zeros(6, 16), "confusion.confmat": torch.zeros(7, 7)}
    backbone, fresh = DigitsNet(6), heads(64, 16)
    classifier = snapshot([backbone.head])
    load_latent_space(backbone, fresh, save(tmp_path / "last.ckpt", state))
    assert unchanged(classifier, [backbone.head])
    assert torch.equal(fresh["fc_var"].weight, linear["fc_var"].weight)
    for name, value in source.state_dict().items():
        assert name.startswith("fc.") or torch.equal(value, backbone.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fc_mu.weight": (16, 500)}, r"mis-shaped: weight is \(16, 500\) in the file, \(32, 500\) in the network"),
        ({"fc_var.bias": None}, "missing: bias"),
        ({"encoder.encoder.0.weight": None}, "missing: "),
        ({"decoder.bias": (3,)}, r"only encoder\., fc_mu\., fc_var\., ae\., sift\. belong here, not decoder\.bias"),
    ],
    ids=["latent_dim", "head", "encoder", "foreign"],
)
def test_what_does_not_fit_changes_nothing(change, message, tmp_path):
    state = drawn(latent(mnist_conv(), 500, 32))
    for name, shape in change.items():
        state.pop(name, None)
        if shape is not None:
            state[name] = torch.zeros(shape)
    backbone, linear = MNISTConv(10), heads(500, 32)
    before = snapshot([backbone, *linear.values()])
    with pytest.raises(ValueError, match=message):
        load_latent_space(backbone, linear, save(tmp_path / "net.ckpt", state))
    assert unchanged(before, [backbone, *linear.values()])
