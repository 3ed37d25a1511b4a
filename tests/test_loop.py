"""The loops over steps: hooks in order, resuming, stopping, waiting, no lost batch."""

import time

import jax.numpy as jnp
import pytest

from resjax import loop
from resjax.steps import TrainState


def state_at(step):
    return TrainState(jnp.int32(step), {}, {}, ())


def count_step(state, batch):
    return state.replace(step=state.step + 1), {"loss": jnp.float32(batch)}


def test_hooks_see_every_step_with_its_state_and_sums():
    seen = []
    hooks = [
        lambda step, state, sums: seen.append(("a", step, int(state.step))),
        lambda step, state, sums: seen.append(("b", step, float(sums["loss"]))),
    ]
    state = loop.fit(count_step, state_at(3), [30, 40], hooks)
    assert seen == [("a", 4, 4), ("b", 4, 30.0), ("a", 5, 5), ("b", 5, 40.0)]
    assert int(state.step) == 5


def count_steps(state, batches):
    """Several updates in one dispatch."""
    sums = tuple({"loss": jnp.float32(batch)} for batch in batches)
    return state.replace(step=state.step + len(batches)), sums


def test_hooks_see_each_update_of_a_dispatch_with_the_state_of_its_end():
    seen = []
    hooks = [
        lambda step, state, sums: seen.append((step, int(state.step), float(sums["loss"])))
    ]
    state = loop.fit(count_steps, state_at(3), [(1, 2, 3), (4,), (5, 6)], hooks)
    expected = [(4, 6, 1), (5, 6, 2), (6, 6, 3), (7, 7, 4), (8, 9, 5), (9, 9, 6)]
    assert seen == expected and int(state.step) == 9


def test_a_stop_comes_only_between_dispatches():
    seen = []
    hooks = [lambda step, state, sums: seen.append(step)]
    dispatches = [(0, 0), (0, 0), (0, 0)]
    state = loop.fit(count_steps, state_at(0), dispatches, hooks, lambda _: len(seen) > 2)
    assert seen == [1, 2, 3, 4] and int(state.step) == 4


def test_a_skipped_update_is_made_again():
    tries = []

    def train_step(state, batch):
        tries.append(batch)
        skipped = len(tries) == 2
        new = state.replace(step=state.step + (not skipped))
        return new, ({"loss": jnp.float32(0), "skipped": jnp.bool_(skipped)},)

    assert int(loop.fit(train_step, state_at(0), "abc", []).step) == 3
    assert tries == ["a", "b", "b", "c"]


def slowly(values, seconds):
    for value in values:
        time.sleep(seconds)
        yield value


class Slow:
    """What block_until_ready waits for, as for an array."""

    def block_until_ready(self):
        time.sleep(0.05)


def test_waiting_for_data_and_for_devices_is_told_apart():
    waits = loop.Waits()
    loop.fit(count_step, state_at(0), slowly(range(4), 0.05), [], waits=waits)
    assert waits.data >= 4 * 0.05 and waits.devices < waits.data

    def slow_step(state, batch):
        return state, {"loss": Slow()}

    waits = loop.Waits()
    loop.fit(slow_step, state_at(0), range(6), [], waits=waits)
    assert waits.devices >= 4 * 0.05 > waits.data  # the last two are in flight


def test_a_failing_source_is_not_taken_for_its_end():
    def batches():
        yield 1
        raise ValueError("damaged")

    with pytest.raises(ValueError, match="damaged"):
        loop.fit(count_step, state_at(0), batches(), [])


def test_a_stop_ends_after_the_hooks_of_the_step():
    seen = []
    hooks = [lambda step, state, sums: seen.append(step)]
    state = loop.fit(count_step, state_at(0), range(9), hooks, lambda _: len(seen) == 2)
    assert seen == [1, 2] and int(state.step) == 2


def test_no_more_batches_are_taken_than_steps_run():
    batches = iter(range(9))
    loop.fit(count_step, state_at(0), batches, [], lambda _: True)
    assert next(batches) == 1


def test_evaluate_adds_up_all_batches():
    def eval_step(variables, batch):
        return {
            "loss": jnp.float32(2.0 * batch),
            "top1": jnp.float32(1),
            "top5": jnp.float32(batch),
            "num_examples": jnp.float32(batch),
        }

    means = loop.evaluate(eval_step, {}, [1, 2, 3, 4])
    assert means == {"loss": 2.0, "top1": 40.0, "top5": 100.0, "num_examples": 10}


class Compiled:
    """A step that is compiled by itself, as the programs of parallel.py are."""

    def __init__(self):
        self.log = []

    def lower(self, variables, batch):
        return Lowered(self.log, batch["image"].shape)

    def __call__(self, variables, batch):
        self.log.append("run")
        return {"sum": variables + batch["image"].sum()}


class Lowered:
    def __init__(self, log, shape):
        self.log, self.shape = log, shape

    def compile(self):
        time.sleep(0.05)
        self.log.append(self.shape)


def test_predictions_come_in_order_and_each_shape_is_compiled_by_itself():
    shapes = [(2,), (2,), (3,), (2,), (3,)]
    batches = [{"image": i * jnp.ones(shape)} for i, shape in enumerate(shapes)]
    step, waits = Compiled(), loop.Waits()
    found = [float(out["sum"]) for out in loop.predict(step, 10, batches, waits)]
    assert found == [10, 12, 16, 16, 22]
    assert step.log == [(2,), "run", "run", (3,), "run", "run", "run"]
    assert 0.1 <= waits.compiling < 10


def test_few_predictions_are_in_flight():
    taken = []

    def batches():
        for i in range(9):
            taken.append(i)
            yield {"image": jnp.ones(1)}

    outputs = loop.predict(Compiled(), 0, batches())
    next(outputs)
    assert len(taken) == 3
    assert len(list(outputs)) == 8
