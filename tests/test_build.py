"""Config to parts: derived numbers, and what is refused before anything is written."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from conftest import ROOT

from resjax import build, build_data, checkpoint, loop, parallel
from resjax.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelKwargs,
    NormConfig,
    UsageError,
)
from resjax.data import order
from resjax.models.norm import BatchNorm, Bias
from resjax.steps import TrainState

GOLDEN = ROOT / "tests" / "golden"


def derived_of(num_examples=1_281_167, **fields):
    config = dataclasses.replace(Config(), **fields)
    return build.build_schedule(config, num_examples)


@pytest.mark.parametrize("kn", [256, 512, 8192])
def test_goyal_warms_up_only_minibatches_over_256(kn):
    schedule, derived = derived_of(batch_size=kn, warmup="goyal")
    peak = 0.1 * kn / 256
    assert derived["peak_lr"] == pytest.approx(peak)
    assert derived["num_steps"] == round(90 * 1_281_167 / kn)
    np.testing.assert_allclose(schedule(0), 0.1, rtol=1e-6)  # reached from 0.1 in any case
    steps = round(5 * 1_281_167 / kn)
    assert derived["warmup_steps"] == (steps if kn > 256 else 0)
    np.testing.assert_allclose(schedule(steps), peak, rtol=1e-6)
    np.testing.assert_allclose(schedule(steps // 2), (0.1 + peak) / 2, rtol=1e-3)


def test_warmups_differ_only_while_they_last():
    kinds = ("gradual", "constant", "none")
    schedules = {kind: derived_of(batch_size=8192, warmup=kind)[0] for kind in kinds}
    first = {kind: float(schedule(0)) for kind, schedule in schedules.items()}
    assert first == pytest.approx({"gradual": 0.1, "constant": 0.1, "none": 3.2})
    middle = {kind: float(schedule(400)) for kind, schedule in schedules.items()}
    assert middle["constant"] == pytest.approx(0.1) and middle["gradual"] > 1
    for step in (800, 5_000, 12_000, 14_000):
        assert len({float(schedule(step)) for schedule in schedules.values()}) == 1


@pytest.mark.parametrize(
    "batch, group, devices, named",
    [
        (100, 0, 8, ["config.batch_size", "100", "8 devices", "96 or 104"]),
        (4, 0, 8, ["config.batch_size", "4", "8 devices", "8"]),
    ],
)
def test_a_minibatch_that_does_not_fit_the_devices_is_named(batch, group, devices, named):
    config = dataclasses.replace(Config(), batch_size=batch, norm=NormConfig(group))
    with pytest.raises(UsageError) as caught:
        build.check_devices(config, devices)
    assert all(part in str(caught.value) for part in named)


@pytest.mark.parametrize(
    "group, microbatch, named",
    [
        (32, 24, ["config.microbatch", "24", "64 examples"]),
        (32, 16, ["config.norm.virtual_batch_size", "32", "config.microbatch=16"]),
        (0, 32, ["config.norm.virtual_batch_size", "0", "128", "config.microbatch=32"]),
        (128, 32, ["config.norm.virtual_batch_size", "128", "config.microbatch=32"]),
    ],
)
def test_statistics_that_no_backward_pass_holds_name_both_fields(group, microbatch, named):
    config = dataclasses.replace(Config(), norm=NormConfig(group), microbatch=microbatch)
    with pytest.raises(UsageError) as caught:
        build.check_devices(config, 2)
    assert all(part in str(caught.value) for part in named)


@pytest.mark.parametrize(
    "group, microbatch, devices",
    [
        (0, 0, 8),
        (128, 16, 8),
        (32, 0, 8),
        (32, 64, 8),
        (16, 16, 4),
        (8, 32, 1),
        (64, 64, 1),
    ],
)
def test_a_minibatch_that_fits_is_accepted(group, microbatch, devices):
    config = dataclasses.replace(Config(), norm=NormConfig(group), microbatch=microbatch)
    build.check_devices(config, devices)


@pytest.mark.parametrize(
    "batch, microbatch, devices, expected",
    [
        (8192, 32, 1, 32),
        (8192, 32, 8, 256),
        (8192, 0, 1, 256),
        (8192, 0, 64, 8192),
        (128, 64, 8, 128),
        (128, 0, 1, 128),
    ],
)
def test_an_evaluation_gives_a_device_no_more_than_it_holds(
    batch, microbatch, devices, expected
):
    config = dataclasses.replace(Config(), batch_size=batch, microbatch=microbatch)
    assert build.eval_batch_size(config, devices) == expected


@pytest.mark.parametrize("on_device", [True, False])
def test_a_run_evaluates_in_parts_no_larger_than_its_backward_pass(on_device):
    config = dataclasses.replace(Config(), microbatch=4, norm=NormConfig(4), num_epochs=0)
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, on_device=on_device)
    )
    batches = list(build.build_run(config).eval_batches())
    assert {batch["image"].shape[:2] for batch in batches} == {(8, 4)}  # [devices, n, ...]
    assert sum(int(batch["mask"].sum()) for batch in batches) == 360


def test_groups_of_the_whole_minibatch_are_the_whole_minibatch():
    config = dataclasses.replace(Config(), norm=NormConfig(128))
    norm = build.build_model(config, axis_name="devices").norm
    assert norm.keywords == {"virtual_batch_size": 0, "axis_name": "devices"}


def test_evaluation_comes_after_the_last_step_and_every_so_often():
    config = dataclasses.replace(
        Config(), num_epochs=2.5, eval_every_epochs=1.0, batch_size=128
    )
    run = build.build_run(config)
    assert run.num_examples == 1437
    assert run.num_steps == round(2.5 * 1437 / 128) == 28
    assert sorted(run.eval_steps) == [11, 22, 28]
    assert run.learning_rates.shape == (28,)
    assert run.record["class_names"] == list("0123456789")


@pytest.mark.parametrize("every, due", [(0, {11, 22, 28}), (12, {12, 24, 28})])
def test_checkpoints_come_every_so_often_and_after_the_last_step(every, due):
    config = dataclasses.replace(Config(), checkpoint=CheckpointConfig(every_steps=every))
    save_due = build.build_save_due(config, frozenset({11, 22, 28}), 28)
    assert set(filter(save_due, range(1, 29))) == due


@pytest.mark.parametrize("on_device", [True, False])
def test_only_a_small_set_is_evaluated_from_the_memory_of_the_devices(on_device):
    run = build.build_run(Config(data=DataConfig(on_device=on_device)))
    first, second = ([b["image"] for b in run.eval_batches()] for _ in range(2))
    assert len(first) == len(second) == 3  # 360 examples
    for a, b in zip(first, second, strict=True):
        assert (a is b) == on_device
        np.testing.assert_array_equal(a, b)


def test_dispatches_take_the_minibatches_of_the_stream(monkeypatch):
    def make_train_step(*_):  # sums what it is given
        def train_step(state, batch):
            weighted = (batch["label"] * (batch["position"] % 97)).sum()
            sums = {"loss": jax.lax.psum(weighted, parallel.AXIS)}
            return state.replace(step=state.step + 1), sums

        return train_step

    monkeypatch.setattr(build.steps, "make_train_step", make_train_step)
    data = DataConfig(steps_per_dispatch=4)
    config = Config(data=data, num_epochs=2.5, eval_every_epochs=1.0)
    run, found, dispatches = build.build_run(config), {}, set()

    def note(step, state, sums):
        found[step] = int(sums["loss"])
        dispatches.add(int(state.step))

    state = TrainState(parallel.replicate(np.int32(2)), {}, {}, ())
    loop.fit(run.train_step, state, run.train_batches(2), [note])
    source = build_data.build_source(config, "train")
    labels = np.array([source[i]["label"] for i in range(1437)])
    stream = np.concatenate([labels[order.permutation(0, e, 1437)] for e in range(3)])
    stream = stream * (np.arange(3 * 1437) % 97)
    expected = stream[: 28 * 128].reshape(28, 128).sum(axis=1)
    assert found == dict(enumerate(expected[2:], start=3))
    assert dispatches == {6, 10, 11, 15, 19, 20, 21, 22, 26, 27, 28}  # evaluated: 11, 22


def test_a_run_too_long_to_count_its_examples_is_refused():
    with pytest.raises(UsageError, match=r"config\.num_epochs: 1e\+12"):
        derived_of(num_epochs=1e12)


@pytest.mark.parametrize("dtype, scaled", [("float32", False), ("float16", True)])
def test_only_float16_scales_its_loss(dtype, scaled):
    config = dataclasses.replace(Config(), dtype=dtype, num_epochs=1)
    state = jax.eval_shape(build.build_run(config).init_state)
    assert (state.loss_scale is not None) == scaled
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype(np.float32)}


def state_of(**fields):
    config = dataclasses.replace(Config(), num_epochs=1, **fields)
    return checkpoint.to_arrays(
        jax.tree.map(
            lambda x: np.zeros(x.shape, x.dtype),
            jax.eval_shape(build.build_run(config).init_state),
        )
    )


def test_a_state_has_what_its_fields_need_and_no_more():
    # By default the arrays are those of the checkpoints before averages and freezing.
    variables = json.loads((GOLDEN / "cifar_resnet20.json").read_text())
    params = {name for name in variables if name.startswith("params/")}
    plain = state_of()
    buffers = {name.replace("params/", "opt_state/1/trace/") for name in params}
    count = {"opt_state/2/count"}
    assert set(plain) == {*variables, *buffers, "step", *count}
    averaged = state_of(ema_decay=0.9, label_smoothing=0.1)
    assert set(averaged) - set(plain) == {f"ema/{name}" for name in variables}
    frozen = state_of(freeze_at=2, init_from="x")
    gone = {name for name in buffers if name.split("/")[3] in ("stem", "stage1")}
    assert gone and set(plain) - set(frozen) == gone and set(frozen) < set(plain)


@pytest.mark.parametrize(
    "name, freeze_at, most", [("cifar_resnet20", 5, 4), ("preact_resnet18", 6, 5)]
)
def test_more_frozen_stages_than_the_model_has_are_refused(name, freeze_at, most):
    config = dataclasses.replace(Config(), model=name, freeze_at=freeze_at, init_from="x")
    match = rf"^config\.freeze_at: {freeze_at} is not from 0 .* to {most} .* of {name}$"
    with pytest.raises(UsageError, match=match):
        build.check_model(config)
    build.check_model(dataclasses.replace(config, freeze_at=most))


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_the_rate_of_the_head_is_multiplied(optimizer):
    config = dataclasses.replace(Config(), optimizer=optimizer, weight_decay=0.25)
    faster = dataclasses.replace(config, head_lr_multiplier=10.0)
    layer = {"kernel": np.ones((1, 2), np.float32)}
    params = {"head": layer, "stem": {"conv": layer}}
    updates = []
    for own in (config, faster):
        tx = build.build_optimizer(own, lambda step: 0.1)
        update, _ = tx.update(params, tx.init(params), params)
        updates.append([update["head"]["kernel"], update["stem"]["conv"]["kernel"]])
    np.testing.assert_allclose(updates[1][0], 10 * updates[0][0], rtol=1e-6)
    np.testing.assert_array_equal(updates[1][1], updates[0][1])


def test_lars_gives_each_layer_a_rate_of_its_own():
    config = dataclasses.replace(Config(), optimizer="lars", weight_decay=0.0)
    tx = build.build_optimizer(config, lambda step: 0.1)
    params = {"conv": {"kernel": np.full((1, 4), 2, np.float32)}}
    grads = {"conv": {"kernel": np.ones((1, 4), np.float32)}}
    updates, _ = tx.update(grads, tx.init(params), params)
    np.testing.assert_allclose(updates["conv"]["kernel"], -0.1 * 0.001 * 2 * 1.9, rtol=1e-5)


@pytest.mark.parametrize("nesterov", [True, False])
def test_the_optimizer_takes_its_numbers_from_the_config(nesterov):
    config = dataclasses.replace(
        Config(), momentum=0.5, nesterov=nesterov, weight_decay=0.25
    )
    tx = build.build_optimizer(config, lambda step: 0.1)
    params = {"head": {"kernel": np.ones((1, 1), np.float32)}}
    updates, _ = tx.update({"head": {"kernel": np.ones((1, 1))}}, tx.init(params), params)
    expected = -0.1 * 1.25 * (1.5 if nesterov else 1)
    np.testing.assert_allclose(updates["head"]["kernel"], [[expected]], rtol=1e-6)


def test_checkpoints_kept_are_the_latest_multiples_and_the_best():
    steps = list(range(10, 110, 10))

    def kept(best=None, **fields):
        config = dataclasses.replace(Config(), checkpoint=CheckpointConfig(**fields))
        return sorted(build.build_keep(config, lambda steps: best)(steps))

    assert kept(keep=2) == [90, 100]
    assert kept(keep=1, keep_every_steps=40) == [40, 80, 100]
    assert kept(keep=1, best=30) == [30, 100]
    assert kept(keep=99) == steps
    assert kept(keep=2, best=35) == [90, 100]  # which has no checkpoint


def test_data_that_a_run_was_not_trained_on_is_named():
    record = {"derived": {"num_examples": 100}, "class_names": ["cat", "dog"]}
    build.check_data(record, record)
    build.check_data(record, {**record, "derived": {}})  # of an older version
    build.check_data(record, {**record, "class_names": ["0", "1"]})  # which had no names
    fewer = {**record, "derived": {"num_examples": 90}}
    with pytest.raises(UsageError, match=r"data\.dir: there are 90 .* trained on 100"):
        build.check_data(fewer, record)
    swapped = {**record, "class_names": ["dog", "cat"]}
    with pytest.raises(UsageError, match="class 0 is 'dog', and was 'cat' in training"):
        build.check_data(swapped, record)


def test_a_net_without_norms_is_built_from_its_field_and_trains_in_microbatches():
    config = dataclasses.replace(Config(), norm=NormConfig(kind="none"), microbatch=16)
    build.check_devices(config, 1)  # no statistics that a microbatch would have to hold
    described = build.describe_model(config)
    assert build.make_model(described).norm is Bias
    shape = ModelKwargs(stage_sizes=(2, 1), width=4)
    shaped = build.describe_model(dataclasses.replace(config, model_kwargs=shape))
    model = build.make_model(json.loads(json.dumps(shaped)))  # as a checkpoint holds it
    assert (model.stage_sizes, model.width) == ((2, 1), 4)
    del described["norm"]  # as checkpoints had it before
    assert build.make_model(described).norm.func is BatchNorm
