"""What the papers say about residual networks, as functions to look at."""

from resjax.analysis.lesions import (
    delete_blocks,
    list_blocks,
    make_top1_error,
    swap_blocks,
    swap_random_blocks,
)
from resjax.analysis.paths import (
    central_range,
    gradient_by_length,
    gradient_by_path,
    path_length_distribution,
)
from resjax.analysis.probe import (
    Features,
    draw_subset,
    extract_features,
    fit_probe,
    learning_curve,
)
from resjax.analysis.propagation import (
    Propagation,
    draw_propagation,
    mean_propagation,
    signal_propagation,
)
from resjax.analysis.sweeps import Sweep, sweep

__all__ = [
    "Features",
    "Propagation",
    "Sweep",
    "central_range",
    "delete_blocks",
    "draw_propagation",
    "draw_subset",
    "extract_features",
    "fit_probe",
    "gradient_by_length",
    "gradient_by_path",
    "learning_curve",
    "list_blocks",
    "make_top1_error",
    "mean_propagation",
    "path_length_distribution",
    "signal_propagation",
    "swap_blocks",
    "swap_random_blocks",
    "sweep",
]
