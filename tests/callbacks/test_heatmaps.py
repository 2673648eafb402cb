"""Pictures of heatmaps: which images they show, on which scale, beside what."""

from collections import defaultdict

import forked
import numpy as np
import pytest
import torch
from matplotlib import colormaps
from test_evaluation import OOD_SIZES, TEST, TRAIN, Pixels, evaluate, module

from callbacks.evaluation import OODEvaluation
from callbacks.heatmaps import Heatmaps, HeatmapSample, heatmap_figure, scale_end, spread
from lightning_modules.classifier import Classifier
from lightning_modules.evidence import Evidence
from lightning_modules.scores.logits import MSP

SETS = ("id", *OOD_SIZES)


class Drawing(Classifier):
    """Would have each image be its negative, in part."""

    def forward(self, images):
        return super().forward(images)._replace(maps=-images / 2)


def drawn(model=None, folder=None, data=None, **options):
    heatmaps = Heatmaps(**options) if options else None
    evaluation = OODEvaluation({"msp": MSP()}, bootstrap=0, heatmaps=heatmaps, folder=folder)
    return evaluate(evaluation, model or module(Drawing), data or Pixels())


def panels(figure, part):
    """The pictures of one part, row by row; each row is labelled at its left."""
    rows = defaultdict(list)
    for axes in figure.axes:
        if axes.images:
            rows[axes.get_subplotspec().rowspan.start].append(axes)
    return [[axes.images[0] for axes in row] for row in rows.values() if row[0].texts[0].get_text() == part]


def figure_of(evaluation, data=None):
    data = data or Pixels()
    data.setup()
    return evaluation.heatmap_sample.figure(data)


def test_all_heatmaps_share_one_stated_scale():
    evaluation = drawn(images=4)
    figure = figure_of(evaluation)
    shown = panels(figure, "heatmap")
    assert [len(row) for row in shown] == [min(4, size) for size in (TEST, *OOD_SIZES.values())]
    pixels = np.concatenate([np.abs(evaluation.heatmap_sample.maps[name]).max(1).ravel() for name in OOD_SIZES])
    end = np.quantile(pixels, 0.99)
    assert {image.get_clim() for row in shown for image in row} == {(0, end)}
    assert {image.get_cmap().name for row in shown for image in row} == {"inferno"}
    assert {image.get_interpolation() for row in shown for image in row} == {"nearest"}
    assert figure.get_suptitle() == f"one scale for all: 0 to {end:.3g}, 99.0% of the OOD pixels shown lie below"
    bars = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert [axes.get_ylim() for axes in bars] == [(0, end)]


def test_the_scale_goes_by_ood_maps_and_the_largest_channel():
    maps = {"id": np.full((1, 2, 1, 1), 0.9), "a": np.array([0.1, -0.4, 0.2, 0.0]).reshape(2, 2, 1, 1)}
    assert scale_end(maps, 1.0) == 0.4
    assert scale_end(maps, 0.5) == pytest.approx(0.3)  # of 0.4 and 0.2
    assert scale_end(maps | {"b": np.full((1, 2, 1, 1), -0.8)}, 1.0) == 0.8


def test_maps_of_zero_are_drawn_in_the_lowest_colour():
    images, zeros = np.ones((2, 3, 3, 1)), np.zeros((2, 1, 3, 3))
    end = scale_end({"id": zeros, "a": zeros})
    figure = heatmap_figure({"id": {"image": images, "heatmap": zeros[:, 0]}}, end)
    for picture, *_ in panels(figure, "heatmap"):
        colours = picture.to_rgba(picture.get_array())
        assert (colours == colormaps["inferno"](0.0)).all()


def test_images_are_shown_as_they_are_above_their_maps():
    data = Pixels(mean=[0.1], std=[0.7])
    evaluation = drawn(images=3, signed=True, reconstruction=True, data=data)
    figure = figure_of(evaluation, data)
    end = scale_end(evaluation.heatmap_sample.maps)
    for index, name in enumerate(SETS):
        rows = spread(data.sizes[name], 3)
        pixels = data.sets[name].read(rows).numpy()[:, 0] / 255
        maps = -(pixels - 0.1) / 0.7 / 2
        expected = {
            "image": pixels,
            "heatmap": np.abs(maps),
            "signed": 0.5 + maps / (2 * end),
            "reconstruction": pixels + maps / 2,
        }
        for part, values in expected.items():
            for picture, value in zip(panels(figure, part)[index], values, strict=True):
                array = np.asarray(picture.get_array())
                array = array if part == "heatmap" else array[..., 0]
                np.testing.assert_allclose(array, value if part == "heatmap" else value.clip(0, 1), atol=1e-6)


def test_colours_stay_colours():
    images = np.random.default_rng(0).random((2, 4, 4, 3))
    figure = heatmap_figure({"id": {"image": images, "heatmap": images[..., 0]}}, 1.0)
    for picture, image in zip(panels(figure, "image")[0], images, strict=True):
        np.testing.assert_array_equal(picture.get_array(), image)


def test_the_paired_image_is_the_nearest_training_image_of_the_same_predicted_class():
    data, model = Pixels(ood_sizes={"a": 31, "b": 17}), module(Drawing)
    evaluation = drawn(model, images=5, paired=True, data=data)
    normalise = lambda images: (images / 255 - 0.5) / 0.5  # noqa: E731
    with torch.no_grad():
        known = model(normalise(data.sets["fit"].read(torch.arange(TRAIN))))
        for name in ("id", "a", "b"):
            queries = model(normalise(data.sets[name].read(spread(data.sizes[name], 5))))
            distances = torch.cdist(
                queries.features["penultimate"].double(), known.features["penultimate"].double()
            ).masked_fill(queries.logits.argmax(1)[:, None] != known.logits.argmax(1), torch.inf)
            assert torch.equal(evaluation.heatmap_sample.neighbours[name], distances.argmin(1))
            assert distances.min(1).values.isfinite().all()
    assert evaluation.results["forwards"] == {"images": TEST + 31 + 17, "heatmaps": TRAIN}
    pictures = panels(figure_of(evaluation, data), "paired")
    expected = data.sets["fit"].read(evaluation.heatmap_sample.neighbours["a"]).numpy()[:, 0] / 255
    for picture, image in zip(pictures[1], expected, strict=True):
        np.testing.assert_allclose(np.asarray(picture.get_array())[..., 0], image, atol=1e-6)


def test_where_no_training_image_has_the_class_the_nearest_of_all_is_paired():
    class Elsewhere(Drawing):
        """Predicts the last class of the darkest images alone."""

        def forward(self, images):
            evidence = super().forward(images)
            dark = images.mean((1, 2, 3)) < -0.8
            logits = torch.stack([1 - dark.float(), torch.zeros(len(images)), dark.float()], 1)
            return evidence._replace(logits=logits)

    data, model = Pixels(ood_sizes={"a": 3, "b": 3, "c": 3, "d": 3, "e": 3, "f": 3, "g": 3, "h": 3}), module(Elsewhere)
    evaluation = drawn(model, images=3, paired=True, data=data)
    with torch.no_grad():
        known, dark = (
            model((data.sets[name].read(torch.arange(data.sizes[name])) / 255 - 0.5) / 0.5) for name in ("fit", "h")
        )
    assert (dark.logits.argmax(1) == 2).all()
    assert (known.logits.argmax(1) == 0).all()
    distances = torch.cdist(dark.features["penultimate"].double(), known.features["penultimate"].double())
    assert torch.equal(evaluation.heatmap_sample.neighbours["h"], distances.argmin(1))


def test_a_method_with_maps_is_drawn_without_being_asked(tmp_path):
    evaluation = drawn(folder=str(tmp_path))
    assert (tmp_path / "figures" / "heatmaps.png").stat().st_size > 10_000
    assert evaluation.results["forwards"] == {"images": TEST + sum(OOD_SIZES.values())}
    assert len(panels(figure_of(evaluation), "heatmap")[0]) == 8


def test_of_a_truncated_test_the_images_that_it_saw_are_drawn():
    evaluation = OODEvaluation({"msp": MSP()}, bootstrap=0, heatmaps=Heatmaps(images=30))
    evaluate(evaluation, module(Drawing), Pixels(), limit_test_batches=1)
    assert {name: len(maps) for name, maps in evaluation.heatmap_sample.maps.items()} == {
        name: min(16, size) for name, size in {"id": TEST, **OOD_SIZES}.items()
    }


def test_maps_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match="heatmaps are asked for, and Classifier yields none"):
        drawn(module(), images=2)
    with pytest.raises(ValueError, match="figures are false"):
        OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False, heatmaps=Heatmaps())
    with pytest.raises(ValueError, match="at least 1 of the images of each set must be shown, got 0"):
        Heatmaps(images=0)


def test_a_method_without_maps_has_no_such_picture(tmp_path):
    drawn(module(), str(tmp_path))
    assert not (tmp_path / "figures" / "heatmaps.png").exists()


def test_rows_are_shown_by_id_whatever_the_batches():
    sample, sizes = HeatmapSample(Heatmaps(images=3), {"id": 9, "a": 4}), {"id": 9, "a": 4}
    maps = {name: torch.randn(size, 1, 2, 2) for name, size in sizes.items()}
    for name, size in sizes.items():
        order = torch.randperm(size, generator=torch.Generator().manual_seed(1))
        for ids in order.split(2):
            evidence = Evidence(
                torch.zeros(len(ids), 2), {"penultimate": torch.zeros(len(ids), 1)}, {}, maps[name][ids]
            )
            sample.add(name, ids, evidence)
        sample.add("fit", torch.tensor([0]), evidence)
    assert sample.gather(None, None, None) == 0
    assert sample.maps.keys() == sizes.keys()
    np.testing.assert_array_equal(sample.maps["id"], maps["id"][[0, 3, 6]])
    np.testing.assert_array_equal(sample.maps["a"], maps["a"][[0, 1, 2]])


def draw_and_save(path):
    evaluation = OODEvaluation({"msp": MSP()}, bootstrap=0, heatmaps=Heatmaps(images=6, paired=True))
    evaluate(evaluation, module(Drawing), Pixels(), devices=2, strategy="ddp", use_distributed_sampler=False)
    if evaluation.results:
        found = {f"maps_{name}": values for name, values in evaluation.heatmap_sample.maps.items()}
        found |= {f"rows_{name}": rows.numpy() for name, rows in evaluation.heatmap_sample.neighbours.items()}
        np.savez(path, forwards=evaluation.results["forwards"]["heatmaps"], **found)


def test_two_processes_draw_what_one_does(tmp_path):
    alone = drawn(images=6, paired=True)
    log = tmp_path / "log"
    assert forked.run(draw_and_save, str(tmp_path / "found.npz"), processes=2, log=log) == [0, 0], log.read_text()
    found = np.load(tmp_path / "found.npz")
    assert found["forwards"] == TRAIN
    for name in SETS:
        np.testing.assert_array_equal(found[f"maps_{name}"], alone.heatmap_sample.maps[name])
        np.testing.assert_array_equal(found[f"rows_{name}"], alone.heatmap_sample.neighbours[name])
