"""Optimizers: short optax chains, and which parameters are decayed."""

import re
from typing import Any

import optax
from flax import traverse_util

from resjax.schedules import Schedule


def decay_mask(params: Any) -> Any:
    """True for each parameter that weight decay applies to: all but the norms'.

    Source: Goyal et al. 2017 (arXiv:1706.02677), section 5.1, which decays all but the
      scale and bias of batch norm.
    """
    return traverse_util.path_aware_map(
        lambda path, _: not re.search(r"(^|_)norm", str(path[-2])), params
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
