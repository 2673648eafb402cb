"""Layouts of published weights: what their authors call the parts of a network, and what we call them.

Pure functions from state dict to state dict, which rename, leave out and fill in; no value is changed.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

State = dict[str, Tensor]

VGG = {  # place in their one Sequential: ours
    **{0: "conv1.0", 1: "conv1.1", 3: "layer1.0", 4: "layer1.1"},
    **{7: "layer2.2", 8: "layer2.3", 10: "layer2.5", 11: "layer2.6"},
    **{14: "layer3.2", 15: "layer3.3", 17: "layer3.5", 18: "layer3.6"},
    **{20: "layer3.8", 21: "layer3.9", 23: "layer3.11", 24: "layer3.12"},
    **{28: "linear.3", 30: "linear.5"},
}
MNIST_CONV = {0: "conv1.0", 2: "layer1", 5: "layer3.0", 7: "layer4.0", 10: "layer5.0"}
RENAMES = (  # pattern and replacement for the names of modules; some need several
    (r"\bblock(\d)\.layer\.(\d+)\b", r"layer\1.\2"),  # wide ResNets and DenseNets
    (r"\btrans(\d)\b", r"layer\1.transition"),
    (r"\bconvShortcut$", "shortcut"),
    (r"\bshortcut\.([01])$", r"downsample.\1"),  # ResNets
    (r"\bshortcut\.0$", "shortcut"),  # heatmap's wide ResNet
    (r"^linear$", "fc"),
    *((rf"\bencoder\.{index}$", ours) for table in (VGG, MNIST_CONV) for index, ours in table.items()),
    (r"\bdec_layer$", "linear"),  # MNISTConv
    (r"^fc$", "encoder.fc"),  # autoencoders
    (r"\bconv2\.1$", "conv2"),
    (r"\bupsample\.0\.1$", "shortcut.0"),
    (r"\bupsample\.1$", "shortcut.1"),
    (r"^decoder\.latent$", "decoder.0"),
    (r"^decoder\.enc_layer$", "decoder.1"),
    *((rf"^decoder\.decoder\.{index}$", f"decoder.{index + 3}") for index in range(0, 13, 2)),
)
DECODER_EPOCH = 149  # of 0 to 149, the one that heatmap's evaluation reads


def translate(state: Mapping[str, Tensor], names: Iterable[str]) -> State:
    """Give modules the names of a network's own, where ``RENAMES`` lead there; all others keep theirs.

    Args:
        state: a published state dict, without the prefix of a wrapper. What a module holds stays together: the
            ``scores`` of a masked convolution go where its ``weight`` goes.
        names: the entries of the network's own state dict.

    >>> translate({"trans1.conv1.weight": torch.ones(1)}, ["layer1.transition.conv1.weight"])
    {'layer1.transition.conv1.weight': tensor([1.])}
    """
    ours = {name.rpartition(".")[0] for name in names}
    free = ours - {name.rpartition(".")[0] for name in state}
    renamed = {module: module for module in ours}
    result = {}
    for name, value in state.items():
        module, dot, entry = name.rpartition(".")
        if module not in renamed:
            renamed[module] = next((new for new in spellings(module) if new in free), module)
            free.discard(renamed[module])
        result[renamed[module] + dot + entry] = value
    return result


def spellings(module: str) -> list[str]:
    """List what a published module may be called here.

    >>> spellings("layer2.0.shortcut.0")
    ['layer2.0.downsample.0', 'layer2.0.shortcut']
    """
    found = [module]
    for pattern, replacement in RENAMES:
        found += [new for old in found if (new := re.sub(pattern, replacement, old)) != old]
    return found[1:]


def fill_affine(state: State, names: Iterable[str]) -> State:
    """Add the scale 1 and the shift 0 to each batch-norm of a file without any, where a network's ``names`` want them.

    A file in which one batch-norm has a scale or a shift stays as it is: there the others should have theirs.
    """
    constants: State = {}
    for name, mean in state.items():
        if name.endswith("running_mean"):
            norm = name.removesuffix("running_mean")
            constants |= {f"{norm}weight": torch.ones_like(mean), f"{norm}bias": torch.zeros_like(mean)}
    if constants.keys() & state.keys():
        return state
    return state | {name: constants[name] for name in names if name in constants}


def latent_space(state: State) -> State:
    """Keep encoder and heads (``encoder.*``, ``fc_mu.*``, ``fc_var.*``) of the variational-metric latent space.

    Its files hold an autoencoder too, which is that of CIFAR-10 whatever the data, and an unused descriptor.
    """
    return _part(state, keep=("encoder.", "fc_mu.", "fc_var."), drop=("ae.", "sift."))


def residual_energy(state: State) -> State:
    """Keep the network ``mlp.*`` of HEAT's residual energies, without the copy of the classifier beside it.

    On CIFAR the hidden layers 2, 4, 6 and 8 are one and the same, stored under each name; so it stays.
    """
    kept = _part(state, keep=("mlp.",), drop=("base_dist.",))
    for index in (4, 6, 8):
        for entry in ("weight", "bias"):
            first, copy = kept.get(f"mlp.2.{entry}"), kept.get(f"mlp.{index}.{entry}")
            if first is not None and (copy is None or not torch.equal(first, copy)):
                raise ValueError(f"mlp.{index}.{entry} should repeat mlp.2.{entry}: the hidden layers are one layer")
    return kept


def heatmap_decoder(checkpoint: Mapping[Any, Any]) -> State:
    """Take the decoder of the last epoch out of a heatmap checkpoint, {epoch: {"generator": state dict}, ...}.

    The ``min`` and ``max`` beside it, meant to scale the features, did so for one row of each training batch. Modules
    get the names of ``backbones.heatmap_decoder``.
    """
    if DECODER_EPOCH not in checkpoint:
        epochs = [key for key in checkpoint if isinstance(key, int)]
        raise ValueError(f"a heatmap checkpoint holds its decoder under {DECODER_EPOCH}; this one has epochs {epochs}")
    state = checkpoint[DECODER_EPOCH]["generator"]
    blocks = len({name.partition(".")[0] for name in state if name.startswith("conv_block")})
    ours = {"fc1": "linear"} | {f"conv_block{i}": f"blocks.{i - 1}" for i in range(1, blocks)}
    ours[f"conv_block{blocks}.0"] = "last"
    renamed = {}
    for name, value in state.items():
        module = next((theirs for theirs in ours if name.startswith(f"{theirs}.")), "")
        renamed[ours.get(module, "") + name.removeprefix(module)] = value
    return renamed


def _part(state: State, keep: tuple[str, ...], drop: tuple[str, ...]) -> State:
    if foreign := [name for name in state if not name.startswith(keep + drop)]:
        raise ValueError(f"only {', '.join(keep + drop)} belong here, not {', '.join(foreign)}")
    return {name: value for name, value in state.items() if name.startswith(keep)}
