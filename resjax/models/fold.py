"""Batch norm of evaluation folded into convolutions: the same function in fewer layers."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jax import lax

from resjax.config import UsageError
from resjax.models.norm import BatchNorm
from resjax.models.ops import Conv
from resjax.models.resnet import ResNet

Tree = dict[str, Any]

# The norms of a pre-activation net that take a sum, so that no kernel can hold their scale.
_AFTER_SUM = ("norm", "norm1")


class FoldedNorm(nn.Module):
    """What `fold_batch_norm` leaves of a norm: fixed numbers a channel, to evaluate with.

    Attributes:
      scaled: names of the norms that multiply by a scale before they add their bias.
    """

    scaled: tuple[str, ...] = ()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, train: bool = False, update_stats: bool | None = None
    ) -> jax.Array:
        """[B, ..., C] -> [B, ..., C], float32 within and of the dtype of `x`.

        Raises:
          UsageError: `train` or `update_stats` is set, or the variables are not folded.
        """
        if train or update_stats:
            raise UsageError(
                f"train={train}, update_stats={update_stats}: a model of fold_batch_norm "
                "only evaluates; train the model that it was made of"
            )
        y = x.astype(jnp.float32)
        if self.name in self.scaled:
            y = y * self.param("scale", nn.initializers.ones, x.shape[-1:], jnp.float32)
        elif self.has_variable("params", "scale"):
            raise UsageError(
                f"variables: {self.name} has a scale; a model of fold_batch_norm takes the "
                "variables that came with it"
            )
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return (y + bias).astype(x.dtype)


def fold_batch_norm(model: nn.Module, variables: Tree) -> tuple[ResNet, Tree]:
    """The network of evaluation without norms: convolutions that do what these did.

    With running statistics a norm multiplies each channel by a number and adds another.
    The convolution before it takes the first into its kernel, and a bias remains. Where a
    norm follows a sum, as the first of a pre-activation block and the last of such a net,
    it stays as that scale and bias. The result is that of `train=False`, but for the
    rounding of the model's dtype.

    Args:
      model: of `create_model`, with `BatchNorm` (any of its options) and its own `Conv`.
      variables: {"params", "batch_stats"} of it; not changed.

    Returns:
      The folded model, which only evaluates, and its variables {"params"}: paths and shapes
      are those of the model, but a folded norm has no "scale", only its "bias" [C].

    Raises:
      UsageError: a model with other norms or convolutions, or without norms; variables
        that are not those of the model.

    Source: Jacob et al. 2017 (arXiv:1712.05877), section 3.2.

    Example:
      run = resjax.restore("runs/digits")
      model, variables = resjax.fold_batch_norm(run.model, run.variables)
      logits = model.apply(variables, run.preprocess(images))
    """
    if not isinstance(model, ResNet):
        raise UsageError(f"model: {type(model).__name__} is no model of create_model")
    _check_layer("norm", model.norm, BatchNorm)
    _check_layer("conv", model.conv, Conv)
    own = _select(model, variables)
    epsilon = model.norm(parent=None).epsilon
    preact = model.preactivation
    params = _fold(own["params"], own["batch_stats"], epsilon, preact)
    norm = partial(FoldedNorm, scaled=_AFTER_SUM if preact else ())
    return model.clone(norm=norm), {"params": params}


def _check_layer(option: str, layer: Any, known: type[nn.Module]) -> None:
    """Raises unless `layer` is that class or a partial of it; another may do anything."""
    own = layer.func if isinstance(layer, partial) else layer
    if own is not known:
        raise UsageError(
            f"{option}: the model has {getattr(own, '__name__', own)}; fold_batch_norm "
            f"needs {known.__name__}"
        )


def _select(model: ResNet, variables: Tree) -> Tree:
    """The variables that the model uses; raises if one is missing or of another shape."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves = traverse_util.flatten_dict(variables)
    used = {}
    for path, leaf in traverse_util.flatten_dict(like).items():
        name, used[path] = "/".join(path), leaves.get(path)
        if used[path] is None:
            raise UsageError(f"variables: no {name}, which the model has")
        shape = np.shape(used[path])
        if shape != leaf.shape:
            raise UsageError(f"variables: {name} is {shape}, in the model {leaf.shape}")
    return traverse_util.unflatten_dict(used)


def _fold(params: Tree, stats: Tree, epsilon: float, preactivation: bool) -> Tree:
    """The parameters of a module with the norms in it folded, at any depth."""
    params = dict(params)
    for name, own in stats.items():
        if "mean" not in own:
            params[name] = _fold(params[name], own, epsilon, preactivation)
            continue
        scale = lax.rsqrt(own["var"] + epsilon) * params[name]["scale"]  # [D]
        bias = params[name]["bias"] - own["mean"] * scale
        if preactivation and name in _AFTER_SUM:
            params[name] = {"scale": scale, "bias": bias}
            continue
        params[name] = {"bias": bias}
        conv = _conv_before(name, params, preactivation)
        params[conv] = {"kernel": params[conv]["kernel"] * scale}  # [k, k, C, D]
    return params


def _conv_before(name: str, siblings: Tree, preactivation: bool) -> str:
    """The convolution whose output the norm of that name takes, see blocks.py."""
    if name == "norm_out":  # the last of as many
        return f"conv{sum(key.startswith('norm') for key in siblings)}"
    if preactivation:
        return f"conv{int(name.removeprefix('norm')) - 1}"
    return name.replace("norm", "conv")
