"""Runs by their workdir: train one, evaluate one, open one in a notebook.

The door of the library: `resjax.restore` is here, and what train.py and eval.py call.
"""

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import SingleDeviceSharding

from resjax import build, hooks, loop, parallel, records
from resjax import config as configs
from resjax.config import Config, UsageError
from resjax.steps import TrainState

_NOT_CONFIG = ("derived", "class_names", "versions")  # what else config.json holds


# --- train --------------------------------------------------------------------------


def stored_config(workdir: epath.Path) -> dict[str, Any] | None:
    """What `config.json` of a workdir holds, or None."""
    path = workdir / "config.json"
    return json.loads(path.read_text()) if path.exists() else None


def config_of(record: dict[str, Any]) -> Config:
    """The config of a `config.json` or of a checkpoint's record."""
    return configs.from_dict({k: v for k, v in record.items() if k not in _NOT_CONFIG})


def check_same_run(workdir: epath.Path, config: Config) -> None:
    """Raises `UsageError` if the workdir holds a run of another config."""
    record = stored_config(workdir)
    different = configs.differences(config_of(record), config) if record else []
    if different:
        raise UsageError(
            f"{workdir} holds a run of another config: {'; '.join(different)}; "
            "choose another --workdir, or put the field back"
        )


def make_workdir(workdir: epath.Path) -> None:
    """Makes the folder of a run; raises `UsageError` if it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / ".writable"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--workdir: {workdir} cannot be written: {error}") from error


def train(config: Config, workdir: str | epath.Path) -> int:
    """Trains the run of a config in a workdir, from where its last checkpoint stands.

    Args:
      config: of the run.
      workdir: folder of the run, made if need be.

    Returns:
      0 when the run is finished, 128 + n after it was stopped by signal n and saved.

    Raises:
      UsageError: something in the config, data or workdir does not fit; nothing was
        written.
    """
    config = configs.validate(config)
    workdir = epath.Path(workdir)
    check_same_run(workdir, config)
    from resjax import checkpoint

    run = build.build_run(config)
    make_workdir(workdir)
    with checkpoint.open_checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        latest = checkpoints.latest_step()
        if latest == run.num_steps:
            records.say(
                f"{workdir} is finished: step {latest} of {run.num_steps}; "
                "for another run choose another --workdir"
            )
            return 0
        state = run.init_state()
        if latest is not None:
            like = checkpoint.abstract(state, state.step.sharding)
            items = checkpoint.restore_arrays(
                checkpoints, latest, variables=like.variables, optimizer=like.optimizer
            )
            state = TrainState(**items["variables"], **items["optimizer"])
        record = {
            **dataclasses.asdict(config),
            "derived": run.derived,
            "class_names": run.class_names,
        }
        records.write_json(workdir / "config.json", record)
        introduce(config, run, workdir, latest)
        return _fit(config, run, workdir, state, checkpoints, record)


def introduce(config: Config, run: build.Run, workdir: epath.Path, latest: Any) -> None:
    """Says what is about to happen: model, data, devices, derived numbers."""
    devices = jax.devices()
    derived = run.derived
    warmup = f"{derived['warmup']} warmup of {derived['warmup_steps']} steps"
    if derived["warmup"] == "none":
        warmup = "no warmup"
        if config.warmup == "goyal":
            warmup += " (goyal warms up only minibatches over 256)"
    start = "from the start" if latest is None else f"resuming after step {latest}"
    records.say(
        f"{config.model} on {config.data.name} ({run.num_examples:,} examples, "
        f"{config.num_classes} classes), {start}, in {workdir}\n"
        f"{run.num_steps:,} steps of {config.batch_size}, {config.num_epochs:g} epochs, "
        f"on {len(devices)} {devices[0].platform} device{'s'[: len(devices) > 1]} "
        f"({config.parallel}); peak learning rate {derived['peak_lr']:g}, {warmup}\n"
        "compiling ..."
    )


def _fit(
    config: Config,
    run: build.Run,
    workdir: epath.Path,
    state: TrainState,
    checkpoints: Any,
    record: dict[str, Any],
) -> int:
    """`loop.fit` with the hooks of a run around it; returns the exit code."""
    from resjax import checkpoint

    start_step, started = int(state.step), time.perf_counter()
    with contextlib.ExitStack() as stack:
        write = stack.enter_context(records.open_metrics(workdir, start_step))
        received = stack.enter_context(hooks.stop_signals())
        images, done = (n * config.batch_size for n in (run.num_steps, start_step))
        bar = stack.enter_context(hooks.progress_bar(images, done, "training"))
        log = hooks.TrainLog(
            write=write,
            every=config.log_every_steps,
            epochs_per_step=config.batch_size / run.num_examples,
            learning_rates=run.learning_rates,
            images_per_step=config.batch_size,
        )

        def evaluate(step: int, state: TrainState) -> None:
            means = loop.evaluate(run.eval_step, state.variables, run.eval_batches())
            epoch = round(step * log.epochs_per_step, 4)
            del means["num_examples"]
            write({"step": step, "epoch": epoch, "split": "test", **means})
            records.plot_curves(workdir, f"{config.model} on {config.data.name}")
            report(run.num_steps, log.latest, {**means, "step": step, "epoch": epoch})

        def save(step: int, state: TrainState) -> None:
            checkpoint.save(checkpoints, step, state.variables, state.optimizer, record)

        def save_due(step: int) -> bool:
            every = config.checkpoint.every_steps
            due = step % every == 0 if every else step in run.eval_steps
            return due or step == run.num_steps or bool(received)

        try:
            state = loop.fit(
                run.train_step,
                state,
                run.train_batches(start_step),
                [
                    log,
                    hooks.make_progress_hook(bar, log),
                    hooks.make_hook(run.eval_steps.__contains__, evaluate, log),
                    hooks.make_hook(save_due, save, log),
                ],
                should_stop=lambda: bool(received),
            )
        except FloatingPointError as error:
            return _diverged(error, checkpoints)
    if received and int(state.step) < run.num_steps:
        records.say(f"stopped by signal {received[0]}; step {int(state.step)} is saved")
        return 128 + received[0]
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    records.say(f"finished in {minutes} min {seconds:02d} s; see {workdir}/curves.png")
    return 0


def report(num_steps: int, train: dict[str, Any], test: dict[str, Any]) -> None:
    """Says how a run stands after an evaluation."""
    records.say(
        f"step {test['step']:>6,}/{num_steps:,}  epoch {test['epoch']:6.2f}  "
        f"train loss {train['loss']:.4f} top-1 {train['top1']:6.2f} %  "
        f"test loss {test['loss']:.4f} top-1 {test['top1']:6.2f} %  "
        f"{train['images_per_second']:,.0f} images/s"
    )


def _diverged(error: FloatingPointError, checkpoints: Any) -> int:
    checkpoints.wait_until_finished()
    latest = checkpoints.latest_step()
    kept = f"the checkpoint of step {latest} is kept" if latest else "nothing was saved yet"
    print(
        f"training stopped: {error}; {kept}. A lower --config.lr_per_256, a longer "
        "--config.warmup_epochs or another --config.init may help (in a new --workdir).",
        file=sys.stderr,
    )
    return 1


# --- evaluate -----------------------------------------------------------------------


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
      "data"}, also written to `eval_<split>_<step>.json` in the workdir.

    Raises:
      UsageError: no such checkpoint, split or data.
    """
    from resjax import checkpoint

    workdir = epath.Path(workdir)
    check_is_run(workdir)
    with checkpoint.open_checkpoints(workdir) as checkpoints:
        step = checkpoint.pick_step(checkpoints, step)
        config = config_of(checkpoint.restore_record(checkpoints, step))
        data = (
            config.data
            if data_dir is None
            else dataclasses.replace(config.data, dir=data_dir)
        )
        config = dataclasses.replace(config, data=data)
        eval_step, batches = build.build_evaluation(
            config, split, batch_size or config.batch_size
        )
        variables = _restore_variables(checkpoints, step, build.build_model(config))
    means = loop.evaluate(eval_step, parallel.replicate(variables), batches())
    result = {
        **{name: means[name] for name in ("top1", "top5", "loss", "num_examples")},
        "step": step,
        "split": split,
        "model": config.model,
        "data": config.data.name,
    }
    records.write_json(workdir / f"eval_{split}_{step}.json", result)
    return result


# --- restore ------------------------------------------------------------------------


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
        there = sorted(p.name for p in workdir.iterdir())
        raise UsageError(f"{workdir} has no checkpoints; there are {there}")


def _restore_variables(checkpoints: Any, step: int, model: nn.Module) -> dict[str, Any]:
    from resjax import checkpoint

    images = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    device = SingleDeviceSharding(jax.local_devices()[0])
    like = checkpoint.abstract(shapes, device)
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

    workdir = epath.Path(workdir)
    check_is_run(workdir)
    with checkpoint.open_checkpoints(workdir) as checkpoints:
        step = checkpoint.pick_step(checkpoints, step)
        record = checkpoint.restore_record(checkpoints, step)
        config = config_of(record)
        model = build.build_model(config)
        variables = _restore_variables(checkpoints, step, model)
    preprocess = build.build_preprocess(config)

    @jax.jit
    def softmax(variables: Any, images: jax.Array) -> jax.Array:
        logits: Any = model.apply(variables, images, train=False)
        return jax.nn.softmax(logits)

    def predict(images: Any) -> np.ndarray:
        if not _is_preprocessed(images):
            images = preprocess(images)
        chunks = [images[i : i + _CHUNK] for i in range(0, len(images), _CHUNK)]
        return np.concatenate([np.asarray(softmax(variables, chunk)) for chunk in chunks])

    return Restored(
        model, variables, config, step, record["class_names"], preprocess, predict
    )


_CHUNK = 64  # images of one forward pass of `predict`


def _is_preprocessed(images: Any) -> bool:
    return getattr(images, "ndim", 0) == 4 and jnp.issubdtype(images.dtype, jnp.floating)
