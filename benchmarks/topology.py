"""Trains one config on 1, 2 and 8 devices, accumulated, on two hosts, and draws the losses.

  python -m benchmarks.topology --flax_example=flax/examples/imagenet

Beside it, under the same changes, the train step of flax's ImageNet example, which is read
where it lies and needs nothing that resjax does not. Without the flag it is left out. The
docs' picture is of commit 18f8f311c275d57f46d95e41b15aa97b454754c0:

  git clone https://github.com/google/flax
  git -C flax checkout 18f8f311c275d57f46d95e41b15aa97b454754c0

Both see the same digits, in the same order and minibatches of 64 with the same shifts, and
take 88 updates of SGD by Nesterov's momentum with weight decay, at a rate that falls from
0.1 along a cosine. Nets are small and shallow: in deep ones training is chaotic, and soon
nothing but rounding errors would be seen (ResNet-20 at a quarter of this rate: losses on 1
and 8 devices part by 1e-7 at first, by 44 % within 88 steps).

  resjax  train.py with statistics over 16 examples, which its config says.
  flax    its `create_model`, `create_train_state` and `train_step` under `jax.pmap`, with
          its net of one block, on the digits enlarged to 32 x 32. Its norms take statistics
          over all devices; "per-device statistics" is the same without their axis_name,
          as `flax.linen.BatchNorm` is by default, and on one device the same formula.
          Accumulation is `optax.MultiSteps` around its optimizer; the loss of an update
          is then the mean over its parts. Two hosts of a device each are 2 devices to it,
          and were not run.

All runs are on the CPU, on forced host devices.
"""

import csv
import functools
import os
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import optax
from etils import epath
from flax import linen as nn
from tqdm import tqdm

from benchmarks import contenders
from benchmarks.turns import Absent
from resjax import build, build_data, records
from resjax.config import (
    ArgumentParser,
    RunError,
    UsageError,
    load_config,
    override,
    run_command,
)

CONFIG = """
from functools import partial

from resjax.config import Config, NormConfig
from resjax.models.blocks import bottleneck
from resjax.models.resnet import MODELS, ResNet

MODELS["small"] = partial(ResNet, (1,), bottleneck, width=8, downsample=False)


def get_config():
    return Config(
        model="small",
        norm=NormConfig(virtual_batch_size=16),
        batch_size=64,
        lr_per_256=0.4,
        schedule="cosine",
        warmup="none",
        num_epochs=3.919,  # 88 steps
        eval_every_epochs=3.919,
        log_every_steps=1,
    )
"""
STEPS, PEAK, IMAGE_SIZE, ENLARGED = 88, 0.1, 8, 4  # PEAK = 0.4 * 64 / 256
ONE, TWO, EIGHT = "1 device", "2 devices", "8 devices"
ACCUMULATED = "1 device, accumulated 4 times"
RESJAX = {  # devices (of each host), hosts, flags
    ONE: (1, 1, []),
    TWO: (2, 1, []),
    EIGHT: (8, 1, []),
    ACCUMULATED: (1, 1, ["--config.microbatch=16"]),
    "two hosts": (1, 2, []),
    "8 devices, shard_map": (8, 1, ["--config.parallel=shard_map"]),
}
FLAX = {  # devices, backward passes of an update, whether devices share statistics
    ONE: (1, 1, True),
    TWO: (2, 1, True),
    EIGHT: (8, 1, True),
    ACCUMULATED: (1, 4, True),
    "2 devices, per-device statistics": (2, 1, False),
    "8 devices, per-device statistics": (8, 1, False),
}
# Color, width, style: each thinner than those below it, so that all can be seen.
LOOKS = {
    ONE: ("0.75", 9, "-"),
    TWO: ("C0", 5.5, "-"),
    EIGHT: ("C2", 3, "-"),
    ACCUMULATED: ("C3", 1.6, "-"),
    "two hosts": ("C1", 1.6, (0, (3, 3))),
    "8 devices, shard_map": ("k", 0.8, (0, (1, 4))),
    "2 devices, per-device statistics": ("C4", 1.2, "-"),
    "8 devices, per-device statistics": ("k", 1.2, "-"),
}
BATCH_NORM = nn.BatchNorm
TITLES = {
    "resjax": "resjax: one config, devices are not part of it",
    "flax": "flax's ImageNet example: its model, step and optimizer",
}
FLOOR = 2e-8  # where the picture puts equal losses; float32 tells 6e-8 apart
KINDS = (".png", ".pdf", ".svg")
Curves = dict[str, np.ndarray]  # of each variant the losses, [STEPS]


def train(config: Path, workdir: Path, devices: int, hosts: int, flags: list) -> np.ndarray:
    """The losses of train.py, run by one process a host."""
    forced = f"--xla_force_host_platform_device_count={devices}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": forced}
    script = Path(__file__).resolve().parent.parent / "train.py"
    words = [sys.executable, script, f"--config={config}", f"--workdir={workdir}", *flags]
    if hosts > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words += [f"--coordinator_address=127.0.0.1:{port}", f"--num_processes={hosts}"]
    pipes: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    processes = [
        subprocess.Popen(
            words + [f"--process_id={host}"] * (hosts > 1), env=environment, **pipes
        )
        for host in range(hosts)
    ]
    errors = [process.communicate()[1] for process in processes]
    for process, error in zip(processes, errors, strict=True):
        if process.returncode:
            raise RunError(f"train.py {' '.join(flags)}: {error}")
    rows = records.read_metrics(epath.Path(workdir))
    return np.array([row["loss"] for row in rows if row["split"] == "train"])


def load_flax_example(folder: Path) -> tuple[Any, Any]:
    """Its modules (models, train); raises `UsageError` if they are not there."""
    try:
        models, train = contenders.load_flax_example(folder)
    except Absent as error:
        raise UsageError(f"--flax_example: {error}; see --help") from error
    train.NUM_CLASSES = 10  # its only constant, and ImageNet's
    return models, train


def load_batches(config_path: Path) -> list[dict[str, np.ndarray]]:
    """What train.py feeds its model, step by step, enlarged for the stem of ImageNet."""
    config = override(load_config(config_path), ["--config.data.on_device=false"])
    augment = jax.jit(build_data.build_transforms(config)[0])
    sharded = build.build_run(config).train_batches(0)
    batches = [{k: x.reshape(-1, *x.shape[2:]) for k, x in b.items()} for b in sharded]
    return [
        {
            "image": np.asarray(augment(batch)).repeat(ENLARGED, 1).repeat(ENLARGED, 2),
            "label": np.asarray(batch["label"]),
        }
        for batch in batches
    ]


def without_axis_name(axis_name: str, **kwargs: Any) -> nn.BatchNorm:
    """`nn.BatchNorm`, with its default: statistics over what the device holds."""
    return BATCH_NORM(**kwargs)


def train_flax(
    example: tuple[Any, Any],
    batches: list[dict[str, np.ndarray]],
    devices: int,
    parts: int,
    shared: bool,
) -> Iterator[float]:
    """The loss of each update; the step and all it is made of are the example's own."""
    models, train = example
    recipe = types.SimpleNamespace(
        half_precision=False, momentum=0.9, warmup_epochs=0, num_epochs=1
    )
    net = functools.partial(models._ResNet1, num_filters=16)
    model = train.create_model(model_cls=net, half_precision=False)
    schedule = train.create_learning_rate_fn(recipe, PEAK, STEPS)
    key = jax.random.key(0)
    state = train.create_train_state(key, recipe, model, IMAGE_SIZE * ENLARGED, schedule)
    if parts > 1:
        tx = optax.MultiSteps(state.tx, parts)
        state = state.replace(tx=tx, opt_state=tx.init(state.params))
    step = jax.pmap(
        functools.partial(train.train_step, learning_rate_fn=schedule),
        in_axes=(None, 0),
        out_axes=(None, 0),
        axis_name="batch",
        devices=jax.devices()[:devices],
    )
    norm = BATCH_NORM if shared else without_axis_name
    for batch in batches:
        split = {k: x.reshape(parts, devices, -1, *x.shape[1:]) for k, x in batch.items()}
        losses = []
        for i in range(parts):
            with mock.patch.object(nn, "BatchNorm", norm):  # read when the step is traced
                state, metrics = step(state, {k: x[i] for k, x in split.items()})
            losses.append(float(metrics["loss"][0]))
        yield float(np.mean(losses))


def deviations(curves: Curves) -> Curves:
    """|loss / the loss on one device - 1|, of each step."""
    return {name: np.abs(losses / curves[ONE] - 1) for name, losses in curves.items()}


def format_table(codes: dict[str, Curves]) -> str:
    """The largest deviation of each variant."""
    lines = ["largest relative deviation of the loss from 1 device"]
    for code, curves in codes.items():
        for name, values in deviations(curves).items():
            lines.append(
                f"{code:<8}{name:<36}{values.max():8.1e}  at first {values[0]:8.1e}"
            )
    return "\n".join(lines)


def write_csv(codes: dict[str, Curves], path: Path) -> None:
    """A line for each loss, in full precision."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["code", "variant", "step", "loss"])
        for code, curves in codes.items():
            for name, losses in curves.items():
                for step, loss in enumerate(losses, 1):
                    writer.writerow([code, name, step, f"{loss:.9g}"])


def draw(codes: dict[str, Curves], path: Path) -> None:
    """The losses of each code, and below them the deviations from one device."""
    from matplotlib.figure import Figure

    size = (0.5 + 5.8 * len(codes), 6.2)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(
        2,
        len(codes),
        sharex=True,
        sharey="row",
        squeeze=False,
        height_ratios=(3, 2),
    )
    for (code, curves), (upper, lower) in zip(codes.items(), panels.T, strict=True):
        parted = deviations(curves)
        for name, losses in curves.items():
            color, width, style = LOOKS[name]
            steps, largest = np.arange(1, len(losses) + 1), parted[name].max()
            label = name if name == ONE else f"{name}: {largest:.1e}"
            upper.plot(steps, losses, color=color, lw=width, ls=style, label=label)
            if name != ONE:
                shown = np.maximum(parted[name], FLOOR)
                lower.plot(steps, shown, color=color, lw=1.2, ls=style)
        upper.set_title(TITLES[code], fontsize=11)
        upper.legend(
            fontsize=8.5,
            title="largest relative deviation from 1 device",
            title_fontsize=8.5,
        )
        lower.set(xlabel="step", yscale="log", ylim=(FLOOR / 2, 1))
        for panel in (upper, lower):
            panel.grid(alpha=0.3)
            panel.tick_params(labelleft=True)
    panels[0, 0].set_ylabel("training loss (nats)")
    panels[1, 0].set_ylabel("relative deviation\nfrom 1 device")
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.topology", description=__doc__)
    parser.add_argument("--flax_example", metavar="DIR", type=Path, help="its folder")
    parser.add_argument(
        "--output",
        metavar="FILE",
        type=Path,
        default=Path("docs/topology.png"),
        help="the picture (%(default)s); the losses are written beside it, as .csv",
    )
    flags = parser.parse_args(arguments)
    if not flags.output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {flags.output.parent}")
    if flags.output.suffix not in KINDS:
        raise UsageError(f"--output: {flags.output} must end in one of {', '.join(KINDS)}")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    codes: dict[str, Curves] = {"resjax": {}}
    if flags.flax_example:
        example = load_flax_example(flags.flax_example.expanduser())
        codes["flax"] = {}
    else:
        print("resjax alone; --flax_example=DIR adds flax's example, see --help")
    total = STEPS * (len(RESJAX) + len(FLAX) * ("flax" in codes))
    with tempfile.TemporaryDirectory() as folder, tqdm(total=total, unit="step") as bar:
        config = Path(folder) / "small.py"
        config.write_text(CONFIG)
        for name, variant in RESJAX.items():
            bar.set_description(f"resjax, {name}")
            workdir = Path(folder) / name.replace(" ", "_")
            codes["resjax"][name] = train(config, workdir, *variant)
            bar.update(STEPS)
        batches = load_batches(config) if "flax" in codes else []
        for name, way in FLAX.items() if "flax" in codes else ():
            bar.set_description(f"flax, {name}")
            losses = []
            for loss in train_flax(example, batches, *way):
                losses.append(loss)
                bar.update()
            codes["flax"][name] = np.array(losses)
    write_csv(codes, flags.output.with_suffix(".csv"))
    draw(codes, flags.output)
    print(format_table(codes))
    return 0


if __name__ == "__main__":
    run_command(main)
