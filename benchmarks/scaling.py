"""Predicts the step time and efficiency of data-parallel training on k devices.

  python -m benchmarks.scaling --check   # against the figures of Goyal et al. 2017
  python -m benchmarks.scaling --measure --model=resnet50 --link_gbit_s=200 --all_reduces=2

For k devices, d on each of p = ceil(k / d) hosts, and 4 bytes a parameter:

  inside        = 2 (d - 1) / d * bytes / host bandwidth
  between       = 2 (p - 1) / p * bytes / link bandwidth + all_reduces * messages * latency
  messages      = 2 (p - 1) in a ring, 2 ceil(log2 p) by halving and doubling
  communication = inside + between
  exposed       = communication - min(overlap * communication, backward pass)
  step          = compute + exposed
  efficiency    = compute / step

A gradient can be summed as soon as it is computed, under the rest of the backward pass;
`overlap` is the part of the communication that is. Stragglers and input are left out.

Source: Goyal et al. 2017 (arXiv:1706.02677), section 4.1 for the volume and messages of
  both algorithms, and for the sums inside a host before and after the one between hosts;
  4.3 for hardware, parameters and the backward pass; 5.5 for the measured efficiency.
Differs: the paper pipelines the sums inside and between hosts; here they follow.
"""

import dataclasses
import math
import statistics
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp

from resjax import count_params, create_model, init, optim, parallel, steps
from resjax.config import ArgumentParser, UsageError, run_command

POSITIVE = ("greater than 0", lambda value: value > 0)
NOT_NEGATIVE = ("0 or more", lambda value: value >= 0)
FRACTION = ("from 0 to 1", lambda value: 0 <= value <= 1)
HEAD = "   k images/step compute ms communication ms exposed ms step ms efficiency images/s"


def _flag(default: float, allowed: tuple, text: str) -> Any:
    return dataclasses.field(default=default, metadata={"allowed": allowed, "text": text})


@dataclasses.dataclass(frozen=True)
class Job:
    """A training job and its machines; the defaults are the paper's."""

    # 29 hours on 8 GPUs for 90 epochs of 1,281,167 images, 256 an update; backward 120 ms.
    compute_ms: float = _flag(232.0, POSITIVE, "step time of one device alone")
    backward_fraction: float = _flag(0.52, FRACTION, "the backward pass in it")
    images: int = _flag(32, POSITIVE, "images of one device in a step")
    params: int = _flag(25_557_032, POSITIVE, "parameters of the model")
    all_reduces: int = _flag(161, POSITIVE, "parts in which a gradient is summed")
    devices_per_host: int = _flag(8, POSITIVE, "devices joined by a faster link")
    # NVLink of a P100: 160 GB/s both ways together (NVIDIA's data sheet).
    host_gbit_s: float = _flag(640.0, POSITIVE, "of a device inside its host, each way")
    link_gbit_s: float = _flag(50.0, POSITIVE, "of a host, each way")
    # Fitted to the ring being 3 times slower than halving and doubling on 32 hosts.
    latency_us: float = _flag(12.0, NOT_NEGATIVE, "of a message between hosts")
    # Fitted to 90 % on 256 GPUs of what 8 do; 0 would give 82 %, 1 gives 100 %.
    overlap: float = _flag(0.5, FRACTION, "the part of communication that may hide")
    algorithm: str = "halving_doubling"


MESSAGES = {  # one after another, among p hosts
    "ring": lambda p: 2 * (p - 1),
    "halving_doubling": lambda p: 2 * math.ceil(math.log2(p)),
}


def communication_ms(job: Job, k: int) -> float:
    """The sum of a gradient over k devices."""
    hosts, local = math.ceil(k / job.devices_per_host), min(k, job.devices_per_host)
    inside = 2 * (local - 1) / local * 32 * job.params / (job.host_gbit_s * 1e6)
    between = 2 * (hosts - 1) / hosts * 32 * job.params / (job.link_gbit_s * 1e6)
    messages = job.all_reduces * MESSAGES[job.algorithm](hosts)
    return inside + between + messages * job.latency_us / 1e3


def exposed_ms(job: Job, k: int) -> float:
    """The communication that the backward pass does not hide."""
    communication = communication_ms(job, k)
    hidden = min(job.overlap * communication, job.backward_fraction * job.compute_ms)
    return communication - hidden


def efficiency(job: Job, k: int, base: int = 1) -> float:
    """What a device among k does in a second, as a part of what one among `base` does."""
    return (job.compute_ms + exposed_ms(job, base)) / (job.compute_ms + exposed_ms(job, k))


def paper_figures(job: Job) -> list[tuple[str, float, float, float]]:
    """What the paper measured or derived: in words, its value, ours, the tolerance."""
    ring = communication_ms(dataclasses.replace(job, algorithm="ring"), 256)
    peak = 2 * 32 * job.params / (job.backward_fraction * job.compute_ms * 1e6)
    return [
        ("256 GPUs: % of 8's efficiency (fitted)", 90, 100 * efficiency(job, 256, 8), 5),
        ("352 GPUs: % of 8's step time", 112, 100 / efficiency(job, 352, 8), 5),
        ("32 hosts: ring / halving (fitted)", 3, ring / communication_ms(job, 256), 0.5),
        # The paper rounds 120 ms to 125, and the parameters to 25 million.
        ("peak bandwidth needed, Gbit/s", 12.8, peak, 1),
    ]


def measure_ms(name: str, images: int, image_size: int, dtype: str) -> float:
    """The train step on one device and synthetic images: median of ten after three."""
    model, key = create_model(name, dtype=jnp.dtype(dtype)), jax.random.key(0)
    tx, one = optim.sgd(lambda step: jnp.float32(0.1), 0.9, True, 1e-4), jax.devices()[:1]
    step = steps.make_train_step(model, tx, lambda batch: batch["image"] / 128 - 1, images)
    run_step = jax.pmap(step, parallel.AXIS, in_axes=(None, 0), out_axes=None, devices=one)
    image = jax.random.bits(key, (1, images, image_size, image_size, 3), jnp.uint8)
    zeros = jnp.zeros((1, images), jnp.int32)
    batch = {"image": image, "label": zeros, "position": zeros}
    state, times = steps.create_state(init(model, key), tx), []
    for _ in range(13):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(run_step(state, batch))
        times.append(1e3 * (time.perf_counter() - start))
    if one[0].platform == "cpu":
        print("warning: measured on a CPU; this is no GPU's step time", file=sys.stderr)
    return statistics.median(times[3:])


def table(job: Job, workers: list[int]) -> str:
    """A line for each number of devices."""
    lines = [HEAD]
    for k in workers:
        exposed, images = exposed_ms(job, k), k * job.images
        step, share = job.compute_ms + exposed, 100 * efficiency(job, k)
        lines.append(
            f"{k:4} {images:11} {job.compute_ms:10.1f} {communication_ms(job, k):16.1f} "
            f"{exposed:10.1f} {step:7.1f} {share:8.1f} % {1e3 * images / step:8.0f}"
        )
    return "\n".join(lines)


def plot(job: Job, workers: list[int], path: str) -> None:
    """The efficiency: hiding nothing, as given, hiding all that fits."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(xscale="log", xlabel="devices", ylabel="efficiency (%)")
    for overlap in (0.0, job.overlap, 1.0):
        now = dataclasses.replace(job, overlap=overlap)
        shares = [100 * efficiency(now, k) for k in workers]
        axes.plot(workers, shares, marker=".", label=f"overlap {overlap:g}")
    axes.legend()
    try:
        figure.savefig(path)
    except (OSError, ValueError) as error:  # no such folder, or kind of picture
        raise UsageError(f"--plot: {error}") from error


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m benchmarks.scaling", description=__doc__)
    *fields, _ = dataclasses.fields(Job)
    for field in fields:
        kind, text = type(field.default), f"{field.metadata['text']} (%(default)s)"
        parser.add_argument(f"--{field.name}", type=kind, default=field.default, help=text)
    parser.add_argument("--algorithm", choices=MESSAGES, default=Job.algorithm)
    parser.add_argument("--model", metavar="NAME", help="counts its --params")
    parser.add_argument("--measure", action="store_true", help="times its --compute_ms")
    parser.add_argument("--image_size", type=int, default=224, help="to measure with")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 8, 64, 256, 352])
    parser.add_argument("--plot", metavar="FILE", help="draws the efficiency")
    parser.add_argument("--check", action="store_true", help="the paper's figures, alone")
    flags = parser.parse_args(arguments)
    values = {field.name: getattr(flags, field.name) for field in fields}
    for field in fields:
        allowed, is_allowed = field.metadata["allowed"]
        if not is_allowed(values[field.name]):
            raise UsageError(f"--{field.name}: {values[field.name]:g} is not {allowed}")
    if min(flags.workers) < 1:
        raise UsageError(f"--workers: {min(flags.workers)} is not greater than 0")
    if flags.check:
        figures = paper_figures(Job())
        for name, paper, model, tolerance in figures:
            print(f"{name:<39} paper {paper:5g}  model {model:5.1f} (within {tolerance:g})")
        return int(any(abs(p - m) > tolerance for _, p, m, tolerance in figures))
    if flags.model:
        values["params"] = count_params(create_model(flags.model))
    if flags.measure:
        name = flags.model or "resnet50"
        values["compute_ms"] = measure_ms(name, flags.images, flags.image_size, flags.dtype)
    job = Job(**values, algorithm=flags.algorithm)
    print(table(job, flags.workers))
    if flags.plot:
        plot(job, flags.workers, flags.plot)
    return 0


if __name__ == "__main__":
    run_command(main)
