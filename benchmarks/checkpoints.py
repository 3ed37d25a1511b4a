"""What writing checkpoints adds to the time of training.

  python -m benchmarks.checkpoints
  python -m benchmarks.checkpoints --config=configs/imagenet_resnet50.py --every_steps=500

One run, in turns: some epochs (or --every_steps) without a checkpoint, then as many with
one at the end of each, written and logged as train.py does, but without evaluations. A turn
ends when its last update and its last checkpoint are finished.
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

    saves = [hooks.make_hook(lambda step: step % every == 0, save, log)] if writer else []
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
    parser.add_argument("--turns", type=int, default=11, help="of each kind (%(default)s)")
    parser.add_argument(
        "--saves", type=int, default=3, help="checkpoints in a turn (%(default)s)"
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
        for with_saves in [False, True] * flags.turns:
            writer = to if with_saves else None
            state, time_taken, times = take_turn(
                run, state, batches, log, flags.saves, every, writer
            )
            seconds[with_saves].append(time_taken)
            stood += times
    pairs = zip(seconds[True], seconds[False], strict=True)
    ratios = sorted(with_saves / without for with_saves, without in pairs)
    device = jax.devices()[0]
    print(
        f"{config.model} on {config.data.name}, steps of {config.batch_size} on "
        f"{jax.device_count()} x {device.device_kind}, a checkpoint every {every} steps\n"
        f"time with checkpoints / without: {statistics.median(ratios):.3f} "
        f"({ratios[0]:.3f} to {ratios[-1]:.3f} of {len(ratios)} pairs of turns)\n"
        f"of an interval, training stands for a checkpoint: "
        f"{statistics.median(stood) * flags.saves / statistics.median(seconds[False]):.1%}"
    )
    return 0


if __name__ == "__main__":
    run_command(main)
