"""The loops over steps: hooks in order, resuming numbers, stopping, no lost batch."""

import jax.numpy as jnp

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
