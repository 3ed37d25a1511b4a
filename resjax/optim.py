"""Optimizers: short optax chains, and which parameters their rules touch."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import traverse_util

from resjax.schedules import Schedule


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay applies to: all but the norms'.

    The classifier's bias is decayed: the paper leaves it open, and fb.resnet.torch, whose
    ResNet-50 it trains, decays everything.

    Source: Goyal et al. 2017 (arXiv:1706.02677), section 5.1, which decays all but the
      scale and bias of batch norm.
    """
    return traverse_util.path_aware_map(
        lambda path, _: not re.search(r"(^|_)norm", str(path[-2])), params
    )


def adaptation_mask(params: Any) -> Any:
    """True for each parameter that LARS gives a rate of its own: decayed and no bias.

    Source: the LARS of MLPerf's ResNet-50 reference, whose norms are neither decayed nor
      adapted, and whose classifier's bias is decayed and not adapted.
    """
    return traverse_util.path_aware_map(
        lambda path, decays: decays and path[-1] != "bias", decay_mask(params)
    )


def sgd(
    learning_rate: Schedule, momentum: float, nesterov: bool, weight_decay: float
) -> optax.GradientTransformation:
    """SGD with momentum; L2 decay joins the gradient before the momentum.

    g = grad + weight_decay * w; u = momentum * u + g; w -= lr * u (Nesterov:
    w -= lr * (g + momentum * u)). The rate stays outside the buffer u, so a change of
    the rate needs no momentum correction.

    Args:
      learning_rate: step -> rate.
      momentum: decay of the buffer.
      nesterov: look ahead.
      weight_decay: coefficient of L2, on the parameters of `decay_mask`.

    Source: Goyal et al. 2017 (arXiv:1706.02677), equation 9 and remark 2; Nesterov in
      Sutskever's form, as in PyTorch.
    """
    return optax.chain(
        optax.add_decayed_weights(weight_decay, decay_mask),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )


def scale_head(multiplier: float) -> optax.GradientTransformation:
    """Multiplies the updates of the classifier; at the end of a chain, its learning rate.

    A body that is trained already wants a small rate, and a new classifier a larger one.

    Args:
      multiplier: its rate / that of the body.

    Source: Caffe's lr_mult, 10 for the new layer in its fine-tuning example; parameter
      groups of PyTorch.
    """

    def scale(updates: Any, params: Any) -> Any:
        return traverse_util.path_aware_map(
            lambda path, u: multiplier * u if path[0] == "head" else u, updates
        )

    return optax.stateless(scale)


def lars(
    learning_rate: Schedule,
    momentum: float,
    nesterov: bool,
    weight_decay: float,
    trust_coefficient: float = 0.001,
) -> optax.GradientTransformation:
    """`sgd` in which every layer steps in proportion to the norm of its weights.

    local = trust_coefficient * |w| / (|grad| + weight_decay * |w|), 1 where |w| or |grad|
    is 0; u = momentum * u + local * (grad + weight_decay * w); w -= lr * u (Nesterov as in
    `sgd`). Norms are of a whole parameter. Those outside `adaptation_mask` have local = 1.

    Args:
      learning_rate: step -> rate.
      momentum: decay of the buffer.
      nesterov: look ahead.
      weight_decay: coefficient of L2, on the parameters of `decay_mask`.
      trust_coefficient: without momentum, the share of |w| that a step of rate 1 moves a
        layer by, at most.

    Source: You et al. 2017 (arXiv:1708.03888), section 4 and algorithm 1.
    Differs: the algorithm multiplies by lr before the buffer, v = momentum * v + lr * local
      * (grad + weight_decay * w), w -= v, as optax does; here lr stays outside it, so that
      a change of the rate needs no momentum correction. At a constant rate both are one.
      The algorithm adapts every parameter and has no Nesterov.
    """

    def layer(grad: jax.Array, w: jax.Array, decays: bool, adapts: bool) -> jax.Array:
        decayed = grad + weight_decay * w if decays else grad
        if not adapts:
            return decayed
        w_norm, grad_norm = jnp.linalg.norm(w), jnp.linalg.norm(grad)
        local = trust_coefficient * w_norm / (grad_norm + weight_decay * w_norm)
        return jnp.where((w_norm == 0) | (grad_norm == 0), 1, local) * decayed

    def scale_layers(grads: Any, params: Any) -> Any:
        masks = decay_mask(params), adaptation_mask(params)
        return jax.tree.map(layer, grads, params, *masks)

    return optax.chain(
        optax.stateless(scale_layers),
        optax.trace(momentum, nesterov),
        optax.scale_by_learning_rate(learning_rate),
    )
