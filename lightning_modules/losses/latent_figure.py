"""A picture of how a latent space took shape."""

from matplotlib.figure import Figure
from torch import Tensor

from lightning_modules.losses.latent_statistics import COURSE


def course_figure(course: Tensor) -> Figure:
    """Draw the (epochs, 6) course of training: distances against the margin that was asked for, norms, deviations."""
    curves = dict(zip(COURSE, course.cpu().T.numpy(), strict=True))
    epochs = range(len(course))
    figure = Figure(figsize=(10, 3), layout="constrained")
    distances, norms, deviations = figure.subplots(1, 3)
    distances.plot(epochs, curves["least_distance"], color="tab:blue", label="nearest two class means")
    distances.plot(epochs, curves["margin"], color="black", linestyle=":", label="margin")
    distances.set(title="distance between classes", ylim=(0, None))
    distances.legend(fontsize=7)
    norms.fill_between(epochs, curves["least_norm"], curves["greatest_norm"], alpha=0.3, linewidth=0)
    norms.plot(epochs, curves["mean_norm"])
    norms.set(title="length of class means: least, mean, greatest", ylim=(0, None))
    deviations.plot(epochs, curves["sigma"])
    deviations.axhline(0.1, color="black", linestyle=":", linewidth=1)
    deviations.set(title="deviation of posteriors (dotted: of priors)", ylim=(0, None))
    for panel in (distances, norms, deviations):
        panel.set_xlabel("epoch")
        panel.title.set_fontsize(9)
    return figure
