"""An epoch of ResNet-20 on images of CIFAR-10's shape, and the paper's whole schedule.

  python -m benchmarks.cifar_epoch
  python -m benchmarks.cifar_epoch --steps=400 --steps_per_call=16    # on a GPU

Projected from the median of some steps on random images that the device holds: an epoch is
50,000 images, the schedule of He et al. 2015, section 4.2, 64,000 steps of 128; without
augmentation and evaluation. The nets in JAX make `--steps_per_call` updates in one program,
as train.py does with small sets.
"""

from benchmarks import turns
from resjax.config import UsageError, run_command

IMAGES, SCHEDULE = 50_000, 64_000
NAMES = ("resjax", "flax modules", "PyTorch", "PyTorch compiled")


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = turns.make_parser("cifar_epoch", __doc__, NAMES)
    parser.add_argument("--steps_per_call", type=int, metavar="N", default=1)
    parser.set_defaults(models=["cifar_resnet20"], batch_size=[128], image_size=32, steps=5)
    flags = parser.parse_args(arguments)
    turns.check_flags(flags, NAMES)
    if flags.steps_per_call < 1:
        raise UsageError(f"--steps_per_call: {flags.steps_per_call} is not 1 or more")
    own = {"steps_per_call": flags.steps_per_call, "floor": True}
    tables = {}
    for title, results, absent in turns.compare_each("train", flags, more=own):
        print(turns.format_times(title, results, absent))
        print(f"{'':<26}{'epoch s':>12}{'64,000 steps':>16}")
        for name, facts in results.items():
            epoch = facts["seconds"] * IMAGES / facts["batch_size"]
            minutes = facts["seconds"] * SCHEDULE / 60
            print(f"{name:<26}{epoch:12.2f}{minutes:12.1f} min")
        tables[title] = results
        turns.write_json(flags.json, tables)
    return 0


if __name__ == "__main__":
    run_command(main)
