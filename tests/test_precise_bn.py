"""Precise batch norm: the statistics are those of the values that the layers take."""

import dataclasses
import json
import shutil
from functools import partial

import jax
import numpy as np
import pytest
from conftest import random_variables, saved
from flax import linen as nn
from flax import traverse_util
from numpy.lib.stride_tricks import sliding_window_view
from test_topology import finish, two_hosts

from resjax import (
    build,
    build_data,
    parallel,
    precise_bn,
    run_evaluation,
    signals,
    training,
)
from resjax import config as configs
from resjax.config import Config, DataConfig, ModelKwargs, NormConfig, UsageError
from resjax.data import augment, datasets, order, pipeline
from resjax.models.norm import BatchNorm
from resjax.models.resnet import create_model

__all__ = ["two_hosts"]  # a fixture

NUM_EXAMPLES = 1437
close = partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5)


# --- pooling ------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_pooled_moments_are_those_of_all_values(offset):
    rng = np.random.RandomState(0)
    places = [4, 4, 1]  # values of an example in each of three channels
    sizes = [3, 3, 3, 5, 2, 2]
    # A group shifts its values: their variances say little about that of all.
    shifts = offset + 10 * rng.randn(len(sizes), 3)
    groups, values = [], [[], [], []]
    for size, shift in zip(sizes, shifts, strict=True):
        own = [shift[k] + (k + 1) * rng.randn(size * n) for k, n in enumerate(places)]
        moments = [[x.mean() for x in own], [x.var(ddof=1) for x in own]]
        groups.append((size, np.array(moments)))
        for k in range(3):
            values[k].extend(own[k])
    expected = [[np.mean(x) for x in values], [np.var(x, ddof=1) for x in values]]
    found = precise_bn.pool(iter(groups), np.array(places))
    np.testing.assert_allclose(found, expected, rtol=1e-10)
    averaged = np.mean([moments[1] for _, moments in groups], axis=0)
    assert (found[1] > 5 * averaged).all()  # which would have been wrong by as much


def test_groups_hold_every_example_once_and_only_the_last_is_larger():
    assert precise_bn.split(12, 4) == (3, 0)
    for num_examples in range(2, 60):
        for group in range(1, 20):
            count, last = precise_bn.split(num_examples, group)
            assert count * group + last == num_examples
            assert last == 0 or group < last < 2 * group or (count, last < group) == (0, 1)


# --- the training set through a network ---------------------------------------------


def make_config(model="cifar_resnet20", recipe=None, seed=3, **fields):
    options = {"stage_sizes": (1,), "width": 8, **fields.pop("options", {})}
    fields = {"batch_size": 128, **fields}
    data = DataConfig(recipe=recipe)
    return Config(
        model=model, model_kwargs=ModelKwargs(**options), data=data, seed=seed, **fields
    )


def variables_of(config):
    return random_variables(build.build_model(config))


def recompute(config, variables, num_examples=NUM_EXAMPLES):
    model = build.build_model(config)
    new = run_evaluation.with_precise_bn(config, model, variables, num_examples)
    for old, kept in zip(*map(jax.tree.leaves, (variables, new)), strict=True):
        assert old.shape == kept.shape and kept.dtype == np.float32
    jax.tree.map(np.testing.assert_array_equal, new["params"], variables["params"])
    return jax.device_get(new["batch_stats"])


def training_images(config, num_examples=NUM_EXAMPLES):
    """The first images of the stream as a network takes them, [N, 8, 8, 3]."""
    source = build_data.build_source(config, "train")
    images, _ = pipeline.load_all(build_data.build_reader(config, source))
    dataset, positions = datasets.get_dataset("digits"), np.arange(num_examples)
    index = [order.example_index(config.seed, p, len(images)) for p in positions]
    if config.data.recipe == "none":
        return (images[index] / 255.0 - dataset.mean) / dataset.std
    draws = {"jitter": 0.0, "lighting": 0.0, "flip": False, "pad": 1}
    stats = {"mean": dataset.mean, "std": dataset.std}
    return augment.augment(images[index], positions, config.seed, **stats, **draws)


def stem_outputs(images, kernel):
    """The stem's convolution in float64: all values of each channel, [N * 64, C]."""
    images, kernel = (np.asarray(x, np.float64) for x in (images, kernel))
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    windows = sliding_window_view(padded, (3, 3), axis=(1, 2))  # [N, 8, 8, 3, 3, 3]
    return np.einsum("nhwckl,klcd->nhwd", windows, kernel).reshape(-1, kernel.shape[-1])


def assert_stem_is_exact(batch_stats, params, config, num_examples=NUM_EXAMPLES):
    images = training_images(config, num_examples)
    values = stem_outputs(images, params["stem"]["conv"]["kernel"])
    found, std = batch_stats["stem"]["norm"], values.std(axis=0)
    assert (np.abs(found["mean"] - values.mean(axis=0)) < 1e-5 * std).all()
    np.testing.assert_allclose(found["var"], values.var(axis=0, ddof=1), rtol=1e-5)


@pytest.fixture
def on_devices(monkeypatch):
    """on_devices(n): the first n devices are all that there are."""

    def use(count):
        devices = jax.devices("cpu")[:count]
        monkeypatch.setattr(parallel, "_devices", lambda: devices)
        monkeypatch.setattr(jax, "device_count", lambda: count)
        monkeypatch.setattr(jax, "local_device_count", lambda: count)

    return use


@pytest.mark.parametrize("recipe", ["none", pytest.param("shift", marks=pytest.mark.slow)])
def test_the_whole_training_set_has_its_exact_statistics_on_any_devices(on_devices, recipe):
    config = make_config(recipe=recipe, norm=NormConfig(virtual_batch_size=96))
    variables, found = variables_of(config), []
    for devices, batch_size in ((1, 96), (4, 288)):
        on_devices(devices)
        own = dataclasses.replace(config, batch_size=batch_size)
        found.append(recompute(own, variables))
        assert_stem_is_exact(found[-1], variables["params"], own)
    jax.tree.map(close, *found)


@pytest.mark.parametrize(
    "fields, num_examples",
    [
        # Groups of 256 in place of 480, and the next epoch.
        ({"batch_size": 480, "parallel": "shard_map"}, NUM_EXAMPLES + 300),
        ({"batch_size": 128}, 100),  # less than a group
        pytest.param({"batch_size": 64}, 64 * 5, marks=pytest.mark.slow),  # no rest
    ],
)
def test_any_batch_and_number_of_examples_has_its_exact_statistics(fields, num_examples):
    config = make_config(**fields)
    variables = variables_of(config)
    found = recompute(config, variables, num_examples)
    assert_stem_is_exact(found, variables["params"], config, num_examples)


def inputs_of_norms(model, variables, groups):
    """{path: all that a norm took, [values, C]}, each group normalised by its own."""

    @jax.jit
    def take(variables, images):
        taken = {}

        def note(call, args, kwargs, context):
            if isinstance(context.module, BatchNorm) and context.method_name == "__call__":
                taken["/".join(context.module.path)] = args[0]
            return call(*args, **kwargs)

        with nn.intercept_methods(note):
            model.apply(variables, images, train=True, update_stats=False)
        return taken

    each = [jax.device_get(take(variables, images)) for images in groups]
    flat = [{k: v.reshape(-1, v.shape[-1]) for k, v in taken.items()} for taken in each]
    return {k: np.concatenate([t[k] for t in flat]).astype(np.float64) for k in flat[0]}


@pytest.mark.parametrize(
    "name",
    [pytest.param("cifar_resnet20", marks=pytest.mark.slow), "cifar_preact_resnet110"],
)
def test_every_norm_has_the_statistics_of_what_it_takes(name):
    shape, norm = {"stage_sizes": (1, 1, 1)}, NormConfig(virtual_batch_size=64)
    config = make_config(name, norm=norm, options=shape)
    variables, images = variables_of(config), training_images(config, 200)
    groups = [images[:64], images[64:128], images[128:]]
    model = create_model(name, **shape, width=8)
    expected = inputs_of_norms(model, variables, groups)
    found = traverse_util.flatten_dict(recompute(config, variables, 200), sep="/")
    assert len(found) == 2 * len(expected) > 10
    for path, values in expected.items():
        close(found[f"{path}/mean"], values.mean(axis=0), atol=1e-4 * values.std())
        close(found[f"{path}/var"], values.var(axis=0, ddof=1))


def test_statistics_that_were_there_have_no_influence():
    config = make_config()
    variables = variables_of(config)
    broken = jax.tree.map(lambda x: np.full_like(x, np.nan), variables["batch_stats"])
    found, again = (
        recompute(config, {**variables, "batch_stats": stats}, 128)
        for stats in (variables["batch_stats"], broken)
    )
    jax.tree.map(np.testing.assert_array_equal, found, again)


def test_stochastic_depth_scales_branches_as_in_evaluation():
    """A branch times its survival is one whose last norm has scale and bias times it."""
    shape = {"stage_sizes": (1, 1)}
    config = make_config(options={**shape, "stochastic_depth": 0.6})
    variables = variables_of(config)
    scaled = traverse_util.flatten_dict(variables)
    for stage, survival in ((1, 0.7), (2, 0.4)):
        for name in ("scale", "bias"):
            path = "params", f"stage{stage}", "block1", "norm_out", name
            scaled[path] = scaled[path] * np.float32(survival)
    found = recompute(config, variables, 256)
    expected = make_config(options=shape), traverse_util.unflatten_dict(scaled)
    jax.tree.map(close, found, recompute(*expected, 256))


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["blocks", "convs"])
def test_rematerialisation_changes_nothing(remat):
    shape = {"stage_sizes": (3,)}  # whose last two blocks are a loop
    configs = [make_config(options={**shape, "remat": way}) for way in ("none", remat)]
    variables = variables_of(configs[0])
    jax.tree.map(close, *(recompute(config, variables, 300) for config in configs))


@pytest.mark.slow
def test_a_bfloat16_network_has_float32_statistics():
    config = make_config(dtype="bfloat16")
    variables = variables_of(config)
    found = recompute(config, variables)
    values = stem_outputs(
        training_images(config), variables["params"]["stem"]["conv"]["kernel"]
    )
    stem, std = found["stem"]["norm"], values.std(axis=0)
    assert (np.abs(stem["mean"] - values.mean(axis=0)) < 1e-3 * std).all()
    np.testing.assert_allclose(stem["var"], values.var(axis=0, ddof=1), rtol=1e-2)
    exact = recompute(dataclasses.replace(config, dtype="float32"), variables)
    differ = jax.tree.map(lambda a, b: np.abs(a - b).max() > 0, found, exact)
    assert all(jax.tree.leaves(differ))  # it was computed in bfloat16


def test_what_has_no_statistics_is_refused_in_a_line():
    config = make_config()
    plain = dataclasses.replace(config, norm=NormConfig(kind="none"))
    model = build.build_model(plain)
    with pytest.raises(UsageError, match="norm: the model has Bias, which has no stat"):
        run_evaluation.with_precise_bn(plain, model, {}, 128)
    with pytest.raises(UsageError, match="model: Dense is no model of create_model"):
        run_evaluation.with_precise_bn(config, nn.Dense(2), {}, 128)
    frozen = dataclasses.replace(config, freeze_at=1)
    with pytest.raises(UsageError, match=r"precise batch norm: .* config\.freeze_at=1"):
        run_evaluation.with_precise_bn(frozen, build.build_model(config), {}, 128)
    with pytest.raises(UsageError, match="1 examples are not 2 or more"):
        run_evaluation.with_precise_bn(config, build.build_model(config), {}, 1)
    with pytest.raises(UsageError, match=r"config\.precise_bn_examples: 9, .*kind=none"):
        configs.validate(dataclasses.replace(plain, precise_bn_examples=9))
    for number in (-1, 1, 2**30 + 1):
        with pytest.raises(UsageError, match=rf"config\.precise_bn_examples: {number} is"):
            configs.validate(dataclasses.replace(config, precise_bn_examples=number))


# --- the end of a run ---------------------------------------------------------------

LAST = 6  # steps of 64; evaluated and saved also after 3


def read_metrics(workdir):
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    timings = "images_per_second", "data_wait"
    return [{k: v for k, v in json.loads(x).items() if k not in timings} for x in lines]


def assert_same_run(workdir, expected):
    jax.tree.map(np.testing.assert_array_equal, saved(workdir, LAST), saved(expected, LAST))
    assert read_metrics(workdir) == read_metrics(expected)


@pytest.fixture(scope="module")
def train(tiny_config, data_dir):
    """train(workdir, *words, stop=None): the exit code of a run in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(data_dir))
        config = configs.load_config(tiny_config)

        def run(workdir, *words, stop=None):
            every = 3 * 64 / NUM_EXAMPLES
            fields = {
                "batch_size": 64,
                "num_epochs": 2 * every,
                "eval_every_epochs": every,
                "checkpoint.keep": 9,
            }
            given = [f"--config.{name}={value}" for name, value in fields.items()]
            own = configs.override(config, given + [f"--config.{word}" for word in words])
            return training.train(own, workdir, stop)

        yield run


@pytest.fixture(scope="module")
def plain(train, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("plain") / "run"
    assert train(workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def precise(train, tmp_path_factory):
    """(workdir, standard output) of the same run with precise statistics at its end."""
    workdir = tmp_path_factory.mktemp("precise") / "run"
    assert train(workdir, EXAMPLES) == 0
    return workdir


EXAMPLES = f"precise_bn_examples={NUM_EXAMPLES}"


@pytest.mark.xdist_group("precise")
def test_only_the_last_statistics_of_a_run_are_precise(plain, precise):
    before, after = (saved(run, LAST) for run in (plain, precise))
    for name, array in before.items():
        same = np.array_equal(array, after[name])
        assert same == name.startswith("params"), name
    jax.tree.map(np.testing.assert_array_equal, saved(plain, 3), saved(precise, 3))
    nested = traverse_util.unflatten_dict(after, sep="/")
    config = configs.from_dict(json.loads((precise / "config.json").read_text()))
    assert_stem_is_exact(nested["batch_stats"], nested["params"], config)


@pytest.mark.xdist_group("precise")
def test_the_last_record_is_that_of_the_precise_statistics(plain, precise):
    *before, last_before = read_metrics(plain)
    *after, last = read_metrics(precise)
    assert before == after and last["step"] == last_before["step"] == LAST
    assert last["split"] == "test" and last["loss"] != last_before["loss"]
    found = run_evaluation.evaluate(precise)
    assert found["loss"] == pytest.approx(last["loss"], rel=1e-5)
    assert found["top1"] == pytest.approx(last["top1"])


@pytest.mark.xdist_group("precise")
@pytest.mark.parametrize(
    "error",
    [
        UsageError("data: example 3: broken"),
        pytest.param(MemoryError(), marks=pytest.mark.slow),
    ],
)
def test_a_run_is_saved_as_it_is_where_they_cannot_be_made(
    train, plain, tmp_path, monkeypatch, capsys, error
):
    def fail(*args):
        raise error

    monkeypatch.setattr(precise_bn, "pool", fail)
    assert train(tmp_path / "run", EXAMPLES) == 0
    (line,) = (x for x in capsys.readouterr().err.splitlines() if "precise_bn" in x)
    assert f"{error}; the run ends with its running statistics" in line
    found, expected = saved(tmp_path / "run", LAST), saved(plain, LAST)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert read_metrics(tmp_path / "run") == read_metrics(plain)


@pytest.mark.xdist_group("precise")
def test_eval_makes_the_statistics_that_the_end_of_a_run_makes(plain, precise, capsys):
    found = run_evaluation.evaluate(plain, precise_bn=NUM_EXAMPLES)
    lines = capsys.readouterr().err.splitlines()
    at_end, running = (run_evaluation.evaluate(run) for run in (precise, plain))
    for name in ("top1", "top5", "loss"):
        assert found[name] == pytest.approx(at_end[name], rel=1e-5)
        assert found["before"][name] == running[name]
    assert found["before"]["loss"] != found["loss"]
    for kind, numbers in (("running", found["before"]), ("precise", found)):
        told = f"loss {numbers['loss']:.4f} top-1 {numbers['top1']:.2f} %"
        assert any(line.startswith(kind) and told in line for line in lines)
    written = json.loads((plain / f"eval_test_{LAST}_precise1437.json").read_text())
    assert written == found and written["precise_bn"] == NUM_EXAMPLES


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xdist_group("precise")
def test_averages_are_evaluated_with_their_own_statistics(train, tmp_path):
    workdir = tmp_path / "run"
    assert train(workdir, "ema_decay=0.9", EXAMPLES) == 0
    rows = read_metrics(workdir)
    (row,) = [r for r in rows if (r["split"], r["step"]) == ("test_ema", LAST)]
    found = run_evaluation.evaluate(workdir, ema=True)
    again = run_evaluation.evaluate(workdir, ema=True, precise_bn=NUM_EXAMPLES)
    for name in ("top1", "loss"):  # they were made at the end of the run, and stay
        assert found[name] == pytest.approx(row[name], rel=1e-5)
        assert again[name] == pytest.approx(again["before"][name], rel=1e-5)
    assert found["loss"] != run_evaluation.evaluate(workdir)["loss"]
    assert (workdir / f"eval_test_{LAST}_ema_precise1437.json").exists()


@pytest.mark.xdist_group("precise")
def test_a_run_says_the_numbers_before_and_after(train, plain, precise, tmp_path, capsys):
    workdir = killed_at_3(precise, tmp_path)
    assert train(workdir, EXAMPLES) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = (i for i, line in enumerate(lines) if line.startswith("running statistics: "))
    for line, run in ((lines[at], plain), (lines[at + 1], precise)):
        row = read_metrics(run)[-1]
        assert f"test loss {row['loss']:.4f} top-1 {row['top1']:6.2f} %" in line
    assert lines[at].endswith("recomputing them over 1,437 training examples")
    assert_same_run(workdir, precise)


def killed_at_3(run, tmp_path):
    workdir = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(workdir / "checkpoints" / str(LAST))
    return workdir


@pytest.mark.xdist_group("precise")
def test_a_finished_run_started_again_says_so(train, precise, capsys):
    assert train(precise, EXAMPLES) == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert f"is finished: step {LAST} of {LAST}" in line


@pytest.mark.slow
@pytest.mark.xdist_group("precise")
def test_several_updates_a_dispatch_end_alike(train, precise, tmp_path):
    dispatch = "data.on_device=true", "data.steps_per_dispatch=3"
    assert train(tmp_path / "run", EXAMPLES, *dispatch) == 0
    jax.tree.map(close, saved(tmp_path / "run", LAST), saved(precise, LAST))


@pytest.mark.xdist_group("precise")
def test_a_signal_while_they_are_recomputed_waits_for_them(
    train, precise, tmp_path, monkeypatch, capsys
):
    workdir, stop = killed_at_3(precise, tmp_path), signals.StopSignals()

    def interrupted(*args, pool=precise_bn.pool):
        stop.received.append(15)
        return pool(*args)

    with monkeypatch.context() as patch:
        patch.setattr(precise_bn, "pool", interrupted)
        assert train(workdir, EXAMPLES, stop=stop) == 128 + 15
    assert f"stopped by signal 15; step {LAST} is saved" in capsys.readouterr().out
    jax.tree.map(np.testing.assert_array_equal, saved(workdir, LAST), saved(precise, LAST))
    assert read_metrics(workdir) == read_metrics(precise)[:-1]
    assert train(workdir, EXAMPLES) == 0  # which has only to evaluate them
    assert "running statistics" not in capsys.readouterr().out
    assert_same_run(workdir, precise)


@pytest.mark.xdist_group("precise")
def test_runs_with_another_number_of_examples_are_not_mixed(train, precise):
    with pytest.raises(UsageError, match=r"config\.precise_bn_examples was 1437 and is"):
        train(precise, "precise_bn_examples=100")


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.xdist_group("topology")
def test_two_hosts_find_what_one_does(two_hosts, command, tiny_config, tmp_path):
    words = f"--config={tiny_config}", "--config.batch_size=64", "--config.num_epochs=0.2"
    words = *words, f"--config.{EXAMPLES}", "--config.data.on_device=false"
    one, both = tmp_path / "one", tmp_path / "both"
    done = command("train.py", f"--workdir={one}", *words, devices=1)
    assert (done.returncode, done.stderr) == (0, "")
    with two_hosts("train.py", f"--workdir={both}", *words) as processes:
        first, _ = finish(processes)
    assert "recomputing them over 1,437 training examples" in first
    jax.tree.map(close, saved(both, 4), saved(one, 4))
