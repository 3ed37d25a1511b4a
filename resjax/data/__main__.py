"""Prepares, indexes, verifies and describes a data set; writes a smaller one if asked.

python -m resjax.data cifar10 --data_dir=DIR
python -m resjax.data imagenet2012 --sample=10000
python -m resjax.data imagenet2012 --sample=10000 --shrink=512

Exit code 1: some examples are unreadable, or their labels out of range.
"""

import argparse

from resjax import config as configs
from resjax.config import UsageError, unknown_name
from resjax.data import shrink, sources
from resjax.data.datasets import DATASETS, Dataset
from resjax.data.describe import (
    Description,
    cells,
    describe,
    disk_bytes,
    format_table,
    location,
)


def _parse(args: list[str]) -> argparse.Namespace:
    parser = configs.ArgumentParser(prog="python -m resjax.data", description=__doc__)
    add = parser.add_argument
    add("dataset", metavar="DATASET", help=", ".join(DATASETS))
    add("--data_dir", metavar="DIR", help="default: $TFDS_DATA_DIR, ~/tensorflow_datasets")
    add("--splits", default="train,test", metavar="A,B", help="to describe: %(default)s")
    add("--sample", type=int, metavar="N", help="decode N examples of a split, not all")
    add("--shrink", type=int, metavar="SIDE", help="re-encode larger JPEG files")
    add("--to", metavar="DIR", help="for the shrunk data set; default: DATA_DIR-SIDE")
    add("--quality", type=int, default=95, metavar="Q", help="of JPEG: %(default)s")
    flags = parser.parse_args(args)
    if flags.dataset not in DATASETS:
        raise unknown_name("DATASET", flags.dataset, DATASETS)
    flags.splits = flags.splits.split(",")
    for split in flags.splits:
        if split not in DATASETS[flags.dataset].splits:
            raise unknown_name("--splits", split, DATASETS[flags.dataset].splits)
    if flags.sample is not None and flags.sample < 1:
        raise UsageError(f"--sample: {flags.sample} is not greater than 0")
    _check_shrink(flags)
    return flags


def _check_shrink(flags: argparse.Namespace) -> None:
    for name in ("data_dir", "to"):
        if getattr(flags, name) == "":
            raise UsageError(f"--{name}: '' is empty; give a folder")
    if flags.to and flags.shrink is None:
        raise UsageError("--to: it is for --shrink=SIDE")
    for name, allowed in (("shrink", shrink.SIDES), ("quality", shrink.QUALITIES)):
        value = getattr(flags, name)
        if value is not None and value not in allowed:
            raise UsageError(f"--{name}: {value} is not from {allowed[0]} to {allowed[-1]}")
    if flags.shrink:
        flags.to = flags.to or f"{sources.data_root(flags.data_dir)}-{flags.shrink}"
        shrink.check_target(flags.dataset, flags.to)


def _describe(flags: argparse.Namespace, dataset: Dataset) -> list[Description]:
    """Describes the splits on standard output."""
    found = {}
    for split in flags.splits:
        source = sources.open_source(flags.dataset, flags.data_dir, split)
        found[split] = describe(source, dataset.rotates, flags.sample, split)
    print(f"{flags.dataset} in {location(source)}")
    if flags.sample:
        print(f"looked at {flags.sample:,} examples of a split at most, evenly spaced")
    print(format_table({split: cells(told) for split, told in found.items()}))
    for split, told in found.items():
        print(*told.damaged, sep="\n", end="\n" if told.damaged else "")
        if told.num_damaged > len(told.damaged):
            print(f"{split}: {told.num_damaged - len(told.damaged):,} more")
    return list(found.values())


def _shrink(flags: argparse.Namespace, dataset: Dataset) -> None:
    """Writes the shrunk data set and says on standard output what has changed."""
    name, places = flags.dataset, (flags.data_dir, flags.to)
    count = shrink.shrink(name, *places, flags.shrink, flags.quality)
    opened = [
        [sources.open_source(name, place, split) for split in dataset.splits]
        for place in places
    ]
    sizes = [sum(map(disk_bytes, splits)) for splits in opened]
    (before, *_), (after, *_) = opened
    costs = shrink.compare(before, after, dataset.rotates)
    columns = {
        heading: {
            "bytes on disk": f"{size:,}",
            "crops a second, of one core": f"{cost.images_per_second:,.0f}",
            "crops that are enlarged": f"{cost.enlarged_share:.1%}",
        }
        for heading, size, cost in zip(("before", "after"), sizes, costs, strict=True)
    }
    num_examples = sum(map(len, opened[0]))
    print(
        f"\n{name} in {location(after)}: {count:,} of {num_examples:,} images re-encoded, "
        f"shorter side {flags.shrink}, quality {flags.quality}\n{format_table(columns)}\n"
        f"bytes x {sizes[1] / sizes[0]:.2f}, decoding x "
        f"{costs[0].seconds / costs[1].seconds:.2f} as fast; random-resized crops of 224 "
        f"pixels of {costs[0].num_images} training images\n"
        f"train with --config.data.name={name} --config.data.dir={flags.to}"
    )


def main(args: list[str]) -> int:
    """Runs the command; returns its exit code."""
    flags = _parse(args)
    dataset = DATASETS[flags.dataset]
    sources.prepare(flags.dataset, flags.data_dir)
    found = _describe(flags, dataset)
    if flags.shrink:
        _shrink(flags, dataset)
    num_damaged = sum(told.num_damaged for told in found)
    if num_damaged:
        print(
            f"\n{num_damaged:,} damaged examples; a run stops at the first that is not "
            "among config.data.skip_errors=N"
        )
    return 1 if num_damaged else 0


if __name__ == "__main__":
    configs.run_command(main)
