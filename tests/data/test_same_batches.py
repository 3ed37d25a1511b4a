"""One data set as TFRecord, as ArrayRecord and as a folder gives the same batches."""

import os
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from conftest import ROOT
from tiny_tfds import write_imagenet

from resjax.data import pipeline, sources
from resjax.data.datasets import get_dataset
from resjax.data.recipes import get_recipe

KINDS = ["array_record", "tfrecord", "folder"]


def export(directory, folder):
    """The files of an ArrayRecord data set, named by their places in it."""
    builder = tfds.builder_from_directory(str(directory))
    decoders = {"image": tfds.decode.SkipDecoding()}
    for ours, split in (("train", "train"), ("val", "validation")):
        for i, example in enumerate(builder.as_data_source(split, decoders=decoders)):
            name = builder.info.features["label"].int2str(example["label"])
            path = folder / ours / name / f"{i:08}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(example["image"])


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """The tiny imagenet2012 in three kinds: kind -> its folder."""
    folders = {kind: tmp_path_factory.mktemp(kind) for kind in KINDS}
    for kind in ("array_record", "tfrecord"):
        directory = write_imagenet(folders[kind], num_shards=3, file_format=kind)
        if kind == "array_record":
            export(directory, folders["folder"])
    return folders


def batches(kind, folder, split):
    """Training batches of two epochs and more, or all evaluation batches."""
    name = "folder" if kind == "folder" else "imagenet2012"
    source = sources.open_source(name, str(folder), split)
    dataset = get_dataset(name)
    reader = pipeline.Reader(dataset, source, image_size=32, num_classes=5)
    if split == "test":
        return list(pipeline.eval_batches(reader, batch_size=8, num_shards=4))
    recipe, steps = get_recipe(dataset.recipe), {"start_step": 0, "num_steps": 7}
    return list(pipeline.train_batches(reader, recipe, seed=3, batch_size=8, **steps))


@pytest.mark.parametrize("split", ["train", "test"])
def test_batches_do_not_depend_on_how_the_data_set_is_stored(split, stored):
    first, *others = [batches(kind, stored[kind], split) for kind in KINDS]
    assert len(first) == {"train": 7, "test": 2}[split]
    assert len(np.unique(np.concatenate([batch["label"] for batch in first]))) == 5
    for other in others:
        for ours, theirs in zip(first, other, strict=True):
            assert ours.keys() == theirs.keys()
            for key in ours:
                np.testing.assert_array_equal(ours[key], theirs[key])


def test_tensorflow_is_not_loaded_even_where_it_is_installed(stored, tmp_path):
    (tmp_path / "tensorflow").mkdir()
    (tmp_path / "tensorflow" / "__init__.py").write_text("")
    code = (
        "import sys\n"
        "from test_same_batches import batches\n"
        "for kind, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):\n"
        "    for split in ('train', 'test'):\n"
        "        batches(kind, folder, split)\n"
        "assert 'tensorflow' not in sys.modules\n"
        "import tensorflow\n"
        f"assert tensorflow.__file__.startswith({str(tmp_path)!r})\n"
    )
    places = [tmp_path, ROOT, ROOT / "tests", ROOT / "tests" / "data"]
    subprocess.run(
        [sys.executable, "-c", code, *(str(x) for item in stored.items() for x in item)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, places))},
        check=True,
    )
