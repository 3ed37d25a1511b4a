"""The train and eval step of one device, pure; parallel.py runs them on all devices.

Knows no config and no data set.
"""

import dataclasses
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax import lax

from resjax.loss_scale import LossScale, all_finite
from resjax.losses import cross_entropy
from resjax.metrics import Sums, classification_sums
from resjax.models.resnet import frozen_layers
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
      opt_state: the optimizer's buffers, of the parameters that are trained.
      loss_scale: of a float16 computation; None = the loss is not scaled.
      ema: averages of parameters and statistics over the updates, {"params",
        "batch_stats"}; None = there are none.
    """

    step: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    loss_scale: LossScale | None = None
    ema: dict[str, Any] | None = None

    @property
    def variables(self) -> dict[str, Any]:
        """What `model.apply` takes."""
        return {"params": self.params, "batch_stats": self.batch_stats}

    @property
    def optimizer(self) -> dict[str, Any]:
        """The rest."""
        rest = {"step": self.step, "opt_state": self.opt_state}
        optional = {"loss_scale": self.loss_scale, "ema": self.ema}
        return rest | {name: x for name, x in optional.items() if x is not None}


def create_state(
    variables: dict[str, Any],
    tx: optax.GradientTransformation,
    loss_scale: LossScale | None = None,
    with_ema: bool = False,
    frozen: Collection[str] = (),
) -> TrainState:
    """The state before the first update.

    Args:
      variables: {"params", "batch_stats"}.
      tx: the optimizer.
      loss_scale: of a float16 computation.
      with_ema: keep averages, which start as the variables.
      frozen: the layers that are not trained, from `frozen_layers`.
    """
    params, stats = variables["params"], variables["batch_stats"]
    step = jnp.zeros((), jnp.int32)
    opt_state = jax.jit(tx.init)(_without(frozen, params))  # one program, not one a shape
    state = TrainState(step, params, stats, opt_state, loss_scale)
    if not with_ema:
        return state
    return dataclasses.replace(state, ema=copy_variables(state.variables))


@jax.jit
def copy_variables(variables: dict[str, Any]) -> dict[str, Any]:
    """In memory of their own, as an update is given that of the whole state."""
    return jax.tree.map(jnp.copy, variables)


def _without(frozen: Collection[str], layers: dict[str, Any]) -> dict[str, Any]:
    return {name: own for name, own in layers.items() if name not in frozen}


TrainStep = Callable[[TrainState, Batch], tuple[TrainState, Sums]]


def make_train_step(
    model: nn.Module,
    tx: optax.GradientTransformation,
    augment: Transform,
    batch_size: int,
    seed: int = 0,
    microbatch: int = 0,
    label_smoothing: float = 0.0,
    ema_decay: float = 0.0,
    freeze_at: int = 0,
) -> TrainStep:
    """The update of one device, to be run under the mapped axis `AXIS`.

    Args:
      model: images -> logits, with `batch_stats`.
      tx: the optimizer.
      augment: the device's batch -> normalised images.
      batch_size: the global minibatch kn, by which the loss is divided, so that the sum
        over devices is the mean over the minibatch (Goyal et al. 2017, remark 3).
      seed: of what the model draws (stochastic depth), the same on all devices.
      microbatch: examples of one backward pass; a device that holds more goes through them
        one microbatch after another, adds up the gradients and updates once. Norms must
        then take their statistics over examples of a microbatch. 0 = all at once.
      label_smoothing: of the loss, also of that in the sums; see `cross_entropy`.
      ema_decay: of the averages, if the state has them; see `move_averages`.
      freeze_at: the layers of `frozen_layers` evaluate, and nothing of them in the state
        changes: they have no gradient, no weight decay, no buffer in the optimizer.

    Returns:
      (state, batch) -> (state, sums), where batch has `image` [b, H, W, 3] uint8, `label`
      [b] and `position` [b] int32, and sums are those of `classification_sums` over all
      devices, before the update. A `stop` [b] int32 in the batch is summed like them: how
      hosts learn in the same step that one of them is to stop. If the state has a loss
      scale above 1, sums also has `skipped` [] bool: the gradients overflowed, and nothing
      in the state changed but the scale.
    """
    key = jax.random.fold_in(jax.random.key(seed), _DROPOUT)
    frozen = frozen_layers(model, freeze_at)
    trained = partial(_without, frozen)
    freezing: dict[str, Any] = {"freeze_at": freeze_at} if frozen else {}

    def loss_fn(params: Any, state: TrainState, batch: Batch) -> tuple[jax.Array, Any]:
        logits, updates = model.apply(
            {"params": {**state.params, **params}, "batch_stats": state.batch_stats},
            augment(batch),
            train=True,
            **freezing,
            mutable=["batch_stats"],
            rngs={"dropout": jax.random.fold_in(key, state.step)},
        )
        loss = cross_entropy(logits, batch["label"], label_smoothing).sum() / batch_size
        if state.loss_scale is not None:
            loss = loss * state.loss_scale.value
        sums = classification_sums(logits, batch["label"], label_smoothing=label_smoothing)
        if "stop" in batch:
            sums["stop"] = batch["stop"].sum()
        return loss, (trained(updates.get("batch_stats", {})), sums)

    def device_gradients(state: TrainState, batch: Batch) -> tuple[Any, Any, Sums]:
        """Gradients, new statistics and sums of a device's examples."""

        def of_part(part: Batch) -> tuple[Any, Any, Sums]:
            params = trained(state.params)
            grads, aux = jax.grad(loss_fn, has_aux=True)(params, state, part)
            return grads, *aux

        local_size = len(batch["label"])
        if not 0 < microbatch < local_size:
            return of_part(batch)
        grads, batch_stats, sums = _accumulate(of_part, batch, microbatch)
        mean = jax.tree.map(lambda x: x * (microbatch / local_size), batch_stats)
        return grads, mean, sums

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
        grads, batch_stats, sums = device_gradients(state, batch)
        grads, sums = lax.psum((grads, sums), AXIS)
        batch_stats = lax.pmean(batch_stats, AXIS)
        scale = state.loss_scale
        if scale is not None:
            grads = jax.tree.map(lambda g: g / scale.value, grads)
        params = trained(state.params)
        updates, opt_state = tx.update(grads, state.opt_state, params)
        new = TrainState(
            step=state.step + 1,
            params={**state.params, **optax.apply_updates(params, updates)},
            batch_stats={**state.batch_stats, **batch_stats},
            opt_state=opt_state,
            loss_scale=scale,
        )
        if state.ema is not None:
            moved = move_averages(state.ema, new.variables, ema_decay, state.step, frozen)
            new = dataclasses.replace(new, ema=moved)
        if scale is not None:
            finite = all_finite((grads, batch_stats))
            skipped = ~finite & (scale.value > 1)  # at 1 it is no matter of scale
            new = jax.tree.map(partial(jnp.where, skipped), state, new)
            new = new.replace(loss_scale=scale.adjust(finite))
            sums["skipped"] = skipped
        return new, sums

    return train_step


def move_averages(
    ema: dict[str, Any],
    variables: dict[str, Any],
    decay: float,
    step: jax.Array,
    frozen: Collection[str] = (),
) -> dict[str, Any]:
    """Exponential moving averages after one more update: d * ema + (1 - d) * variables.

    d = min(decay, (1 + step) / (10 + step)), so that what the weights were at first is
    forgotten soon: after t updates an average is over about the last ninth of them, until
    that is as many as 1 / (1 - decay). Running statistics are averaged like parameters:
    those of the last weights would be of another net.

    Args:
      ema: {"params", "batch_stats"}.
      variables: likewise, after the update.
      decay: at least 0 and below 1.
      step: [] int, updates finished before this one.
      frozen: the layers that are left as they are.

    Source: Szegedy et al. 2015 (arXiv:1512.00567), section 8, who evaluate averages; the
      beginning is that of TensorFlow's ExponentialMovingAverage with `num_updates`.
    """
    share = jnp.maximum(1 - decay, 9 / (10 + step))  # 1 - d, without its rounding

    def move(old: jax.Array, new: jax.Array) -> jax.Array:
        return old + share * (new - old)

    trained = partial(_without, frozen)
    return {
        kind: {**old, **jax.tree.map(move, trained(old), trained(variables[kind]))}
        for kind, old in ema.items()
    }


def make_train_steps(
    train_step: TrainStep,
    take_batch: Callable[..., Batch],
    num_steps: int,
    unroll: bool,
) -> Callable[[TrainState, Any], tuple[TrainState, tuple[Sums, ...]]]:
    """Several updates of one device in one program, of data that it holds.

    Args:
      train_step: from `make_train_step`.
      take_batch: (data, step, device_index=, num_devices=) -> the device's batch.
      num_steps: updates; 1 if the state has a loss scale, so that a skipped one repeats.
      unroll: no loop in the program, which takes longer to compile and, on a CPU, less to
        run.

    Returns:
      (state, data) -> (state, the sums of each update).
    """

    def one_step(state: TrainState, data: Any) -> tuple[TrainState, Sums]:
        place = {"device_index": lax.axis_index(AXIS), "num_devices": lax.axis_size(AXIS)}
        return train_step(state, take_batch(data, state.step, **place))

    def train_steps(state: TrainState, data: Any) -> tuple[TrainState, tuple[Sums, ...]]:
        if not unroll and num_steps > 1:  # a loop of one would still be a loop
            state, stacked = lax.scan(
                lambda state, _: one_step(state, data), state, length=num_steps
            )
            sums = [jax.tree.map(lambda x, i=i: x[i], stacked) for i in range(num_steps)]
            return state, tuple(sums)
        sums = []
        for _ in range(num_steps):
            state, new = one_step(state, data)
            sums.append(new)
        return state, tuple(sums)

    return train_steps


def _accumulate(of_part: Callable[[Batch], Any], batch: Batch, microbatch: int) -> Any:
    """The sum of `of_part` over the microbatches of a batch, one after another."""
    parts = jax.tree.map(lambda x: x.reshape(-1, microbatch, *x.shape[1:]), batch)

    def add_part(total: Any, part: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, of_part(part)), None

    shapes = jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    return lax.scan(add_part, zeros, parts)[0]


def make_eval_step(
    model: nn.Module, prepare: Transform
) -> Callable[[dict[str, Any], Batch], Sums]:
    """The evaluation of one device's batch, to be run under the mapped axis `AXIS`.

    Args:
      model: images -> logits.
      prepare: the device's batch -> normalised images.

    Returns:
      (variables, batch) -> `classification_sums` over all devices, where batch has `image`
      [b, H, W, 3] uint8, `label` [b] and `mask` [b] bool, False for padding. A `stop` [b]
      int32 in it is summed like them, as in `make_train_step`.
    """

    def eval_step(variables: dict[str, Any], batch: Batch) -> Sums:
        logits: Any = model.apply(variables, prepare(batch), train=False)
        sums = classification_sums(logits, batch["label"], batch["mask"])
        if "stop" in batch:
            sums["stop"] = batch["stop"].sum()
        return lax.psum(sums, AXIS)

    return eval_step


def make_predict_step(
    apply: Callable[[dict[str, Any], jax.Array], jax.Array], prepare: Transform
) -> Callable[[dict[str, Any], Batch], dict[str, jax.Array]]:
    """What the model says of each example, to be run under the mapped axis `AXIS`.

    Args:
      apply: (variables, images [B, H, W, 3]) -> logits [B, K].
      prepare: the device's batch -> normalised images.

    Returns:
      (variables, batch) -> {"log_probs" [B, K] float32, "label", "index", "mask" [B]} of
      all devices, in the order of the global batch, where batch has `label` and `index` [b]
      int32, `mask` [b] bool, and `image` [b, H, W, 3] uint8. Or it has several views of
      each, `image` [b, V, H, W, 3]: then the softmax is averaged over these and their
      mirror images.
    """

    def predict_step(variables: dict[str, Any], batch: Batch) -> dict[str, jax.Array]:
        images = prepare(batch)  # [b, H, W, 3] or [b, V, H, W, 3]
        num_examples, has_views = len(images), images.ndim == 5
        if has_views:
            images = jnp.concatenate([images, images[..., ::-1, :]], axis=1)
            images = images.reshape(-1, *images.shape[2:])  # [b * 2V, H, W, 3]
        log_probs = nn.log_softmax(apply(variables, images).astype(jnp.float32))
        if has_views:
            log_probs = log_probs.reshape(num_examples, -1, log_probs.shape[-1])
            log_probs = nn.logsumexp(log_probs, axis=1) - jnp.log(log_probs.shape[1])
        outputs = {name: batch[name] for name in ("label", "index", "mask")}
        return lax.all_gather({"log_probs": log_probs, **outputs}, AXIS, tiled=True)

    return predict_step
