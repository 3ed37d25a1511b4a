"""resjax: the residual-network line of work in JAX and Flax.

>>> import resjax
>>> model = resjax.create_model("resnet50", num_classes=1000)
"""

from resjax.initializers import init
from resjax.models.counting import count_macs, count_params
from resjax.models.fold import fold_batch_norm
from resjax.models.norm import BatchNorm
from resjax.models.resnet import create_model, list_models
from resjax.runs import restore
from resjax.weights import from_torch, to_torch

__all__ = [
    "BatchNorm",
    "count_macs",
    "count_params",
    "create_model",
    "fold_batch_norm",
    "from_torch",
    "init",
    "list_models",
    "restore",
    "to_torch",
]
__version__ = "0.1.0"
