"""The train and eval step of one device, pure; parallel.py runs them on all devices.

Knows no config and no data set.
"""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from resjax.losses import cross_entropy
from resjax.metrics import Sums, classification_sums
from resjax.parallel import AXIS

Batch = dict[str, jax.Array]
Transform = Callable[[Batch], jax.Array]  # a device's batch -> images [B, H, W, 3] float

_DROPOUT = 2  # the random domain of what the model draws; augment.py has 1


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes; arrays only, the same on every device.

    Attributes:
      step: [] int32, updates finished.
      params: parameters, float32.
      batch_stats: running statistics of the norms, float32.
      opt_state: the optimizer's buffers.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def optimizer(self) -> dict[str, Any]:
        """The rest."""
        return {"step": self.step, "opt_state": self.opt_state}


def create_state(variables: dict[str, Any], tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    params, stats = variables["params"], variables["batch_stats"]
    return TrainState(jnp.zeros((), jnp.int32), params, stats, tx.init(params))


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    augment: Transform,
    batch_size: int,
    seed: int = 0,
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
    """The update of one device, to be run under the mapped axis `AXIS`.

    Args:
      model: images -> logits, with `batch_stats`.
      tx: the optimizer.
      augment: the device's batch -> normalised images.
      batch_size: the global minibatch kn, by which the loss is divided, so that the sum
        over devices is the mean over the minibatch (Goyal et al. 2017, remark 3).
      seed: of what the model draws (stochastic depth), the same on all devices.

    Returns:
      (state, batch) -> (state, sums), where batch has `image` [b, H, W, 3] uint8, `label`
      [b] and `position` [b] int32, and sums are those of `classification_sums` over all
      devices, before the update.
    """
    key = jax.random.fold_in(jax.random.key(seed), _DROPOUT)

    def loss_fn(params: Any, state: TrainState, batch: Batch) -> tuple[jax.Array, Any]:
        logits, updates = model.apply(
            {"params": params, "batch_stats": state.batch_stats},
            augment(batch),
            train=True,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        loss = cross_entropy(logits, batch["label"]).sum() / batch_size
        return loss, (updates["batch_stats"], logits)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        grad_fn = jax.grad(loss_fn, has_aux=True)
        grads, (batch_stats, logits) = grad_fn(state.params, state, batch)
        grads = lax.psum(grads, AXIS)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        sums = classification_sums(logits, batch["label"])
        state = TrainState(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            batch_stats=lax.pmean(batch_stats, AXIS),
            opt_state=opt_state,
        )
        return state, lax.psum(sums, AXIS)

    return train_step


def make_eval_step(
    model: nn.Module, prepare: Transform
) -> Callable[[dict[str, Any], Batch], Sums]:
    """The evaluation of one device's batch, to be run under the mapped axis `AXIS`.

    Args:
      model: images -> logits.
      prepare: the device's batch -> normalised images.

    Returns:
      (variables, batch) -> `classification_sums` over all devices, where batch has `image`
      [b, H, W, 3] uint8, `label` [b] and `mask` [b] bool, False for padding.
    """

    def eval_step(variables: dict[str, Any], batch: Batch) -> Sums:
        logits: Any = model.apply(variables, prepare(batch), train=False)
        sums = classification_sums(logits, batch["label"], batch["mask"])
        return lax.psum(sums, AXIS)

    return eval_step
