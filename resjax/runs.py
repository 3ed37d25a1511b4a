"""Runs by their workdir: evaluate one, open one in a notebook.

The door of the library: `resjax.restore` is here, and what eval.py calls.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Sharding, SingleDeviceSharding

from resjax import build, build_data, loop, parallel, records
from resjax import config as configs
from resjax.config import Config, UsageError


def evaluate(
    workdir: str | epath.Path,
    step: int | None = None,
    split: str = "test",
    batch_size: int | None = None,
    data_dir: str | None = None,
) -> dict[str, Any]:
    """Evaluates a checkpoint on a whole split, each example once.

    Args:
      workdir: of the run.
      step: of the checkpoint; None = the latest.
      split: "train" or "test".
      batch_size: examples at a time; None = that of the training.
      data_dir: where the data is; None = as in the training.

    Returns:
      {"top1", "top5" (percent), "loss" (nats), "num_examples", "step", "split", "model",
      "data"}, also written to `eval_<split>_<step>.json` if the workdir can be written.

    Raises:
      UsageError: no such checkpoint, split or data.
    """
    from resjax import checkpoint

    workdir = epath.Path(workdir).expanduser()
    check_is_run(workdir)
    with checkpoint.open_checkpoints(workdir) as checkpoints:
        step = checkpoint.pick_step(checkpoints, step)
        record = checkpoint.restore_record(checkpoints, step)
        config = configs.from_dict(record["config"])
        data = dataclasses.replace(config.data, dir=data_dir or config.data.dir)
        config = dataclasses.replace(config, data=data)
        eval_step, batches = build.build_evaluation(
            config, split, batch_size or config.batch_size
        )
        model, sharding = build.build_model(config), parallel.replicated()
        variables = _restore_variables(checkpoints, step, model, sharding)
    means = loop.evaluate(eval_step, variables, batches())
    result = {
        **{name: means[name] for name in ("top1", "top5", "loss", "num_examples")},
        "step": step,
        "split": split,
        "model": config.model,
        "data": config.data.name,
    }
    with contextlib.suppress(OSError):  # a run may be kept where nobody can write
        records.write_json(workdir / f"eval_{split}_{step}.json", result)
    return result


_CHUNK = 64  # images of one forward pass of `predict`


@dataclasses.dataclass(frozen=True)
class Restored:
    """A trained model, ready to use.

    Attributes:
      model: the linen Module.
      variables: {"params", "batch_stats"}.
      config: of the run.
      step: of the checkpoint.
      class_names: of the logits, in order.
      preprocess: images of any size, uint8 arrays or PIL -> [B, S, S, 3] float32, as the
        run was evaluated.
      predict: the same, or preprocessed float32 images -> softmax [B, K] float32.
    """

    model: nn.Module
    variables: dict[str, Any]
    config: Config
    step: int
    class_names: list[str]
    preprocess: Callable[[Any], np.ndarray]
    predict: Callable[[Any], np.ndarray]


def check_is_run(workdir: epath.Path) -> None:
    """Raises `UsageError` if there is no run; it lists what is there."""
    if not workdir.is_dir():
        near = (
            sorted(p.name for p in workdir.parent.iterdir())
            if workdir.parent.is_dir()
            else []
        )
        raise UsageError(f"there is no directory {workdir}; beside it there are {near}")
    if not (workdir / "checkpoints").is_dir():
        there = sorted(path.name for path in workdir.iterdir())
        raise UsageError(f"{workdir} has no checkpoints; it holds {there[:10]}")


def _restore_variables(
    checkpoints: Any, step: int, model: nn.Module, sharding: Sharding
) -> dict[str, Any]:
    from resjax import checkpoint

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    like = checkpoint.abstract(shapes, sharding)
    return checkpoint.restore_arrays(checkpoints, step, variables=like)["variables"]


def restore(workdir: str | epath.Path, step: int | None = None) -> Restored:
    """Opens a checkpoint on any machine, without its data set, optimizer or devices.

    Args:
      workdir: of the run.
      step: of the checkpoint; None = the latest.

    Raises:
      UsageError: no such folder, run or checkpoint; it lists what is there.

    Example:
      run = resjax.restore("runs/digits")
      run.class_names[run.predict(image).argmax()]
    """
    from resjax import checkpoint

    workdir = epath.Path(workdir).expanduser()
    check_is_run(workdir)
    with checkpoint.open_checkpoints(workdir) as checkpoints:
        step = checkpoint.pick_step(checkpoints, step)
        record = checkpoint.restore_record(checkpoints, step)
        config = configs.from_dict(record["config"])
        model = build.build_model(config)
        device = SingleDeviceSharding(jax.local_devices()[0])
        variables = _restore_variables(checkpoints, step, model, device)
    preprocess = build_data.build_preprocess(config)

    @jax.jit
    def softmax(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images, train=False)
        return jax.nn.softmax(logits)

    def predict(images: Any) -> np.ndarray:
        if not _is_preprocessed(images):
            images = preprocess(images)
        if not len(images):
            raise UsageError("image: an empty array; give at least one image")
        chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
        return np.concatenate([np.asarray(softmax(variables, chunk)) for chunk in chunks])

    return Restored(
        model, variables, config, step, record["class_names"], preprocess, predict
    )


def _is_preprocessed(images: Any) -> bool:
    return getattr(images, "ndim", 0) == 4 and jnp.issubdtype(images.dtype, jnp.floating)
