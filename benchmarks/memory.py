"""The peak of memory in a training step, with and without remat, and that of peers.

  python -m benchmarks.memory --models resnet50 --batch_size 32
  python -m benchmarks.memory --dtype=bfloat16 --batch_size 256 --json=memory.json

On a GPU the peak of what is in use there, on a CPU that of the process, code and compiler
included. A turn of two steps is enough; the times are what remat costs.
"""

from benchmarks import contenders, turns
from resjax.config import run_command

_first, *_others = contenders.TRAIN
NAMES = (_first, *contenders.REMAT, *_others)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = turns.make_parser("memory", __doc__, NAMES)
    parser.set_defaults(rounds=2)
    flags = parser.parse_args(arguments)
    turns.check_flags(flags, NAMES)
    tables = {}
    for title, results, absent in turns.compare_each("train", flags):
        print(f"{title} ({turns.machine(results)})")
        print(f"{'':<26}{'peak GiB':>12}{'ratio':>8}{'step s':>10}{'ratio':>8}")
        first = next(iter(results.values()), {})
        for name, facts in results.items():
            peak, seconds = facts["peak_bytes"], facts["seconds"]
            print(
                f"{name:<26}{peak / 2**30:12.2f}{peak / first['peak_bytes']:8.2f}"
                f"{seconds:10.3f}{seconds / first['seconds']:8.2f}"
            )
        print("\n".join(f"{line} (skipped)" for line in absent))
        tables[title] = results
        turns.write_json(flags.json, tables)
    return 0


if __name__ == "__main__":
    run_command(main)
