"""Many runs at once, as a function: schemes, seeds and learning rates in one program."""

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from resjax import build_members, hooks
from resjax import config as configs
from resjax.build_members import Members
from resjax.config import Config, UsageError
from resjax.initializers import Scheme
from resjax.steps import TrainState

_IN_FLIGHT = 2  # dispatches ahead of the devices


@dataclasses.dataclass(frozen=True)
class Segment:
    """Updates of all members, and what came of them.

    Attributes:
      step: updates finished.
      num_updates: of them, those of this segment.
      states: of the members, on the devices; given away when the next segment begins.
      train: sums of the minibatch of each update, {"loss", ...: [M, updates]}.
      test: sums over the test split, {"loss", ...: [M]}; empty if it was not evaluated.
      test_ema: likewise, of the averaged weights; empty if there are none.
      seconds: that the updates took.
    """

    step: int
    num_updates: int
    states: TrainState
    train: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    test_ema: dict[str, np.ndarray]
    seconds: float


@dataclasses.dataclass(frozen=True)
class Sweep:
    """What the members of a sweep came to, in the order of the product of their values.

    Attributes:
      members: of each the fields that vary, {name: value}.
      learning_rates: of every update, [M, num_steps].
      train_loss: of the minibatch of every update, before it, in nats, [M, num_steps].
      train_error: likewise, top-1, in percent.
      steps: after which the members were evaluated, [E].
      test_loss: in nats, [M, E].
      test_error: top-1, in percent, [M, E].
      variables: of each after the last update, {"params", "batch_stats"}.
      ema: their averages, of which `test_loss_ema` and `test_error_ema` [M, E] tell; None
        without `config.ema_decay`.
    """

    members: list[dict[str, Any]]
    learning_rates: np.ndarray
    train_loss: np.ndarray
    train_error: np.ndarray
    steps: np.ndarray
    test_loss: np.ndarray
    test_error: np.ndarray
    variables: list[dict[str, Any]]
    ema: list[dict[str, Any]] | None = None
    test_loss_ema: np.ndarray | None = None
    test_error_ema: np.ndarray | None = None


def sweep(
    config: Config,
    vary: Mapping[str, Sequence[Any]],
    schemes: Mapping[str, Scheme] | None = None,
    batch_seed: int | None = None,
) -> Sweep:
    """Trains every combination of some fields' values at once, in one compiled program.

    Each member is the run that `train.py` makes of its config, but for rounding: members of
    one seed see the same minibatches. They are spread over the devices; those of one device
    are a batch of the program (`vmap`), or on a CPU take turns in it, which is faster.

    Args:
      config: of what the members share.
      vary: values by field, of `build_members.ARRAY_FIELDS`, e.g. {"init": ["xavier",
        "mine"], "seed": range(3), "lr_per_256": [0.1, 0.2]}.
      schemes: init schemes of your own by name, (key, abstract_params) -> params.
      batch_seed: of the order, augmentation and dropped branches of all members; None: of
        each its own seed.

    Raises:
      UsageError: a field that cannot vary within a program or that no member reads, a
        value that is not allowed, or data that the devices cannot hold.
    """
    names, combined = list(vary), list(itertools.product(*vary.values()))
    for name in names:
        if name not in build_members.ARRAY_FIELDS:
            raise configs.unknown_name("vary", name, build_members.ARRAY_FIELDS)
    fields = [dict(zip(names, values, strict=True)) for values in combined]
    if not fields:
        raise UsageError(f"vary: {dict(vary)!r} leaves no member")
    if batch_seed is not None and not 0 <= batch_seed < 2**32:
        raise UsageError(f"batch_seed: {batch_seed} is not from 0 to 2**32 - 1")
    flat = configs.flatten(config)
    all_configs = [configs.validate(configs.unflatten({**flat, **own})) for own in fields]
    configs.check_varied(names, all_configs)
    if not build_members.can_train_together(config):
        raise UsageError(
            "config: its runs cannot be trained at once: that needs data that the devices "
            "hold (config.data.on_device), no config.init_from, no float16 and no "
            "config.precise_bn_examples"
        )
    build_members.check(all_configs, schemes)
    members = build_members.build_members(all_configs, schemes, batch_seed)
    segments = list(train_members(members, members.init_states()))
    evaluated = [segment for segment in segments if segment.test]
    train = {
        name: np.concatenate([segment.train[name] for segment in segments], axis=1)
        for name in segments[0].train
    }
    test, test_ema = (
        {name: np.stack([part[name] for part in parts], axis=1) for name in parts[0]}
        for parts in zip(*((s.test, s.test_ema) for s in evaluated), strict=True)
    )
    states = segments[-1].states

    def of_each(variables: dict[str, Any]) -> list[dict[str, Any]]:
        return [
            jax.device_get(jax.tree.map(lambda x, i=i: x[i], variables))
            for i in range(len(fields))
        ]

    averaged: dict[str, Any] = (
        {}
        if not states.ema
        else {
            "ema": of_each(states.ema),
            "test_loss_ema": test_ema["loss"] / test_ema["num_examples"],
            "test_error_ema": 100 - 100 * test_ema["top1"] / test_ema["num_examples"],
        }
    )
    return Sweep(
        members=fields,
        learning_rates=members.learning_rates,
        train_loss=train["loss"] / train["num_examples"],
        train_error=100 - 100 * train["top1"] / train["num_examples"],
        steps=np.array([segment.step for segment in evaluated]),
        test_loss=test["loss"] / test["num_examples"],
        test_error=100 - 100 * test["top1"] / test["num_examples"],
        variables=of_each(states.variables),
        **averaged,
    )


def train_members(
    members: Members,
    states: TrainState,
    start_step: int = 0,
    is_evaluated: bool = True,
    should_stop: Callable[[int], bool] = lambda step: False,
) -> Iterator[Segment]:
    """Trains from an update to the end, or until it is to stop.

    A segment ends where an evaluation or a checkpoint is due, and where it is to stop.

    Args:
      members: from `build_members`.
      states: of the members after `start_step` updates, on the devices; given away.
      start_step: updates that are done.
      is_evaluated: whether an evaluation that is due after them is done, too.
      should_stop: asked before each dispatch, with the updates done.
    """
    count, step = len(members.configs), start_step
    images = count * members.configs[0].batch_size
    total, done = images * members.num_steps, images * start_step
    ends = [n for n in sorted(members.segment_ends) if n > start_step]
    if not is_evaluated and start_step in members.eval_steps:
        ends.insert(0, start_step)
    with hooks.progress_bar(total, done, f"training {count} at once") as bar:
        for end in ends:
            began, first = time.perf_counter(), step
            sums, in_flight = list[Any](), deque[Any]()
            while step < end and not should_stop(step):
                states, each = members.train_step(states, step)
                sums += each
                step += len(each)
                in_flight.append(each[-1])
                if len(in_flight) > _IN_FLIGHT:
                    jax.block_until_ready(in_flight.popleft())
                bar.update(images * len(each))
            train, test, test_ema = _fetch(sums, count), {}, {}
            seconds = time.perf_counter() - began
            if step == end and step in members.eval_steps:
                test = _evaluate(members, states.variables)
                test_ema = _evaluate(members, states.ema) if states.ema else {}
            if step > first or test:
                yield Segment(step, step - first, states, train, test, test_ema, seconds)
            if step < end:
                return


def _evaluate(members: Members, variables: dict[str, Any]) -> dict[str, np.ndarray]:
    """Sums over the test split, {name: [M]}."""
    each = _fetch(members.evaluate(variables), len(members.configs))
    return {name: values.sum(axis=1) for name, values in each.items()}


def _fetch(sums: list[Any], count: int) -> dict[str, np.ndarray]:
    """Sums of many updates or batches as {name: [M, that many] float64}."""
    fetched = jax.device_get(sums) or [{}]
    return {
        name: np.stack([part[name][:count] for part in fetched], axis=1, dtype=np.float64)
        for name in fetched[0]
    }
