"""What the papers say about residual networks, as functions to look at."""

from resjax.analysis.attribution import (
    class_activation_map,
    saliency,
    smooth_grad,
    upsample,
)
from resjax.analysis.excitation import ExcitingImages, exciting_images, to_pixels
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
from resjax.analysis.seeing import (
    TopImages,
    feature_maps,
    first_layer_filters,
    list_layers,
    top_images,
)
from resjax.analysis.sweeps import Sweep, sweep

__all__ = [
    "ExcitingImages",
    "Features",
    "Propagation",
    "Sweep",
    "TopImages",
    "central_range",
    "class_activation_map",
    "delete_blocks",
    "draw_propagation",
    "draw_subset",
    "exciting_images",
    "extract_features",
    "feature_maps",
    "first_layer_filters",
    "fit_probe",
    "gradient_by_length",
    "gradient_by_path",
    "learning_curve",
    "list_blocks",
    "list_layers",
    "make_top1_error",
    "mean_propagation",
    "path_length_distribution",
    "saliency",
    "signal_propagation",
    "smooth_grad",
    "swap_blocks",
    "swap_random_blocks",
    "sweep",
    "to_pixels",
    "top_images",
    "upsample",
]
