"""Published weights by name: found where they must lie, checked where a hash is known, explained where they are not."""

import hashlib
import re
from pathlib import Path

import pytest
import torch
from torchvision.models import ResNet18_Weights

from backbones import published, weights
from backbones.digits_net import DigitsNet
from backbones.weights import load_weights, locate, origins


@pytest.fixture
def checkpoints(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(weights, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path / "checkpoints"


def write(path: Path) -> str:
    """Put weights of a ``DigitsNet`` there; return their SHA-256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    torch.save(DigitsNet(3).state_dict(), path)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("heat/cifar100_resnet34", "weights/cifar100/resnet34/multisteplr_randomresizedcrop_epoch_199.ckpt"),
        ("unleashing_mask/densenet_cifar10_last", "densenet_cifar10_last.state"),
        ("heatmap/cifar10_resnet18", "cifar10_resnet18.pt"),
        ("heatmap/cifar100_wideresnet_40_2", "cifar100_wideresnet_40_2.pt"),
        ("variational_metric/cifar10_densenet", "cifar10_densenet.ckpt"),
        ("variational_metric/finetuning_densenet", "checkpoint_100.pth.tar"),
        ("energy_ood/cifar10_wrn_pretrained", "pretrained/cifar10_wrn_pretrained_epoch_99.pt"),
        ("energy_ood/cifar100_wrn_energy_ft", "energy_ft/cifar100_wrn_s1_energy_ft_epoch_9.pt"),
        ("outlier_exposure/cifar10_wrn_oe_tune", "oe_tune/cifar10_wrn_oe_tune_epoch_9.pt"),
        ("outlier_exposure/cifar100_calib_wrn_oe_scratch", "oe_scratch/cifar100_calib_wrn_oe_scratch_epoch_99.pt"),
        ("akamaster/resnet56", "resnet56-4bfd9763.th"),
        ("openood/cifar10_resnet18_s2", "cifar10_resnet18_32x32_base_e100_lr0.1_default/s2/best.ckpt"),
    ],
)
def test_a_name_has_one_place(checkpoints, name, file):
    path = checkpoints / "published" / name.partition("/")[0] / file
    with pytest.raises(FileNotFoundError, match=rf"^{name} is not here yet: put its file at {re.escape(str(path))}\. "):
        locate(name)
    path.parent.mkdir(parents=True)
    path.touch()
    assert locate(name) == path


def test_a_missing_file_says_where_to_get_it(checkpoints):
    with pytest.raises(FileNotFoundError, match=r"Where to get it: .*github\.com/MarcLafon/heatood.* weights\.zip"):
        DigitsNet(3, weights="heat/cifar10_resnet34")


def test_the_readme_knows_every_source_and_no_place_is_taken_twice():
    readme = (Path(weights.__file__).parent.parent / "checkpoints" / "README.md").read_text(encoding="utf-8")
    sources = {name.partition("/")[0] for name in published.FILES}
    assert sources == set(published.SOURCES)
    assert [source for source in sources if f"`{source}/" not in readme] == []
    places = [(name.partition("/")[0], file) for name, file in published.FILES.items()]
    assert len(set(places)) == len(places)


def test_a_published_file_is_loaded_and_recorded_by_its_name(checkpoints):
    digest = write(checkpoints / "published" / "heatmap" / "cifar10_resnet18.pt")
    net = DigitsNet(3, weights="heatmap/cifar10_resnet18")
    record = {"source": "heatmap/cifar10_resnet18", "file": "cifar10_resnet18.pt", "sha256": digest}
    assert origins(net) == {"": record}


def test_a_file_that_is_not_the_published_one_is_refused(checkpoints, monkeypatch):
    path = checkpoints / "published" / "akamaster" / "resnet20-12fca82f.th"
    digest = write(path)
    message = rf"resnet20-12fca82f\.th is not the file that was published.* 12fca82f and begins with {digest[:8]}"
    with pytest.raises(ValueError, match=message):
        DigitsNet(3, weights="akamaster/resnet20")
    DigitsNet(3, weights=str(path))  # a path promises nothing
    monkeypatch.setitem(published.FILES, "akamaster/resnet20", f"net-{digest[:8]}.th")
    path.rename(path.with_name(f"net-{digest[:8]}.th"))
    DigitsNet(3, weights="akamaster/resnet20")


@pytest.mark.parametrize(
    ("name", "near"),
    [("akamaster/resnet21", "akamaster/resnet20"), ("heat/cifar10_resnet43", "heat/cifar10_resnet34")],
)
def test_an_unknown_name_brings_the_near_ones(name, near):
    with pytest.raises(FileNotFoundError, match=rf"^no weights at .*{name} .*; did you mean .*{near}.*\?$"):
        load_weights(DigitsNet(3), name)


def test_a_path_like_no_name_brings_none():
    with pytest.raises(FileNotFoundError, match=r"counts from the repository root\)$"):
        load_weights(DigitsNet(3), "none.pt")


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """Torch's cache of downloads; a folder of this machine plays torchvision's server."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    return tmp_path / "torch" / "hub" / "checkpoints"


def serve(folder: Path, monkeypatch, promised: str | None = None) -> Path:
    digest = write(folder / "net.pth")
    path = (folder / "net.pth").rename(folder / f"net-{promised or digest[:8]}.pth")
    monkeypatch.setattr(ResNet18_Weights.IMAGENET1K_V1.value, "url", path.as_uri())
    return path


def test_torchvision_downloads_once(hub, tmp_path, monkeypatch, capfd):
    origin = serve(tmp_path / "server", monkeypatch)
    first = DigitsNet(3, weights="ResNet18_Weights.IMAGENET1K_V1")
    assert (hub / origin.name).read_bytes() == origin.read_bytes()
    origin.unlink()
    DigitsNet(3, weights="ResNet18_Weights.IMAGENET1K_V1")
    assert origins(first)[""]["source"] == "ResNet18_Weights.IMAGENET1K_V1"
    assert origins(first)[""]["file"] == origin.name


def test_torchvision_checks_what_it_downloads(hub, tmp_path, monkeypatch, capfd):
    origin = serve(tmp_path / "server", monkeypatch, promised="0123abcd")
    with pytest.raises(FileNotFoundError, match=rf"cannot be downloaded \(.*hash.*\): put file:.* at .*{origin.name}$"):
        DigitsNet(3, weights="ResNet18_Weights.IMAGENET1K_V1")
    assert not (hub / origin.name).exists()
    origin.unlink()
    with pytest.raises(FileNotFoundError, match=rf"cannot be downloaded \(.*\): put file:.* at .*{origin.name}$"):
        DigitsNet(3, weights="ResNet18_Weights.IMAGENET1K_V1")


def test_what_lies_in_the_cache_is_checked_too(hub, tmp_path, monkeypatch):
    origin = serve(tmp_path / "server", monkeypatch, promised="0123abcd")
    hub.mkdir(parents=True)
    origin.rename(hub / origin.name)
    with pytest.raises(ValueError, match="is not the file that was published: its SHA-256 should begin with 0123abcd"):
        DigitsNet(3, weights="ResNet18_Weights.IMAGENET1K_V1")


def test_an_unknown_name_of_torchvision_brings_the_near_ones():
    with pytest.raises(ValueError, match=r"no weights ResNet50_Weights\.IMAGENET1K_V3; did you .*IMAGENET1K_V[12]"):
        load_weights(DigitsNet(3), "ResNet50_Weights.IMAGENET1K_V3")


def test_the_names_of_torchvision_lead_to_its_files(hub):
    url = "https://download.pytorch.org/models/resnet50-0676ba61.pth"
    assert url == published.torchvision.models.ResNet50_Weights.IMAGENET1K_V1.url
    hub.mkdir(parents=True)
    (hub / "resnet50-0676ba61.pth").touch()
    assert locate("ResNet50_Weights.IMAGENET1K_V1") == hub / "resnet50-0676ba61.pth"
