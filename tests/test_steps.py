"""One update against the same update written out, on one device and on eight."""

import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT

import resjax
from resjax import checkpoint, loop, optim, parallel, steps
from resjax.initializers import init
from resjax.loss_scale import init_loss_scale
from resjax.models.blocks import ResidualBlock, basic
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv
from resjax.models.resnet import ResNet, frozen_layers

BATCH, CLASSES, RATE, DECAY = 16, 4, 0.3, 1e-2


def tiny_model(group=0, axis_name=None, dtype=jnp.float32, stage_sizes=(1,), **options):
    norm = partial(BatchNorm, virtual_batch_size=group, axis_name=axis_name)
    options = {"num_classes": CLASSES, "dtype": dtype, "norm": norm, **options}
    return ResNet(stage_sizes, basic, 4, downsample=False, **options)


def to_float(batch):
    return batch["image"].astype(jnp.float32) / 64 - 2


def random_batch(seed=0, size=BATCH):
    rng = np.random.RandomState(seed)
    return {
        "image": rng.randint(256, size=(size, 6, 6, 3)).astype(np.uint8),
        "label": rng.randint(CLASSES, size=size).astype(np.int32),
        "position": np.arange(size, dtype=np.int32),
    }


def make_step(model, seed=0, microbatch=0, loss_scale=None, variables=None, **fields):
    """A train step with `label_smoothing`, `ema_decay`, `freeze_at`; the first state."""
    tx = optim.sgd(lambda step: jnp.float32(RATE), 0.9, True, DECAY)
    size = fields.pop("batch_size", BATCH)
    step = steps.make_train_step(model, tx, to_float, size, seed, microbatch, **fields)
    variables = variables or init(model, jax.random.key(0))
    frozen = frozen_layers(model, fields.get("freeze_at", 0))
    with_ema = bool(fields.get("ema_decay"))
    return step, steps.create_state(variables, tx, loss_scale, with_ema, frozen)


def on_devices(step, num_devices):
    devices = jax.devices()[:num_devices]
    return jax.pmap(step, parallel.AXIS, in_axes=(None, 0), out_axes=None, devices=devices)


def run(model, num_devices, batches, **kwargs):
    return walk(model, num_devices, batches, **kwargs)[-1]


def walk(model, num_devices, batches, **kwargs):
    """(state, sums) before the first update and after each."""
    step, state = make_step(model, **kwargs)
    mapped, found = on_devices(step, num_devices), [jax.device_get((state, None))]
    for batch in batches:
        split = jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)
        state, sums = mapped(state, split)
        found.append(jax.device_get((state, sums)))
    return found


def written_out_update(model, batch, groups=1, smoothing=0.0):
    """Mean loss over the minibatch, L2 on all but norms, a first Nesterov step."""
    target = np.full((BATCH, CLASSES), smoothing / CLASSES)
    target[np.arange(BATCH), batch["label"]] += 1 - smoothing
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
        return -(target * log_p).sum(axis=1).mean()

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(variables["params"])
    decay = jax.tree.map(lambda is_on: DECAY * is_on, optim.decay_mask(grads))
    params = jax.tree.map(
        lambda w, g, d: w - RATE * 1.9 * (g + d * w), variables["params"], grads, decay
    )
    return params, loss


@pytest.mark.parametrize(
    "num_devices, group, microbatch, scale, smoothing",
    [
        (2, 4, 4, None, 0.0),
        pytest.param(2, 4, 4, None, 0.3, marks=pytest.mark.slow),
        pytest.param(1, 0, 0, None, 0.0, marks=pytest.mark.slow),
        pytest.param(4, 8, 0, 2.0**10, 0.0, marks=pytest.mark.slow),
        pytest.param(2, 4, 4, 2.0**10, 0.1, marks=pytest.mark.slow),
    ],
)
def test_an_update_is_sgd_on_the_mean_loss_of_the_minibatch(
    num_devices, group, microbatch, scale, smoothing
):
    # Of seed 0 a value is so near to 0 that rounding decides whether its ReLU is on.
    batch = random_batch(seed=1)
    fields = {"microbatch": microbatch, "label_smoothing": smoothing}
    model, scale = tiny_model(group, parallel.AXIS), scale and init_loss_scale(scale)
    state, sums = run(model, num_devices, [batch], loss_scale=scale, **fields)
    groups = BATCH // group if group else 1
    params, loss = written_out_update(tiny_model(), batch, groups, smoothing)
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
    step, state = make_step(model, microbatch=4, loss_scale=scale, ema_decay=0.5)
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


# --- averages of the weights --------------------------------------------------------


@pytest.mark.parametrize(
    "num_devices, decay", [pytest.param(1, 0.3, marks=pytest.mark.slow), (2, 0.99)]
)
def test_averages_follow_their_recursion_over_the_weights_of_each_update(
    num_devices, decay
):
    # 0.3 is reached after three updates; before, and with 0.99, the beginning counts.
    batches = [random_batch(seed) for seed in range(6)]
    model = tiny_model(4, parallel.AXIS)
    states = [state for state, _ in walk(model, num_devices, batches, ema_decay=decay)]
    plain, _ = run(model, num_devices, batches)
    jax.tree.map(np.testing.assert_array_equal, states[-1].variables, plain.variables)
    as_float64 = partial(jax.tree.map, lambda x: np.asarray(x, np.float64))
    average = as_float64(states[0].variables)
    jax.tree.map(np.testing.assert_array_equal, states[0].ema, states[0].variables)
    for t, state in enumerate(states[1:]):
        d = min(decay, (1 + t) / (10 + t))
        average = jax.tree.map(
            lambda a, x, d=d: d * a + (1 - d) * x, average, as_float64(state.variables)
        )
        close = partial(np.testing.assert_allclose, rtol=2e-6, atol=1e-7)
        jax.tree.map(close, state.ema, average)
    assert {leaf.dtype for leaf in jax.tree.leaves(states[-1].ema)} == {np.dtype("f4")}


def test_late_averages_are_of_as_many_updates_as_the_decay_says():
    ema = {"params": {"head": {"bias": jnp.zeros(3)}}, "batch_stats": {}}
    new = {"params": {"head": {"bias": jnp.full(3, 8.0)}}, "batch_stats": {}}
    moved = steps.move_averages(ema, new, 0.9999, jnp.int32(10**6))
    np.testing.assert_allclose(moved["params"]["head"]["bias"], 8e-4, rtol=1e-6)


# --- frozen layers ------------------------------------------------------------------


def bits(tree):
    """The bits of every float by its path."""
    leaves = checkpoint.to_arrays(tree)
    return {path: np.atleast_1d(leaf).view(np.uint32) for path, leaf in leaves.items()}


def trained_variables(model):
    """As after a training: no statistic is that of a first state, and some zeros are -0."""
    rng = np.random.RandomState(5)

    def draw(path, leaf):
        if path[-1].key == "var":
            return np.float32(rng.uniform(0.5, 2, leaf.shape))
        leaf = leaf + np.float32(0.1 * rng.randn(*leaf.shape))
        return np.where(rng.rand(*leaf.shape) < 0.1, np.float32(-0.0), leaf)

    return jax.tree_util.tree_map_with_path(draw, init(model, jax.random.key(0)))


@pytest.mark.parametrize(
    "num_devices, freeze_at, preactivation, dtype",
    [
        (2, 2, False, jnp.float32),
        pytest.param(1, 3, True, jnp.float32, marks=pytest.mark.slow),
        pytest.param(3, 1, False, jnp.float32, marks=pytest.mark.slow),
        pytest.param(2, 2, True, jnp.float16, marks=pytest.mark.slow),
    ],
)
def test_what_is_frozen_stays_to_the_bit_and_all_else_moves(
    num_devices, freeze_at, preactivation, dtype
):
    size = 6 * num_devices  # in three microbatches a device, whose shares are no power of 2
    options = {"stage_sizes": (1, 1), "preactivation": preactivation}
    model = tiny_model(2, parallel.AXIS, dtype, **options)
    batches = [random_batch(seed, size) for seed in range(4)]
    states = walk(
        model,
        num_devices,
        batches,
        microbatch=2,
        batch_size=size,
        variables=trained_variables(model),
        loss_scale=init_loss_scale(2.0**8) if dtype == jnp.float16 else None,
        freeze_at=freeze_at,
        ema_decay=0.9,
    )
    frozen = {1: "stem", 2: "stem stage1", 3: "stem stage1 stage2 norm"}[freeze_at].split()
    (first, _), (last, _) = states[0], states[-1]
    assert last.step == 4
    for before, after in ((first.variables, last.variables), (first.ema, last.ema)):
        before, after = bits(before), bits(after)
        same = {name for name in before if (before[name] == after[name]).all()}
        assert same == {name for name in before if name.split("/")[1] in frozen}
        assert len(same) >= 1 and before.keys() - same
    buffers = {name.split("/")[0] for name in bits(last.opt_state[1].trace)}
    assert not buffers & set(frozen) and "head" in buffers


def test_a_frozen_update_is_that_of_the_layers_above_on_what_is_below():
    # The layers above as a net of their own, whose input is what those below put out.
    model = tiny_model(4, parallel.AXIS, stage_sizes=(1, 1))
    variables, batch = trained_variables(model), random_batch()
    fields = {"freeze_at": 2, "variables": variables, "microbatch": 4}
    state, sums = run(model, 2, [batch], **fields)
    alone = tiny_model(4, stage_sizes=(1, 1))
    look = jax.jit(partial(alone.apply, return_stages=True))
    below = look(variables, to_float(batch))[1]["stage1"]  # [B, 6, 6, 4]
    upper = {name: variables["params"][name] for name in ("stage2", "head")}
    norm = partial(BatchNorm, virtual_batch_size=4)
    block = ResidualBlock(basic, 8, 2, "B", conv=Conv, norm=norm)

    def loss_fn(params):
        stats = variables["batch_stats"]["stage2"]["block1"]
        own = {"params": params["stage2"]["block1"], "batch_stats": stats}
        x, updates = block.apply(own, below, train=True, mutable=["batch_stats"])
        x = x.mean(axis=(1, 2)) @ params["head"]["kernel"] + params["head"]["bias"]
        log_p = jax.nn.log_softmax(x)
        return -log_p[np.arange(BATCH), batch["label"]].mean(), updates["batch_stats"]

    grad_fn = jax.jit(jax.value_and_grad(loss_fn, has_aux=True))
    (loss, new_stats), grads = grad_fn(upper)
    decay = jax.tree.map(lambda is_on: DECAY * is_on, optim.decay_mask(grads))
    params = jax.tree.map(lambda w, g, d: w - RATE * 1.9 * (g + d * w), upper, grads, decay)
    close = partial(np.testing.assert_allclose, rtol=1e-5, atol=3e-6)
    jax.tree.map(close, {name: state.params[name] for name in upper}, params)
    jax.tree.map(close, state.batch_stats["stage2"]["block1"], new_stats)
    np.testing.assert_allclose(sums["loss"] / BATCH, loss, rtol=1e-5)


@pytest.mark.peers
def test_fine_tuning_with_all_fields_is_that_of_pytorch():
    """A frozen stem and stage1, a faster head, smoothed labels, averages; three updates."""
    sys.path.insert(0, str(ROOT / "tests" / "golden"))
    import make_torch_golden
    import torch

    _operators = make_torch_golden.declare_torchvision_operators()
    from torchvision.models import resnet

    net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=CLASSES)
    options = {"num_classes": CLASSES, "stage_sizes": (1, 1, 1, 1)}
    norm = partial(BatchNorm, axis_name=parallel.AXIS)
    model = resjax.create_model("resnet18", norm=norm, **options)
    variables = trained_variables(resjax.create_model("resnet18", **options))
    to_torch = partial(resjax.to_torch, model="resnet18", stage_sizes=(1, 1, 1, 1))
    state = {name: torch.tensor(array) for name, array in to_torch(variables).items()}
    net.load_state_dict(state, strict=False)
    net = net.double().train()
    frozen = [net.conv1, net.bn1, net.layer1]
    for module in frozen:
        module.eval().requires_grad_(False)
    groups = [
        {
            "params": [w],
            "lr": 0.1 * (5 if name.startswith("fc") else 1),
            "weight_decay": DECAY * (w.ndim > 1 or name == "fc.bias"),
        }
        for name, w in net.named_parameters()
        if w.requires_grad
    ]
    sgd = torch.optim.SGD(groups, momentum=0.9, nesterov=True)
    # At a decay of 0.1 ours is the same from the first update on.
    move = torch.optim.swa_utils.get_ema_multi_avg_fn(0.1)
    averaged = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=move, use_buffers=True)
    averaged.update_parameters(net)  # the copy at the start

    tx = optim.sgd(lambda step: jnp.float32(0.1), 0.9, True, DECAY)
    tx = optax.chain(tx, optim.scale_head(5.0))
    step = steps.make_train_step(
        model, tx, to_float, BATCH, label_smoothing=0.1, ema_decay=0.1, freeze_at=2
    )
    ours = steps.create_state(variables, tx, None, True, frozen_layers(model, 2))
    mapped = on_devices(step, 2)
    for seed in range(3):
        batch = random_batch(seed)
        batch["image"] = np.random.RandomState(seed).randint(256, size=(BATCH, 40, 40, 3))
        split = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
        ours, sums = mapped(ours, split)
        images = torch.tensor(batch["image"]).permute(0, 3, 1, 2).double() / 64 - 2
        loss = torch.nn.functional.cross_entropy(
            net(images), torch.tensor(batch["label"]).long(), label_smoothing=0.1
        )
        sgd.zero_grad()
        loss.backward()
        sgd.step()
        averaged.update_parameters(net)
        np.testing.assert_allclose(sums["loss"] / BATCH, loss.item(), rtol=1e-4)
    for mine, theirs in ((ours.variables, net), (ours.ema, averaged.module)):
        theirs = theirs.state_dict()
        for name, array in to_torch(jax.device_get(mine)).items():
            if name.endswith("num_batches_tracked"):
                continue
            wanted = theirs[name].numpy()
            atol = 1e-4 * max(np.abs(wanted).max(), 0.1)
            np.testing.assert_allclose(array, wanted, rtol=0, atol=atol, err_msg=name)


@pytest.mark.slow
def test_what_is_frozen_costs_no_backward_pass():
    model = tiny_model(0, parallel.AXIS, stage_sizes=(2, 2))
    batch = jax.tree.map(lambda x: x[None], random_batch())

    def flops(freeze_at):
        step, state = make_step(model, freeze_at=freeze_at)
        compiled = on_devices(step, 1).lower(state, batch).compile()
        cost = compiled.cost_analysis()
        return (cost[0] if isinstance(cost, list) else cost)["flops"]

    forward = jax.jit(lambda v, b: model.clone(norm=BatchNorm).apply(v, to_float(b)))
    once = forward.lower(make_step(model)[1].variables, random_batch()).compile()
    once = once.cost_analysis()["flops"]
    all_layers, body = flops(0), flops(3)
    assert 0.8 * once < body < 1.5 * once and all_layers > 2.5 * once


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
