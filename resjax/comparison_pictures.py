"""The pictures of sweeps: training and test error by epoch, or against what varied."""

import io
from typing import Any

from resjax import report
from resjax.comparisons import Comparison
from resjax.report import Row

_LABELS = {
    "batch_size": "minibatch (images)",
    "lr_per_256": "learning rate (for a minibatch of 256)",
}


def draw(rows: list[Row], comparison: Comparison | None = None) -> bytes:
    """A picture of training and test error, the mean over seeds +- one std, as PNG.

    Against `axis` of the comparison, or by epoch.

    Args:
      rows: from `report.summarize`.
      comparison: for title and axis.
    """
    from matplotlib.figure import Figure

    axis = comparison.axis if comparison else None
    axis = axis if axis in rows[0].fields else None
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    if comparison:
        figure.suptitle(comparison.title)
    panels = figure.subplots(1, 2, sharey=True)
    lowest = min(row.spread(name)[0] for row in rows for name in ("error", "train_error"))
    scale, ticks = "symlog", [0, 1, 2, 5, 10, 20, 50, 100]
    if lowest > 20:
        scale, ticks = "linear", [0, 20, 40, 60, 80, 100]
    for panel, split in zip(panels, ("training", "test"), strict=True):
        if axis:
            _draw_by_axis(panel, rows, split, axis)
        else:
            _draw_by_epoch(panel, rows, split)
        panel.set(ylabel=f"top-1 {split} error (%)", yscale=scale, ylim=(0, 105))
        panel.set_yticks(ticks, map(str, ticks))
        panel.tick_params(labelleft=True)
        panel.grid(alpha=0.3)
    names = [name for name in rows[0].fields if name != axis]
    if names:
        panels[1].legend(fontsize=8, title=", ".join(names), title_fontsize=8)
    file = io.BytesIO()
    figure.savefig(file, dpi=120, format="png")
    return file.getvalue()


def _styles(rows: list[Row], axis: str | None) -> list[tuple[str, dict[str, Any]]]:
    """Label and style of each row: dashes by the first field, colours by the others."""
    names = [name for name in rows[0].fields if name != axis]
    firsts = list(dict.fromkeys(row.fields[name] for row in rows for name in names[:1]))
    others = list(dict.fromkeys(tuple(row.fields[n] for n in names[1:]) for row in rows))
    by_colour = len(names) < 2 or len(firsts) > 3
    styles = []
    for row in rows:
        values = [row.fields[name] for name in names]
        first = firsts.index(values[0]) if values else 0
        other = others.index(tuple(values[1:]))
        place, dash = (first, 0) if by_colour else (other, first)
        style = {"color": f"C{place}", "linestyle": ("-", "--", ":")[dash % 3]}
        styles.append((", ".join(map(report.format_value, values)), style))
    return styles


def _draw_by_epoch(panel: Any, rows: list[Row], split: str) -> None:
    for row, (label, style) in zip(rows, _styles(rows, None), strict=True):
        curves = [r.train_curve if split == "training" else r.curve for r in row.results]
        report.draw_band(panel, *report.align(curves), label=label, **style)
    panel.set_xlabel("epoch")


def _draw_by_axis(panel: Any, rows: list[Row], split: str, axis: str) -> None:
    lines: dict[str, list[tuple[float, Row]]] = {}
    styles = {}
    for row, (label, style) in zip(rows, _styles(rows, axis), strict=True):
        lines.setdefault(label, []).append((row.fields[axis], row))
        styles[label] = style
    number = "train_error" if split == "training" else "error"
    for label, points in lines.items():
        values, own = zip(*sorted(points, key=lambda point: point[0]), strict=True)
        means, stds = zip(*(row.spread(number) for row in own), strict=True)
        style = {"capsize": 3, "marker": ".", "label": label, **styles[label]}
        panel.errorbar(values, means, stds, **style)
    panel.set(xlabel=_LABELS.get(axis, axis), xscale="log")
    panel.set_xticks(values, [f"{value:g}" for value in values])
    panel.minorticks_off()
