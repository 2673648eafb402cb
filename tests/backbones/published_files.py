"""What lies in published files, name by name: the entries of each layout and their shapes.

Written from the authors' networks; nothing here knows how our networks call their parts.
"""

from functools import partial

import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def bn(name: str, channels: int, affine: bool = True, counter: bool = True) -> Shapes:
    entries = [*(["weight", "bias"] if affine else []), "running_mean", "running_var"]
    return {f"{name}.{entry}": (channels,) for entry in entries} | (
        {f"{name}.num_batches_tracked": ()} if counter else {}
    )


def affine_map(name: str, *shape: int) -> Shapes:
    """A convolution or linear layer with a bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def resnet(blocks: tuple[int, ...], convs: int, shortcut: str) -> Shapes:
    shapes = {"conv1.weight": (64, 3, 3, 3)} | bn("bn1", 64)
    last = 64
    for stage, (width, count) in enumerate(zip((64, 128, 256, 512), blocks, strict=True), start=1):
        out = width * (4 if convs == 3 else 1)
        for i in range(count):
            block = f"layer{stage}.{i}"
            kernels = [(width, last, 3), (width, width, 3)]
            if convs == 3:
                kernels = [(width, last, 1), (width, width, 3), (out, width, 1)]
            for number, (to, of, size) in enumerate(kernels, start=1):
                shapes |= {f"{block}.conv{number}.weight": (to, of, size, size)} | bn(f"{block}.bn{number}", to)
            if last != out:
                shapes |= {f"{block}.{shortcut}.0.weight": (out, last, 1, 1)} | bn(f"{block}.{shortcut}.1", out)
            last = out
    return shapes


def wide_resnet(blocks: int, factor: int, affine: bool = True, counter: bool = True) -> Shapes:
    norm = partial(bn, affine=affine, counter=counter)
    shapes: Shapes = {"conv1.weight": (16, 3, 3, 3)}
    last = 16
    for stage, width in enumerate((16 * factor, 32 * factor, 64 * factor), start=1):
        for i in range(blocks):
            name = f"block{stage}.layer.{i}"
            shapes |= norm(f"{name}.bn1", last) | {f"{name}.conv1.weight": (width, last, 3, 3)}
            shapes |= norm(f"{name}.bn2", width) | {f"{name}.conv2.weight": (width, width, 3, 3)}
            if i == 0:
                shapes[f"{name}.convShortcut.weight"] = (width, last, 1, 1)
            last = width
    return shapes | norm("bn1", last)


def heatmap_wide_resnet() -> Shapes:
    shapes = affine_map("conv1", 16, 3, 3, 3)
    last = 16
    for stage, width in enumerate((32, 64, 128), start=1):
        for i in range(6):
            name = f"layer{stage}.{i}"
            shapes |= bn(f"{name}.bn1", last) | affine_map(f"{name}.conv1", width, last, 3, 3)
            shapes |= bn(f"{name}.bn2", width) | affine_map(f"{name}.conv2", width, width, 3, 3)
            if i == 0:
                shapes |= affine_map(f"{name}.shortcut.0", width, last, 1, 1)
            last = width
    return shapes | bn("bn1", 128)


def densenet(classes: int, affine: bool = True) -> Shapes:
    norm = partial(bn, affine=affine)
    shapes: Shapes = {"conv1.weight": (24, 3, 3, 3)}
    for block, channels in enumerate((24, 108, 150), start=1):
        for i in range(16):
            name, width = f"block{block}.layer.{i}", channels + 12 * i
            shapes |= norm(f"{name}.bn1", width) | {f"{name}.conv1.weight": (48, width, 1, 1)}
            shapes |= norm(f"{name}.bn2", 48) | {f"{name}.conv2.weight": (12, 48, 3, 3)}
    for trans, (to, of) in enumerate(((108, 216), (150, 300)), start=1):
        shapes |= norm(f"trans{trans}.bn1", of) | {f"trans{trans}.conv1.weight": (to, of, 1, 1)}
    return shapes | norm("bn1", 342) | affine_map("fc", classes, 342)


def option_a(blocks: int) -> Shapes:
    norm = partial(bn, counter=False)
    shapes = {"module.conv1.weight": (16, 3, 3, 3)} | norm("module.bn1", 16)
    last = 16
    for stage, width in enumerate((16, 32, 64), start=1):
        for i in range(blocks):
            name = f"module.layer{stage}.{i}"
            shapes |= {f"{name}.conv1.weight": (width, last, 3, 3)} | norm(f"{name}.bn1", width)
            shapes |= {f"{name}.conv2.weight": (width, width, 3, 3)} | norm(f"{name}.bn2", width)
            last = width
    return shapes | affine_map("module.linear", 10, 64)


def vgg() -> Shapes:
    shapes: Shapes = {}
    last = 3
    for index, width in zip((0, 3, 7, 10, 14, 17, 20, 23), (64, 128, *[256] * 6), strict=True):
        shapes |= affine_map(f"encoder.{index}", width, last, 3, 3) | bn(f"encoder.{index + 1}", width)
        last = width
    return shapes | affine_map("encoder.28", 1024, 4096) | affine_map("encoder.30", 1024, 1024)


def mnist_conv() -> Shapes:
    shapes = affine_map("encoder.0", 100, 1, 3, 3)
    for index in (2, 5, 7, 10):
        shapes |= affine_map(f"encoder.{index}", 100, 100, 3, 3)
    return shapes | affine_map("dec_layer", 500, 900)


def bolts_autoencoder() -> Shapes:
    shapes = prefixed("encoder.", resnet((2, 2, 2, 2), 2, "downsample")) | affine_map("fc", 256, 512)
    shapes |= affine_map("decoder.linear", 8192, 256)
    last = 512
    for stage, width in enumerate((256, 128, 64, 64), start=1):
        for i in (0, 1):
            name, grows = f"decoder.layer{stage}.{i}", i == 0 and stage < 4
            shapes |= {f"{name}.conv1.weight": (last, last, 3, 3)} | bn(f"{name}.bn1", last)
            shapes |= {f"{name}.conv2{'.1' if grows else ''}.weight": (width, last, 3, 3)} | bn(f"{name}.bn2", width)
            if grows:
                shapes |= {f"{name}.upsample.0.1.weight": (width, last, 1, 1)} | bn(f"{name}.upsample.1", width)
            last = width
    return shapes | {"decoder.conv1.weight": (3, 64, 3, 3)}


def mnist_autoencoder() -> Shapes:
    shapes = prefixed("encoder.", mnist_conv()) | affine_map("fc", 32, 500)
    shapes |= affine_map("decoder.latent", 500, 32) | affine_map("decoder.enc_layer", 900, 500)
    for index in (0, 2, 4, 6, 8, 10):
        shapes |= affine_map(f"decoder.decoder.{index}", 100, 100, 2, 2)
    return shapes | affine_map("decoder.decoder.12", 1, 100, 1, 1)


def masked(shapes: Shapes) -> Shapes:
    """Every convolution and linear layer gains scores."""
    weights = {name: shape for name, shape in shapes.items() if name.endswith("weight") and len(shape) > 1}
    return shapes | {name.removesuffix("weight") + "scores": shape for name, shape in weights.items()}


def latent(encoder: Shapes, width: int, dim: int) -> Shapes:
    """A file of the variational-metric latent space."""
    heads = affine_map("fc_mu", dim, width) | affine_map("fc_var", dim, width)
    side = (10, 10) if width == 500 else (12, 12)
    return (
        prefixed("encoder.", encoder) | heads | prefixed("ae.", bolts_autoencoder()) | {"sift.pk.weight": (1, 1, *side)}
    )


def trainable(shapes: Shapes) -> int:
    kept = [s for name, s in shapes.items() if not name.rpartition(".")[2].startswith(("running_", "num_"))]
    return sum(torch.Size(shape).numel() for shape in kept)


def meta(shapes: Shapes) -> dict[str, Tensor]:
    """Entries without values."""
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def drawn(shapes: Shapes) -> dict[str, Tensor]:
    """Entries at random, such that no activation vanishes or explodes."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for name, shape in shapes.items():
        entry = name.rpartition(".")[2]
        if entry == "num_batches_tracked":
            state[name] = torch.tensor(7)
        elif entry == "running_var" or (entry == "weight" and len(shape) == 1):
            state[name] = 0.5 + torch.rand(shape, generator=generator)
        else:
            scale = (2 / torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) > 1 else 0.1
            state[name] = scale * torch.randn(shape, generator=generator)
    return state
