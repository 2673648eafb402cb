"""The same job done with pytorch-ood, in the style of its documentation; import it only where that is installed."""

from typing import Any

import torch
from pytorch_ood.api import Detector
from pytorch_ood.benchmark.base import Benchmark
from pytorch_ood.detector import GMM, KNN, EnergyBased, KLMatching, Mahalanobis, MaxLogit, MaxSoftmax, ReAct
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from backbones.backbone import Backbone
from benchmarks.job import BATCH, NEIGHBOUR, QUANTILE, labels_of, normalize


class Model(nn.Module):
    """A network as pytorch-ood wants it: logits from the call, pooled features from ``features``."""

    def __init__(self, network: Backbone) -> None:
        super().__init__()
        self.network = network

    def features(self, images: Tensor) -> Tensor:
        return self.network.forward_head(self.network.forward_features(images), pre_logits=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)


class PatternsBenchmark(Benchmark):
    """The images as one of its benchmarks: normalised beforehand, which spares it its input pipeline."""

    def __init__(self, images: dict[str, Tensor]) -> None:
        known = {name: images[name] for name in ("fit", "id")}
        self.train, self.test = (TensorDataset(normalize(x), labels_of(x)) for x in known.values())
        self.ood = {
            name: TensorDataset(normalize(x), torch.full((len(x),), -1))
            for name, x in images.items()
            if name not in known
        }
        self.ood_names = list(self.ood)

    def train_set(self) -> Dataset[Any]:
        return self.train

    def test_sets(self, known: bool = True, unknown: bool = True) -> list[Dataset[Any]]:
        return [ConcatDataset([self.test, unknown_set]) for unknown_set in self.ood.values()]


def detectors(network: Backbone, shared_encoder: bool = False) -> dict[str, Detector]:
    """Make the eight, under our names.

    Args:
        network: what they detect with.
        shared_encoder: hand all the same ``model.features`` object, which lets the peer's cache recognise it; written
            out at each detector, as documented, every one is a bound method of its own.
    """
    model = Model(network)
    features = model.features
    encoders = [features if shared_encoder else model.features for _ in range(4)]
    return {
        "msp": MaxSoftmax(model),
        "max_logit": MaxLogit(model),
        "energy": EnergyBased(model),
        "kl_matching": KLMatching(model),
        "mahalanobis": Mahalanobis(encoders[0]),
        "gmm": GMM(encoders[1]),
        "knn": KNN(encoders[2], k=NEIGHBOUR),
        "react": ReAct(encoders[3], network.head, percentile=QUANTILE),
    }


def run_peer(benchmark: PatternsBenchmark, peers: dict[str, Detector]) -> dict[tuple[str, str], float]:
    """Fit on the training images and evaluate: (score, OOD set) -> AUROC."""
    for detector in peers.values():
        detector.to("cpu").fit(DataLoader(benchmark.train_set(), batch_size=BATCH))
    rows = benchmark.evaluate(list(peers.values()), loader_kwargs={"batch_size": BATCH})
    names = {type(detector).__name__: name for name, detector in peers.items()}
    return {(names[row["Detector"]], row["Dataset"]): row["AUROC"] for row in rows}
