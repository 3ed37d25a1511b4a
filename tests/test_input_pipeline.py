"""The generated images and pipeline of benchmarks/input_pipeline.py are what it says."""

import numpy as np

from benchmarks import input_pipeline
from resjax.data.decode import decode


def test_images_are_like_those_of_imagenet():
    jpegs = [input_pipeline.photograph(i) for i in range(8)]
    assert 100_000 < np.mean([len(jpeg) for jpeg in jpegs]) < 125_000
    shapes = [decode(jpeg).shape for jpeg in jpegs]
    assert set(shapes) == {(375, 500, 3), (500, 375, 3)}


def test_one_set_of_images_is_read_as_train_py_reads_it(tmp_path, capsys):
    mean_bytes = input_pipeline.write_images(tmp_path, 20)
    files = sorted((tmp_path / "folder").rglob("*.jpg"))
    assert np.mean([path.stat().st_size for path in files]) == mean_bytes
    batches = input_pipeline.resjax_batches(tmp_path, 1)
    batch = next(batches)
    batches.close()
    assert batch["image"].shape == (64, 224, 224, 3)
    assert sorted(batch["label"][:20]) == sorted([*range(10), *range(10)])
