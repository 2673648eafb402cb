"""Published weights by name: where they are obtained, where they must lie, and whether they are what they should be.

The names are ``<source>/<weights>``, and torchvision's own (``ResNet50_Weights.IMAGENET1K_V1``), which are downloaded.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from pathlib import Path

import torch
import torchvision

SOURCES = {  # where it is published: what to put below checkpoints/published/<source>/
    "heat": "the README of github.com/MarcLafon/heatood links an archive weights.zip (Dropbox), to be unpacked there",
    "unleashing_mask": "`runs/` of github.com/ZFancy/Unleashing-Mask (its README calls the files .pth, not .state)",
    "heatmap": "the README of github.com/jhornauer/heatmap_ood links a folder `Models` (cloud of Ulm University)",
    "variational_metric": "the README of github.com/BGU-CS-VIL/vmdls links a folder (Google Drive)",
    "energy_ood": "`CIFAR/snapshots/` of github.com/wetliu/energy_ood",
    "outlier_exposure": "`CIFAR/snapshots/` of github.com/hendrycks/outlier-exposure",
    "akamaster": "`pretrained_models/` of github.com/akamaster/pytorch_resnet_cifar10",
    "openood": "the README of github.com/Jingkang50/OpenOOD links the CIFAR weights of v1.5 (Google Drive)",
}
TEMPLATES = {  # name: file below checkpoints/published/<source>/, called as it is published
    "heat/{data}_resnet34": "weights/{data}/resnet34/multisteplr_randomresizedcrop_epoch_199.ckpt",
    "unleashing_mask/densenet_{data}_best": "densenet_{data}_best.state",
    "unleashing_mask/densenet_{data}_last": "densenet_{data}_last.state",
    "heatmap/{data}_resnet18": "{data}_resnet18.pt",
    "heatmap/{data}_wideresnet_40_2": "{data}_wideresnet_40_2.pt",
    "heatmap/tinyimagenet_resnet50": "tinyimagenet_resnet50.pt",
    "variational_metric/{data}_densenet": "{data}_densenet.ckpt",
    "variational_metric/cifar10_resnet": "cifar10_resnet.ckpt",
    "variational_metric/cifar10_vgg": "cifar10_vgg.ckpt",
    "variational_metric/cifar10_wresnet": "cifar10_wresnet.ckpt",
    "variational_metric/cnn_mnist": "cnn_mnist.ckpt",
    "variational_metric/ae_mnist": "ae_mnist.ckpt",
    "variational_metric/ae_cifar100": "ae_cifar100.ckpt",
    "variational_metric/finetuning_densenet": "checkpoint_100.pth.tar",
    "variational_metric/finetuning_wideresnet": "finetuning_wideresnet.tar",
    "energy_ood/{data}_wrn_pretrained": "pretrained/{data}_wrn_pretrained_epoch_99.pt",
    "energy_ood/{data}_wrn_oe_tune": "oe_tune/{data}_wrn_s1_oe_tune_epoch_9.pt",
    "energy_ood/{data}_wrn_energy_ft": "energy_ft/{data}_wrn_s1_energy_ft_epoch_9.pt",
    "outlier_exposure/{data}_wrn_baseline": "baseline/{data}_wrn_baseline_epoch_99.pt",
    "outlier_exposure/{data}_wrn_oe_scratch": "oe_scratch/{data}_wrn_oe_scratch_epoch_99.pt",
    "outlier_exposure/{data}_wrn_oe_tune": "oe_tune/{data}_wrn_oe_tune_epoch_9.pt",
    "outlier_exposure/{data}_calib_wrn_baseline": "baseline/{data}_calib_wrn_baseline_epoch_99.pt",
    "outlier_exposure/{data}_calib_wrn_oe_scratch": "oe_scratch/{data}_calib_wrn_oe_scratch_epoch_99.pt",
    "outlier_exposure/{data}_calib_wrn_oe_tune": "oe_tune/{data}_calib_wrn_oe_tune_epoch_9.pt",
    "akamaster/resnet20": "resnet20-12fca82f.th",
    "akamaster/resnet32": "resnet32-d509ac18.th",
    "akamaster/resnet44": "resnet44-014dd654.th",
    "akamaster/resnet56": "resnet56-4bfd9763.th",
    "openood/{data}_resnet18_s0": "{data}_resnet18_32x32_base_e100_lr0.1_default/s0/best.ckpt",
    "openood/{data}_resnet18_s1": "{data}_resnet18_32x32_base_e100_lr0.1_default/s1/best.ckpt",
    "openood/{data}_resnet18_s2": "{data}_resnet18_32x32_base_e100_lr0.1_default/s2/best.ckpt",
}
FILES = {
    name.format(data=data): file.format(data=data)
    for name, file in TEMPLATES.items()
    for data in ("cifar10", "cifar100")
}


def is_published(source: str) -> bool:
    """Say whether ``source`` is a name of this table or of torchvision, and not a path or a run."""
    return source in FILES or is_torchvision(source)


def is_torchvision(source: str) -> bool:
    """Say whether ``source`` has the form of torchvision's names, such as ``ResNet50_Weights.IMAGENET1K_V1``."""
    return re.fullmatch(r"\w+_Weights\.\w+", source) is not None


def published_file(name: str, checkpoints: Path) -> Path:
    """Find the file of published weights.

    Raises:
        FileNotFoundError: it is not there; then it says what to put where.
    """
    source = name.partition("/")[0]
    path = checkpoints / "published" / source / FILES[name]
    if not path.is_file():
        raise FileNotFoundError(f"{name} is not here yet: put its file at {path}. Where to get it: {SOURCES[source]}")
    return path


def torchvision_file(name: str) -> Path:
    """Find the file of torchvision's weights, and download it, with a check of its hash, where it is not here yet.

    Raises:
        ValueError: torchvision has no weights of this name.
        FileNotFoundError: they cannot be downloaded.
    """
    models = torchvision.models.list_models(module=torchvision.models)
    known = {repr(entry): entry for model in models for entry in torchvision.models.get_model_weights(model)}
    if name not in known:
        raise ValueError(f"torchvision has no weights {name}{did_you_mean(name, known)}")
    url = known[name].url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rpartition("/")[2])
    if not path.is_file():
        try:
            known[name].get_state_dict(progress=False, check_hash=True, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError) as error:
            raise FileNotFoundError(f"{name} cannot be downloaded ({error}): put {url} at {path}") from error
    return path


def check_digest(path: Path, sha256: str) -> None:
    """Compare a file's SHA-256 with the beginning of it that published files carry in their names, where they do.

    Raises:
        ValueError: they differ.
    """
    promised = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if promised and not sha256.startswith(promised[1]):
        raise ValueError(
            f"{path} is not the file that was published: its SHA-256 should begin with {promised[1]} and begins with "
            f"{sha256[:8]}; get it anew"
        )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Continue a sentence about an unknown name with the near ones, if there are any."""
    near = get_close_matches(name, known)
    return f"; did you mean {' or '.join(near)}?" if near else ""
