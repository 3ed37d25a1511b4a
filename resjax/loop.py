"""The two loops, over steps that are given: fit and evaluate."""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from resjax.metrics import Sums, summarize
from resjax.steps import TrainState

Hook = Callable[[int, TrainState, Sums], None]
_IN_FLIGHT = 2  # steps dispatched ahead of the devices; more only holds batches in memory


def fit(
    train_step: Callable[[TrainState, Any], tuple[TrainState, Sums]],
    state: TrainState,
    batches: Iterable[Any],
    hooks: Sequence[Hook],
    should_stop: Callable[[Sums | None], bool] = lambda finished: False,
) -> TrainState:
    """Runs one update for every batch.

    Args:
      train_step: (state, batch) -> (state, sums).
      state: where to start; its memory is given to the first update.
      batches: from the one of update `state.step` on.
      hooks: called in order after each update as hook(step, state, sums), where step
        counts the updates finished and sums may still be computing.
      should_stop: asked after the hooks of each step, with the sums of the last step that
        the devices are known to have finished, None at first; True ends the loop.

    Returns:
      The state after the last update.
    """
    step = int(state.step)
    in_flight: deque[Sums] = deque()
    finished = None
    for batch in batches:
        state, sums = train_step(state, batch)
        while sums.pop("skipped", False):  # a float16 overflow: again, at half the scale
            state, sums = train_step(state, batch)
        step += 1
        in_flight.append(sums)
        if len(in_flight) > _IN_FLIGHT:
            finished = jax.block_until_ready(in_flight.popleft())
        for hook in hooks:
            hook(step, state, sums)
        if should_stop(finished):
            break
    return state


def evaluate(
    eval_step: Callable[[Any, Any], Sums], variables: Any, batches: Iterable[Any]
) -> dict[str, float]:
    """Averages over all batches, each example once.

    Args:
      eval_step: (variables, batch) -> sums.
      variables: {"params", "batch_stats"}, replicated.
      batches: sharded, with a mask.

    Returns:
      {"loss", "top1", "top5", "num_examples"}, see `metrics.summarize`.
    """
    sums: list[Sums] = []
    for batch in batches:
        sums.append(eval_step(variables, batch))
        if len(sums) > _IN_FLIGHT:
            jax.block_until_ready(sums[-1 - _IN_FLIGHT])
    return summarize(sums)
