"""What writing checkpoints adds to the time of training.

  python -m benchmarks.checkpoints
  python -m benchmarks.checkpoints --config=configs/imagenet_resnet50.py --every_steps=500

One run, in turns: some epochs (or --every_steps) without a checkpoint, then as many with
one in the middle of each, written and logged as train.py does, but without evaluations. A
turn ends when its last update and its last checkpoint are finished. Compared are the lower
quartiles of the turns: other work on the machine only adds.
"""

import itertools
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath

from resjax import build, checkpoint_writer, hooks, loop
from resjax.config import (
    ArgumentParser,
    UsageError,
    load_config,
    override,
    run_command,
)

DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"


def take_turn(
    run: build.Run,
    state: Any,
    batches: Iterator[Any],
    log: hooks.TrainLog,
    num_saves: int,
    every: int,
    writer: Any,
) -> tuple[Any, float, list[float]]:
    """State, seconds, and seconds that training stood for each checkpoint, if any."""
    stood: list[float] = []

    def save(step: int, state: Any) -> None:
        before = time.perf_counter()
        checkpoint_writer.save(writer, step, state.variables, state.optimizer, run.record)
        stood.append(time.perf_counter() - before)

    first = int(state.step) + max(every // 2, 1)
    due = range(first, first + num_saves * every, every).__contains__
    saves = [hooks.make_hook(due, save, log)] if writer else []
    turn = itertools.islice(batches, num_saves * every)
    start = time.perf_counter()
    state = loop.fit(run.train_step, state, turn, [log, *saves])
    jax.block_until_ready(state)
    if writer:
        writer.wait_until_finished()
    return state, time.perf_counter() - start, stood


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.checkpoints", description=__doc__)
    parser.add_argument("--config", metavar="FILE", type=Path, default=DIGITS)
    parser.add_argument("--turns", type=int, default=48, help="of each kind (%(default)s)")
    parser.add_argument(
        "--saves", type=int, default=2, help="checkpoints in a turn (%(default)s)"
    )
    parser.add_argument(
        "--every_steps", type=int, help="updates between two checkpoints (an epoch)"
    )
    flags, words = parser.parse_known_args(arguments)
    for name in ("turns", "saves", "every_steps"):
        if (value := getattr(flags, name)) is not None and value < 1:
            raise UsageError(f"--{name}: {value} is not greater than 0")
    config = override(load_config(flags.config), words)
    run = build.build_run(config)
    every = flags.every_steps or max(round(run.num_examples / config.batch_size), 1)
    num_steps = (2 * flags.turns + 1) * flags.saves * every
    if num_steps > run.num_steps:
        epochs = num_steps * config.batch_size / run.num_examples
        run = build.build_run(override(config, [f"--config.num_epochs={epochs + 1}"]))
    state, batches = run.init_state(), iter(run.train_batches(0))
    log = hooks.TrainLog(
        write=lambda record: None,
        every=config.log_every_steps,
        epochs_per_step=config.batch_size / run.num_examples,
        learning_rates=run.learning_rates,
        images_per_step=config.batch_size,
    )
    seconds: dict[bool, list[float]] = {False: [], True: []}
    stood: list[float] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        checkpoint_writer.open_writer(
            epath.Path(folder), lambda steps: {*steps[-2:]}
        ) as to,
    ):
        state, _, _ = take_turn(run, state, batches, log, 1, every, to)  # which compiles
        for is_saving in [False, True] * flags.turns:
            writer = to if is_saving else None
            state, time_taken, times = take_turn(
                run, state, batches, log, flags.saves, every, writer
            )
            seconds[is_saving].append(time_taken)
            stood += times
    without, with_saves = (statistics.quantiles(seconds[k])[0] for k in (False, True))
    device = jax.devices()[0]
    print(
        f"{config.model} on {config.data.name}, steps of {config.batch_size} on "
        f"{jax.device_count()} x {device.device_kind}, a checkpoint every {every} steps\n"
        f"time with checkpoints / without: {with_saves / without:.3f}, of {flags.turns} "
        f"turns each\nof which training stands for the checkpoint: "
        f"{statistics.median(stood) * flags.saves / without:.3f}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
