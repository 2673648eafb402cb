"""Images that go through the network: six scores on six OOD sets.

The count depends on the sizes of the sets alone, so a small network does.
"""

import torch

from backbones.digits_net import DigitsNet
from benchmarks.job import CLASSES, SIZES, counted, patterns, run_ours, settle
from benchmarks.measure import has_peer, print_table


def run(quick: bool) -> None:
    """Count and print; ours is an error where it is not the limit."""
    images = patterns({name: round(size / (500 if quick else 100)) for name, size in SIZES.items()})
    limit = sum(map(len, images.values()))
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = settle(DigitsNet(CLASSES, (3, 32, 32)), images["fit"])
    with counted(network) as ours:
        run_ours(network, images)
    counts = {"ours": sum(ours)}
    if has_peer():
        from benchmarks.peer import PatternsBenchmark, detectors, run_peer

        for style, shared in (("as documented", False), ("one encoder shared by hand", True)):
            with counted(network) as theirs:
                run_peer(PatternsBenchmark(images), detectors(network, shared))
            counts[f"pytorch-ood, {style}"] = sum(theirs)
    print(f"  {', '.join(f'{name} {len(x)}' for name, x in images.items())}; limit: each image once")
    rows = [(who, f"{count}", f"{limit}", f"{count / limit:.3g}") for who, count in counts.items()]
    verdict = "= limit: met" if counts["ours"] == limit else "= limit: MISSED"
    print_table(
        ("who", "forwards", "limit", "/ limit", "target"), [(*row, verdict if row[0] == "ours" else "") for row in rows]
    )
    if counts["ours"] != limit:
        raise RuntimeError(f"ours ran {counts['ours']} images through the network, {limit} are needed")
