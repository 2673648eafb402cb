"""Arrows between the rooms point down only, and no method imports another."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MAY_IMPORT = {
    "backbones": set(),
    "datamodules": set(),
    "lightning_modules": {"backbones"},
    "callbacks": {"backbones", "datamodules", "lightning_modules"},
    "experiments": {"backbones", "callbacks", "datamodules", "lightning_modules"},
}
SHARED = {
    "ood_module",
    "evidence",
    "distributed",
    "losses",
    "samplers",
    "scores",
}  # open to callbacks and methods


def violations(room, stem, source):
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.level:
            found.append("relative imports hide where an arrow points")
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        for module in modules:
            top, *rest = module.split(".")
            if top == "lightning":
                found.append("import pytorch_lightning, not lightning")
            if top in MAY_IMPORT and top not in MAY_IMPORT[room] | {room}:
                found.append(f"{room} imports {module}")
            method = top == "lightning_modules" and (not rest or rest[0] not in SHARED | {stem})
            if method and room in ("callbacks", "lightning_modules"):
                found.append(f"{room}/{stem} imports the method {module}")
    return found


@pytest.mark.parametrize("path", [p for room in MAY_IMPORT for p in (ROOT / room).rglob("*.py")], ids=str)
def test_arrows_point_down(path):
    room = path.relative_to(ROOT).parts[0]
    assert violations(room, path.stem, path.read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("room", "stem", "source"),
    [
        ("backbones", "resnet", "import datamodules.batch"),
        ("datamodules", "digits", "from backbones.backbone import Backbone"),
        ("lightning_modules", "heat", "from lightning_modules.classifier import Classifier"),
        ("callbacks", "evaluation", "def f():\n    from lightning_modules.heat import HEAT"),
        ("callbacks", "evaluation", "from experiments import cli"),
        ("experiments", "cli", "import lightning"),
    ],
)
def test_a_planted_violation_is_found(room, stem, source):
    assert violations(room, stem, source)


def test_yaml_names_make_targets():
    """Make targets derive from paths, method-setting: a hyphen in a name would split elsewhere."""
    assert [p for p in (ROOT / "experiments").glob("*/*.yaml") if "-" in f"{p.parent.name}{p.stem}"] == []
