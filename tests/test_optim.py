"""SGD against its update rule written out in numpy, and what weight decay touches."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import resjax
from resjax import optim
from resjax.initializers import init


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("nesterov", [False, True])
def test_updates_are_sgd_with_the_rate_outside_the_buffer(nesterov):
    rates, momentum, decay = [0.5, 0.1, 0.02], 0.9, 1e-2
    rng = np.random.RandomState(0)
    w, u = rng.randn(4, 3), np.zeros((4, 3))
    scale = rng.randn(3)
    params = {"conv": {"kernel": jnp.array(w)}, "norm1": {"scale": jnp.array(scale)}}
    tx = optim.sgd(lambda step: jnp.array(rates)[step], momentum, nesterov, decay)
    state, u_scale = tx.init(params), np.zeros(3)
    for rate in rates:
        grad, grad_scale = rng.randn(4, 3), rng.randn(3)
        grads = {
            "conv": {"kernel": jnp.array(grad)},
            "norm1": {"scale": jnp.array(grad_scale)},
        }
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        g = grad + decay * w
        u = momentum * u + g
        w = w - rate * (g + momentum * u if nesterov else u)
        u_scale = momentum * u_scale + grad_scale  # not decayed
        look = grad_scale + momentum * u_scale if nesterov else u_scale
        scale = scale - rate * look
    np.testing.assert_allclose(params["conv"]["kernel"], w, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(params["norm1"]["scale"], scale, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["cifar_resnet20", "resnet18", "resnet50"])
def test_all_but_the_norms_are_decayed(name):
    model = resjax.create_model(name)
    params = jax.eval_shape(lambda key: init(model, key), jax.random.key(0))["params"]
    mask = flat(optim.decay_mask(params))
    kept = {path for path, decays in mask.items() if not decays}
    # A norm is what has a scale; nothing else of a residual network does.
    norms = {path.rsplit("/", 1)[0] for path in mask if path.endswith("/scale")}
    assert kept == {f"{norm}/{leaf}" for norm in norms for leaf in ("scale", "bias")}
    assert mask["head/kernel"] and mask["head/bias"] and mask["stem/conv/kernel"]
