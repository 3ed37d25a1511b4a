"""The ImageNet config, end to end, on a tiny data set with the features of the real one."""

import json

import numpy as np
import pytest
from conftest import ROOT
from tiny_tfds import SIZES, encode, pixels, write_imagenet

import resjax
from resjax.data.decode import decode


@pytest.mark.slow  # a minute: it compiles ResNet-18 three times
def test_resnet18_trains_and_evaluates_on_jpegs_of_many_sizes(command, tmp_path):
    data_dir, workdir = tmp_path / "tfds", tmp_path / "run"
    write_imagenet(data_dir, num_train=24, num_validation=10, num_classes=5)
    flags = [
        f"--config={ROOT}/configs/imagenet_resnet50.py",
        "--config.model=resnet18",
        "--config.num_classes=5",
        f"--config.data.dir={data_dir}",
        "--config.data.image_size=64",
        "--config.batch_size=8",
        "--config.norm.virtual_batch_size=2",
        "--config.num_epochs=1",
        "--config.log_every_steps=1",
    ]
    done = command("train.py", *flags, f"--workdir={workdir}", devices=2)
    assert done.returncode == 0, done.stderr
    text = (workdir / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [(row["split"], row["step"]) for row in rows] == [
        ("train", 1),
        ("train", 2),
        ("train", 3),
        ("test", 3),
    ]
    assert all(np.isfinite(row["loss"]) for row in rows)

    done = command("eval.py", f"--workdir={workdir}", "--batch_size=3", devices=2)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["num_examples"] == 10

    # The same images, given to a restored model as a notebook user would.
    jpegs = [encode(pixels(i, *SIZES[i % len(SIZES)]), ".jpg") for i in range(24, 34)]
    labels = [i % 5 for i in range(24, 34)]
    run = resjax.restore(workdir)
    probabilities = run.predict([decode(jpeg) for jpeg in jpegs])
    hits = probabilities.argmax(axis=1) == labels
    loss = -np.log(probabilities[np.arange(10), labels])
    assert result["top1"] == 100 * hits.mean()
    np.testing.assert_allclose(result["loss"], loss.mean(), rtol=1e-4)
