"""Features are what the head takes; probes fit what is there to fit, and nothing else."""

import sys
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from conftest import ROOT, random_variables
from PIL import Image

import resjax
from resjax import convert
from resjax.analysis import probe
from resjax.config import Config, DataConfig, ModelKwargs, UsageError

KWARGS = ModelKwargs(stage_sizes=(1, 1), width=8)
CLASSES = {"ant": 3, "bee": 5, "cat": 4}


def write_images(root, classes=CLASSES, size=11):
    """A folder of colourful noise; returns it as text."""
    rng = np.random.RandomState(0)
    for split in ("train", "val"):
        for name, count in classes.items():
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.randint(0, 256, (size, size + i, 3)).astype(np.uint8)
                cv2.imwrite(str(root / split / name / f"{name}{i}.png"), pixels)
    return str(root)


@pytest.fixture(scope="module", params=["cifar_resnet20", "cifar_preact_resnet110"])
def run(request, tmp_path_factory):
    """A restored run of a tiny net with random weights, for digits."""
    config = Config(model=request.param, model_kwargs=KWARGS, data=DataConfig("digits"))
    model = resjax.create_model(request.param, stage_sizes=(1, 1), width=8)
    workdir = tmp_path_factory.mktemp("probe") / "run"
    convert.write_checkpoint(workdir, random_variables(model), config)
    return resjax.restore(workdir)


def head_of(run):
    head = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), run.variables["params"])
    return head["head"]["kernel"], head["head"]["bias"]


def check_logits(run, features, images):
    """The head of the features are the logits of the whole net."""
    kernel, bias = head_of(run)
    logits = run.model.apply(run.variables, images, train=False)
    np.testing.assert_allclose(features @ kernel + bias, logits, rtol=1e-4, atol=1e-4)


def test_the_head_of_the_features_are_the_logits_in_evaluation_mode(run):
    images = np.random.RandomState(1).randn(5, 8, 8, 3).astype(np.float32)
    features = probe.make_features(run)(images)
    kernel, _ = head_of(run)
    assert features.shape == (5, len(kernel)) and features.dtype == np.float32
    check_logits(run, features, images)


@pytest.mark.parametrize("batch_size", [1, 5, 100])
def test_a_folders_features_are_in_order_and_of_the_runs_own_preprocessing(
    run, batch_size, tmp_path
):
    root = write_images(tmp_path)
    found = probe.extract_features(run, "folder", "test", root, batch_size)
    names = sorted(
        (path.name, label, path)
        for label, name in enumerate(CLASSES)
        for path in (tmp_path / "val" / name).iterdir()
    )
    assert found.class_names == list(CLASSES)
    assert found.labels.tolist() == [label for _, label, _ in names]
    # Each file as somebody opens it in a notebook, alone.
    images = [run.preprocess(Image.open(path)) for *_, path in names]
    check_logits(run, found.values, np.concatenate(images))


def test_a_photo_on_its_side_is_turned_as_its_data_set_says(run, tmp_path):
    root = Path(write_images(tmp_path))
    image = Image.open(root / "val" / "bee" / "bee3.png").convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by 90 degrees
    for name in CLASSES:
        for path in (root / "val" / name).iterdir():
            path.unlink()
        side = root / "val" / name / "side.png"
        image.save(side, exif=exif)
    found = probe.extract_features(run, "folder", "test", str(root))
    upright = image.transpose(Image.Transpose.ROTATE_270)
    check_logits(run, found.values, np.repeat(run.preprocess(upright), 3, axis=0))


def test_features_of_a_tfds_data_set_are_of_every_example(run, data_dir):
    found = probe.extract_features(run, "digits", "test", batch_size=100)
    assert found.values.shape == (360, len(head_of(run)[0]))
    counts = np.bincount(found.labels)
    assert counts.min() >= 34 and counts.max() <= 38  # every fifth of each class
    assert len(np.unique(found.values, axis=0)) == 360


@pytest.mark.peers
@pytest.mark.parametrize("name", ["resnet18", "resnet50"])
def test_features_are_those_before_the_classifier_in_pytorch(name, tmp_path):
    import torch

    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_torch_golden
    import parity

    net = make_torch_golden.load(name).eval()
    state = {key: value.float().numpy() for key, value in net.state_dict().items()}
    config = Config(
        model=name,
        num_classes=parity.NUM_CLASSES,
        data=DataConfig("imagenet2012", image_size=64),
    )
    convert.write_checkpoint(tmp_path / "run", resjax.from_torch(state, name), config)
    images = parity.images(64, 3)
    found = probe.make_features(resjax.restore(tmp_path / "run"))(images)
    net.fc = torch.nn.Identity()
    with torch.no_grad():
        expected = net(make_torch_golden.tensor(images)).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


# --- which images -------------------------------------------------------------------

LABELS = np.random.RandomState(3).permutation(np.repeat([0, 1, 2], [9, 12, 30]))


@pytest.mark.parametrize("seed", [0, 7])
def test_subsets_grow_within_each_class(seed):
    before: set[int] = set()
    for count in (1, 2, 5, 9):
        subset = probe.draw_subset(LABELS, count, seed)
        assert np.bincount(LABELS[subset]).tolist() == [count] * 3
        assert len(set(subset)) == len(subset) and before <= set(subset)
        assert (np.diff(subset) > 0).all()
        before = set(subset)
    everything = probe.draw_subset(LABELS, None, seed)
    np.testing.assert_array_equal(everything, np.arange(len(LABELS)))


def test_subsets_are_of_the_seed_and_of_the_class_alone():
    one, again, other = (probe.draw_subset(LABELS, 4, seed) for seed in (0, 0, 1))
    np.testing.assert_array_equal(one, again)
    assert set(one) != set(other)
    without = np.flatnonzero(LABELS != 1)
    fewer = without[probe.draw_subset(LABELS[without], 4, 0)]
    np.testing.assert_array_equal(fewer, [i for i in one if LABELS[i] != 1])


def test_every_image_of_a_class_is_as_likely_to_be_drawn():
    draws = [probe.draw_subset(LABELS, 3, seed) for seed in range(400)]
    counts = np.bincount(np.concatenate(draws), minlength=len(LABELS))
    for label, size in enumerate([9, 12, 30]):
        expected = 400 * 3 / size
        own = counts[label == LABELS]
        assert abs(own - expected).max() < 4.5 * np.sqrt(expected)


# --- the fit ------------------------------------------------------------------------


def clusters(distance, num=60, seed=0, dim=6):
    """Features of three classes around corners `distance` apart, of unequal scales."""
    rng = np.random.RandomState(seed)
    labels = np.arange(num) % 3
    values = rng.randn(num, dim)
    values[np.arange(num), labels] += distance
    values = (values + 5) * np.resize([1e-3, 1, 1e3], dim)
    return probe.Features(np.float32(values), labels.astype(np.int32), ["a", "b", "c"])


def test_classes_that_are_apart_are_told_apart():
    rows = probe.learning_curve(clusters(30), clusters(30, seed=1), [5, 10, None], [0, 1])
    assert [row["top1"] for row in rows] == [100] * 5
    assert [row["num_train"] for row in rows] == [15, 15, 30, 30, 60]
    assert [row["images_per_class"] for row in rows] == [5, 5, 10, 10, None]
    assert [row["seed"] for row in rows] == [0, 1, 0, 1, 0]


@pytest.mark.parametrize("penalty_inverse", [1.0, None])
def test_labels_that_mean_nothing_give_chance(penalty_inverse):
    train = clusters(0, 120)
    test = clusters(0, 3000, seed=1)
    rows = probe.learning_curve(train, test, [10, None], [0], penalty_inverse)
    for row in rows:  # four deviations of a binomial share of 3,000
        assert abs(row["top1"] - 100 / 3) < 400 * np.sqrt(2 / 9 / 3000)


@pytest.mark.parametrize("c", [0.01, 1.0, 10.0])
def test_the_fit_is_where_the_gradient_of_the_stated_objective_is_nothing(c):
    train = clusters(1.5)
    fitted = probe.fit_probe(train.values, train.labels, c)
    values = train.values.astype(np.float64)
    x = (values - values.mean(axis=0)) / values.std(axis=0)
    weights, biases = fitted[-1].coef_.T, fitted[-1].intercept_
    logits = x @ weights + biases
    exp = np.exp(logits - logits.max(axis=1, keepdims=True))
    error = exp / exp.sum(axis=1, keepdims=True) - np.eye(3)[train.labels]
    gradient = c * x.T @ error + weights
    scale = np.abs(c * x.T @ error).max()
    assert scale > 0.01
    np.testing.assert_allclose(gradient / scale, 0, atol=1e-3)
    np.testing.assert_allclose(c * error.sum(axis=0) / scale, 0, atol=1e-3)


def test_the_scale_of_the_features_makes_no_difference():
    train, test = clusters(1.5), clusters(1.5, 90, seed=1)
    scale = np.float32(2.0) ** np.arange(-2, 4)
    moved = [each._replace(values=each.values * scale) for each in (train, test)]
    rows = probe.learning_curve(train, test, [5, None], [0, 1])
    assert rows == probe.learning_curve(*moved, [5, None], [0, 1])
    assert 50 < rows[0]["top1"] < 100


def test_a_feature_that_never_changes_is_harmless():
    train, test = clusters(30), clusters(30, seed=1)
    dead = [
        each._replace(values=np.pad(each.values, [(0, 0), (0, 1)]))
        for each in (train, test)
    ]
    assert [row["top1"] for row in probe.learning_curve(*dead, [5], [0])] == [100]


def test_cross_validation_takes_a_strong_penalty_where_nothing_can_be_learned():
    noise = clusters(0, 90, dim=40)
    assert probe.fit_probe(noise.values, noise.labels, None)[-1].C <= 0.01
    apart = clusters(30)
    chosen = probe.fit_probe(apart.values, apart.labels, None)[-1].C
    assert chosen >= 1


def test_of_one_image_a_class_there_is_nothing_to_choose_by():
    (row,) = probe.learning_curve(clusters(3), clusters(3, seed=1), [1], [0], None)
    assert row["penalty_inverse"] == probe.PENALTY_INVERSE


# --- what a user can get wrong ------------------------------------------------------


def message(function, *arguments):
    with pytest.raises(UsageError) as error:
        function(*arguments)
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize("count", [10, 0, -1])
def test_more_images_than_the_rarest_class_has_are_refused_by_its_name(count):
    features = probe.Features(np.zeros((51, 2)), LABELS, ["ant", "bee", "cat"])
    text = message(probe.learning_curve, features, features, [1, count])
    assert text == (
        f"images_per_class: {count}, but class 'ant' has 9; allowed: 1 to 9, or all"
    )
    assert "class '0' has 9" in message(probe.draw_subset, LABELS, count, 0)


def test_one_class_is_no_task():
    assert "only one" in message(probe.fit_probe, np.zeros((4, 2)), np.zeros(4, int))


@pytest.mark.parametrize("c", [0.0, -1.0, float("nan")])
def test_a_penalty_that_is_none_is_refused(c):
    told = message(probe.fit_probe, np.zeros((4, 2)), np.arange(4) % 2, c)
    assert told == f"penalty_inverse: {c} is not greater than 0"


def test_a_class_folder_without_images_is_named(run, tmp_path):
    root = write_images(tmp_path)
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").write_text("none yet")
    told = message(probe.extract_features, run, "folder", "train", root)
    assert str(tmp_path / "train" / "dog") in told and "has no image" in told


def test_a_damaged_image_is_named(run, tmp_path):
    root = write_images(tmp_path)
    (tmp_path / "train" / "cat" / "cat2.png").write_bytes(b"no image")
    told = message(probe.extract_features, run, "folder", "train", root)
    assert "train/cat/cat2.png" in told and "no readable image" in told


@pytest.mark.parametrize(
    "words, told",
    [
        (("folders", "train"), "'folders'"),
        (("folder", "validation"), "'validation'"),
        (("folder", "train", None), "config.data.dir"),
    ],
)
def test_a_data_set_that_is_not_there_is_named(run, words, told):
    assert told in message(probe.extract_features, run, *words)


def test_a_batch_of_nothing_is_refused(run, tmp_path):
    root = write_images(tmp_path)
    told = message(probe.extract_features, run, "folder", "train", root, 0)
    assert told == "batch_size: 0 is not greater than 0"
