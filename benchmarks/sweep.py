"""Four init schemes by three seeds, trained at once, and one after another as by train.py.

  python -m benchmarks.sweep
  python -m benchmarks.sweep --lone=6 --config.num_epochs=30

Both sides build, compile and train, without evaluation and files, in a process each: a run
of its own on all cores as one device, the sweep with a device a core, as the two commands
have it. The lone runs are spread over the members and stand before and after the sweep;
their mean time times twelve is that of the twelve. Their losses are compared with the
members'.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resjax import build, build_members
from resjax.config import ArgumentParser, Config, load_config, override, run_command
from resjax.data.workers import num_cores

DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"
SCHEMES = ("msra_fan_out", "msra_fan_in", "xavier", "msra_fan_out_zero_gamma")
SEEDS = (0, 1, 2)


def members_of(config: Config) -> list[Config]:
    """Twelve configs."""
    return [
        dataclasses.replace(config, init=scheme, seed=seed)
        for scheme in SCHEMES
        for seed in SEEDS
    ]


def train_lone(config: Config) -> np.ndarray:
    """The loss of each update of a run on its own."""
    run = build.build_run(config)
    state, losses = run.init_state(), []
    for batch in run.train_batches(0):
        state, sums = run.train_step(state, batch)
        losses += [one["loss"] for one in (sums if isinstance(sums, tuple) else (sums,))]
    return np.array(jax.device_get(losses)) / config.batch_size


def train_together(config: Config) -> np.ndarray:
    """The loss of each update of all members, [12, updates]."""
    members = build_members.build_members(members_of(config))
    states, losses = members.init_states(), []
    step = 0
    while step < members.num_steps:
        states, each = members.train_step(states, step)
        losses += [sums["loss"] for sums in each]
        step += len(each)
    return np.stack(jax.device_get(losses), axis=1)[:12] / config.batch_size


def measure(which: str, words: list[str], config_file: Path) -> dict[str, Any]:
    """Seconds and losses of one side, of a process of its own.

    Args:
      which: "sweep", or the number of a member.
      words: overrides of the config.
      config_file: of what the members share.
    """
    devices = num_cores() if which == "sweep" else 1
    flags = f"--xla_force_host_platform_device_count={devices}"
    command = [sys.executable, "-m", "benchmarks.sweep"]
    done = subprocess.run(
        [*command, f"--config={config_file}", f"--only={which}", *words],
        env={**os.environ, "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        check=True,
    )
    return json.loads(done.stdout)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.sweep", description=__doc__)
    parser.add_argument("--config", metavar="FILE", type=Path, default=DIGITS)
    parser.add_argument("--lone", type=int, default=4, help="lone runs (%(default)s)")
    parser.add_argument("--only", metavar="SIDE", help="one side, as JSON (sweep, 0 to 11)")
    flags, words = parser.parse_known_args(arguments)
    config = override(load_config(flags.config), words)
    if flags.only:
        start = time.perf_counter()
        if flags.only == "sweep":
            losses = train_together(config)
        else:
            losses = train_lone(members_of(config)[int(flags.only)])
        seconds = time.perf_counter() - start
        print(json.dumps({"seconds": seconds, "losses": losses.tolist()}))
        return 0
    count = len(members_of(config))
    places = [i * count // flags.lone for i in range(flags.lone)]
    half = len(places) // 2
    measured = {}
    for which in [*places[:half], "sweep", *places[half:]]:
        measured[which] = measure(str(which), words, flags.config)
        print(f"{which}: {measured[which]['seconds']:.1f} s", file=sys.stderr)
    lone = statistics.fmean(measured[i]["seconds"] for i in places)
    together = measured["sweep"]["seconds"]
    print(
        f"{config.model} on {config.data.name}, {count} members, "
        f"{len(measured[places[0]]['losses'])} updates, {jax.default_backend()}: one after "
        f"another / at once = {count * lone / together:.2f}"
    )
    for i in places:
        own, its = np.array(measured[i]["losses"]), np.array(measured["sweep"]["losses"][i])
        apart = np.abs(its / own - 1)
        print(
            f"member {i:2}: losses differ by {apart[0]:.1e} in the first update, by up to "
            f"{apart[:30].max():.1e} in thirty"
        )
    return 0


if __name__ == "__main__":
    run_command(main)
