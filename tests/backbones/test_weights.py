"""Weights enter whole or not at all, whatever they are wrapped in; nothing in a file is executed."""

import hashlib
import json
import os
import pickle
import re
import sys
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn

from backbones import weights
from backbones.digits_net import DigitsNet
from backbones.weights import load_weights, origins, weights_sha256


def network(seed: int = 0, classes: int = 3) -> DigitsNet:
    torch.manual_seed(seed)
    net = DigitsNet(classes)
    net(torch.rand(4, 1, 8, 8))  # moves the batch-norm statistics and their counters
    return net


def snapshot(module: nn.Module) -> dict:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def save(path: Path, content, legacy: bool = False) -> str:
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return str(path)


def prefixed(prefix: str, state: dict) -> dict:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "backbone.", "module.model."])
@pytest.mark.parametrize("container", [None, "state_dict", "model_state"])
def test_containers_and_prefixes(tmp_path, container, prefix, legacy):
    state = prefixed(prefix, network(0).state_dict())
    content = state if container is None else {container: state, "epoch": 3, "optimizer": {"lr": 0.1}}
    other = network(1)
    load_weights(other, save(tmp_path / "net.pt", content, legacy))
    assert same(other.state_dict(), network(0).state_dict())


def test_encoder_and_classifier_in_parts(tmp_path):
    state = network(0).state_dict()
    encoder = {name: value for name, value in state.items() if not name.startswith("fc.")}
    parts = {"net_state_dict": encoder, "cls_state_dict": {f"linear.{e}": state[f"fc.{e}"] for e in ("weight", "bias")}}
    other = network(1)
    load_weights(other, save(tmp_path / "net.pt", parts))
    assert same(other.state_dict(), state)
    with pytest.raises(ValueError, match="it holds keys net_state_dict, epoch"):
        load_weights(other, save(tmp_path / "net.pt", {"net_state_dict": encoder, "epoch": 1}))


def test_of_a_lightning_checkpoint_the_backbone_is_taken(tmp_path):
    state = prefixed("backbone.", network(0).state_dict()) | {"residual.weight": torch.zeros(2), "seen": torch.ones(1)}
    content = {"pytorch-lightning_version": "2.6.6", "epoch": 1, "global_step": 2, "state_dict": state}
    other = network(1)
    load_weights(other, save(tmp_path / "last.ckpt", content))
    assert same(other.state_dict(), network(0).state_dict())


def test_of_a_foreign_file_nothing_is_dropped(tmp_path):
    state = prefixed("backbone.", network(0).state_dict()) | {"residual.weight": torch.zeros(2)}
    with pytest.raises(ValueError, match=r"unexpected: residual\.weight"):
        load_weights(network(1), save(tmp_path / "net.pt", {"state_dict": state}))


@pytest.mark.parametrize("prefix", ["module.model.", "model.module.", "module.module.", "_orig_mod.module."])
def test_wrappers_may_be_wrapped(tmp_path, prefix):
    other = network(1)
    load_weights(other, save(tmp_path / "net.pt", prefixed(prefix, network(0).state_dict())))
    assert same(other.state_dict(), network(0).state_dict())


def test_a_network_inside_another_takes_the_files_of_the_inner_one(tmp_path):
    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.network = inner

    outer = Outer(network(1))
    load_weights(outer, save(tmp_path / "net.pt", network(0).state_dict()))
    assert same(outer.network.state_dict(), network(0).state_dict())


@pytest.mark.parametrize("status", ["running", "interrupted", "failed"])
def test_an_unfinished_run_is_no_source(checkpoints, status):
    folder = checkpoints / "classifier" / "digits" / "seed0"
    folder.mkdir(parents=True)
    save(folder / "last.ckpt", network(0).state_dict())
    (folder / "run.json").write_text(json.dumps({"status": status}))
    with pytest.raises(ValueError, match=rf"run:classifier/digits is {status}, not finished: .*give the path"):
        load_weights(network(1), "run:classifier/digits")
    (folder / "run.json").write_text(json.dumps({"status": "finished"}))
    load_weights(network(1), "run:classifier/digits")


def test_a_misspelt_run_names_the_near_ones(checkpoints):
    with pytest.raises(FileNotFoundError, match=r"not there either; did you mean run:classifier/digits"):
        load_weights(network(1), "run:clasifier/digits")


def test_a_prefix_that_the_network_has_itself_stays(tmp_path):
    wrapped, other = nn.DataParallel(network(0)), nn.DataParallel(network(1))
    load_weights(other, save(tmp_path / "net.pt", wrapped.state_dict()))
    assert same(other.state_dict(), wrapped.state_dict())


@pytest.mark.parametrize("container", [OrderedDict, dict])  # the former keeps the format version of torch
def test_counters_of_batch_norm_are_optional(tmp_path, container):
    state = network(0).state_dict()
    for name in [name for name in state if name.endswith("num_batches_tracked")]:
        del state[name]
    other = network(1)
    load_weights(other, save(tmp_path / "net.pt", state if container is OrderedDict else dict(state)))
    assert same({name: value for name, value in other.state_dict().items() if name in state}, state)


def test_loading_copies(tmp_path):
    net = network(0)
    before = snapshot(net)
    other = network(1)
    load_weights(other, save(tmp_path / "net.pt", net.state_dict()))
    with torch.no_grad():
        other.fc.bias.add_(1)
    assert same(net.state_dict(), before)


def test_every_misfit_is_listed_and_nothing_is_loaded(tmp_path):
    state = OrderedDict(network(0, classes=5).state_dict())
    del state["layer1.0.weight"], state["conv1.1.running_var"]
    state["extra.weight"], state["layer9.bias"] = torch.zeros(1), torch.zeros(2)
    net = network(1, classes=3)
    before = snapshot(net)
    path = save(tmp_path / "net.pt", state)
    with pytest.raises(ValueError, match=re.escape(path)) as error:
        load_weights(net, path)
    assert {line.strip() for line in str(error.value).splitlines()[1:]} == {
        "missing: layer1.0.weight",
        "missing: conv1.1.running_var",
        "unexpected: extra.weight",
        "unexpected: layer9.bias",
        "mis-shaped: fc.weight is (5, 64) in the file, (3, 64) in the network",
        "mis-shaped: fc.bias is (5,) in the file, (3,) in the network",
    }
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("change", ["missing", "unexpected", "mis-shaped"])
def test_one_misfit_suffices(tmp_path, change):
    state = network(0).state_dict()
    if change == "missing":
        del state["fc.bias"]
    else:
        state["fc.bias" if change == "mis-shaped" else "fc.scale"] = torch.zeros(1)
    net = network(1)
    before = snapshot(net)
    with pytest.raises(ValueError, match=f"{change}: fc"):
        load_weights(net, save(tmp_path / "net.pt", state))
    assert same(net.state_dict(), before)


def test_the_constructor_is_as_strict(tmp_path):
    path = save(tmp_path / "net.pt", network(0, classes=5).state_dict())
    with pytest.raises(ValueError, match=r"fc\.weight is \(5, 64\) in the file, \(3, 64\) in the network"):
        DigitsNet(3, weights=path)


class Hostile:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, legacy):
    content = {"state_dict": network(0).state_dict(), "config": Hostile(tmp_path / "made")}
    net = network(1)
    before = snapshot(net)
    with pytest.raises(ValueError, match=r"net\.pt is refused: .* run \w+\.mkdir.*plain data only"):
        load_weights(net, save(tmp_path / "net.pt", content, legacy))
    assert not (tmp_path / "made").exists()
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickled_configuration_is_refused_by_its_class(tmp_path, monkeypatch, legacy):
    package = ModuleType("omegaconf.dictconfig")
    package.DictConfig = type("DictConfig", (dict,), {"__module__": package.__name__})
    monkeypatch.setitem(sys.modules, "omegaconf", ModuleType("omegaconf"))
    monkeypatch.setitem(sys.modules, package.__name__, package)
    content = {"model_state": network(0).state_dict(), "config": package.DictConfig(lr=0.1)}
    with pytest.raises(ValueError, match=r"is refused: .* run omegaconf\.dictconfig\.DictConfig.*state_dict\(\) alone"):
        load_weights(network(1), save(tmp_path / "net.ckpt", content, legacy))


@pytest.mark.parametrize("numpy", [b"numpy._core", b"numpy.core"])  # of NumPy 2 and 1
def test_what_lightning_and_numpy_leave_beside_the_weights_is_skipped(tmp_path, numpy):
    heads = {"ae.fc.bias": torch.zeros(3)}
    content = {
        "pytorch-lightning_version": "1.1.2",
        "callbacks": {ModelCheckpoint: {"best_model_score": np.float64(0.5), "current_score": torch.tensor(0.5)}},
        "state_dict": prefixed("backbone.", network(0).state_dict()) | heads,
    }
    path = Path(save(tmp_path / "net.ckpt", content, legacy=True))
    assert path.read_bytes().count(b"numpy._core.multiarray") == 1
    path.write_bytes(path.read_bytes().replace(b"numpy._core", numpy))
    other = network(1)
    load_weights(other, str(path))
    assert same(other.state_dict(), network(0).state_dict())
    with pytest.raises(pickle.UnpicklingError, match="GLOBAL"):  # elsewhere the rule is as strict as before
        torch.load(path, weights_only=True)


def test_a_pickle_may_not_build_what_it_skips_with_something_else(tmp_path):
    content = {"state_dict": network(0).state_dict(), "score": np.zeros(3)}
    with pytest.raises(ValueError, match=r"is refused: .* run numpy\._core\.multiarray\._reconstruct"):
        load_weights(network(1), save(tmp_path / "net.pt", content))


def test_a_decoder_is_read_by_its_epoch(tmp_path):
    generator = {"fc1.weight": torch.ones(2, 3)}
    path = save(tmp_path / "model.pt", {"min": 0, "max": np.float64(2.5), 9: {}, 149: {"generator": generator}})
    assert same(weights.read_state_dict(Path(path)), {"linear.weight": generator["fc1.weight"]})


def test_a_pickled_network_is_refused_by_its_class(tmp_path):
    with pytest.raises(ValueError, match=r"is refused: .*backbones\.digits_net\.DigitsNet.*state_dict\(\)"):
        load_weights(network(1), save(tmp_path / "net.pt", network(0)))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kept", [0.0, 0.0001, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_named(tmp_path, kept, legacy):
    path = Path(save(tmp_path / "net.pt", network(0).state_dict(), legacy))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    net = network(1)
    before = snapshot(net)
    with pytest.raises(ValueError, match=f"{re.escape(str(path))} is damaged, cut short"):
        load_weights(net, str(path))
    assert same(net.state_dict(), before)


@pytest.mark.parametrize("content", [b"hello, a text", b"<html>not found</html>", b"\x1f\x8b\x08\x00\x00"])
def test_a_file_of_another_kind_is_named(tmp_path, content):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(ValueError, match=r"net\.pt is damaged, cut short, or not a file of torch\.save"):
        load_weights(network(), str(tmp_path / "net.pt"))


@pytest.mark.parametrize(
    ("content", "held"),
    [
        ([1, 2], "it holds list"),
        ({"net_state_dict": {}, "epoch": 1}, "it holds keys net_state_dict, epoch"),
        ({"state_dict": [1]}, "holds no state dict"),
        ({0: torch.zeros(1)}, "holds no state dict"),
    ],
)
def test_a_file_without_a_state_dict_says_what_it_holds(tmp_path, content, held):
    with pytest.raises(ValueError, match=held):
        load_weights(network(), save(tmp_path / "net.pt", content))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=re.escape(str(tmp_path / "none.pt"))):
        load_weights(network(), str(tmp_path / "none.pt"))
    with pytest.raises(FileNotFoundError, match="no weights at"):
        load_weights(network(), str(tmp_path))


def test_a_network_remembers_the_file_of_its_weights(tmp_path):
    path = save(tmp_path / "net.pt", network(0).state_dict())
    whole = nn.ModuleDict({"frozen": DigitsNet(3, weights=path), "head": nn.Linear(2, 2), "other": DigitsNet(3)})
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    assert origins(whole) == {"frozen": {"source": path, "file": "net.pt", "sha256": digest}}
    save(tmp_path / "wide.pt", network(0, classes=5).state_dict())
    with pytest.raises(ValueError, match="nothing was loaded"):
        load_weights(whole["frozen"], str(tmp_path / "wide.pt"))
    assert origins(whole)["frozen"]["file"] == "net.pt"
    assert "origin" not in "".join(whole.state_dict())


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(weights, "ROOT", tmp_path)
    monkeypatch.setattr(weights, "CHECKPOINTS", tmp_path / "checkpoints")
    return tmp_path


def test_root_is_the_folder_above_the_package():
    assert Path(weights.__file__) == weights.ROOT / "backbones" / "weights.py"


def test_a_relative_path_counts_from_the_root(root, monkeypatch):
    (root / "elsewhere").mkdir()
    monkeypatch.chdir(root / "elsewhere")
    save(root / "net.pt", network(0).state_dict())
    net = network(1)
    load_weights(net, "net.pt")
    assert same(net.state_dict(), network(0).state_dict())


@pytest.mark.parametrize(("source", "name"), [("run:heat/digits", "seed0"), ("run:heat/digits/mine", "mine")])
def test_of_a_run_the_best_checkpoint_is_taken_else_the_last(root, source, name):
    folder = root / "checkpoints" / "heat" / "digits" / name
    folder.mkdir(parents=True)
    for seed, file in ((1, "last.ckpt"), (2, "best.ckpt")):
        save(folder / file, {"state_dict": prefixed("backbone.", network(seed).state_dict())})
        net = network(0)
        load_weights(net, source)
        assert same(net.state_dict(), network(seed).state_dict())


def test_a_missing_run_names_its_make_target(root):
    (root / "checkpoints" / "classifier" / "digits" / "seed0").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"`make classifier-digits` makes it$"):
        DigitsNet(3, weights="run:classifier/digits")
    with pytest.raises(FileNotFoundError, match="`make classifier-digits` makes it, given the name seed4"):
        DigitsNet(3, weights="run:classifier/digits/seed4")


@pytest.mark.parametrize("source", ["run:", "run:classifier", "run:classifier/", "run:a/b/c/d", "run:/a/b"])
def test_a_malformed_run_is_refused(root, source):
    with pytest.raises(ValueError, match=f"run:<method>/<setting>.*not {source}$"):
        load_weights(network(), source)


def test_sha256_covers_names_dtypes_shapes_and_bytes():
    module = nn.Module()
    module.register_buffer("b", torch.tensor([1.0, 2.0]))
    module.register_buffer("a", torch.tensor(3))
    expected = hashlib.sha256()
    expected.update(b"a torch.int64 ()\n" + (3).to_bytes(8, "little"))
    expected.update(b"b torch.float32 (2,)\n" + bytes.fromhex("0000803f00000040"))
    assert weights_sha256(module) == expected.hexdigest()


def test_sha256_ignores_the_order_of_keys():
    a, b = nn.Linear(2, 3), nn.Linear(3, 1)
    forwards, backwards = nn.ModuleDict([("a", a), ("b", b)]), nn.ModuleDict([("b", b), ("a", a)])
    assert list(forwards.state_dict()) != list(backwards.state_dict())
    assert weights_sha256(forwards) == weights_sha256(backwards)
    assert weights_sha256(nn.ModuleDict([("a", a), ("c", b)])) != weights_sha256(forwards)


def test_sha256_sees_one_changed_weight():
    net = network(0)
    before = weights_sha256(net)
    with torch.no_grad():
        net.layer2[0].weight[3, 1, 2, 2] += 1e-6
    assert weights_sha256(net) != before


def hashed(value: torch.Tensor) -> str:
    module = nn.Module()
    module.register_buffer("value", value)
    return weights_sha256(module)


def test_sha256_sees_dtype_and_shape():
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.bfloat16)]
    assert len({hashed(value) for value in [*zeros, torch.zeros(0), torch.zeros(())]}) == 6


def test_sha256_ignores_file_format_and_memory_layout(tmp_path):
    net = network(0)
    for legacy in (False, True):
        other = network(1)
        load_weights(other, save(tmp_path / "net.pt", {"state_dict": prefixed("module.", net.state_dict())}, legacy))
        assert weights_sha256(other) == weights_sha256(net)
    assert weights_sha256(network(0).to(memory_format=torch.channels_last)) == weights_sha256(net)
    assert hashed(torch.arange(8)[::2]) == hashed(torch.tensor([0, 2, 4, 6]))


@pytest.mark.gpu
def test_sha256_ignores_the_device():
    assert weights_sha256(network(0).cuda()) == weights_sha256(network(0))
