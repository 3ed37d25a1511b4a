"""Batches against a plain loop, for any number of threads, hosts and shards."""

import dataclasses
import functools
import itertools
import os
import time
import uuid

import cv2
import numpy as np
import pytest
from tiny_tfds import encode, write_imagenet

from resjax.config import UsageError
from resjax.data import order, pipeline, sources
from resjax.data.datasets import DATASETS
from resjax.data.decode import decode, decode_window
from resjax.data.recipes import RECIPES
from resjax.data.views import Group

DIGITS, IMAGENET = DATASETS["digits"], DATASETS["imagenet2012"]
PLAIN, CROPPED = RECIPES["shift"], RECIPES["goyal"]
SIDE = 4


def make_source(num_examples):
    """Example i is of label i, and all its pixels are i % 251 + 1."""
    images = [np.full((SIDE, SIDE, 3), i % 251 + 1, np.uint8) for i in range(num_examples)]
    return [{"image": encode(image, ".png"), "label": i} for i, image in enumerate(images)]


SOURCE = make_source(10)


def read(source, dataset=DIGITS, image_size=SIDE, **options):
    options = {"num_classes": 1000, "num_threads": 2, **options}
    return pipeline.Reader(dataset, source, image_size, **options)


def train(reader=None, recipe=PLAIN, **kwargs):
    options = {"seed": 3, "batch_size": 4, "start_step": 0, "num_steps": 9}
    reader = reader or read(SOURCE)
    return list(pipeline.train_batches(reader, recipe, **{**options, **kwargs}))


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
    """Opens a split of a tiny data set of JPEGs."""
    folder = tmp_path_factory.mktemp("imagenet")
    write_imagenet(folder)
    return functools.partial(sources.open_source, "imagenet2012", str(folder))


@pytest.fixture(scope="module")
def jpegs(imagenet):
    """Its training split, in crops of 16."""
    return read(imagenet("train"), IMAGENET, 16)


@pytest.mark.parametrize("num_threads", [0, 1, 4])
def test_threads_change_nothing(jpegs, num_threads):
    one = train(dataclasses.replace(jpegs, num_threads=1), CROPPED, num_steps=8)
    many = dataclasses.replace(jpegs, num_threads=num_threads, prefetch=4)
    assert_same(train(many, CROPPED, num_steps=8), one)


@pytest.mark.parametrize("num_workers", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_processes_change_nothing(jpegs, num_workers):
    options = {"start_step": 2, "num_steps": 9}
    here = train(jpegs, CROPPED, **options)
    there = dataclasses.replace(jpegs, num_workers=num_workers)
    assert_same(train(there, CROPPED, **options), here)


def test_damage_in_another_process_is_the_same_line(jpegs):
    source = [{"image": b"no image", "label": 6}] * 10
    lines = []
    for num_workers in (0, 1):
        with pytest.raises(UsageError, match="no readable image") as error:
            train(read(source, num_workers=num_workers))
        lines.append(str(error.value))
    assert lines[0] == lines[1]


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_slices_of_the_hosts_make_the_batch_of_one(jpegs, num_hosts):
    options = {"batch_size": 8, "start_step": 1, "num_steps": 6}
    hosts = [
        train(jpegs, CROPPED, host=host, num_hosts=num_hosts, **options)
        for host in range(num_hosts)
    ]
    assert all(len(batch["image"]) == 8 // num_hosts for batch in hosts[0])
    assert_same(joined(hosts), train(jpegs, CROPPED, **options))


def test_random_crops_are_keyed_by_seed_and_position(jpegs):
    def crops(**kwargs):
        batches = train(jpegs, CROPPED, **kwargs)
        return np.concatenate([batch["image"] for batch in batches])

    by_4 = crops(batch_size=4, num_steps=12)
    np.testing.assert_array_equal(crops(batch_size=6, num_steps=8), by_4)
    for position in (0, 23, 24, 47):
        example = jpegs.source[order.example_index(3, position, 24)]
        (uniforms,) = order.uniforms(3, position, 1)
        expected = np.zeros((16, 16, 3), np.uint8)

        def window(height, width, uniforms=uniforms):
            return CROPPED.window(height, width, 16, uniforms)

        decode_window(example["image"], window, expected)
        np.testing.assert_array_equal(by_4[position], expected)


@pytest.mark.parametrize("start", [0, 137])
def test_any_step_is_as_near_as_the_first(jpegs, start):
    decoded = []

    class Counting(list):
        def __getitem__(self, index):
            decoded.append(index)
            return super().__getitem__(index)

    reader = dataclasses.replace(jpegs, source=Counting(jpegs.source))
    batches = pipeline.train_batches(
        reader, CROPPED, seed=3, batch_size=4, start_step=start, num_steps=start + 1
    )
    (batch,) = batches
    assert len(decoded) == 4  # nothing before was read
    np.testing.assert_array_equal(batch["position"], 4 * start + np.arange(4))


def test_starting_at_137_is_skipping_to_it(jpegs):
    assert_same(
        train(jpegs, CROPPED, start_step=137, num_steps=140),
        train(jpegs, CROPPED, num_steps=140)[137:],
    )


def test_example_is_cropped_anew_in_every_epoch(jpegs):
    batches = train(jpegs, CROPPED, batch_size=24, num_steps=2)
    orders = [order.permutation(3, epoch, 24) for epoch in (0, 1)]
    first, second = (
        batch["image"][np.argsort(indices)]
        for batch, indices in zip(batches, orders, strict=True)
    )
    assert not any(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def evaluate(source, batch_size, num_shards, host=0, num_hosts=1, **options):
    return list(
        pipeline.eval_batches(
            read(source, **options),
            batch_size=batch_size,
            num_shards=num_shards,
            host=host,
            num_hosts=num_hosts,
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
    source = imagenet("test")
    (batch,) = pipeline.eval_batches(
        read(source, IMAGENET, 16), batch_size=10, num_shards=1
    )
    expected = [IMAGENET.eval_crop(decode(example["image"]), 16) for example in source]
    np.testing.assert_array_equal(batch["image"], expected)


# --- plans of views ------------------------------------------------------------------


def cut(image, shape):
    """A view that says where it is from: the upper left, or two of it."""
    part = image[: shape[-3], : shape[-2]]
    return np.stack([part] * shape[0]) if len(shape) == 4 else part


PLAN = [
    Group((2, 4, 3, 3), [8, 1, 5], 2),
    Group((4, 2, 3), [0, 2, 3, 4, 6, 7, 9], 3),
    Group((1, 1, 3), [10], 5),
]


@pytest.mark.parametrize(("num_shards", "num_hosts"), [(1, 1), (4, 1), (4, 2), (4, 4)])
def test_a_plan_shows_each_example_once_in_the_shape_of_its_group(num_shards, num_hosts):
    reader = read(make_source(11))
    batches = joined(
        list(
            pipeline.plan_batches(
                reader,
                reader.crop_to(cut),
                PLAN,
                num_shards=num_shards,
                host=host,
                num_hosts=num_hosts,
            )
        )
        for host in range(num_hosts)
    )
    seen = iter(batches)
    for group in PLAN:
        indices = []
        for _ in range(-(-len(group.indices) // group.batch_size)):
            batch = next(seen)
            index, mask = batch["index"], batch["mask"]
            padded = -(-group.batch_size // num_shards) * num_shards
            assert batch["image"].shape == (padded, *group.shape)
            np.testing.assert_array_equal(mask, index >= 0)
            assert index.dtype == np.int32 and (index[~mask] == -1).all()
            np.testing.assert_array_equal(batch["label"][mask], index[mask])
            pixels = batch["image"].reshape(padded, -1)
            assert (pixels[mask] == index[mask, None] + 1).all() and not pixels[~mask].any()
            indices += index[mask].tolist()
        assert indices == group.indices
    assert next(seen, None) is None


def test_a_damaged_example_of_a_plan_keeps_its_index_and_loses_its_mask(capsys):
    reader = read(damaged_source(2, 5), skip_errors=2)
    plan = [Group((4, 4, 3), [5, 0, 2], 2)]
    batches = list(pipeline.plan_batches(reader, reader.crop_to(cut), plan, num_shards=1))
    index, mask = (np.concatenate([b[name] for b in batches]) for name in ("index", "mask"))
    assert index.tolist() == [5, 0, 2, -1]
    assert mask.tolist() == [False, True, False, False]
    assert reader.damaged == {2, 5} and len(capsys.readouterr().err.splitlines()) == 2


def rotated(jpeg):
    """The file with an EXIF tag that has it turned by a quarter when shown."""
    tiff = b"MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    segment = b"Exif\0\0" + tiff
    return (
        jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:]
    )


@pytest.mark.parametrize("name", ["imagenet2012", "folder"])
def test_sizes_are_those_of_the_decoded_images(name, monkeypatch, capsys):
    image = np.random.RandomState(0).randint(0, 256, (20, 31, 3)).astype(np.uint8)
    jpeg, png = encode(image, ".jpg"), encode(image[:7], ".png")
    files = [
        jpeg,
        png,
        rotated(jpeg),
        b"no image",
        jpeg[:-20],
        encode(image[:, :9], ".jpg"),
    ]
    source = [{"image": file, "label": 0} for file in files]
    reader = read([*source, {"image": jpeg, "label": -1}], DATASETS[name], skip_errors=3)
    decoded = []
    monkeypatch.setattr(
        pipeline, "decode", lambda *args: (decoded.append(args), decode(*args))[1]
    )
    turned = (31, 20) if name == "folder" else (20, 31)
    expected = [(20, 31), (7, 31), turned, None, None, (20, 9), None]
    assert pipeline.image_sizes(reader) == expected
    # Not the JPEG files whose header tells all.
    assert len(decoded) == (4 if name == "folder" else 3)
    assert reader.damaged == {3, 4, 6} and len(capsys.readouterr().err.splitlines()) == 3
    for file, size in zip(files, expected, strict=False):
        if size:
            assert decode(file, DATASETS[name].rotates).shape[:2] == size


def test_one_damaged_example_too_many_stops_the_measuring():
    with pytest.raises(UsageError, match="example 3: 8 bytes"):
        pipeline.image_sizes(read(damaged_source(3)))


# --- damage -------------------------------------------------------------------------


def damaged_source(*indices, example=None):
    source = make_source(10)
    for index in indices:
        source[index] = example or {"image": b"no image", "label": index}
    return source


BAD = [
    ({"image": b"no image", "label": 6}, "8 bytes that are no readable image"),
    ({"image": b"", "label": 6}, "0 bytes"),
    (
        {"image": SOURCE[0]["image"], "label": 1000},
        "label is 1000; it must be from 0 to 999",
    ),
    ({"image": SOURCE[0]["image"], "label": -1}, "label is -1"),
]


@pytest.mark.parametrize(("example", "said"), BAD)
def test_damaged_example_is_named_in_one_line(example, said):
    source = damaged_source(6, example=example)
    for run in (lambda: train(read(source)), lambda: evaluate(source, 4, 1)):
        with pytest.raises(UsageError, match="example 6") as error:
            run()
        assert said in str(error.value) and "skip_errors" in str(error.value)
        assert "\n" not in str(error.value)


def test_place_of_a_damaged_example_is_told():
    class Named(list):
        def where(self, index):
            return f"shard-2, record {index}"

    with pytest.raises(UsageError, match=r"example 6 \(shard-2, record 6\): 8 bytes"):
        train(read(Named(damaged_source(6))))


def test_next_example_takes_the_place_of_a_damaged_one(capsys):
    whole = train(num_steps=5)
    replaced = train(read(damaged_source(3, 6, 7), skip_errors=3), num_steps=5)
    takes = {3: 4, 6: 8, 7: 8}
    for batch, expected in zip(replaced, whole, strict=True):
        labels = [takes.get(label, label) for label in expected["label"]]
        np.testing.assert_array_equal(batch["label"], labels)
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], np.array(labels) + 1)
        np.testing.assert_array_equal(batch["position"], expected["position"])
    # Every damaged example once, though all were met twice.
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert {line.split(":")[1].strip() for line in lines} == {
        "example 3",
        "example 6",
        "example 7",
    }
    assert lines[-1].endswith("left out, as 3 of at most 3")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_one_damaged_example_too_many_stops(num_workers, capfd):
    reader = read(damaged_source(3, 6, 7), skip_errors=2, num_workers=num_workers)
    with pytest.raises(UsageError, match=r"at most config\.data\.skip_errors=2"):
        train(reader, num_steps=5)


def test_examples_are_told_and_counted_once_in_all_evaluations(capsys):
    reader = read(damaged_source(3, 7), skip_errors=2)
    for _ in range(2):
        list(pipeline.eval_batches(reader, batch_size=4, num_shards=1))
    assert len(capsys.readouterr().err.splitlines()) == 2
    assert reader.damaged == {3, 7}


def test_split_of_which_nothing_can_be_read_is_an_error():
    source = damaged_source(*range(10))
    for run in (
        lambda: train(read(source, skip_errors=10)),
        lambda: evaluate(source, 4, 1, skip_errors=10),
    ):
        with pytest.raises(UsageError):
            run()
    with pytest.raises(UsageError, match="none of the examples can be read"):
        evaluate(source, 4, 1, skip_errors=10)


def test_errors_of_opencv_name_the_example():
    class Broken(list):
        def __getitem__(self, index):
            raise cv2.error("ssize.empty()")

    with pytest.raises(UsageError, match=r"data: example \d: .*ssize"):
        train(read(Broken(SOURCE)))


@pytest.mark.parametrize(
    ("num_workers", "prefetch"),
    [(0, 1), (0, 3), pytest.param(1, 2, marks=pytest.mark.slow)],
)
def test_few_batches_exist_at_once(num_workers, prefetch, tmp_path):
    source = Logged(tmp_path, SOURCE)
    reader = read(source, num_workers=num_workers, prefetch=prefetch)
    options = {"seed": 3, "batch_size": 64, "start_step": 0, "num_steps": 50}
    batches = pipeline.train_batches(reader, PLAIN, **options)
    next(batches)
    time.sleep(1)
    made = len(list(tmp_path.iterdir())) / 64
    batches.close()
    # One is taken, `prefetch` are ahead; a process holds some parts of half a batch.
    assert made <= 1 + prefetch + 8 / 2 * num_workers
    assert made >= 1 + prefetch


class Logged:
    """A source that leaves a file for each example that is read."""

    def __init__(self, folder, examples):
        self.folder, self.examples = folder, examples

    def __len__(self):
        return len(self.examples)

    def __getitem__(self, index):
        (self.folder / uuid.uuid4().hex).touch()
        return self.examples[index]


def test_too_little_shared_memory_is_told(monkeypatch, capsys):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(32), raising=False)
    monkeypatch.setattr(pipeline, "can_share", lambda workers, num_bytes: False)
    assert pipeline._sized(read([], num_workers=None)).num_workers == 0
    assert "too little shared memory" in capsys.readouterr().err
    with pytest.raises(UsageError, match=r"config\.data\.num_workers: 2 .*--shm-size"):
        pipeline._sized(read([], num_workers=2))


def test_evaluation_leaves_damaged_examples_out(capsys):
    batches = evaluate(damaged_source(3, 7), 4, 1, skip_errors=2)
    mask = np.concatenate([batch["mask"] for batch in batches])
    labels = np.concatenate([batch["label"] for batch in batches])
    assert labels[mask].tolist() == [0, 1, 2, 4, 5, 6, 8, 9]
    assert capsys.readouterr().err.splitlines()[-1].endswith("left out, as 2 of at most 2")


def test_whole_split_is_loaded_as_it_is_trained_on():
    images, labels = pipeline.load_all(read(damaged_source(3), skip_errors=1))
    expected = [0, 1, 2, 4, 4, 5, 6, 7, 8, 9]
    np.testing.assert_array_equal(labels, expected)
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.array(expected) + 1)
    with pytest.raises(UsageError, match="example 9"):
        pipeline.load_all(read(damaged_source(9)))


# --- processes and threads ----------------------------------------------------------


@pytest.mark.parametrize(
    ("cores", "num_workers", "num_threads", "expected"),
    [
        (2, None, 0, (0, 2)),
        (8, None, 0, (0, 8)),
        (15, None, 0, (0, 15)),
        (16, None, 0, (2, 8)),
        (96, None, 0, (12, 8)),
        (96, 0, 0, (0, 96)),
        (2, 3, 0, (3, 1)),
        (16, 4, 2, (4, 2)),
    ],
)
def test_processes_and_threads_fit_the_cores(
    cores, num_workers, num_threads, expected, monkeypatch
):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(cores), raising=False)
    reader = pipeline._sized(read([], num_workers=num_workers, num_threads=num_threads))
    assert (reader.num_workers, reader.num_threads) == expected
