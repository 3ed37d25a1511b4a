"""Weights both ways between resjax and PyTorch: names, layouts, files.

Names are torchvision's and timm's ("layer1.0.conv1.weight") for post-activation nets, and
those of timm's `resnetv2_*` ("stages.0.blocks.0.conv1.weight") for pre-activation ones.
"""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from resjax.config import UsageError
from resjax.models.resnet import ResNet, create_model

_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
_COUNTER = "num_batches_tracked"  # PyTorch's, of no use here
_MOST = 5  # differences of each sign that an error lists


def from_torch(
    weights: str | os.PathLike | Mapping[str, Any],
    model: str,
    num_classes: int | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Variables of a model from the weights of the same one in torchvision or timm.

    Args:
      weights: a .safetensors or .pth file, or {PyTorch's name: array or tensor}.
      model: a name of `list_models()`.
      num_classes: of the classifier; None = as many as the weights have, 0 = leave the
        classifier out, to put another one on.
      **options: of `create_model`, e.g. shortcut.

    Returns:
      {"params", "batch_stats"}, float32.

    Raises:
      UsageError: a file that cannot be read, or weights that do not fit: what is missing
        (-) and what is too much (+), by name and shape.

    Example:
      variables = resjax.from_torch("model.safetensors", "resnet50")
      logits = resjax.create_model("resnet50").apply(variables, images)
    """
    arrays = weights if isinstance(weights, Mapping) else read_weights(weights)
    arrays = {
        name: _to_numpy(name, array)
        for name, array in arrays.items()
        if not name.endswith(_COUNTER)
    }
    if num_classes is None:
        heads = [array for name, array in arrays.items() if name.endswith("fc.bias")]
        num_classes = len(heads[0]) if heads else 0
    if num_classes == 0:
        heads = [name for name in arrays if name.removeprefix("head.").startswith("fc.")]
        arrays = {name: array for name, array in arrays.items() if name not in heads}
    net = create_model(model, num_classes=num_classes, **options)
    shapes = _shapes(net)
    names = {path: torch_name(path, net) for path in shapes}
    wanted = {names[path]: _torch_shape(names[path], s) for path, s in shapes.items()}
    _check_fit(model, wanted, {name: array.shape for name, array in arrays.items()})
    flat = {
        path: jnp.asarray(_from_torch_layout(arrays[names[path]], len(shape)))
        for path, shape in shapes.items()
    }
    return traverse_util.unflatten_dict(flat, sep="/")


def to_torch(
    variables: Mapping[str, Any], model: str, **options: Any
) -> dict[str, np.ndarray]:
    """The state_dict of the same model in torchvision or timm, the inverse of `from_torch`.

    Args:
      variables: {"params", "batch_stats"}.
      model: a name of `list_models()`.
      **options: of `create_model`, e.g. shortcut.

    Returns:
      {PyTorch's name: array}; `torch.from_numpy` of each is a state_dict. PyTorch's
      counters of batches are there, at 0.

    Raises:
      UsageError: variables of another model.
    """
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    num_classes = flat["params/head/bias"].size if "params/head/bias" in flat else 0
    net = create_model(model, num_classes=num_classes, **options)
    _check_fit(model, _shapes(net), {path: leaf.shape for path, leaf in flat.items()})
    state = {}
    for path, leaf in flat.items():
        name = torch_name(path, net)
        state[name] = _to_torch_layout(name, np.asarray(leaf))
        if name.endswith("running_var"):
            state[name.replace("running_var", _COUNTER)] = np.zeros((), np.int64)
    return state


def torch_name(path: str, model: ResNet) -> str:
    """PyTorch's name of "params/stage1/block1/norm_out/scale" and its like.

    Raises:
      UsageError: a net whose architecture PyTorch's libraries do not have.
    """
    _, *modules, leaf = path.split("/")
    last = len(model.branch(64, 1))  # the number of the last layer of a branch
    if model.preactivation and last == 2:
        raise UsageError(
            "timm's resnetv2 of basic blocks is another net: the shortcut of its first "
            "block takes the input before the activation, not after it (He et al. 2016)"
        )
    if len(modules) == 3:
        stage, block = (int(re.sub(r"\D", "", name)) for name in modules[:2])
        layer = modules[2].replace("_out", str(last))
        if model.preactivation:
            layer = layer.replace("shortcut_conv", "downsample.conv")
            module = f"stages.{stage - 1}.blocks.{block - 1}.{layer}"
        else:
            names = {"shortcut_conv": "downsample.0", "shortcut_norm": "downsample.1"}
            layer = names.get(layer, layer.replace("norm", "bn"))
            module = f"layer{stage}.{block - 1}.{layer}"
    elif model.preactivation:
        module = {"head": "head.fc"}.get(modules[0], ".".join(modules))
    else:
        names = {"stem/conv": "conv1", "stem/norm": "bn1", "head": "fc"}
        module = names["/".join(modules)]
    return f"{module}.{_LEAVES[leaf]}"


def _shapes(model: ResNet) -> dict[str, tuple[int, ...]]:
    """{"params/stem/conv/kernel": (7, 7, 3, 64), ...} of all variables."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    flat = traverse_util.flatten_dict(variables, sep="/")
    return {path: leaf.shape for path, leaf in flat.items()}


def _to_torch_layout(name: str, array: np.ndarray) -> np.ndarray:
    """Kernels HWIO -> OIHW, the classifier [D, K] -> [K, D], or [K, D, 1, 1] in timm."""
    if array.ndim == 4:
        array = array.transpose(3, 2, 0, 1)
    elif array.ndim == 2:
        array = array.T[..., None, None] if name.startswith("head.") else array.T
    return np.array(array, order="C")


def _torch_shape(name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return _to_torch_layout(name, np.broadcast_to(np.float32(0), shape)).shape


def _from_torch_layout(array: np.ndarray, ndim: int) -> np.ndarray:
    """The inverse, for an array that has `ndim` axes here."""
    if ndim == 2:
        return array.reshape(array.shape[:2]).T
    return array.transpose(2, 3, 1, 0) if ndim == 4 else array


def _check_fit(model: str, wanted: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Raises `UsageError` unless the names and shapes are the same."""
    lines = []
    for sign, mine, other in (("-", wanted, found), ("+", found, wanted)):
        names = [name for name in sorted(mine) if mine[name] != other.get(name)]
        lines += [f"{sign} {name} {list(mine[name])}" for name in names[:_MOST]]
        if len(names) > _MOST:
            lines.append(f"{sign} {len(names) - _MOST} more")
    if lines:
        raise UsageError(
            f"the weights do not fit {model} (- is missing, + is too much): "
            + "; ".join(lines)
        )


def _to_numpy(name: str, array: Any) -> np.ndarray:
    """A float32 copy of an array, or of a tensor of PyTorch wherever it is."""
    try:
        if hasattr(array, "detach"):
            array = array.detach().cpu().float()
        return np.asarray(array, np.float32)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UsageError(
            f"weights: {name!r} is a {type(array).__name__}, not an array; a checkpoint "
            "often keeps its weights under 'state_dict' or 'model': give those"
        ) from error


def read_weights(path: str | os.PathLike) -> dict[str, Any]:
    """{name: array} of a .safetensors file, or of a .pth file where PyTorch is installed.

    Raises:
      UsageError: no such file, or one that is damaged or of another kind.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"weights: there is no file {path}")
    if path.suffix not in (".safetensors", ".pth"):
        raise UsageError(f"weights: {path} is neither .safetensors nor .pth")
    try:
        return _load_safetensors(path) if path.suffix == ".safetensors" else _load_pth(path)
    except UsageError:
        raise
    except Exception as error:  # of many kinds: cut off, pickled code
        text = " ".join(str(error).split())[:200]
        raise UsageError(f"weights: {path} cannot be read: {text}") from error


def _load_safetensors(path: Path) -> dict[str, Any]:
    from safetensors.flax import load_file

    return load_file(path)


def _load_pth(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise UsageError(
            f"weights: PyTorch reads {path}, and it is not installed; with it, "
            "safetensors.torch.save_file makes a file that needs no PyTorch"
        ) from error
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        raise UsageError(f"weights: {path} holds a {type(state).__name__}, no weights")
    return dict(state)
