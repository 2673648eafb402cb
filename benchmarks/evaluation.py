"""Wall time of the whole evaluation over that of the bare forward passes.

ResNet-18 on 32x32 images, eight scores on six OOD sets, fits and metrics included. The bootstrap is off: the peer has
none. Both sides must have found the same, else nothing is printed.
"""

from typing import Any

import numpy as np
import torch

from backbones.backbone import Backbone
from backbones.digits_net import DigitsNet
from backbones.resnet import ResNet
from benchmarks.job import BATCH, CLASSES, SIZES, normalize, patterns, run_bare, run_ours, settle
from benchmarks.measure import COLUMNS, has_peer, interleave, print_table, timing_rows
from callbacks.evaluation import OODEvaluation

# The pooled covariance of 512 features of 10 classes is singular below 522 images, and the peer's inverse then noise.
LEAST_FIT = 600


def run(quick: bool) -> None:
    """Measure, compare values, print."""
    sizes = {name: round(size / (500 if quick else 200)) for name, size in SIZES.items()}
    if not quick:
        sizes["fit"] = LEAST_FIT
    images = patterns(sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network: Backbone = DigitsNet(CLASSES, (3, 32, 32)) if quick else ResNet(18, CLASSES)
        settle(network, images["fit"])
    found: dict[str, Any] = {}

    def ours() -> None:
        found["ours"] = run_ours(network, images)

    contenders = {"limit": lambda: run_bare(network, images), "ours": ours}
    if has_peer():
        from benchmarks.peer import PatternsBenchmark, detectors, run_peer

        benchmark = PatternsBenchmark(images)

        def theirs() -> None:
            found["detectors"] = detectors(network)
            found["aurocs"] = run_peer(benchmark, found["detectors"])

        contenders["pytorch-ood"] = theirs
    seconds = interleave(contenders, repetitions=1 if quick else 5)
    print(f"  {type(network).__name__}, batches of {BATCH}; {', '.join(f'{name} {n}' for name, n in sizes.items())}")
    if has_peer():
        print(f"  same values: {compare(network, images, **found)}")
    case = f"{sum(sizes.values())} images"
    print_table(COLUMNS, timing_rows(case, seconds, 1.1, {"pytorch-ood": 4}, judge=not quick))


@torch.inference_mode()
def compare(
    network: Backbone,
    images: dict[str, torch.Tensor],
    ours: OODEvaluation,
    detectors: dict[str, Any],
    aurocs: dict[tuple[str, str], float],
) -> str:
    """Hold our scores and AUROCs against the peer's, raise an ``AssertionError`` where they differ, say what was held.

    Its Mahalanobis is d^2 / 2N, its kNN the distance and ours the square. Its GMM has a covariance for each class and
    ours a shared one: these are different scores.
    """
    number = len(images["fit"])
    in_our_units = {"mahalanobis": lambda scores: 2 * number * scores, "knn": lambda scores: scores.square()}
    tolerances = dict.fromkeys(("msp", "max_logit", "energy"), 1e-4)
    tolerances |= dict.fromkeys(("kl_matching", "mahalanobis", "knn", "react"), 1e-3)
    assert ours.samples is not None
    for split in ours.samples.splits:
        maps = torch.cat([network.forward_features(normalize(batch)) for batch in images[split].split(BATCH)])
        logits, features = network.forward_head(maps), network.forward_head(maps, pre_logits=True)
        inputs = {"predict_logits": logits, "predict_features": features, "predict_feature_maps": features}
        for name, tolerance in tolerances.items():
            detector = detectors[name]
            method = next(method for method in inputs if hasattr(detector, method))
            scores = getattr(detector, method)(inputs[method])
            scores = in_our_units.get(name, lambda scores: scores)(scores)
            message = f"{name} on {split}"
            np.testing.assert_allclose(ours.samples.of(split).scores[name], scores, tolerance, 1e-6, err_msg=message)
    rows = [row for row in ours.results["rows"] if row["score"] in tolerances]
    worst = max(abs(row["auroc"] - aurocs[row["score"], row["ood_set"]]) for row in rows)
    if worst > 1e-3:
        raise AssertionError(f"AUROCs differ by {worst:.2g} from the peer's")
    held = f"each image's {', '.join(tolerances)}; {len(rows)} AUROCs within {worst:.1g}"
    return f"{held}. gmm is another model there"
