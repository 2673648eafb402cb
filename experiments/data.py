"""The verb ``data``: what lies on disk, and how to get what does not."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from datamodules.catalogue import ENTRIES, SOURCES, how_to_get, read, way_out
from datamodules.download import fetch, install
from datamodules.fitting import Fit
from datamodules.images import ImageSet, data_root


def data(args: Sequence[str]) -> None:
    """``data check`` lists every set of images; ``data get NAME...`` downloads what may be downloaded."""
    root = argparse.ArgumentParser(add_help=False)
    root.add_argument(
        "--root",
        default=argparse.SUPPRESS,
        help="folder of all data; else the environment variable OOD_DATA, else data",
    )
    prog = "python -m experiments data"
    parser = argparse.ArgumentParser(prog=prog, description=data.__doc__, allow_abbrev=False, parents=[root])
    verbs = parser.add_subparsers(dest="verb", required=True)
    checking = verbs.add_parser("check", help="list every set: present, damaged, or how to get it", parents=[root])
    checking.add_argument("names", nargs="*", metavar="SET", help="only these sets")
    getting = verbs.add_parser("get", help="download", parents=[root])
    getting.add_argument("names", nargs="+", metavar="NAME", help="sources or sets, as check names them")
    options = parser.parse_args(args)
    folder = data_root(getattr(options, "root", None))
    if options.verb == "check":
        check(folder, options.names)
        return
    problems = []
    for source in dict.fromkeys(ENTRIES[name].source if name in ENTRIES else name for name in options.names):
        try:
            get(source, folder)
        except (ValueError, OSError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))


def get(source: str, root: Path) -> None:
    """Download a source into its folder below the root; an error in words where that is not possible."""
    if source not in SOURCES:
        raise ValueError(f"no source of data is called {source!r}; known are: {', '.join(sorted(SOURCES))}")
    folder, how = root / source, SOURCES[source].get
    if how is None:
        print(f"{source}: nothing to get, these images are made when they are needed")
        return
    if isinstance(how, str):
        raise ValueError(f"{source} cannot be downloaded by a program; its folder is {folder}: {how}")
    print(f"{source} (licence: {SOURCES[source].licence})")
    if callable(how):
        install(how, folder)
    else:
        fetch(how, folder)
    print(f"{source}: {folder}")


def check(root: Path, names: Sequence[str]) -> None:
    """Print a row for each set and a note for what needs one; ``ValueError`` where one is not as it should be."""
    if wrong := sorted(set(names) - set(ENTRIES)):
        raise ValueError(f"no set of images is called {', '.join(wrong)}; known are: {', '.join(sorted(ENTRIES))}")
    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    table = Table(
        title=f"Sets of images in {root}",
        caption="fingerprint: of the images as they lie on disk, before anything is done to them",
    )
    for column in ("set", "images", "fingerprint", "state"):
        table.add_column(column, no_wrap=True, justify="right" if column == "images" else "left")
    notes, damaged = {}, []
    for name in names or ENTRIES:
        source = ENTRIES[name].source
        images = None
        try:
            images = inspect(name, root)
            state = "present"
        except FileNotFoundError:
            state = f"missing: make data-{source}"
            if isinstance(SOURCES[source].get, str):
                state, notes[source] = "missing: see below", how_to_get(source)
        except (ValueError, OSError) as error:
            state, notes[name] = "damaged: see below", str(error)
            if (remedy := way_out(source, root / source)) not in notes[name]:
                notes[name] += f"; {remedy}"
            damaged.append(name)
        count = ENTRIES[name].count if images is None else len(images)
        fingerprint = "" if images is None else images.as_outliers().fingerprint()[:12]
        table.add_row(name, "" if count is None else f"{count:,}", fingerprint, state)
    console.print(table)
    for subject, note in notes.items():
        console.print(f"{subject}: {note}", markup=False, highlight=False, soft_wrap=True)
    if damaged:
        raise ValueError(f"not as they should be: {', '.join(damaged)}")


def inspect(name: str, root: Path) -> ImageSet:
    """Read a set as it is, or squashed to a small size where its images have different ones."""
    shape = ENTRIES[name].shape
    return read(name, root, Fit((3, 32, 32), "squash") if shape is None else Fit(shape))
