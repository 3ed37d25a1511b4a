"""The loops, over steps that are given: fit, evaluate and predict."""

import contextlib
import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from resjax.metrics import Sums, summarize
from resjax.steps import TrainState

Hook = Callable[[int, TrainState, Sums], None]
Dispatch = Callable[[TrainState, Any], tuple[TrainState, Sums | tuple[Sums, ...]]]
_IN_FLIGHT = 2  # dispatches ahead of the devices; more only holds batches in memory


@dataclasses.dataclass
class Waits:
    """How long a run has waited, so far.

    Attributes:
      data: seconds, for the next batch.
      devices: seconds, for what they compute.
      compiling: seconds, for the programs of `predict`.
    """

    data: float = 0.0
    devices: float = 0.0
    compiling: float = 0.0

    def for_data(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches; the time that each takes to come is counted."""
        source = iter(batches)
        while True:
            start = time.perf_counter()
            try:
                batch = next(source)
            except StopIteration:
                return
            finally:
                self.data += time.perf_counter() - start
            yield batch

    @contextlib.contextmanager
    def for_devices(self) -> Iterator[None]:
        """The time that passes inside is counted."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.devices += time.perf_counter() - start


def fit(
    train_step: Dispatch,
    state: TrainState,
    batches: Iterable[Any],
    hooks: Sequence[Hook],
    should_stop: Callable[[Sums | None], bool] = lambda finished: False,
    waits: Waits | None = None,
) -> TrainState:
    """Runs one dispatch for every batch.

    Args:
      train_step: (state, batch) -> (state, sums) of one update, or a tuple of the sums of
        several.
      state: where to start; its memory is given to the first update.
      batches: from the one of update `state.step` on.
      hooks: called in order after the dispatch of each update as hook(step, state, sums),
        where step counts the updates finished, sums may still be computing, and state is
        that after the last update of the dispatch, the same object for all of them.
      should_stop: asked after the hooks of each dispatch, with the sums of the last step
        that the devices are known to have finished, None at first; True ends the loop.
      waits: what the loop waits for is added to it.

    Returns:
      The state after the last update.
    """
    waits = waits or Waits()
    step = int(state.step)
    in_flight: deque[Sums] = deque()
    finished = None
    for batch in waits.for_data(batches):
        state, each = _dispatch(train_step, state, batch, waits)
        in_flight.append(each[-1])
        if len(in_flight) > _IN_FLIGHT:
            with waits.for_devices():
                finished = jax.block_until_ready(in_flight.popleft())
        for sums in each:
            step += 1
            for hook in hooks:
                hook(step, state, sums)
        if should_stop(finished):
            break
    return state


def _dispatch(
    train_step: Dispatch, state: TrainState, batch: Any, waits: Waits
) -> tuple[TrainState, tuple[Sums, ...]]:
    """The state and the sums of each update, after a float16 overflow at half the scale."""
    while True:
        state, sums = train_step(state, batch)
        each = sums if isinstance(sums, tuple) else (sums,)
        with waits.for_devices():
            if not each[-1].pop("skipped", False):
                return state, each


def evaluate(
    eval_step: Callable[[Any, Any], Sums],
    variables: Any,
    batches: Iterable[Any],
    should_stop: Callable[[Sums | None], bool] = lambda finished: False,
    waits: Waits | None = None,
) -> dict[str, float] | None:
    """Averages over all batches, each example once; None if it was to stop before the end.

    Args:
      eval_step: (variables, batch) -> sums.
      variables: {"params", "batch_stats"}, replicated.
      batches: sharded, with a mask.
      should_stop: asked after each batch, with the sums of the last one that the devices
        are known to have finished, None at first.
      waits: what the loop waits for is added to it.

    Returns:
      {"loss", "top1", "top5", "num_examples"}, see `metrics.summarize`.
    """
    waits = waits or Waits()
    sums: list[Sums] = []
    finished = None
    for batch in waits.for_data(batches):
        sums.append(eval_step(variables, batch))
        if len(sums) > _IN_FLIGHT:
            with waits.for_devices():
                finished = jax.block_until_ready(sums[-1 - _IN_FLIGHT])
        if should_stop(finished):
            break
    if should_stop(finished):
        return None
    with waits.for_devices():
        return summarize(sums)


def predict(
    predict_step: Any, variables: Any, batches: Iterable[Any], waits: Waits | None = None
) -> Iterator[dict[str, Any]]:
    """The outputs of each batch on the host, in order.

    Args:
      predict_step: (variables, batch) -> arrays, on all devices; compiled by itself for
        each new shape of the images, so that the time that takes is known.
      variables: {"params", "batch_stats"}, replicated.
      batches: sharded.
      waits: what the loop waits for is added to it.
    """
    waits = waits or Waits()
    compiled: set[tuple[int, ...]] = set()
    in_flight: deque[Any] = deque()
    for batch in waits.for_data(batches):
        shape = batch["image"].shape
        if shape not in compiled:
            start = time.perf_counter()
            predict_step.lower(variables, batch).compile()  # what later calls run
            waits.compiling += time.perf_counter() - start
            compiled.add(shape)
        in_flight.append(predict_step(variables, batch))
        if len(in_flight) > _IN_FLIGHT:
            with waits.for_devices():
                done = jax.device_get(in_flight.popleft())
            yield done
    while in_flight:
        yield jax.device_get(in_flight.popleft())
