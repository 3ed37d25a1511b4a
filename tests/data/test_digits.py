"""The digits: 1,797 real images, split for ever, prepared and read without TensorFlow."""

import collections
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT
from sklearn.datasets import load_digits

from resjax.data import sources
from resjax.data.decode import decode
from resjax.data.digits import split_indices


@pytest.fixture(scope="module")
def digits():
    return load_digits()


@pytest.fixture
def examples(data_dir):
    """{"train", "test"}: the pixels and the label of every example, as read back."""

    def read(split):
        source = sources.open_source("digits", str(data_dir), split)
        return [(decode(e["image"]), int(e["label"])) for e in source]

    return {split: read(split) for split in ("train", "test")}


def test_split_is_disjoint_and_whole(digits):
    split = split_indices(digits.target)
    assert {name: len(indices) for name, indices in split.items()} == {
        "train": 1437,
        "test": 360,
    }
    both = np.concatenate([split["train"], split["test"]])
    assert sorted(both) == list(range(1797))


def test_split_keeps_the_shares_of_the_classes(digits):
    share = np.bincount(digits.target) * 360 / 1797
    in_test = np.bincount(digits.target[split_indices(digits.target)["test"]])
    assert (np.abs(in_test - share) <= 1).all()


def test_split_is_frozen(digits):
    # Every fifth of the examples, walked class by class in the order of
    # numpy.random.RandomState(0).permutation(1797), written down once.
    test = split_indices(digits.target)["test"]
    assert list(test[:10]) == [9, 12, 15, 27, 34, 39, 52, 59, 62, 63]
    assert test.sum() == 337431


def test_test_split_is_spread_over_the_set(digits):
    # Neighbours in the set were written by one person, whom a block would hold out.
    test = split_indices(digits.target)["test"]
    counts, _ = np.histogram(test, bins=9, range=(0, 1797))
    assert counts.min() >= 20


def counted(images, labels):
    """How often each (pixels, label) occurs; tfds has an order of its own."""
    return collections.Counter(
        (image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True)
    )


@pytest.mark.parametrize("split", ["train", "test"])
def test_pixels_and_labels_are_those_of_scikit_learn(digits, examples, split):
    grey = np.round(digits.images * 255 / 16).astype(np.uint8)
    expected = np.repeat(grey[:, :, :, None], 3, axis=3)
    indices = split_indices(digits.target)[split]
    assert counted(expected[indices], digits.target[indices]) == counted(
        *zip(*examples[split], strict=True)
    )


def test_both_splits_are_the_whole_set(digits, examples):
    labels = [label for split in examples.values() for _, label in split]
    np.testing.assert_array_equal(np.bincount(labels), np.bincount(digits.target))


@pytest.mark.slow
def test_prepares_and_reads_without_tensorflow(tmp_path):
    code = (
        "import sys\n"
        "from resjax.data import sources\n"
        f"source = sources.open_source('digits', {str(tmp_path)!r}, 'test')\n"
        "print(len(source), source[0]['image'][:4])\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "360 b'\\x89PNG'\n"
