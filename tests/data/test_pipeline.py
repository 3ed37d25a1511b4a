"""Batches against a plain loop, for any number of threads, hosts and shards."""

import itertools

import numpy as np
import pytest
from tiny_tfds import encode, write_imagenet

from resjax.config import UsageError
from resjax.data import order, pipeline, sources
from resjax.data.datasets import DATASETS
from resjax.data.decode import decode

DIGITS, IMAGENET = DATASETS["digits"], DATASETS["imagenet2012"]
SIDE = 4


def make_source(num_examples):
    """Example i is of label i, and all its pixels are i % 251 + 1."""
    images = [np.full((SIDE, SIDE, 3), i % 251 + 1, np.uint8) for i in range(num_examples)]
    return [{"image": encode(image, ".png"), "label": i} for i, image in enumerate(images)]


SOURCE = make_source(10)


def train(source=SOURCE, dataset=DIGITS, **kwargs):
    options = {
        "image_size": SIDE,
        "seed": 3,
        "batch_size": 4,
        "start_step": 0,
        "num_steps": 9,
        "num_threads": 2,
    }
    return list(pipeline.train_batches(dataset, source, **{**options, **kwargs}))


def assert_same(actual, expected):
    assert len(actual) == len(expected)
    for a, b in zip(actual, expected, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            np.testing.assert_array_equal(a[key], b[key], strict=True)


def joined(hosts):
    """The batches of one host from those of many, their slices in the order of hosts."""
    return [
        {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
        for parts in zip(*hosts, strict=True)
    ]


def test_training_batches_are_a_loop_over_the_stream():
    # 9 minibatches of 4 over 10 examples cross the end of an epoch three times.
    batches = train()
    assert len(batches) == 9
    for step, batch in enumerate(batches):
        positions = range(4 * step, 4 * step + 4)
        indices = [order.example_index(3, p, 10) for p in positions]
        images = [decode(SOURCE[i]["image"]) for i in indices]
        np.testing.assert_array_equal(batch["image"], images)
        np.testing.assert_array_equal(batch["label"], indices)
        np.testing.assert_array_equal(batch["position"], positions)


def test_every_epoch_shows_every_example_once():
    labels = np.concatenate([batch["label"] for batch in train(num_steps=10)])
    for epoch in labels.reshape(4, 10):
        assert sorted(epoch) == list(range(10))


def test_types_and_shapes():
    batch = train()[0]
    assert {key: (v.dtype, v.shape) for key, v in batch.items()} == {
        "image": (np.uint8, (4, SIDE, SIDE, 3)),
        "label": (np.int32, (4,)),
        "position": (np.int32, (4,)),
    }


@pytest.mark.parametrize("start", [1, 4, 8, 9])
def test_starting_later_is_the_tail_of_starting_at_0(start):
    assert_same(train(start_step=start), train()[start:])


def test_minibatch_larger_than_the_data_set():
    (batch,) = train(batch_size=24, num_steps=1)
    assert sorted(batch["label"][:20]) == sorted([*range(10), *range(10)])


def test_seeds_differ():
    labels = [train(seed=seed)[0]["label"].tolist() for seed in range(5)]
    assert len(set(map(tuple, labels))) == 5


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder)
    return sources.open_builder("imagenet2012", str(folder))


@pytest.fixture(scope="module")
def train_source(imagenet):
    return sources.open_source(imagenet, "train")


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_threads_change_nothing(train_source, num_threads):
    options = {"image_size": 16, "num_steps": 8}
    one = train(train_source, IMAGENET, num_threads=1, **options)
    assert_same(train(train_source, IMAGENET, num_threads=num_threads, **options), one)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_slices_of_the_hosts_make_the_batch_of_one(train_source, num_hosts):
    options = {"image_size": 16, "batch_size": 8, "start_step": 1, "num_steps": 6}
    hosts = [
        train(train_source, IMAGENET, host=host, num_hosts=num_hosts, **options)
        for host in range(num_hosts)
    ]
    assert all(len(batch["image"]) == 8 // num_hosts for batch in hosts[0])
    assert_same(joined(hosts), train(train_source, IMAGENET, **options))


def test_random_crops_are_keyed_by_seed_and_position(train_source):
    def crops(**kwargs):
        batches = train(train_source, IMAGENET, image_size=16, **kwargs)
        return np.concatenate([batch["image"] for batch in batches])

    by_4 = crops(batch_size=4, num_steps=12)
    np.testing.assert_array_equal(crops(batch_size=6, num_steps=8), by_4)
    for position in (0, 23, 24, 47):
        image = decode(train_source[order.example_index(3, position, 24)]["image"])
        rng = order.augmentation_rng(3, position)
        expected = IMAGENET.train_crop(image, 16, rng)
        np.testing.assert_array_equal(by_4[position], expected)


def test_example_is_cropped_anew_in_every_epoch(train_source):
    batches = train(train_source, IMAGENET, image_size=16, batch_size=24, num_steps=2)
    orders = [order.permutation(3, epoch, 24) for epoch in (0, 1)]
    first, second = (
        batch["image"][np.argsort(indices)]
        for batch, indices in zip(batches, orders, strict=True)
    )
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def evaluate(source, batch_size, num_shards, **kwargs):
    options = {"image_size": SIDE, "num_threads": 2, **kwargs}
    return list(
        pipeline.eval_batches(
            DIGITS, source, batch_size=batch_size, num_shards=num_shards, **options
        )
    )


@pytest.fixture(scope="module")
def eval_source():
    return make_source(360)


CASES = itertools.product((1, 7, 64, 360, 1000), (1, 4, 8), (1, 2))


@pytest.mark.parametrize(
    ("batch_size", "num_shards", "num_hosts"), [c for c in CASES if c[1] % c[2] == 0]
)
def test_evaluation_shows_every_example_once(
    eval_source, batch_size, num_shards, num_hosts
):
    batches = joined(
        evaluate(eval_source, batch_size, num_shards, host=host, num_hosts=num_hosts)
        for host in range(num_hosts)
    )
    assert len(batches) == -(-360 // batch_size)
    # All of one size, so that one compiled step takes them, and shared out evenly.
    padded = {len(batch["mask"]) for batch in batches}
    assert len(padded) == 1
    assert 0 <= padded.pop() - min(batch_size, 360) < num_shards
    assert all(len(batch["mask"]) % num_shards == 0 for batch in batches)
    mask = np.concatenate([batch["mask"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    images = np.concatenate([batch["image"] for batch in batches])
    np.testing.assert_array_equal(labels[mask], range(360))
    np.testing.assert_array_equal(images[mask][:, 0, 0, 0], np.arange(360) % 251 + 1)
    assert not images[~mask].any()


def test_evaluation_types_and_shapes():
    batch = evaluate(SOURCE, 6, 4)[0]
    assert {key: (v.dtype, v.shape) for key, v in batch.items()} == {
        "image": (np.uint8, (8, SIDE, SIDE, 3)),
        "label": (np.int32, (8,)),
        "mask": (np.bool_, (8,)),
    }


def test_evaluation_takes_centre_crops(imagenet):
    source = sources.open_source(imagenet, "validation")
    options = {"image_size": 16, "batch_size": 10, "num_shards": 1}
    (batch,) = pipeline.eval_batches(IMAGENET, source, **options)
    expected = [IMAGENET.eval_crop(decode(example["image"]), 16) for example in source]
    np.testing.assert_array_equal(batch["image"], expected)


@pytest.mark.parametrize("encoded", [b"no image", b""])
def test_unreadable_example_is_named_in_one_line(encoded):
    source = make_source(10)
    source[6] = {"image": encoded, "label": 6}
    for read in (lambda: train(source), lambda: evaluate(source, 4, 1)):
        with pytest.raises(UsageError, match="example 6") as error:
            read()
        assert "\n" not in str(error.value)
