"""config.init_from: another run's weights, and nothing else of it."""

import dataclasses
import shutil
import types

import jax
import numpy as np
import pytest
from conftest import random_variables, saved
from safetensors.numpy import save_file

import resjax
from resjax import build, checkpoint, convert, steps, training
from resjax import config as configs
from resjax.config import UsageError

# One worker runs all that share `source`.
pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("resume")]


@pytest.fixture(scope="module")
def tiny(tiny_config):
    """tiny(*fields) -> a config of two updates."""

    def make(*fields):
        fields = "batch_size=320", f"num_epochs={2 * 320 / 1437}", *fields
        words = [f"--config.{field}" for field in fields]
        return configs.override(configs.load_config(tiny_config), words)

    return make


@pytest.fixture(scope="module")
def source(tiny, data_dir, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("source") / "run"
    words = f"data.dir={data_dir}", "checkpoint.every_steps=1", "ema_decay=0.5"
    assert training.train(tiny(*words), workdir) == 0
    return workdir


def test_a_run_starts_from_the_weights_and_anew_in_all_else(source, tiny, tmp_path, capsys):
    # With a rate of nothing, what is left after two updates is what they started from.
    still = "lr_per_256=1e-30", "weight_decay=0", f"init_from={source}"
    assert training.train(tiny(*still), tmp_path / "run") == 0
    assert f"from the weights of {source} after step 2, in" in capsys.readouterr().out
    given, found = saved(source, 2), saved(tmp_path / "run", 2)
    for name in given:
        same = np.array_equal(given[name], found[name])
        assert same == name.startswith("params"), name  # the statistics moved on
    assert saved(tmp_path / "run", 2, "optimizer")["step"] == 2


def test_images_that_were_normalised_in_another_way_are_told_of(tiny, tmp_path, capsys):
    config = tiny("data.name=cifar10", "data.image_size=32")
    variables = random_variables(build.build_model(config))
    convert.write_checkpoint(tmp_path / "given", variables, config)
    assert training.train(tiny(f"init_from={tmp_path / 'given'}"), tmp_path / "run") == 0
    told = [x for x in capsys.readouterr().err.splitlines() if "config.init_from: " in x]
    assert len(told) == 2 and "with mean [0.49" in told[0] and "with std [0.24" in told[1]


def averages(workdir, step):
    found = saved(workdir, step, "optimizer").items()
    return {name[4:]: array for name, array in found if name.startswith("ema/")}


def test_averages_start_from_the_weights_and_not_from_averages(source, tiny, tmp_path):
    still = "lr_per_256=1e-30", "weight_decay=0", f"init_from={source}", "ema_decay=0.9"
    assert training.train(tiny(*still), tmp_path / "run") == 0
    given, found = saved(source, 2), averages(tmp_path / "run", 2)
    theirs = averages(source, 2)
    for name in given:
        if name.startswith("params"):
            np.testing.assert_array_equal(found[name], given[name])
            assert not np.array_equal(found[name], theirs[name])


def test_frozen_layers_are_those_of_the_weights_to_the_end(source, tiny, tmp_path, capsys):
    words = f"init_from={source}", "freeze_at=1", "ema_decay=0.9", "weight_decay=0.1"
    config = tiny(*words, "head_lr_multiplier=10", "checkpoint.every_steps=1")
    workdir = tmp_path / "run"
    assert training.train(config, workdir) == 0  # on eight devices
    assert f"after step 2, stem frozen, in {workdir}\n" in capsys.readouterr().out
    given, found = saved(source, 2), saved(workdir, 2)
    for arrays in (found, averages(workdir, 2)):
        same = {n for n in given if given[n].tobytes() == arrays[n].tobytes()}
        assert same == {name for name in given if name.split("/")[1] == "stem"} != set()
    buffers = saved(workdir, 2, "optimizer")
    assert not [name for name in buffers if "trace/stem" in name]
    shutil.rmtree(workdir / "checkpoints" / "2")
    assert training.train(config, workdir) == 0  # resumed
    for item in ("variables", "optimizer"):
        whole = {"variables": found, "optimizer": buffers}[item]
        again = saved(workdir, 2, item)
        assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_a_run_starts_from_converted_weights_of_other_data(tiny, tmp_path, capsys):
    name, shape = "cifar_resnet20", {"stage_sizes": (1, 1, 1), "width": 4}
    given = random_variables(resjax.create_model(name, num_classes=7, **shape))
    save_file(resjax.to_torch(given, name, **shape), tmp_path / "weights.safetensors")
    words = "--config.model_kwargs.stage_sizes=1,1,1", "--config.model_kwargs.width=4"
    flags = f"--model={name}", f"--workdir={tmp_path / 'given'}"
    assert convert.main([str(tmp_path / "weights.safetensors"), *flags, *words]) == 0
    words = f"model={name}", "model_kwargs.stage_sizes=1,1,1", "model_kwargs.width=4"
    config = tiny(*words, f"init_from={tmp_path / 'given'}", "freeze_at=4")  # digits
    assert training.train(config, tmp_path / "run") == 0
    told = "after step 0 and a new classifier, stem stage1 stage2 stage3 frozen, in"
    assert told in capsys.readouterr().out
    given, found = checkpoint.to_arrays(given), saved(tmp_path / "run", 2)
    for path in given:
        is_head = path.startswith("params/head")
        assert np.array_equal(given[path], found[path]) != is_head, path
    assert found["params/head/kernel"].shape == (16, 10)


@pytest.mark.parametrize("names, is_new", [("abcdefghij", True), ("0123456789", False)])
def test_a_classifier_of_as_many_other_classes_is_new(
    names, is_new, tiny, tmp_path, capsys
):
    config = tiny()
    run = build.build_run(config)
    given = random_variables(build.build_model(config))
    record = {**run.record, "class_names": list(names)}
    arrays = {
        "variables": checkpoint.to_arrays(given),
        "optimizer": checkpoint.to_arrays(run.init_state().optimizer),
    }
    folder = tmp_path / "given" / "checkpoints" / "0" / "state"
    folder.mkdir(parents=True)
    for name, content in checkpoint.to_files({"step": 0, **record}, arrays).items():
        (folder / name).write_bytes(content)
    still = "lr_per_256=1e-30", "weight_decay=0", f"init_from={tmp_path / 'given'}"
    assert training.train(tiny(*still), tmp_path / "run") == 0
    assert ("and a new classifier" in capsys.readouterr().out) == is_new
    found = saved(tmp_path / "run", 2)["params/head/kernel"]
    assert np.array_equal(found, arrays["variables"]["params/head/kernel"]) != is_new


def test_a_checkpoint_may_be_named(source, tiny, tmp_path):
    still = "lr_per_256=1e-30", "weight_decay=0"
    path = f"init_from={source / 'checkpoints' / '1'}"
    assert training.train(tiny(*still, path), tmp_path / "run") == 0
    kernel = "params/stage1/block1/conv1/kernel"
    first, second, found = saved(source, 1), saved(source, 2), saved(tmp_path / "run", 2)
    assert np.array_equal(first[kernel], found[kernel])
    assert not np.array_equal(second[kernel], found[kernel])


def test_a_resumed_run_needs_its_source_no_more(source, tiny, tmp_path):
    shutil.copytree(source, tmp_path / "source")
    config = tiny(f"init_from={tmp_path / 'source'}", "checkpoint.every_steps=1")
    assert training.train(config, tmp_path / "run") == 0
    whole = saved(tmp_path / "run", 2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2")
    shutil.rmtree(tmp_path / "source")
    assert training.train(config, tmp_path / "run") == 0
    again = saved(tmp_path / "run", 2)
    assert all(np.array_equal(whole[name], again[name]) for name in whole)


def test_a_classifier_of_another_size_is_drawn_anew(source, tiny):
    config = dataclasses.replace(tiny(), num_classes=7)
    images = np.zeros((1, 8, 8, 3), np.float32)
    variables = build.build_model(config).init(jax.random.key(1), images)
    tx = build.build_optimizer(config, lambda step: 0.1)
    own = steps.create_state(variables, tx)
    record = build.build_run(tiny()).record
    run = types.SimpleNamespace(init_state=lambda: own, record=record)
    state, told = training._init_from(str(source), run)
    assert told == f"from the weights of {source} after step 2 and a new classifier"
    kernel = state.params["stage1"]["block1"]["conv1"]["kernel"]
    wanted = saved(source, 2)["params/stage1/block1/conv1/kernel"]
    np.testing.assert_array_equal(kernel, wanted)
    head = own.params["head"]["kernel"]
    np.testing.assert_array_equal(state.params["head"]["kernel"], head)
    assert head.shape[1] == 7 and np.abs(head).max() > 0


def test_weights_of_another_model_are_refused_by_name(source, tiny, tmp_path):
    config = tiny(f"init_from={source}", "model=cifar_resnet20")
    with pytest.raises(
        UsageError, match=r"config.init_from: .*/2: .* is missing, .*arrays"
    ):
        training.train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
