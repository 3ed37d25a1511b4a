"""resjax: the residual-network line of work in JAX and Flax.

>>> import resjax
>>> model = resjax.create_model("resnet50", num_classes=1000)
"""

from resjax.initializers import init
from resjax.models.norm import BatchNorm
from resjax.models.resnet import create_model, list_models
from resjax.runs import restore

__all__ = ["BatchNorm", "create_model", "init", "list_models", "restore"]
__version__ = "0.1.0"
