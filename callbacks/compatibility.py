"""Do data and network fit together? Asked once, before anything runs."""

from pytorch_lightning import Callback, LightningModule, Trainer

from backbones.autoencoders import Autoencoder
from backbones.backbone import Backbone
from datamodules.datamodule import OODDataModule
from lightning_modules.ood_module import OODModule


class Compatibility(Callback):
    """Compares class count, image shape, normalisation and outliers of data module and method in words."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Raise a ``ValueError`` where the two do not fit."""
        data = trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(pl_module, OODModule) and isinstance(data, OODDataModule):
            check_compatibility(data, pl_module.backbone)
            if stage == "fit" and pl_module.needs_outliers and data.outlier_feed is None:
                raise ValueError(
                    f"{type(pl_module).__name__} is trained with auxiliary outliers, and {type(data).__name__} feeds "
                    "none: set outlier_feed of the data to paired, and num_outliers not to 0"
                )


def check_compatibility(data: OODDataModule, backbone: Backbone | Autoencoder) -> None:
    """Raise a ``ValueError`` that says both sides where data and network do not fit."""
    network, sets = type(backbone).__name__, type(data).__name__
    if isinstance(backbone, Backbone) and data.num_classes != backbone.num_classes:
        raise ValueError(f"{network} has {backbone.num_classes} classes, the ID data of {sets} {data.num_classes}")
    if tuple(data.image_shape) != tuple(backbone.input_shape):
        raise ValueError(
            f"{network} reads images of shape {tuple(backbone.input_shape)} (C, H, W), {sets} serves "
            f"{tuple(data.image_shape)}; set the network's input_shape or let the data resize"
        )
    normalizes = isinstance(backbone, Backbone) and backbone.mean is not None
    if data.normalizes and normalizes:
        raise ValueError(
            f"images would be normalised twice: {sets} and {network} both have mean and std; drop one pair"
        )
    if not data.normalizes and not normalizes:
        raise ValueError(
            f"nobody normalises: neither {sets} nor {network} has mean and std; "
            "for images left in [0, 1] say data mean [0.0], std [1.0]"
        )
