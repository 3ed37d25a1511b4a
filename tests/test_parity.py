"""The same numbers as PyTorch, from the same weights and images (tests/golden/torch_*)."""

import json

import jax
import numpy as np
import optax
import parity
import pytest
from conftest import ROOT

import resjax
from resjax import losses, optim

FAST = ("resnet18",)  # the others compile for a long time


def read_golden(name):
    return json.loads(parity.golden_path(ROOT / "tests" / "golden", name).read_text())


def load(name, num_classes=parity.NUM_CLASSES, **options):
    """A model, and its variables of `parity.weights(..., **options)`."""
    model = resjax.create_model(name, num_classes=num_classes)
    images = np.zeros((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)
    shapes = {key: x.shape for key, x in resjax.to_torch(zeros, name).items()}
    return model, resjax.from_torch(parity.weights(shapes, **options), name)


def make_loss_fn(model):
    """(params, batch_stats, images, labels) -> ((loss, new batch_stats), gradients)."""

    def loss_fn(params, batch_stats, images, labels):
        variables = {"params": params, "batch_stats": batch_stats}
        logits, updates = model.apply(
            variables, images, train=True, mutable=["batch_stats"]
        )
        return losses.cross_entropy(logits, labels).mean(), updates["batch_stats"]

    return jax.value_and_grad(loss_fn, has_aux=True)


MODELS = [
    name if name in FAST else pytest.param(name, marks=pytest.mark.slow)
    for name in parity.MODELS
]


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_pytorchs(name):
    model, variables = load(name)
    golden = read_golden(name)["logits"]
    assert set(golden) == {str(size) for size in parity.SIZES}
    for size in parity.SIZES:
        images = parity.images(size, parity.EVAL_BATCH)
        wanted = np.array(golden[str(size)])
        error = np.abs(jax.jit(model.apply)(variables, images) - wanted).max()
        assert error <= 1e-4 * np.abs(wanted).max(), size


@pytest.mark.slow
@pytest.mark.parametrize("name", parity.MODELS)
def test_gradients_and_statistics_are_pytorchs(name):
    model, variables = load(name)
    golden = read_golden(name)
    images = parity.images(parity.TRAIN_SIZE, parity.TRAIN_BATCH)
    labels = parity.labels(parity.TRAIN_BATCH)
    (loss, stats), grads = jax.jit(make_loss_fn(model))(
        variables["params"], variables["batch_stats"], images, labels
    )
    np.testing.assert_allclose(loss, golden["loss"], rtol=1e-4)
    found = resjax.to_torch({"params": grads, "batch_stats": stats}, name)
    found = {key: x for key, x in found.items() if not key.endswith("num_batches_tracked")}
    assert set(found) == {*golden["gradients"], *golden["statistics"]}
    wrong = {}
    for kind, tolerance in (("gradients", 1e-3), ("statistics", 1e-5)):
        # A gradient that is small because its terms cancel (in the deepest nets some are
        # zero) is known no better than its terms.
        least = np.median([norm for norm, _ in golden[kind].values()]) / 10
        for key, wanted in golden[kind].items():
            error = np.abs(np.subtract(parity.digest(key, found[key]), wanted)).max()
            if not error <= tolerance * max(wanted[0], least):
                wrong[key] = error / wanted[0]
    assert not wrong


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", parity.CURVES)
def test_loss_curve_is_pytorchs(name):
    classes = parity.CURVE["num_classes"]
    model, variables = load(name, classes, **parity.CURVE_WEIGHTS)
    params, stats = variables["params"], variables["batch_stats"]
    tx = optim.sgd(lambda step: parity.RATE, **parity.SGD)
    loss_fn = make_loss_fn(model)

    @jax.jit
    def step(params, stats, opt_state, images, labels):
        (loss, stats), grads = loss_fn(params, stats, images, labels)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), stats, opt_state, loss

    opt_state, curve = tx.init(params), []
    for images, labels in parity.curve_batches():
        params, stats, opt_state, loss = step(params, stats, opt_state, images, labels)
        curve.append(float(loss))
    np.testing.assert_allclose(curve, read_golden(f"{name}_curve")["losses"], rtol=1e-3)


@pytest.mark.peers
@pytest.mark.parametrize("name", [*parity.MODELS, *(f"{n}_curve" for n in parity.CURVES)])
def test_values_made_anew_are_those_committed(name, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tests" / "golden")
    import make_torch_golden as golden

    made = json.loads(golden.dumps(golden.make(name)))
    assert not golden.differences(made, read_golden(name))
