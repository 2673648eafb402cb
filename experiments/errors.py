"""The parser's errors, in a few lines that name what would have been right."""

import difflib
import inspect
import pkgutil
import re
from collections.abc import Iterable
from importlib import import_module

from jsonargparse import ArgumentParser

NOISE = re.compile(r"^\s*(-\s*)?(Given value|Subtypes:|Expected a <class 'NoneType'>|Errors:|Does not validate)")


def explain(message: str, keys: Iterable[str] = ()) -> str:
    """Shorten jsonargparse's message about a wrong configuration and add the valid names.

    Args:
        message: what jsonargparse says, often nested over many lines.
        keys: the keys of the command, for near matches.
    """
    if "in DataLoader worker" in message:  # what the worker raised, without its traceback
        return message.rstrip().splitlines()[-1].partition("Error: ")[2]
    if found := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", message):
        module, name = found.groups()
        return f"there is no {module}.{name}; {suggest(name, members(module), 'it has')}"
    if found := re.search(
        r"Option '([\w.]+)' is not accepted(?:\. Got value: Namespace\(class_path='([\w.]+)')?", message
    ):
        option, owner = found[1].split(".")[0], found[2]
        owner = owner or re.findall(r"class_path '([\w.]+)'", message[: found.start()])[-1]
        return f"{owner} has no option {option!r}; {suggest(option, options(owner), 'its options')}"
    if found := re.search(r"(?:does not accept option '|unrecognized arguments: --?)([\w.+]+)", message):
        return f"unknown key {found[1]}; {suggest(found[1], keys, 'valid')}"
    lines = [line for line in message.splitlines() if line.strip() and not NOISE.match(line)]
    text = re.sub(r"^[\s-]*- ", "", "\n".join(lines)).strip()
    if "is abstract" in message:
        text += "\nwrite a class as `class_path: package.module.Class` with its options under `init_args:`"
    return text


def suggest(name: str, valid: Iterable[str], label: str) -> str:
    """Name the near matches, or all that is valid where there is none."""
    valid = sorted(set(valid))
    near = difflib.get_close_matches(name, valid, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(near)}?" if near else f"{label}: {', '.join(valid)}"


def members(module: str) -> list[str]:
    """List the classes and modules that a module or package offers."""
    found = import_module(module)
    names = [info.name for info in pkgutil.iter_modules(getattr(found, "__path__", []))]
    names += [
        name for name, member in inspect.getmembers(found, inspect.isclass) if member.__module__.startswith(module)
    ]
    return [name for name in names if not name.startswith("_")]


def options(path: str) -> list[str]:
    """List what the constructor of a class takes, through its ``**kwargs`` too."""
    module, _, name = path.rpartition(".")
    parser = ArgumentParser()
    return parser.add_class_arguments(getattr(import_module(module), name), fail_untyped=False)
