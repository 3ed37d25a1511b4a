"""What `eval.py --details` writes: a table of the classes and three pictures."""

import csv
import io
import textwrap
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from etils import epath

from resjax import evaluation
from resjax.evaluation import Predictions

_MISTAKES, _COLUMNS = 24, 6
_FEW = 20  # classes whose names and numbers can be read in a matrix
_CELLS = 250  # along a side of a matrix that can be seen
_BLUE, _RED = "#8fb8de", "#c03a3f"


def write_details(
    folder: epath.Path,
    predictions: Predictions,
    class_names: Sequence[str],
    read_image: Callable[[int], np.ndarray],
    title: str,
) -> None:
    """Writes classes.csv, confusion.png, calibration.png and mistakes.png.

    Args:
      folder: made if need be.
      predictions: of the split.
      class_names: of the labels, in order.
      read_image: place in the split -> the image as it was evaluated, [H, W, 3] uint8.
      title: of the pictures.

    Raises:
      OSError: the folder cannot be written.
    """
    labels, count = predictions.labels, predictions.num_classes
    predicted = evaluation.best_classes(predictions)
    per_class = evaluation.per_class(labels, predicted, count)
    matrix = evaluation.confusion_matrix(labels, predicted, count)
    confidences, correct = evaluation.confidences(predictions), predicted == labels
    bins = evaluation.calibration_bins(confidences, correct)
    folder.mkdir(parents=True, exist_ok=True)
    worst = f"{title}\nthe worst mistakes; in red what they were taken for"
    error = 100 * evaluation.calibration_error(confidences, correct)
    files = {
        "classes.csv": format_classes(class_names, *per_class).encode(),
        "confusion.png": draw_confusion(matrix, class_names, title),
        "calibration.png": draw_calibration(*bins, f"{title}\nECE {error:.2f} %"),
        "mistakes.png": draw_mistakes(predictions, class_names, read_image, worst),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)


def format_classes(
    class_names: Sequence[str], examples: np.ndarray, correct: np.ndarray
) -> str:
    """A row for each class: class, examples, correct, top-1 in percent; as CSV.

    Args:
      class_names: in order.
      examples: of each class, [K] int.
      correct: those of them that were predicted, [K] int.
    """
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(["class", "examples", "correct", "top1"])
    for name, count, hits in zip(class_names, examples, correct, strict=True):
        top1 = f"{100 * hits / count:.2f}" if count else ""
        writer.writerow([name, count, hits, top1])
    return file.getvalue()


def draw_confusion(matrix: np.ndarray, class_names: Sequence[str], title: str) -> bytes:
    """The shares of each class that are predicted as each, as PNG; with numbers if few.

    Of very many classes a cell shows the largest share among some, so that it can be seen.

    Args:
      matrix: examples of each class (a row) predicted as each (a column), [K, K] int.
      class_names: in order.
      title: of the picture.
    """
    from matplotlib.colors import PowerNorm

    count = len(matrix)
    is_small, block = count <= _FEW, -(-count // _CELLS)
    shares = 100 * matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    side = max(3.4, 2.2 + 0.5 * count) if is_small else 7.0
    figure = _figure(side + 1.2, side, title)
    panel = figure.subplots()
    image = panel.imshow(
        _largest(shares, block),
        cmap="Blues",
        norm=PowerNorm(0.4, 0, 100),  # rare mistakes are to be seen beside the diagonal
        interpolation="nearest",
        extent=None if is_small else (0, count, count, 0),
    )
    bar = figure.colorbar(image, ax=panel, fraction=0.045, pad=0.02)
    bar.set_label(
        "of the true class (%)" + (f", largest of {block} x {block}" if block > 1 else "")
    )
    bar.set_ticks([0, 1, 5, 10, 25, 50, 100])
    panel.set(xlabel="predicted class", ylabel="true class")
    if is_small:
        names = [_shorten(name, 14) for name in class_names]
        turn = any(len(name) > 4 for name in names)
        style = {"rotation": 45, "ha": "right", "rotation_mode": "anchor"} if turn else {}
        panel.set_xticks(range(count), names, **style, **_TEXT)
        panel.set_yticks(range(count), names, **_TEXT)
        for (row, column), number in np.ndenumerate(matrix):
            if number:
                colour = "white" if shares[row, column] > 40 else "black"
                style = {"ha": "center", "va": "center", "fontsize": 9, "color": colour}
                panel.text(column, row, str(number), **style)
    return _png(figure, 150)


def _largest(matrix: np.ndarray, block: int) -> np.ndarray:
    """The largest number in each square of so many rows and columns."""
    padded = np.pad(matrix, (0, -len(matrix) % block))
    side = len(padded) // block
    return padded.reshape(side, block, side, block).max(axis=(1, 3))


def draw_calibration(
    counts: np.ndarray, accuracy: np.ndarray, confidence: np.ndarray, title: str
) -> bytes:
    """A reliability diagram above the histogram of confidences, as PNG.

    Args:
      counts: examples of each bin, [M] int.
      accuracy: of each bin, from 0 to 1, [M].
      confidence: its mean in each bin, [M].
      title: of the picture.

    Source: Guo et al. 2017 (arXiv:1706.04599), figure 1.
    """
    width, kept = 1 / len(counts), counts > 0
    left = np.arange(len(counts)) * width
    figure = _figure(4.8, 5.6, title)
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    style = {"width": width, "align": "edge", "edgecolor": "white"}
    upper.bar(left[kept], accuracy[kept], color=_BLUE, label="accuracy", **style)
    gaps = {"facecolor": "none", "edgecolor": _RED, "hatch": "////", "linewidth": 0.8}
    upper.bar(
        left[kept],
        (confidence - accuracy)[kept],
        width,
        bottom=accuracy[kept],
        align="edge",
        label="gap to the confidence",
        **gaps,
    )
    upper.plot([0, 1], [0, 1], color="black", linestyle="--", linewidth=1)
    upper.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    lower.bar(left, 100 * counts / counts.sum(), color=_BLUE, **style)
    lower.set(xlabel="confidence", ylabel="examples (%)", ylim=(0, None))
    for panel in (upper, lower):
        panel.grid(alpha=0.3)
        panel.set_axisbelow(True)
    return _png(figure, 150)


def draw_mistakes(
    predictions: Predictions,
    class_names: Sequence[str],
    read_image: Callable[[int], np.ndarray],
    title: str,
) -> bytes:
    """The worst mistakes: what each was taken for, and what it is; as PNG.

    Args:
      predictions: of the split.
      class_names: of the labels, in order.
      read_image: place in the split -> [H, W, 3] uint8.
      title: of the picture.
    """
    rows = evaluation.worst_mistakes(predictions, _MISTAKES)
    predicted = evaluation.best_classes(predictions)
    columns = min(max(len(rows), 3), _COLUMNS)
    num_rows = max(1, -(-len(rows) // columns))
    figure = _figure(1.7 * columns, 2.3 * num_rows + 0.4, title)
    if not len(rows):
        figure.text(0.5, 0.45, "no mistakes", ha="center", fontsize=14, color="0.5")
    panels = figure.subplots(num_rows, columns, squeeze=False).ravel()
    for panel in panels:
        panel.axis("off")
    for panel, row in zip(panels, rows, strict=False):
        log_probs, style = predictions.log_probs[row], {"fontsize": 8, **_TEXT}
        image = _squared(read_image(int(predictions.indices[row])))
        smooth = "nearest" if len(image) < 64 else "antialiased"
        panel.imshow(image, interpolation=smooth)
        taken = _describe(class_names, predicted[row], log_probs)
        panel.set_title(taken, color=_RED, pad=3, **style)
        own = _describe(class_names, predictions.labels[row], log_probs)
        place = {"transform": panel.transAxes, "ha": "center", "va": "top"}
        panel.text(0.5, -0.03, f"is {own}", **place, **style)
    return _png(figure, 130)


def _squared(image: np.ndarray) -> np.ndarray:
    """The image in the middle of a white square."""
    side = max(image.shape[:2])
    square = np.full((side, side, 3), 255, np.uint8)
    top, left = ((side - n) // 2 for n in image.shape[:2])
    square[top : top + image.shape[0], left : left + image.shape[1]] = image
    return square


_TEXT: dict[str, Any] = {"parse_math": False}  # a class may be called "$"


def _describe(class_names: Sequence[str], label: int, log_probs: np.ndarray) -> str:
    """A class and its probability, on at most two lines."""
    if label < 0:
        return "no number"
    percent = f"({100 * np.exp(log_probs[label]):.3g} %)"
    name = _shorten(class_names[label], 24)
    return name + (" " if len(name + percent) < 22 else "\n") + percent


def _shorten(name: str, length: int) -> str:
    return textwrap.shorten(name, length, placeholder="…") if " " in name else name[:length]


def _figure(width: float, height: float, title: str) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title, fontsize=10, **_TEXT)
    return figure


def _png(figure: Any, dpi: int) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():  # a name in letters that the font does not have
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(file, dpi=dpi, format="png")
    return file.getvalue()
