"""Nets that start from the features of another, and nets that start at random.

What `figures.transfer` compares: folders of some images of each class, and the runs that
are trained on them, alike in all but where they start.
"""

import dataclasses
import math
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from resjax import checkpoint, records, report, training
from resjax import config as configs
from resjax.analysis import probe
from resjax.config import (
    CheckpointConfig,
    Config,
    NormConfig,
    RunError,
    UsageError,
)
from resjax.data.datasets import get_dataset
from resjax.data.folder import FolderSource, open_folder

PROBE, FINE_TUNED, FROM_SCRATCH = ("probe", "fine-tuned", "from scratch")
RATES = (0.05, 0.2, 0.8, 3.2)  # lr_per_256
POOL = {"old": 140, "new": 50}  # digits of each class that may be trained on
DIGITS = Path(__file__).resolve().parent.parent / "configs" / "digits.py"
_MARGIN = 1  # pixels, see `write_digits`
_TUNING_SEED = 1000  # of the draw that the learning rate is chosen by
Row = dict[str, Any]


# --- the digits as two folders ------------------------------------------------------


def write_digits(root: Path) -> tuple[Path, Path]:
    """Writes two folders of images: the digits 0 to 4, and 5 to 9.

    A folder's evaluation takes the middle 224 of 256 pixels, of these images 8 of 9. So
    they have a margin of background, one pixel to the right and below, and what remains is
    the digit, pixel for pixel.

    Args:
      root: of the two, made if need be.

    Returns:
      The folders, each with train/CLASS and val/CLASS.
    """
    import cv2
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * (255 / 16)).astype(np.uint8)  # 17 grey levels
    pixels = np.pad(pixels, [(0, 0), (0, _MARGIN), (0, _MARGIN)])
    folders = []
    for name, is_new in (("old", False), ("new", True)):
        folder = root / f"{name}_digits"
        shutil.rmtree(folder, ignore_errors=True)
        mine = np.flatnonzero((digits.target >= 5) == is_new)
        drawn = mine[probe.draw_subset(digits.target[mine], POOL[name], seed=0)]
        for i in mine:
            split = "train" if i in drawn else "val"
            # Not by the number alone: so classes are called whose names are not known.
            path = folder / split / f"digit{digits.target[i]}" / f"{i:04}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(cv2.imencode(".png", pixels[i])[1].tobytes())
        folders.append(folder)
    return folders[0], folders[1]


def pretrain_digits(workdir: Path, folder: Path, words: Sequence[str]) -> None:
    """Trains the net of configs/digits.py on a folder of `write_digits`, if it is not.

    But with more weight decay, 0.005 for 0.0001. Of features trained so, probes of 10 of
    the 50 images of each new class told the other 40 apart in 84 % for 79 %.
    """
    config = configs.load_config(DIGITS)
    data = dataclasses.replace(
        config.data, name="folder", dir=str(folder), recipe=get_dataset("digits").recipe
    )
    config = dataclasses.replace(
        config,
        num_classes=5,
        data=data,
        weight_decay=0.005,
        eval_every_epochs=config.num_epochs,
    )
    training.train(configs.override(config, words), workdir)


# --- training on a part of a folder -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
    """What each trained net has, whichever way it starts.

    Attributes:
      updates: of its weights.
      batch_size: examples of each.
      rates: learning rates per 256 examples, of which it takes the best.
    """

    updates: int = 200
    batch_size: int = 32
    rates: tuple[float, ...] = RATES


def write_subset(target: Path, **parts: tuple[FolderSource, np.ndarray]) -> None:
    """Makes a folder of some images of others, without copying where links can be made.

    Args:
      target: the new folder; what was there is gone.
      **parts: for "train" and "val", a source and the indices that are taken.
    """
    shutil.rmtree(target, ignore_errors=True)
    for split, (source, indices) in parts.items():
        root = source.directory.parent
        for index in indices:
            path = Path(source.where(index))
            goal = target / split / path.relative_to(source.directory.name)
            goal.parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(os.path.realpath(root / path), goal)
            except OSError:
                shutil.copyfile(root / path, goal)


def transfer_config(
    base: Config, folder: Path, num_images: int, budget: Budget, **own: Any
) -> Config:
    """The config of a net trained on a folder, with the model and images of `base`.

    Args:
      base: of the run that others start from.
      folder: of the images.
      num_images: of its training split.
      budget: of all nets.
      **own: other fields.
    """
    recipe = base.data.recipe or get_dataset(base.data.name).recipe
    epochs = budget.updates * budget.batch_size / num_images
    return dataclasses.replace(
        base,
        data=dataclasses.replace(base.data, name="folder", dir=str(folder), recipe=recipe),
        norm=NormConfig(kind=base.norm.kind),
        batch_size=budget.batch_size,
        microbatch=0,
        freeze_at=0,
        head_lr_multiplier=1.0,
        schedule="cosine",
        warmup="none",
        weight_decay=1e-4,
        num_epochs=epochs,
        eval_every_epochs=epochs,
        checkpoint=CheckpointConfig(keep=1, best_metric="none"),
        published_error=None,
        **own,
    )


def check_counts(pool: FolderSource, counts: Sequence[int]) -> None:
    """Raises `UsageError` if a class has no image left to choose the learning rate by."""
    least = int(np.bincount(pool.labels).min())
    for count in counts:
        if count >= least:
            raise UsageError(
                f"--train_at: {count} of a class of {least} images in {pool.directory} "
                f"leave none to choose the learning rate by; allowed: 1 to {least - 1}"
            )


def train_curve(
    base: Config,
    origin: Path,
    data_dir: Path,
    counts: Sequence[int],
    seeds: Sequence[int],
    budget: Budget,
    workdir: Path,
    words: Sequence[str] = (),
) -> list[Row]:
    """Test accuracies of nets that start from a run, and of those that start at random.

    What is trained is not trained again.

    Args:
      base: the config of the run.
      origin: its workdir.
      data_dir: of the folder of other classes.
      counts: images of each class that nets are trained on.
      seeds: of the draws, and of the nets.
      budget: of each net.
      workdir: the folder of the workdirs.
      words: `--config.FIELD=VALUE`, of all nets.

    Raises:
      UsageError: see `check_counts`.
      RunError: a net diverged.
    """
    pool, test = (open_folder(str(data_dir), split) for split in ("train", "val"))
    check_counts(pool, counts)
    runs = workdir / f"runs_{_identity(origin, pool, test):08x}"

    def accuracy(method: str, count: int, seed: int, rate: float) -> float:
        drawn = probe.draw_subset(pool.labels, count, seed)
        name = f"{count}_images,seed={seed}"
        folder = workdir / "folders" / name
        rest = np.setdiff1d(np.arange(len(pool)), drawn)
        held_out = (pool, rest) if seed == _TUNING_SEED else (test, np.arange(len(test)))
        write_subset(folder, train=(pool, drawn), val=held_out)
        config = transfer_config(
            base,
            folder,
            len(drawn),
            budget,
            num_classes=len(pool.class_names),
            seed=seed,
            lr_per_256=rate,
            init_from=str(origin) if method == FINE_TUNED else None,
        )
        run = runs / f"{method.replace(' ', '_')},{name},rate={rate:g}"
        training.train(configs.override(config, words), run)
        jax.clear_caches()  # the programs of a hundred nets are more than a process may map
        return 100 - report.read_run(run).error

    def held_out_accuracy(method: str, rate: float) -> float:
        try:
            each = [accuracy(method, count, _TUNING_SEED, rate) for count in counts]
        except RunError as error:  # it diverged
            records.warn(f"{method}, rate {rate:g}: {error}")
            return -math.inf
        return sum(each) / len(each)

    rows = []
    for method in (FINE_TUNED, FROM_SCRATCH):
        found = {rate: held_out_accuracy(method, rate) for rate in budget.rates}
        rate = max(found, key=lambda rate: found[rate])
        for count in counts:
            for seed in seeds:
                top1 = accuracy(method, count, seed, rate)
                rows.append(make_row(method, count, seed, top1, budget.updates, rate))
    return rows


def _identity(origin: Path, *sources: FolderSource) -> int:
    """A number that changes with the weights that nets start from, and with the images."""
    found, _ = checkpoint.read(checkpoint.to_path(origin), items=[])
    places = [
        (os.path.realpath(source.directory), source.where(i))
        for source in sources
        for i in range(len(source))
    ]
    return zlib.crc32(repr((found.record.get("digest"), places)).encode())


def make_row(
    method: str, count: int, seed: int, top1: float, updates: Any = "", rate: Any = ""
) -> Row:
    """A row of the table: the accuracy of one net, in percent."""
    return {
        "method": method,
        "updates": updates,
        "images_per_class": count,
        "seed": seed,
        "lr_per_256": rate,
        "top1": round(top1, 4),
    }
