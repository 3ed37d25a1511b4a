"""Parameters and multiply-adds of a model, from shapes alone: nothing is computed."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn


def count_params(model: nn.Module, image_size: int = 32) -> int:
    """The number of parameters of a model; running statistics are not among them.

    Args:
      model: a linen Module that takes images [B, H, W, 3].
      image_size: side of the images used to trace shapes; the count does not depend on it.

    >>> count_params(create_model("resnet50"))
    25557032
    """
    leaves = jax.tree.leaves(_abstract_init(model, image_size)["params"])
    return sum(math.prod(leaf.shape) for leaf in leaves)


def count_macs(model: nn.Module, image_size: int) -> int:
    """Multiply-adds of convolutions and classifier for one image; biases do not count.

    Every module that holds a `kernel` multiplies all of it once for each position of its
    output. He et al. 2015 call multiply-adds FLOPs.

    Args:
      model: a linen Module that takes images [B, H, W, 3].
      image_size: side of the square image, in pixels.

    >>> count_macs(create_model("resnet50"), image_size=224)
    4089184256
    """
    macs = 0

    def count(
        call: Any, args: Any, kwargs: Any, context: nn.module.InterceptorContext
    ) -> Any:
        nonlocal macs
        out = call(*args, **kwargs)
        module = context.module
        if context.method_name == "__call__" and module.has_variable("params", "kernel"):
            kernel: Any = module.get_variable("params", "kernel")
            positions = math.prod(out.shape[1:-1])
            macs += positions * math.prod(kernel.shape)
        return out

    with nn.intercept_methods(count):
        _abstract_init(model, image_size)
    return macs


def _abstract_init(model: nn.Module, image_size: int) -> Any:
    images = jax.ShapeDtypeStruct((1, image_size, image_size, 3), jnp.float32)
    return jax.eval_shape(model.init, jax.random.key(0), images)
