"""Contenders in processes of their own, which take turns, so that drift hits all alike.

A worker builds its contender (contenders.py) and then, whenever it is asked, makes a step
to get warm and so many that are timed, while others wait. The first turn does not count.
What counts are ratios of medians.
"""

import argparse
import contextlib
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from resjax import list_models
from resjax.config import ArgumentParser, UsageError, unknown_name

ROOT = Path(__file__).resolve().parent.parent
# For malloc, which reads it when a process starts: huge pages, and what was freed is kept.
MALLOC = ":".join(
    f"glibc.malloc.{name}"
    for name in ("hugetlb=1", "arena_max=1", "mmap_max=0", "trim_threshold=1000000000000")
)
Result = dict[str, Any]


class Absent(Exception):
    """A contender cannot be had here; says why."""


class Worker:
    """A contender in its own process.

    Attributes:
      name: of the contender.
      facts: what it told when it was warm: `first_seconds`, `device`, versions, ...
      launch_seconds: from its start to the end of its first step.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        first, *_ = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")
        own = {
            "CUDA_VISIBLE_DEVICES": first,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # they share its memory
        }
        self.name, self.environment = spec["contender"], spec.get("environment", {})
        start = time.perf_counter()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.contenders", json.dumps(spec)],
            cwd=ROOT,
            env={**os.environ, **own, **self.environment},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.facts = self._answer()
        self.launch_seconds = time.perf_counter() - start
        if "absent" in self.facts:
            self.close()
            raise Absent(self.facts["absent"])

    def ask(self, steps: int) -> dict[str, Any]:
        """After so many steps: `seconds` of one, on average, `peak_bytes` of memory."""
        assert self._process.stdin
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(f"{steps}\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise Absent(f"ended with exit code {self._process.wait()}")

    def close(self) -> None:
        """Ends the process."""
        self._process.communicate()


def serve(
    step: Callable[[], Any],
    finish: Callable[[], Any],
    facts: dict[str, Any],
    peak_bytes: Callable[[], int] | None = None,
) -> None:
    """What a worker does: it gets warm, then makes the steps that it is asked for.

    Args:
      step: starts a step, or as many as `facts` say with `steps_per_call`.
      finish: waits for all that were started.
      facts: to be told, with the seconds of the first step.
      peak_bytes: of memory; None = of the process.
    """
    per_call = facts.setdefault("steps_per_call", 1)

    def run(calls: int) -> float:
        start = time.perf_counter()
        for _ in range(calls):
            step()
        finish()
        return (time.perf_counter() - start) / (calls * per_call)

    print(json.dumps({**facts, "first_seconds": run(1) * per_call}), flush=True)
    for line in sys.stdin:
        run(1)  # the machine may have taken memory and caches back in the meantime
        seconds = run(math.ceil(int(line) / per_call))
        peak = peak_bytes() if peak_bytes else _resident_peak()
        print(json.dumps({"seconds": seconds, "peak_bytes": peak}), flush=True)


def _resident_peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux says KiB


def compare(
    specs: Sequence[dict[str, Any]], rounds: int, steps: int
) -> tuple[dict[str, Result], list[str]]:
    """The step times of all contenders, in turns.

    Args:
      specs: of the workers, what contenders.py takes; the names must differ.
      rounds: turns of each.
      steps: of a turn.

    Returns:
      {name: its facts with `seconds` (the median), `all_seconds`, `peak_bytes` and
      `launch_seconds`}, and a line for each that is absent.
    """
    workers, absent = [], []
    for spec in specs:
        say(f"{spec['model']}: {spec['contender']} compiles")
        try:
            worker = Worker(spec)
        except Absent as error:
            absent.append(f"{spec['contender']}: {error}")
            continue
        workers.append(worker)
    answers: dict[str, list[dict[str, Any]]] = {worker.name: [] for worker in workers}
    for turn in range(rounds + 1 if rounds else 0):
        for worker in list(workers):
            say(f"{specs[0]['model']}: turn {turn} of {rounds}, {worker.name}")
            try:
                answer = worker.ask(steps)
            except Absent as error:
                absent.append(f"{worker.name}: {error}")
                workers.remove(worker)
                continue
            if turn:
                answers[worker.name].append(answer)
    results = {}
    for worker in workers:
        worker.close()
        own = answers[worker.name]
        times = [answer["seconds"] for answer in own]
        results[worker.name] = {
            **worker.facts,
            "environment": worker.environment,
            "batch_size": specs[0]["batch_size"],
            "launch_seconds": worker.launch_seconds,
            "seconds": statistics.median(times) if times else None,
            "all_seconds": times,
            "peak_bytes": max((answer["peak_bytes"] for answer in own), default=0),
        }
    return results, absent


def say(text: str) -> None:
    """A line on stderr, over the one before in a terminal."""
    terminal = sys.stderr.isatty()
    end = "" if terminal else "\n"
    print(f"\r\033[K{text}" if terminal else text, end=end, file=sys.stderr, flush=True)


def make_parser(name: str, doc: str | None, contenders: Iterable[str]) -> ArgumentParser:
    """The flags that the benchmarks have in common."""
    parser = ArgumentParser(prog=f"python -m benchmarks.{name}", description=doc)
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["resnet50"])
    parser.add_argument("--batch_size", type=int, nargs="+", metavar="N", default=[32])
    parser.add_argument("--image_size", type=int, metavar="N", default=224)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--contenders",
        nargs="+",
        metavar="NAME",
        default=list(contenders),
        help=f"of: {', '.join(contenders)} (default: all that can be had)",
    )
    parser.add_argument("--rounds", type=int, metavar="N", default=5, help="turns of each")
    parser.add_argument("--steps", type=int, metavar="N", default=1, help="of a turn")
    parser.add_argument(
        "--virtual_batch_size",
        type=int,
        metavar="N",
        default=0,
        help="examples that share resjax's batch-norm statistics (default: all)",
    )
    parser.add_argument(
        "--flax_example",
        metavar="DIR",
        help="folder examples/imagenet of a checkout of github.com/google/flax",
    )
    parser.add_argument(
        "--keep_memory",
        nargs="*",
        metavar="NAME",
        help="start these contenders (alone: all) with the GLIBC_TUNABLES of the README",
    )
    parser.add_argument(
        "--json", metavar="FILE", type=Path, help="writes all numbers there"
    )
    return parser


def check_flags(flags: argparse.Namespace, contenders: Iterable[str]) -> None:
    """Raises `UsageError` for what the parser has not seen."""
    for name in flags.contenders:
        if name not in contenders:
            allowed = ", ".join(contenders)
            raise UsageError(f"--contenders: {name!r} is not one of {allowed}")
    for model in flags.models:
        if model not in list_models():
            raise unknown_name("--models", model, list_models())
    _check_numbers(flags)
    for name in flags.keep_memory or ():
        if name not in flags.contenders:
            raise UsageError(f"--keep_memory: {name!r} is not one of the contenders")
    if len(set(flags.contenders)) < len(flags.contenders):
        raise UsageError("--contenders: a name is there twice")
    if flags.json and not flags.json.resolve().parent.is_dir():
        raise UsageError(f"--json: there is no folder {flags.json.parent}")


def _check_numbers(flags: argparse.Namespace) -> None:
    for name in ("image_size", "rounds", "steps"):
        if getattr(flags, name) < 1:
            raise UsageError(f"--{name}: {getattr(flags, name)} is not 1 or more")
    if min(flags.batch_size) < 1:
        raise UsageError(f"--batch_size: {min(flags.batch_size)} is not 1 or more")
    group = flags.virtual_batch_size
    for size in flags.batch_size:
        if group < 0 or (group and size % group):
            raise UsageError(f"--virtual_batch_size: {group} does not divide {size} images")


def make_spec(
    task: str, contender: str, model: str, batch_size: int, flags: argparse.Namespace
) -> dict[str, Any]:
    """What a worker is given."""
    example = flags.flax_example and str(Path(flags.flax_example).expanduser().resolve())
    return {
        "task": task,
        "contender": contender,
        "model": model,
        "batch_size": batch_size,
        "image_size": flags.image_size,
        "dtype": flags.dtype,
        "virtual_batch_size": flags.virtual_batch_size,
        "flax_example": example,
    }


def machine(results: dict[str, Result]) -> str:
    """The device, the processor and the versions, in words."""
    facts = next(iter(results.values()), {})
    words = [str(facts.get("device", "no device"))]
    if facts.get("platform", "cpu") == "cpu":
        words = [f"{_processor()}, {len(os.sched_getaffinity(0))} cores"]
    for name in ("jax", "torch"):
        found = {facts[name] for facts in results.values() if name in facts}
        words += [f"{name} {version}" for version in found]
    return ", ".join(words)


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    wide = " with AVX-512" if any(" avx512f" in line for line in lines) else ""
    return (names[0] if names else platform.processor()) + wide


def format_times(title: str, results: dict[str, Result], absent: Sequence[str]) -> str:
    """A row for each contender, with ratios to the first and to the machine's floor."""
    lines = [f"{title} ({machine(results)})"]
    floor = next((facts["floor"] for facts in results.values() if "floor" in facts), None)
    lines.append(
        f"{'':<26}{'first step s':>12}{'step s':>10}{'images/s':>10}{'ratio':>8}"
        f"{'floor':>8}"
    )
    first = next(iter(results.values()))["seconds"] if results else math.nan
    for name, facts in results.items():
        seconds, images = facts["seconds"], facts["batch_size"]
        share = f"{100 * floor['seconds'] / seconds:6.0f} %" if floor else ""
        name += " *" if "GLIBC_TUNABLES" in facts["environment"] else ""
        lines.append(
            f"{name:<26}{facts['first_seconds']:12.1f}{seconds:10.4f}"
            f"{images / seconds:10.1f}{seconds / first:8.2f}{share:>8}"
        )
    lines += [f"{line} (skipped)" for line in absent]
    lines.append("ratio: times as long as the first; * keeps its memory (GLIBC_TUNABLES)")
    if floor:
        lines.append(
            f"floor: {floor['seconds']:.4f} s, all {floor['gflop']:.0f} GFLOP at "
            f"{floor['gflops']:.0f} GFLOP/s ({floor['product_seconds']:.4f} s), the rate "
            f"of a large matrix product here, or all {floor['gigabytes']:.1f} GB that the "
            f"convolutions read and write at {floor['gigabytes_a_second']:.0f} GB/s "
            f"({floor['copy_seconds']:.4f} s), that of a copy"
        )
    return "\n".join(lines)


def write_json(path: Path | None, tables: dict[str, Any]) -> None:
    """All numbers of a benchmark, if a file is asked for."""
    if path:
        path.write_text(json.dumps(tables, indent=1) + "\n")


def compare_each(
    task: str,
    flags: argparse.Namespace,
    environment: dict[str, str] | None = None,
    more: dict[str, Any] | None = None,
) -> Iterator[tuple[str, dict[str, Result], list[str]]]:
    """Of each model and batch size that flags name a title and what `compare` returns."""
    for model in flags.models:
        for batch_size in flags.batch_size:
            specs = [
                make_spec(task, name, model, batch_size, flags) | (more or {})
                for name in flags.contenders
            ]
            kept = flags.keep_memory
            for spec in specs:
                spec["environment"] = dict(environment or {})
                if kept is not None and (not kept or spec["contender"] in kept):
                    spec["environment"]["GLIBC_TUNABLES"] = MALLOC
            results, absent = compare(specs, flags.rounds, flags.steps)
            say("")
            size = f"{batch_size} images of {flags.image_size} px, {flags.dtype}"
            yield f"{model}, {task}, {size}", results, absent


def time_steps(
    script: str, doc: str | None, task: str, names: Iterable[str], arguments: list[str]
) -> int:
    """The command of `train_step` and `inference`; returns its exit code."""
    flags = make_parser(script, doc, names).parse_args(arguments)
    check_flags(flags, names)
    tables = {}
    for title, results, absent in compare_each(task, flags, more={"floor": True}):
        print(format_times(title, results, absent), flush=True)
        tables[title] = results
        write_json(flags.json, tables)  # what is measured is not lost with what follows
    return 0
