"""Pictures of a feature space: which images they show, and where."""

import forked
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from matplotlib.colors import to_rgba
from test_evaluation import OOD_SIZES, TEST, Pixels, evaluate, module

from callbacks.embedding import Embedding, FeatureSample, embedding_figure
from callbacks.evaluation import OODEvaluation
from lightning_modules.evidence import Evidence
from lightning_modules.scores.logits import MSP

SIZES = {"id": 40, "a": 30, "b": 3}
SMALL = Embedding("layer1", points=60, perplexity=5)


def batches(split, features, order, size=7):
    """Yield the rows of a split, in some order, in batches."""
    for start in range(0, len(order), size):
        ids = torch.from_numpy(order[start : start + size])
        labels = ids % 3 if split == "id" else torch.full_like(ids, -1)
        evidence = Evidence(torch.empty(len(ids), 0), {"tap": torch.from_numpy(features[ids])}, {}, None)
        yield split, ids, labels, evidence


def collected(features, embedding, sizes=SIZES):
    sample, rng = FeatureSample(embedding, sizes), np.random.default_rng(5)
    for split in ("fit", *sizes):
        for batch in batches(split, features[split], rng.permutation(len(features[split]))):
            sample.add(*batch)
    sample.gather()
    return sample


def random_features(width=8, sizes=SIZES):
    rng = np.random.default_rng(0)
    named = {"fit": 9} | sizes
    return {name: rng.normal(size=(size, width)).astype(np.float32) for name, size in named.items()}


def dots(figure):
    """Label of a scatter -> its (n, 2) points."""
    return {dots.get_label(): np.asarray(dots.get_offsets()) for dots in figure.axes[0].collections}


def test_the_choice_depends_on_seed_and_sizes_alone_and_gives_id_one_half():
    sizes = {"id": 1000, "a": 500, "b": 3, "c": 90}
    embedding = Embedding("tap", points=300)
    chosen = embedding.choose(sizes)
    assert {name: len(ids) for name, ids in chosen.items()} == {"id": 150, "a": 50, "b": 3, "c": 50}
    for name, ids in chosen.items():
        assert len(ids.unique()) == len(ids)
        assert 0 <= ids.min() <= ids.max() < sizes[name]
    assert all(torch.equal(ids, chosen[name]) for name, ids in embedding.choose(sizes).items())
    assert not torch.equal(Embedding("tap", points=300, seed=1).choose(sizes)["id"], chosen["id"])


@pytest.mark.parametrize("perplexity", [0.5, 60.0])
def test_a_perplexity_that_cannot_be_is_refused(perplexity):
    with pytest.raises(ValueError, match="perplexity of at least 1 and more points than that"):
        Embedding("tap", points=60, perplexity=perplexity)


def test_exactly_the_chosen_images_are_kept_in_order_whatever_the_batches():
    features, embedding = random_features(), Embedding("tap", points=40, perplexity=5)
    sample, chosen = collected(features, embedding), embedding.choose(SIZES)
    assert sample.features.keys() == SIZES.keys()
    for name, ids in chosen.items():
        np.testing.assert_array_equal(sample.features[name], features[name][ids])
    np.testing.assert_array_equal(sample.labels["id"], chosen["id"] % 3)


def test_components_equal_a_singular_value_decomposition():
    features = random_features()
    figures = collected(features, Embedding("tap", points=500, perplexity=5)).figures(["x", "y", "z"])
    assert figures.keys() == {"embedding_pca", "embedding_tsne"}
    rows = np.concatenate([features[name] for name in SIZES]).astype(np.float64)
    left, sizes, _ = np.linalg.svd(rows - rows.mean(0), full_matrices=False)
    expected = dict(zip(SIZES, np.split(left[:, :2] * sizes[:2], np.cumsum([*SIZES.values()])[:-1]), strict=True))
    found = dots(figures["embedding_pca"])
    assert [*found] == ["x", "y", "z", "a", "b"]
    for label, name in enumerate("xyz"):
        np.testing.assert_allclose(np.abs(found[name]), np.abs(expected["id"][label::3]), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.abs(found["a"]), np.abs(expected["a"]), rtol=1e-5, atol=1e-6)
    share = sizes[0] ** 2 / (sizes**2).sum()
    assert figures["embedding_pca"].axes[0].get_xlabel() == f"{share:.0%} of the variance"
    assert {name: len(points) for name, points in dots(figures["embedding_tsne"]).items()} == {
        name: len(points) for name, points in found.items()
    }


def test_neighbours_stay_neighbours_and_a_seed_decides():
    features = random_features()
    for name, centre in (("id", 0), ("a", 100), ("b", 200)):
        features[name] += centre
    embedding = Embedding("tap", points=500, perplexity=5)
    (first, again) = (dots(collected(features, embedding).figures(["x", "y", "z"])["embedding_tsne"]) for _ in "12")
    known = np.concatenate([first[name] for name in "xyz"])
    spread = np.linalg.norm(known - known.mean(0), axis=1).max()
    assert np.linalg.norm(first["a"].mean(0) - known.mean(0)) > 1.5 * spread
    assert all((again[name] == points).all() for name, points in first.items())


@pytest.mark.parametrize(
    ("classes", "named"), [(2, True), (10, True), (11, True), (18, True), (19, False), (200, False)]
)
def test_classes_have_colours_of_their_own_and_the_legend_stays_short(classes, named):
    labels = np.append(np.arange(classes), [-1, -1])
    splits = np.append(np.full(classes, "id"), ["a", "b"])
    points = np.random.default_rng(0).normal(size=(classes + 2, 2))
    names = [f"class {label}" for label in range(classes)]
    figure = embedding_figure(points, labels, splits, names)
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == [*(names if named else []), "a", "b"]
    assert len(figure.axes) == (1 if named else 2)  # a bar of colours
    figure.draw_without_rendering()  # which is when a scale gives out its colours
    *known, a, b = figure.axes[0].collections
    colours = {tuple(colour) for scatter in known for colour in scatter.get_facecolors()}
    assert len(colours) == classes
    assert all(len({*colour[:3]}) > 1 for colour in colours)
    for scatter in (a, b):
        red, green, blue, _ = to_rgba(scatter.get_edgecolors()[0])
        assert red == green == blue


def test_images_whose_features_are_not_finite_are_left_out():
    features = random_features()
    features["id"][3:5, 0] = np.nan, np.inf
    sample = collected(features, Embedding("tap", points=500, perplexity=5))
    with pytest.warns(UserWarning, match="tap tap leave 2 images out, whose features are not finite"):
        figures = sample.figures(["x", "y", "z"])
    assert sum(map(len, dots(figures["embedding_tsne"]).values())) == sum(SIZES.values()) - 2


@pytest.mark.filterwarnings("ignore:the pictures of tap")
@pytest.mark.parametrize("value", [0.0, np.nan])
def test_features_that_show_nothing_are_not_drawn(value):
    features = {name: np.full_like(rows, value) for name, rows in random_features().items()}
    sample = collected(features, Embedding("tap", points=500, perplexity=5))
    with pytest.warns(UserWarning, match="there is no picture of tap tap: its features are all the same"):
        assert sample.figures(["x", "y", "z"]) == {}


def test_a_single_feature_makes_no_picture():
    with pytest.raises(ValueError, match="tap tap has a single feature"):
        collected(random_features(width=1), Embedding("tap", points=500, perplexity=5))


def evaluation(embedding, folder=None, **kwargs):
    return OODEvaluation({"msp": MSP()}, bootstrap=0, figures=False, embedding=embedding, folder=folder, **kwargs)


def test_an_evaluation_leaves_the_pictures_and_nothing_else_changes(tmp_path):
    plain = evaluate(evaluation(None))
    drawn = evaluate(evaluation(SMALL, str(tmp_path)), data=Pixels(eval_batch_size=9))
    assert {path.name for path in (tmp_path / "figures").iterdir()} == {"embedding_pca.png", "embedding_tsne.png"}
    assert drawn.results.keys() == plain.results.keys()
    assert [row.keys() for row in drawn.results["rows"]] == [row.keys() for row in plain.results["rows"]]
    assert {name: len(rows) for name, rows in drawn._features.features.items()} == {"id": 30} | {
        name: min(size, 5) for name, size in OOD_SIZES.items()
    }
    model, images = module(), Pixels()
    images.setup()
    ids = SMALL.choose({"id": TEST} | OOD_SIZES)["id"]
    batch = images.on_after_batch_transfer(images.sets["id"][ids], 0)
    _, features = model.backbone.forward_intermediates(batch.images, {"layer1"})
    np.testing.assert_allclose(drawn._features.features["id"], features["layer1"].detach(), rtol=1e-4, atol=1e-6)


def test_a_truncated_evaluation_chooses_among_the_images_it_sees():
    sample = evaluate(evaluation(SMALL), limit_test_batches=1)._features
    assert len(sample.features["id"]) == 16  # a batch; half of the points would be more


def test_too_few_images_are_refused_before_the_first():
    seen = []
    model = module()
    model.register_forward_hook(lambda *_: seen.append(1))
    with pytest.raises(ValueError, match=r"perplexity of 200 takes more than 200 images, and the embedding shows \d+:"):
        evaluate(evaluation(Embedding("layer1", perplexity=200)), model)
    assert not seen


def test_a_tap_that_the_network_does_not_have_is_refused_in_words():
    with pytest.raises(ValueError, match="DigitsNet has no tap layer9; its taps: penultimate"):
        evaluate(evaluation(Embedding("layer9")))


def test_the_command_line_and_yaml_build_it():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(OODEvaluation, "evaluation")
    scores = "--evaluation.scores={}"
    given = parser.parse_args([scores, "--evaluation.embedding.tap", "latent", "--evaluation.tau_source", "test_known"])
    built = parser.instantiate_classes(given).evaluation
    assert (built.embedding, built.tau_source) == (Embedding("latent"), "test_known")
    text = "evaluation: {scores: {}, thresholds: true, embedding: {tap: latent, points: 600}}"
    built = parser.instantiate_classes(parser.parse_string(text)).evaluation
    assert (built.embedding, built.thresholds) == (Embedding("latent", points=600), True)


def evaluate_a_share(folder):
    sample = evaluate(
        evaluation(SMALL, thresholds=True), strategy="ddp", devices=2, use_distributed_sampler=False
    )._features
    torch.save((sample.features, sample.labels), folder / f"{torch.distributed.get_rank()}.pt")


def test_two_processes_show_what_one_does(tmp_path):
    expected = evaluate(evaluation(SMALL))._features
    log = tmp_path / "log"
    assert forked.run(evaluate_a_share, tmp_path, processes=2, log=log) == [0, 0], log.read_text()[-3000:]
    for rank in range(2):
        features, labels = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert features.keys() == expected.features.keys()
        for name, rows in expected.features.items():
            np.testing.assert_allclose(features[name], rows, rtol=1e-4, atol=1e-6)
            np.testing.assert_array_equal(labels[name], expected.labels[name])
