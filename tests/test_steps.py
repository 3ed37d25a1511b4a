"""One update against the same update written out, on one device and on eight."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from resjax import loop, optim, parallel, steps
from resjax.initializers import init
from resjax.loss_scale import init_loss_scale
from resjax.models.blocks import basic
from resjax.models.norm import BatchNorm
from resjax.models.resnet import ResNet

BATCH, CLASSES, RATE, DECAY = 16, 4, 0.3, 1e-2


def tiny_model(group=0, axis_name=None, dtype=jnp.float32):
    norm = partial(BatchNorm, virtual_batch_size=group, axis_name=axis_name)
    return ResNet(
        (1,), basic, 4, downsample=False, num_classes=CLASSES, dtype=dtype, norm=norm
    )


def to_float(batch):
    return batch["image"].astype(jnp.float32) / 64 - 2


def random_batch(seed=0, size=BATCH):
    rng = np.random.RandomState(seed)
    return {
        "image": rng.randint(256, size=(size, 6, 6, 3)).astype(np.uint8),
        "label": rng.randint(CLASSES, size=size).astype(np.int32),
        "position": np.arange(size, dtype=np.int32),
    }


def make_step(model, seed=0, microbatch=0, loss_scale=None):
    tx = optim.sgd(lambda step: jnp.float32(RATE), 0.9, True, DECAY)
    step = steps.make_train_step(model, tx, to_float, BATCH, seed, microbatch)
    variables = init(model, jax.random.key(0))
    return step, steps.create_state(variables, tx, loss_scale)


def on_devices(step, num_devices):
    devices = jax.devices()[:num_devices]
    return jax.pmap(step, parallel.AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def run(model, num_devices, batches, **kwargs):
    step, state = make_step(model, **kwargs)
    mapped, sums = on_devices(step, num_devices), None
    for batch in batches:
        split = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
        state, sums = mapped(state, split)
    return jax.device_get((state, sums))


def written_out_update(model, batch, groups=1):
    """Mean loss over the minibatch, L2 on all but norms, a first Nesterov step."""
    variables = init(model, jax.random.key(0))

    def loss_fn(params):
        logits = [
            model.apply(
                {"params": params, "batch_stats": variables["batch_stats"]},
                to_float({"image": images}),
                train=True,
                update_stats=False,
            )
            for images in np.split(batch["image"], groups)
        ]
        log_p = jax.nn.log_softmax(jnp.concatenate(logits))
        return -log_p[np.arange(BATCH), batch["label"]].mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    decay = jax.tree.map(lambda is_on: DECAY * is_on, optim.decay_mask(grads))
    params = jax.tree.map(
        lambda w, g, d: w - RATE * 1.9 * (g + d * w), variables["params"], grads, decay
    )
    return params, loss


@pytest.mark.parametrize(
    "num_devices, group, microbatch, scale",
    [
        (2, 4, 4, None),
        pytest.param(1, 0, 0, None, marks=pytest.mark.slow),
        pytest.param(4, 8, 0, 2.0**10, marks=pytest.mark.slow),
    ],
)
def test_an_update_is_sgd_on_the_mean_loss_of_the_minibatch(
    num_devices, group, microbatch, scale
):
    batch = random_batch()
    model, scale = tiny_model(group, parallel.AXIS), scale and init_loss_scale(scale)
    state, sums = run(model, num_devices, [batch], microbatch=microbatch, loss_scale=scale)
    groups = BATCH // group if group else 1
    params, loss = written_out_update(tiny_model(), batch, groups)
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-6), state.params, params)
    np.testing.assert_allclose(sums["loss"] / BATCH, loss, rtol=1e-5)
    assert sums["num_examples"] == BATCH and state.step == 1


@pytest.mark.slow
@pytest.mark.parametrize("group, depth, microbatch", [(0, 0.0, 0), (4, 0.6, 4)])
def test_many_devices_train_as_one(group, depth, microbatch):
    batches = [random_batch(seed) for seed in range(3)]
    model = tiny_model(group, parallel.AXIS).clone(stochastic_depth=depth)
    one, one_sums = run(model, 1, batches, microbatch=microbatch)
    eight, eight_sums = run(model, 8, batches)
    close = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
    jax.tree.map(close, (one, one_sums), (eight, eight_sums))


@pytest.mark.slow
def test_every_step_and_seed_draws_anew_which_branch_it_drops():
    model = tiny_model(0, parallel.AXIS).clone(stochastic_depth=0.5)
    state = make_step(model)[1]
    batch = jax.tree.map(lambda x: x[None], random_batch())

    def kept_last(seed):
        """Of each of 12 steps from the same state, whether the last branch moved."""
        step = make_step(model, seed)[0]
        mapped = on_devices(step, 1)
        states = [mapped(state.replace(step=jnp.int32(i)), batch)[0] for i in range(12)]
        before = state.params["stage1"]["block1"]["norm_out"]["scale"]
        ends = [new.params["stage1"]["block1"]["norm_out"]["scale"] for new in states]
        return [bool((end != before).any()) for end in ends]

    first, other = kept_last(0), kept_last(1)
    assert first != other
    assert set(first) == {True, False}


def test_running_statistics_average_over_the_groups_of_all_devices():
    batch = random_batch()
    state, _ = run(tiny_model(4, parallel.AXIS), 4, [batch])
    variables = init(tiny_model(), jax.random.key(0))
    apply = partial(tiny_model().apply, train=True, mutable=["batch_stats"])
    images = [to_float({"image": part}) for part in np.split(batch["image"], 4)]
    parts = [apply(variables, part)[1] for part in images]
    mean = jax.tree.map(lambda *x: np.mean(x, axis=0), *(p["batch_stats"] for p in parts))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-6), state.batch_stats, mean)


@pytest.mark.slow
def test_bfloat16_keeps_the_state_in_float32_and_the_loss_near():
    batches = [random_batch(seed) for seed in range(3)]
    half, half_sums = run(tiny_model(0, parallel.AXIS, jnp.bfloat16), 2, batches)
    _, full_sums = run(tiny_model(0, parallel.AXIS), 2, batches)
    floats = jax.tree.leaves((half.params, half.batch_stats, half.opt_state[1]))
    assert {leaf.dtype for leaf in floats} == {np.dtype(np.float32)}
    np.testing.assert_allclose(half_sums["loss"], full_sums["loss"], rtol=0.05)
    assert half_sums["loss"] != full_sums["loss"]


def test_an_overflow_changes_nothing_but_the_scale_and_training_recovers():
    model, scale = tiny_model(4, parallel.AXIS, jnp.float16), init_loss_scale(2.0**14)
    step, state = make_step(model, microbatch=4, loss_scale=scale)
    mapped, states, skips = on_devices(step, 2), [state], []

    def train_step(state, batch):
        if len(skips) == 2:  # the third step overflows: gradients up to 2**40
            state = state.replace(loss_scale=init_loss_scale(2.0**40))
        new, sums = mapped(state, batch)
        skips.append(bool(sums["skipped"]))
        states.append(new)
        return new, sums

    batch = jax.tree.map(lambda x: x.reshape(2, 8, *x.shape[1:]), random_batch(0))
    losses = []
    end = loop.fit(
        train_step,
        state,
        [batch] * 12,
        [lambda step, state, sums: losses.append(sums["loss"])],
    )
    assert skips[:3] == [False, False, True] and not skips[-1]
    before, after = states[2], states[3]
    assert after.loss_scale.value == 2.0**39 and after.loss_scale.good_steps == 0
    same = [s.replace(loss_scale=None) for s in (before, after)]
    jax.tree.map(np.testing.assert_array_equal, *same)
    assert end.step == 12 and len(skips) == 12 + sum(skips)
    undisturbed = loop.fit(mapped, state, [batch] * 12, [])
    jax.tree.map(
        partial(np.testing.assert_allclose, atol=0.05), end.params, undisturbed.params
    )
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("num_steps, unroll", [(1, False), (3, True), (3, False)])
def test_updates_of_one_program_follow_one_another_as_in_a_plain_loop(num_steps, unroll):
    def train_step(state, batch):  # w goes towards the mean of its minibatch
        total = jax.lax.psum(batch["x"].sum(), parallel.AXIS)
        w = state.params + RATE * (total / 8 - state.params)
        return state.replace(step=state.step + 1, params=w), {"loss": w, "total": total}

    def take_batch(data, step, device_index, num_devices):
        assert num_devices == 4
        return {"x": jax.lax.dynamic_slice(data, (8 * step + 2 * device_index,), (2,))}

    x = np.random.RandomState(0).randn(8 * 30).astype(np.float32)
    program = steps.make_train_steps(train_step, take_batch, num_steps, unroll)
    mapped = on_devices(program, 4)
    state, found = steps.TrainState(jnp.int32(0), jnp.float32(0), {}, ()), []
    for _ in range(30 // num_steps):
        state, sums = mapped(state, np.stack([x] * 4))
        assert len(sums) == num_steps
        found += sums
    w, expected = 0.0, []
    for minibatch in x.astype(np.float64).reshape(30, 8):
        w += RATE * (minibatch.mean() - w)
        expected.append(w)
    np.testing.assert_allclose([s["loss"] for s in found], expected, rtol=1e-4, atol=1e-6)
    totals = x.reshape(30, 8).sum(axis=1)
    np.testing.assert_allclose([s["total"] for s in found], totals, rtol=1e-4, atol=1e-6)
    assert state.step == 30 and state.params == found[-1]["loss"]


def test_eval_step_ignores_padding_and_leaves_the_statistics():
    model, batch = tiny_model(), random_batch()
    variables = init(model, jax.random.key(0))
    step = steps.make_eval_step(model, to_float)
    batch["mask"] = np.arange(BATCH) < 11
    batch["image"][11:] = 255
    split = jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch)
    sums = jax.pmap(step, parallel.AXIS, in_axes=(None, 0), out_axes=None)(variables, split)
    logits = np.asarray(model.apply(variables, to_float(batch)), np.float64)[:11]
    assert float(sums["num_examples"]) == 11
    assert float(sums["top1"]) == (logits.argmax(1) == batch["label"][:11]).sum()


def test_a_step_compiles_once():
    traces = []
    tx = optim.sgd(lambda step: jnp.float32(RATE), 0.9, True, DECAY)

    def prepare(batch):
        traces.append(1)
        return to_float(batch)

    step = steps.make_train_step(tiny_model(0, parallel.AXIS), tx, prepare, BATCH)
    run_step = parallel.run_on_devices(step, "pmap", donate_state=True)
    state = parallel.replicate(
        steps.create_state(init(tiny_model(), jax.random.key(0)), tx)
    )
    for seed in range(3):
        state, _ = run_step(state, parallel.shard(random_batch(seed)))
    assert len(traces) == 1


def predict_batch():
    """Ten examples of five views each and two of padding, in an order of their own."""
    rng = np.random.RandomState(0)
    index = np.array([4, 9, 0, 1, 2, 3, -1, 8, 7, 6, 5, -1], np.int32)
    return {
        "image": rng.randint(256, size=(12, 5, 6, 6, 3)).astype(np.uint8),
        "label": rng.randint(CLASSES, size=12).astype(np.int32),
        "index": index,
        "mask": index >= 0,
    }


@pytest.mark.parametrize("runner", ["pmap", "shard_map"])
@pytest.mark.parametrize("num_devices", [1, 2, 4])
def test_predictions_average_the_softmax_of_views_and_their_mirror_images(
    num_devices, runner, monkeypatch
):
    devices = jax.devices()[:num_devices]
    monkeypatch.setattr(jax, "devices", lambda: devices)
    monkeypatch.setattr(jax, "local_device_count", lambda: num_devices)
    model, batch = tiny_model(), predict_batch()
    variables = init(model, jax.random.key(0))
    step = steps.make_predict_step(partial(model.apply, train=False), to_float)
    run = parallel.run_on_devices(step, runner)
    found = jax.device_get(run(parallel.replicate(variables), parallel.shard(batch)))

    views = np.float32(batch["image"]) / 64 - 2  # one pass a view, each way round
    each = [views[:, i, :, ::way] for i in range(5) for way in (1, -1)]
    forward = jax.jit(model.apply)
    logits = np.float64([forward(variables, images) for images in each])
    softmax = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    expected = np.log(softmax.mean(axis=0))
    np.testing.assert_allclose(found["log_probs"], expected, rtol=1e-5, atol=1e-5)
    for name in ("label", "index", "mask"):
        np.testing.assert_array_equal(found[name], batch[name])


def test_predictions_of_one_image_are_its_log_softmax_and_never_infinite():
    batch = {**predict_batch(), "image": np.full((12, 2, 2, 3), 5, np.uint8)}
    far = np.array([0.0, -200, -400, -300])  # exp(-104) is 0 in float32
    step = steps.make_predict_step(lambda _, x: far + 0 * x[:, 0, 0, :1], to_float)
    views = {**batch, "image": np.full((12, 3, 2, 2, 3), 5, np.uint8)}
    for given in (batch, views):
        split = jax.tree.map(lambda x: x[None], given)
        found = jax.device_get(on_devices(step, 1)({}, split))["log_probs"]
        assert found.shape == (12, CLASSES)
        np.testing.assert_allclose(found, np.tile(far, (12, 1)), rtol=1e-6)
