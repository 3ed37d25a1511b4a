"""The ImageNet config, end to end, on a tiny data set with the features of the real one."""

import json

import jax
import numpy as np
import pytest
from conftest import ROOT
from tiny_tfds import SIZES, encode, pixels, write_imagenet

import resjax
from resjax import build, build_data, parallel, steps
from resjax import config as configs
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


RECIPE = ROOT / "configs" / "imagenet_resnet50_8k.py"


@pytest.mark.slow  # seven minutes: 16,384 images through ResNet-50
@pytest.mark.long
def test_the_8k_recipe_takes_two_steps_in_full_size_on_one_device(command, tmp_path):
    data_dir, workdir = tmp_path / "tfds", tmp_path / "run"
    write_imagenet(data_dir, num_train=64, num_validation=10, num_classes=1000)
    done = command(
        "train.py",
        f"--config={RECIPE}",
        f"--config.data.dir={data_dir}",
        "--config.data.image_size=32",
        "--config.num_epochs=256",  # of 64 images
        "--config.eval_every_epochs=256",
        "--config.log_every_steps=1",
        f"--workdir={workdir}",
    )
    assert done.returncode == 0, done.stderr
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    train = [row for row in rows if row["split"] == "train"]
    assert [row["step"] for row in train] == [1, 2]
    assert abs(train[0]["loss"] - np.log(1000)) < 0.2 and np.isfinite(train[1]["loss"])


@pytest.mark.slow  # compiles a ResNet-18 three times
@pytest.mark.long
def test_memory_of_an_accumulated_step_does_not_grow_with_the_minibatch():
    def memory(batch_size, microbatch=32):
        """Bytes beside the state and the minibatch itself, 3 a pixel."""
        words = ["model=resnet18", "data.image_size=32", f"batch_size={batch_size}"]
        config = configs.override(
            configs.load_config(RECIPE), [f"--config.{word}" for word in words]
        )
        model = build.build_model(config, axis_name=parallel.AXIS)
        tx = build.build_optimizer(config, lambda step: 0.1)
        augment, _ = build_data.build_transforms(config)
        step = steps.make_train_step(model, tx, augment, batch_size, 0, microbatch)
        image = jax.ShapeDtypeStruct((1, batch_size, 32, 32, 3), np.uint8)
        number = jax.ShapeDtypeStruct((1, batch_size), np.int32)
        batch = {"image": image, "label": number, "position": number}
        variables = jax.eval_shape(
            model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
        )
        state = jax.eval_shape(lambda v: steps.create_state(v, tx), variables)
        mapped = jax.pmap(
            step,
            parallel.AXIS,
            in_axes=(None, 0),
            out_axes=None,
            devices=jax.devices()[:1],
        )
        compiled = mapped.lower(state, batch).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert memory(8192) == memory(64)
    assert memory(256, microbatch=0) > 2 * memory(64, microbatch=0)
