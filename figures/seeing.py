"""What a trained net sees, on one page: filters, maps, favourite images, and why.

  python -m figures.seeing
  python -m figures.seeing --workdir=runs/resnet50 --data_dir=DIR --out=resnet50.png
  python -m figures.seeing --workdir=runs/resnet50 --pictures=photos

Of the run in a workdir, after `train.py` or `python -m resjax.convert`. Images are those of
the test split, or one's own. Each part of the page is a function of resjax/analysis, whose
docstring has the paper. Half a minute for the digits on two cores; any net takes as long as
some 300 of its training steps at 10 images would, and less with fewer --steps.
"""

import dataclasses
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

import figures
import resjax
from resjax import build_data, checkpoint, records
from resjax.analysis import attribution, excitation, seeing
from resjax.compilation_cache import use_compilation_cache
from resjax.config import ArgumentParser, UsageError, run_command
from resjax.data.folder import EXTENSIONS

COLUMNS = 10  # classes, maps and images in a row
_FILTER_COLUMNS, _MOST_FILTERS = 16, 64
_TOP_CHANNELS = 5
_CELL = 1.15  # inches
_RED, _BLUE = np.array([1.0, 0.2, 0.0]), np.array([0.1, 0.4, 1.0])


@dataclasses.dataclass(frozen=True)
class Page:
    """What is drawn. K classes (up to 10), of which an image each; pictures are in 0..1.

    Attributes:
      title: of the page.
      filters: [D, k, k, 3].
      maps: of the first picture, {stage: (channels [M], their maps [M, h, w])}.
      tops: of some channels, (what it is, its pictures [n, S, S, 3], rows and columns of
        what it sees there [n, 2]).
      pictures: [K, S, S, 3].
      captions: of each.
      overlays: {name: (maps [K, S, S], whether they have a sign)}.
      exciting: of up to 10 classes, [L, S, S, 3].
      exciting_captions: of each.
    """

    title: str
    filters: np.ndarray
    maps: dict[str, tuple[np.ndarray, np.ndarray]]
    tops: list[tuple[str, np.ndarray, np.ndarray]]
    pictures: np.ndarray
    captions: list[str]
    overlays: dict[str, tuple[np.ndarray, bool]]
    exciting: np.ndarray
    exciting_captions: list[str]


def examine(run: Any, images: np.ndarray, labels: np.ndarray | None, steps: int) -> Page:
    """Everything on the page.

    Args:
      run: from `resjax.restore`.
      images: [N, S, S, 3] float, normalised.
      labels: [N] int; None = not known.
      steps: of gradient ascent.
    """
    model, variables = run.model, run.variables
    described = build_data.describe_preprocess(run.config)
    mean, std = np.array(described["mean"]), np.array(described["std"])
    probabilities = run.predict(images)
    predicted = probabilities.argmax(axis=1)
    # One image of each class, or the first, as far as there is room.
    firsts = np.arange(len(images))
    if labels is not None:
        _, firsts = np.unique(labels, return_index=True)
    firsts = firsts[:COLUMNS]
    chosen = images[firsts]
    # The classes that come first in one of the images, or near it.
    best = probabilities[firsts].max(axis=0)
    units = np.sort(np.argsort(-best, kind="stable")[:COLUMNS])
    captions = []
    for i in firsts:
        told = f"seen as {_named(run, predicted[i], probabilities[i].max())}"
        captions.append(told if labels is None else f"{_short(run, labels[i])}\n{told}")
    maps = {}
    for stage in range(1, len(model.stage_sizes) + 1):
        name = f"stage{stage}"
        maps[name] = _most_varied(seeing.feature_maps(model, variables, chosen[:1], name))
    key = jax.random.key(0)
    excited = excitation.exciting_images(
        model,
        variables,
        units,
        key,
        image_size=described["image_size"],
        steps=steps,
        bounds=((0 - mean) / std, (1 - mean) / std),
        grey=bool((np.ptp(excitation.to_pixels(chosen, mean, std), axis=-1) < 1e-3).all()),
    )
    sure = run.predict(excited.images)[np.arange(len(units)), units]
    return Page(
        title=_title(run),
        filters=seeing.first_layer_filters(variables)[:_MOST_FILTERS],
        maps=maps,
        tops=_tops(run, images, units[:_TOP_CHANNELS], mean, std),
        pictures=excitation.to_pixels(chosen, mean, std),
        captions=captions,
        overlays=_overlays(run, chosen, probabilities[firsts], key),
        exciting=excitation.to_pixels(excited.images, mean, std),
        exciting_captions=[
            _named(run, unit, each) for unit, each in zip(units, sure, strict=True)
        ],
    )


def _overlays(
    run: Any, images: np.ndarray, probabilities: np.ndarray, key: jax.Array
) -> dict[str, tuple[np.ndarray, bool]]:
    """Of the class predicted for each image."""
    net = run.model, run.variables, images
    ordered = probabilities.argsort(axis=1)
    first, second = ordered[:, -1], ordered[:, -2:][:, 0]
    one, other = (attribution.class_activation_map(*net, each) for each in (first, second))
    size = images.shape[1:3]
    overlays = {
        "class activation": (attribution.upsample(one, *size), True),
        "less that of\nthe next class": (attribution.upsample(one - other, *size), True),
        "saliency": (attribution.saliency(*net, first), False),
        "SmoothGrad": (attribution.smooth_grad(*net, first, key), False),
    }
    return {name: (np.asarray(maps), sign) for name, (maps, sign) in overlays.items()}


def _short(run: Any, label: int) -> str:
    """A class's name, as long as there is room for."""
    name = run.class_names[label]
    return name if len(name) <= 12 else f"{name[:11]}…"


def _named(run: Any, label: int, probability: float) -> str:
    return f"{_short(run, label)}\n{100 * probability:.1f} %"


def _title(run: Any) -> str:
    config, top1 = run.config, (run.evaluation or {}).get("top1")
    told = "" if top1 is None else f", {top1:.2f} % top-1 on its test split"
    return f"What {config.model} sees: {config.data.name}, step {run.step:,}{told}"


def _most_varied(maps: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """The channels that vary most over the one image, and their maps."""
    by_channel = np.moveaxis(np.asarray(maps[0], np.float32), -1, 0)  # [C, h, w]
    order = np.argsort(-by_channel.std(axis=(1, 2)), kind="stable")[: COLUMNS - 1]
    return order, by_channel[order]


def _tops(
    run: Any, images: np.ndarray, classes: np.ndarray, mean: np.ndarray, std: np.ndarray
) -> list[tuple[str, np.ndarray, np.ndarray]]:
    """Of the last stage, the channel that speaks most for each class."""
    layer = f"stage{len(run.model.stage_sizes)}"
    top = seeing.top_images(run.model, run.variables, [images], layer, n=COLUMNS)
    weights = np.asarray(run.variables["params"]["head"]["kernel"])  # [D, K]
    found = []
    for label in classes:
        channel = weights[:, label].argmax()
        pictures = excitation.to_pixels(images[top.indices[channel]], mean, std)
        name = f"channel {channel}\nfor {_short(run, label)}"
        found.append((name, pictures, top.positions[channel]))
    return found


def draw(page: Page) -> Figure:
    """The page."""
    filter_rows = -(-len(page.filters) // _FILTER_COLUMNS)
    rows = [
        filter_rows * COLUMNS / _FILTER_COLUMNS,
        len(page.maps),
        len(page.tops),
        1 + len(page.overlays),
        1,
    ]
    titles = (0.35, 0.5, 0.35, 0.75, 0.65)  # and captions
    heights = [_CELL * count + more for count, more in zip(rows, titles, strict=True)]
    figure = Figure(figsize=(COLUMNS * _CELL + 0.9, sum(heights) + 0.4))
    figure.set_layout_engine("constrained", h_pad=0.02, w_pad=0.02, hspace=0, wspace=0)
    figure.suptitle(page.title, fontsize=14)
    parts: Any = figure.subfigures(len(rows), 1, height_ratios=heights, hspace=0.02)
    _draw_filters(parts[0], page.filters, filter_rows)
    _draw_maps(parts[1], page)
    _draw_tops(parts[2], page.tops)
    _draw_overlays(parts[3], page)
    grid = _grid(
        parts[4],
        1,
        COLUMNS,
        "Images that gradient ascent made for a class, and its probability",
    )
    for axes, picture, caption in zip(
        grid[0], page.exciting, page.exciting_captions, strict=False
    ):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=7, pad=3)
    return figure


def _grid(part: SubFigure, rows: int, columns: int, title: str) -> Any:
    """Cells [rows, columns] without ticks or frames."""
    part.suptitle(title, fontsize=11, x=0.01, ha="left")
    grid = part.subplots(rows, columns, squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return grid


def _name_row(axes: Axes, name: str) -> None:
    axes.set_ylabel(name, fontsize=8, rotation=0, ha="right", va="center")


def _draw_filters(part: SubFigure, filters: np.ndarray, rows: int) -> None:
    title = "Filters of the first layer, grey = 0, each in its own scale"
    grid = _grid(part, rows, _FILTER_COLUMNS, title)
    for axes, image in zip(grid.flat, filters, strict=False):
        axes.imshow(image)


def _draw_maps(part: SubFigure, page: Page) -> None:
    title = (
        "Feature maps of the first image: channels that vary most, each in its own scale"
    )
    grid = _grid(part, len(page.maps), COLUMNS, title)
    for row, (name, (channels, maps)) in zip(grid, page.maps.items(), strict=True):
        row[0].imshow(page.pictures[0])
        height, width = maps.shape[1:]
        _name_row(row[0], f"{name}\n{height} x {width}")
        for axes, channel, each in zip(row[1:], channels, maps, strict=False):
            axes.imshow(each, cmap="viridis")
            axes.set_title(f"channel {channel}", fontsize=7, pad=2)


def _draw_tops(part: SubFigure, tops: Sequence[tuple[str, np.ndarray, np.ndarray]]) -> None:
    title = "What excites channels of the last stage most, and the middle of what they see"
    grid = _grid(part, len(tops), COLUMNS, title)
    for row, (name, pictures, positions) in zip(grid, tops, strict=True):
        _name_row(row[0], name)
        for axes, picture, (y, x) in zip(row, pictures, positions, strict=False):
            axes.imshow(picture)
            axes.plot(x, y, "o", mfc="none", color="tab:red", clip_on=False)


def _draw_overlays(part: SubFigure, page: Page) -> None:
    title = (
        "What speaks for the predicted class (red) and against it (blue); below, which "
        "pixels change its score"
    )
    grid = _grid(part, 1 + len(page.overlays), COLUMNS, title)
    for axes, picture, caption in zip(grid[0], page.pictures, page.captions, strict=False):
        axes.imshow(picture)
        axes.set_title(caption, fontsize=7, pad=3)
    _name_row(grid[0, 0], "image")
    for row, (name, (maps, has_sign)) in zip(grid[1:], page.overlays.items(), strict=True):
        _name_row(row[0], name)
        for axes, picture, each in zip(row, page.pictures, maps, strict=False):
            axes.imshow(picture.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
            axes.imshow(_tinted(each, np.abs(each).max() if has_sign else _cap(each)))


def _tinted(map_: np.ndarray, largest: float) -> np.ndarray:
    """Red where positive and blue where negative, the more opaque the larger, [S, S, 4]."""
    opacity = 0.7 * np.clip(np.abs(map_) / (largest or 1), 0, 1)[..., None]
    return np.concatenate([np.where(map_[..., None] < 0, _BLUE, _RED), opacity], axis=-1)


def _cap(saliency: np.ndarray) -> float:
    """What 1 % of the pixels exceed.

    Source: Smilkov et al. 2017 (arXiv:1706.03825), for capping outliers.
    """
    return float(np.percentile(saliency, 99))


def _read_pictures(folder: str, count: int, preprocess: Any) -> np.ndarray:
    """The first image files of a folder, by name, as the net takes them: [N, S, S, 3]."""
    from PIL import Image, UnidentifiedImageError

    path = Path(folder)
    files = sorted(
        file
        for file in (path.iterdir() if path.is_dir() else [])
        if file.suffix.lower() in EXTENSIONS and not file.name.startswith(".")
    )
    if not files:
        kinds = " ".join(EXTENSIONS)
        raise UsageError(f"--pictures: {folder} is no folder with image files ({kinds})")
    pictures = []
    for file in files[:count]:
        try:
            with Image.open(file) as image:
                pictures.append(preprocess(image))
        except (UnidentifiedImageError, OSError) as error:
            raise UsageError(f"--pictures: {file} is no image: {error}") from error
    return np.concatenate(pictures)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m figures.seeing", description=__doc__)
    add = parser.add_argument
    add("--workdir", metavar="DIR", default="runs/digits", help="(default: %(default)s)")
    add("--step", metavar="N|best", help="of the checkpoint (default: the latest)")
    add("--out", metavar="FILE", help="to write (default: DIR/seeing.png)")
    add("--data_dir", metavar="DIR", help="where the data set is")
    add("--pictures", metavar="DIR", help="image files to look at, in place of a data set")
    add(
        "--images",
        metavar="N",
        type=figures.positive,
        default=1000,
        help="the first N of the test split or of the files, at most (%(default)s)",
    )
    add(
        "--steps",
        metavar="N",
        type=figures.positive,
        default=256,
        help="of gradient ascent (%(default)s)",
    )
    flags = parser.parse_args(arguments)
    use_compilation_cache()
    step = flags.step and (int(flags.step) if flags.step.isdecimal() else flags.step)
    run = resjax.restore(flags.workdir, step)
    if run.config is None:
        raise UsageError(f"--workdir: {flags.workdir} is of another version of resjax")
    path = checkpoint.to_path(flags.workdir)
    workdir = path.parent.parent if checkpoint.is_checkpoint(path) else path
    out = checkpoint.to_path(flags.out or workdir / "seeing.png", "--out")
    if out.suffix != ".png" or not out.parent.is_dir():
        raise UsageError(f"--out: {out} is no .png file in a folder that is there")
    labels = None
    if flags.pictures is None:
        data = dataclasses.replace(run.config.data, dir=flags.data_dir)
        config = (
            dataclasses.replace(run.config, data=data) if flags.data_dir else run.config
        )
        images, labels = map(np.asarray, figures.load_images(config, flags.images))
    else:
        images = _read_pictures(flags.pictures, flags.images, run.preprocess)
    picture = io.BytesIO()
    draw(examine(run, images, labels, flags.steps)).savefig(picture, dpi=100, format="png")
    try:
        out.write_bytes(picture.getvalue())
    except OSError as error:
        raise UsageError(f"--out: {out} cannot be written: {error}") from error
    records.say(f"see {out}")
    return 0


if __name__ == "__main__":
    run_command(main)
