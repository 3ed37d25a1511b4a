"""Small data sets in the memory of the devices: minibatches are gathered inside the step.

They are those of `pipeline.train_batches`, bit for bit, where the host draws no crop. What
the devices hold is `image` [N, S, S, 3] uint8, `label` [N] int32, and of a few epochs
`order` [E, N] int32, their permutations, and `first_epoch` [] int32, the first of them.
"""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from resjax.data import order


def resident_batch(
    data: dict[str, jax.Array],
    step: jax.Array,
    batch_size: int,
    device_index: jax.Array | int,
    num_devices: int,
) -> dict[str, jax.Array]:
    """A device's slice of the minibatch of an update, a pure function.

    Args:
      data: what the devices hold, with the epochs of the update.
      step: [] int32, updates finished.
      batch_size: B, the global minibatch.
      device_index: from 0.
      num_devices: of the run, a divisor of B.

    Returns:
      `image` [b, S, S, 3] uint8, `label` and `position` [b] int32, b = B / num_devices.
    """
    local_size, num_examples = batch_size // num_devices, len(data["label"])
    first = step * batch_size + device_index * local_size
    position = first + jnp.arange(local_size, dtype=jnp.int32)
    epoch, place = position // num_examples, position % num_examples
    index = data["order"][epoch - data["first_epoch"], place]
    return {
        "image": data["image"][index],
        "label": data["label"][index],
        "position": position,
    }


def resident_batches(
    images: np.ndarray,
    labels: np.ndarray,
    put: Callable[[Any], Any],
    *,
    seed: int,
    batch_size: int,
    start_step: int,
    num_steps: int,
    steps_per_dispatch: int,
    must_end: Callable[[int], bool],
) -> Iterator[tuple[int, dict[str, jax.Array]]]:
    """For each dispatch its number of updates and what the devices hold for it.

    A dispatch makes `steps_per_dispatch` updates, or one where more would go past an update
    that must end one. So it depends only on the update it starts from, and a resumed run
    goes on with the dispatches of one that was not interrupted.

    Args:
      images: of the whole set, [N, S, S, 3] uint8.
      labels: [N] int32.
      put: arrays -> the same on all devices.
      seed: of the order.
      batch_size: the global minibatch.
      start_step: updates already done.
      num_steps: updates of the whole run.
      steps_per_dispatch: at least 1.
      must_end: whether a dispatch must end with that update, counted from 1.
    """
    num_examples = len(labels)
    # Consecutive positions of one dispatch lie in at most so many epochs.
    num_epochs = -(-(steps_per_dispatch * batch_size - 1) // num_examples) + 1
    data = put({"image": images, "label": labels})
    first_epoch, step = -1, start_step
    while step < num_steps:
        epoch = step * batch_size // num_examples
        if epoch != first_epoch:
            first_epoch = epoch
            epochs = range(epoch, epoch + num_epochs)
            table = [order.permutation(seed, e, num_examples) for e in epochs]
            new = {
                "order": np.stack(table).astype(np.int32),
                "first_epoch": np.int32(epoch),
            }
            data = {**data, **put(new)}
        last = step + steps_per_dispatch
        cut = last > num_steps or any(map(must_end, range(step + 1, last)))
        length = 1 if cut else steps_per_dispatch
        yield length, data
        step += length
