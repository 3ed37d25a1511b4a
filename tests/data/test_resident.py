"""What the devices gather are the batches that the host would have sent, bit for bit."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from resjax import build_data
from resjax.config import Config
from resjax.data import order, pipeline, resident

SEED = 5


@pytest.fixture(scope="module")
def digits(data_dir):
    """The reader of the training digits, its recipe, and the whole set."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TFDS_DATA_DIR", str(data_dir))  # this fixture is older than the test
        config = Config()
        source = build_data.build_source(config, "train")
    reader = build_data.build_reader(config, source)
    return reader, build_data.build_recipe(config), pipeline.load_all(reader)


def dispatches(images, labels, put=jax.device_put, **kwargs):
    options = {
        "seed": SEED,
        "batch_size": 3,
        "start_step": 0,
        "num_steps": 20,
        "steps_per_dispatch": 1,
        "must_end": lambda step: False,
    }
    return resident.resident_batches(images, labels, put, **{**options, **kwargs})


def numbered(num_examples):
    """A set whose example i is of label i and has the pixels i."""
    labels = np.arange(num_examples, dtype=np.int32)
    return np.tile(labels.astype(np.uint8)[:, None, None, None], (1, 2, 2, 3)), labels


@pytest.mark.parametrize(
    "num_devices, batch_size, steps",
    [(1, 7, (203, 208)), (2, 128, (9, 13)), (4, 2000, (0, 3)), (8, 128, (20, 24))],
)
def test_batches_are_bitwise_those_of_the_host(digits, num_devices, batch_size, steps):
    # 1,437 examples: each of these runs crosses the end of an epoch.
    reader, recipe, examples = digits
    span = {"seed": SEED, "batch_size": batch_size}
    span |= {"start_step": steps[0], "num_steps": steps[1]}
    host = list(pipeline.train_batches(reader, recipe, **span))
    assert len(host) == steps[1] - steps[0]

    def on_device(step, data):
        place = lax.axis_index("d"), lax.axis_size("d")
        return resident.resident_batch(data, step, batch_size, *place)

    mesh = jax.make_mesh(
        (num_devices,),
        ("d",),
        (jax.sharding.AxisType.Auto,),
        devices=jax.devices()[:num_devices],
    )
    all_of_it, parts = jax.P(), jax.P("d")
    gather = jax.jit(
        jax.shard_map(on_device, mesh=mesh, in_specs=all_of_it, out_specs=parts)
    )
    put = partial(jax.device_put, device=jax.NamedSharding(mesh, all_of_it))
    found = dispatches(*examples, put, **span)
    for step, batch, (length, data) in zip(range(*steps), host, found, strict=True):
        assert length == 1
        gathered = gather(jnp.int32(step), data)
        jax.tree.map(partial(np.testing.assert_array_equal, strict=True), gathered, batch)


@pytest.mark.parametrize("batch_size, per_dispatch", [(3, 1), (3, 4), (25, 1), (25, 3)])
def test_the_table_of_a_dispatch_holds_all_its_positions(batch_size, per_dispatch):
    # 10 examples, so that a dispatch reaches over up to eight epochs.
    images, labels = numbered(10)
    span = {"batch_size": batch_size, "steps_per_dispatch": per_dispatch}
    gather = jax.jit(resident.resident_batch, static_argnums=(2, 3, 4))
    step = 0
    for length, data in dispatches(images, labels, **span):
        for _ in range(length):
            batch = gather(data, jnp.int32(step), batch_size, 0, 1)
            positions = range(step * batch_size, (step + 1) * batch_size)
            expected = [order.example_index(SEED, p, 10) for p in positions]
            assert batch["position"].tolist() == list(positions)
            assert batch["label"].tolist() == expected
            assert batch["image"][:, 1, 1, 2].tolist() == expected
            step += 1
    assert step == 20


def test_only_a_new_epoch_sends_anything():
    sent = []

    def put(tree):
        sent.append(sorted(tree))
        return jax.device_put(tree)

    data = [data for _, data in dispatches(*numbered(10), put, num_steps=10)]
    assert sent == [["image", "label"]] + [["first_epoch", "order"]] * 3  # 30 positions
    assert len({id(d["image"]) for d in data}) == 1


def lengths(**kwargs):
    return [length for length, _ in dispatches(*numbered(10), **kwargs)]


def test_dispatches_end_where_something_is_due_and_at_the_end():
    due = {10, 13}.__contains__
    found = lengths(steps_per_dispatch=4, must_end=due, num_steps=23)
    assert found == [4, 4, 1, 1, 1, 1, 1, 4, 4, 1, 1]
    assert {10, 13, 23} <= set(np.cumsum(found))


def test_a_resumed_run_goes_on_with_the_same_dispatches():
    span = {"steps_per_dispatch": 4, "must_end": {10, 13}.__contains__, "num_steps": 23}
    whole = lengths(**span)
    for done, start in enumerate(np.cumsum(whole)):
        assert lengths(**span, start_step=int(start)) == whole[done + 1 :]
