"""Seconds from launch to the end of the first training step, compiled anew and from disk.

  python -m benchmarks.compile_time --models resnet50 cifar_resnet20

Each contender is started twice with one compilation cache of JAX's, empty at first, which
keeps every program, as that of train.py does: the second start finds what the first has
compiled. "PyTorch compiled" has caches of its own, empty at first as well.
"""

import tempfile

from benchmarks import contenders, turns
from resjax.config import run_command

STARTS = ("anew", "from disk")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    names = contenders.TRAIN
    flags = turns.make_parser("compile_time", __doc__, names).parse_args(arguments)
    turns.check_flags(flags, names)
    flags.rounds = 0
    tables: dict[str, dict[str, turns.Result]] = {}
    skipped: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        cache = {
            "JAX_COMPILATION_CACHE_DIR": folder,
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": f"{folder}/inductor",
            "TRITON_CACHE_DIR": f"{folder}/triton",
        }
        for start in STARTS:
            for title, results, absent in turns.compare_each("train", flags, cache):
                tables.setdefault(title, {})[start] = results
                skipped[title] = absent
    for title, starts in tables.items():
        print(f"{title} ({turns.machine(starts[STARTS[0]])})")
        print(f"{'seconds from launch':<26}{'anew':>12}{'from disk':>12}{'ratio':>8}")
        for name in starts[STARTS[0]]:
            anew, disk = (starts[start][name]["launch_seconds"] for start in STARTS)
            print(f"{name:<26}{anew:12.1f}{disk:12.1f}{anew / disk:8.1f}")
        print("\n".join(f"{line} (skipped)" for line in skipped[title]))
    turns.write_json(flags.json, tables)
    return 0


if __name__ == "__main__":
    run_command(main)
