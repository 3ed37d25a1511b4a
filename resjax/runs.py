"""Runs by their workdir: open a checkpoint on any machine, in a notebook.

The door of the library: `resjax.restore` is here. eval.py calls run_evaluation.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn

from resjax import build, build_data, checkpoint, records
from resjax import config as configs
from resjax.checkpoint import Checkpoint
from resjax.config import Config, UsageError

_CHUNK = 64  # images of one forward pass of `predict`


@dataclasses.dataclass(frozen=True)
class Restored:
    """A trained model, ready to use.

    Attributes:
      model: the linen Module.
      variables: {"params", "batch_stats"}.
      config: of the run; None if another version of resjax wrote it in other terms.
      step: of the checkpoint.
      class_names: of the logits, in order.
      evaluation: the last record of the test split when it was saved, None if none; of the
        averages if they are what was restored.
      versions: of what trained it: jax, flax, the commit of resjax, ...
      preprocess: images of any size, uint8 arrays or PIL -> [B, S, S, 3] float32, as the
        run was evaluated.
      predict: the same, or preprocessed float32 images -> softmax [B, K] float32.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: Config | None
    step: int
    class_names: list[str]
    evaluation: dict[str, Any] | None
    versions: dict[str, str]
    preprocess: Callable[[Any], np.ndarray]
    predict: Callable[[Any], np.ndarray]


def read_checkpoint(
    path: epath.Path, step: int | str | None = None, ema: bool = False
) -> Checkpoint:
    """A checkpoint with the arrays of `find_variables`.

    Says so if newer ones are damaged.

    Args:
      path: a workdir, or a checkpoint in it.
      step: of the checkpoint; None = the latest; "best" = that which evaluated best.
      ema: with the averages of `config.ema_decay` in place of the weights.

    Raises:
      UsageError: no such run or checkpoint, or it is damaged.
    """
    number: Any = _best_step(path) if step == "best" else step
    is_step = isinstance(number, int | np.integer) and not isinstance(number, bool)
    if number is not None and not (is_step and number >= 0):
        raise UsageError(f"step: {step!r} is neither a step nor 'best'")
    item = "optimizer" if ema else "variables"  # to resume needs the averages
    found, damaged = checkpoint.read(path, number, items=[item])
    records.warn_of_damage(damaged, found.step)
    return found


def _best_step(workdir: epath.Path) -> int:
    """The checkpoint of a workdir that evaluated best, by its `metrics.jsonl`."""
    checkpoint.check_is_run(workdir, "best")
    steps = checkpoint.list_steps(workdir)
    newest, _ = checkpoint.read_latest(workdir, items=[])
    options = newest.record["config"]["checkpoint"] if newest else {}
    metric = options.get("best_metric", "top1")
    rows = records.read_evaluations(workdir)
    best = records.best_step(rows, "top1" if metric == "none" else metric, steps)
    if best is None:
        raise UsageError(
            f"step: 'best' of {workdir} is not known: its metrics.jsonl has no evaluation "
            f"of a step that has a checkpoint; there are {steps}"
        )
    return best


def find_variables(found: Checkpoint, model: nn.Module) -> dict[str, Any]:
    """Those of `read_checkpoint`; raises `UsageError` if the model has others."""
    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    like = jax.eval_shape(model.init, jax.random.key(0), images)
    is_plain = "variables" in found.arrays
    arrays = found.arrays["variables"] if is_plain else _averages(found)
    return checkpoint.to_tree(arrays, like, found.path)


def _averages(found: Checkpoint) -> checkpoint.Arrays:
    """The averaged variables."""
    arrays = {
        name.removeprefix("ema/"): array
        for name, array in found.arrays["optimizer"].items()
        if name.startswith("ema/")
    }
    if not arrays:
        raise UsageError(
            f"ema: {found.path} has no averaged weights; a run with --config.ema_decay has"
        )
    return arrays


def restore(
    path: str | epath.Path, step: int | str | None = None, ema: bool = False
) -> Restored:
    """Opens a checkpoint on any machine, without its data set, optimizer or devices.

    Args:
      path: a workdir, or a checkpoint in it, `runs/digits/checkpoints/337`.
      step: of the checkpoint; None = the latest; "best" = that which evaluated best.
      ema: the averages of `config.ema_decay` in place of the weights; "best" is still that
        of which the weights evaluated best.

    Raises:
      UsageError: no such folder, run or checkpoint, with what is there; or it is damaged,
        or has no averages.

    Example:
      run = resjax.restore("runs/digits")
      run.class_names[run.predict(image).argmax()]
    """
    found = read_checkpoint(checkpoint.to_path(path, "path"), step, ema)
    record = found.record
    config = _read_config(record)
    model = build.make_model(record.get("model") or build.describe_model(config))
    device = jax.local_devices()[0]
    variables = jax.device_put(find_variables(found, model), device)
    described = record.get("preprocess") or build_data.describe_preprocess(config)
    preprocess = build_data.make_preprocess(described)

    @jax.jit
    def softmax(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images, train=False)
        return jax.nn.softmax(logits)

    def predict(images: Any) -> np.ndarray:
        if not _is_preprocessed(images, described["image_size"]):
            images = preprocess(images)
        if not len(images):
            raise UsageError("image: an empty array; give at least one image")
        chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
        return np.concatenate([np.asarray(softmax(variables, chunk)) for chunk in chunks])

    return Restored(
        model=model,
        variables=variables,
        config=config,
        step=found.step,
        class_names=record["class_names"],
        evaluation=record.get("evaluation_ema" if ema else "evaluation"),
        versions=record.get("versions", {}),
        preprocess=preprocess,
        predict=predict,
    )


def _read_config(record: dict[str, Any]) -> Any:
    """The config of a record; None if it has values that this version does not know."""
    try:
        return configs.from_dict(record["config"], ignore_unknown=True)
    except UsageError:
        if record["format"] == 1:  # which knows the model by it alone
            raise
        return None


def _is_preprocessed(images: Any, size: int) -> bool:
    """Whether they are of `preprocess`, and not pixels; raises for other floats."""
    if getattr(images, "ndim", 0) != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        return False
    if images.shape[1:] != (size, size, 3):
        raise UsageError(
            f"image: {images.dtype} of shape {images.shape}; give pixels, uint8, or what "
            f"`preprocess` makes of them, floats [B, {size}, {size}, 3]"
        )
    return True
