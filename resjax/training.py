"""Trains the run of a config in a workdir: checked, resumed, logged, saved."""

import contextlib
import dataclasses
import json
import math
import signal
import time
import zlib
from collections.abc import Callable
from typing import Any

import jax
from etils import epath

from resjax import build, checkpoint, hooks, hosts, loop, parallel, records
from resjax import config as configs
from resjax.config import Config, RunError, UsageError
from resjax.steps import TrainState

_LONG_WAIT = 20  # percent of the time without data


def train(config: Config, workdir: str | epath.Path) -> int:
    """Trains the run of a config in a workdir, from where its last checkpoint stands.

    Args:
      config: of the run.
      workdir: folder of the run, made if need be.

    Returns:
      0 when the run is finished, 128 + n after it was stopped by signal n and saved.

    Raises:
      RunError: it could not go on; the last checkpoint is kept.
      UsageError: something in the config, data or workdir does not fit; nothing was
        written.
    """
    config = configs.validate(config)
    workdir = epath.Path(workdir).expanduser()
    check_agreement(config, workdir)
    latest, num_steps = check_workdir(workdir, config)
    if not hosts.is_same(-1 if latest is None else latest):
        raise _other_workdir(workdir)
    if latest is not None and latest == num_steps:
        records.say(
            f"{workdir} is finished: step {latest} of {num_steps}; "
            "for another run choose another --workdir"
        )
        return 0
    run = build.build_run(config)
    make_workdir(workdir)
    with checkpoint.open_checkpoints(workdir, config.checkpoint.keep) as checkpoints:
        if latest is None:
            state = run.init_state()
        else:
            shapes = jax.eval_shape(run.init_state)
            like = checkpoint.abstract(shapes, parallel.replicated())
            items = checkpoint.restore_arrays(
                checkpoints, latest, variables=like.variables, optimizer=like.optimizer
            )
            state = TrainState(**items["variables"], **items["optimizer"])
        records.write_json(workdir / "config.json", dataclasses.asdict(config))
        check_shared(workdir)
        introduce(config, run, workdir, latest)
        return _fit(config, run, workdir, state, checkpoints)


def check_workdir(workdir: epath.Path, config: Config) -> tuple[int | None, int | None]:
    """The last step saved in a workdir and the number of steps of its run, None if none.

    Raises:
      UsageError: the workdir holds a run of another config, or records of something else.
    """
    if (workdir / "config.json").exists():
        _check_same(workdir, records.read_config(workdir), config)
    elif (workdir / "metrics.jsonl").exists():
        raise UsageError(f"--workdir: {workdir} holds metrics.jsonl of something else")
    records.read_metrics(workdir)  # a damaged file is found before anything is done
    if not (workdir / "checkpoints").is_dir():
        return None, None
    with checkpoint.open_checkpoints(workdir) as checkpoints:
        latest = checkpoints.latest_step()
        if latest is None:
            return None, None
        record = checkpoint.restore_record(checkpoints, latest)
    _check_same(workdir, configs.from_dict(record["config"]), config)
    return latest, record["derived"]["num_steps"]


def _check_same(workdir: epath.Path, stored: Config, config: Config) -> None:
    different = configs.differences(stored, config)
    if different:
        raise UsageError(
            f"{workdir} holds a run of another config: {'; '.join(different)}; "
            "choose another --workdir, or put the field back"
        )


def check_agreement(config: Config, workdir: epath.Path) -> None:
    """Raises `UsageError` if the processes of a run are not about to do the same."""
    flat = configs.flatten(config)
    own = ("data.dir", "data.num_workers", "data.num_threads", "data.prefetch")
    shared = json.dumps({name: flat[name] for name in flat if name not in own})
    if not hosts.is_same(zlib.crc32(shared.encode())):
        raise UsageError("--config: the processes of the run have different configs")
    if not hosts.is_same((workdir / "checkpoints").is_dir()):
        raise _other_workdir(workdir)


def _other_workdir(workdir: epath.Path) -> UsageError:
    return UsageError(
        f"--workdir: {workdir} of process {jax.process_index()} is not that of the others; "
        "all must see one folder"
    )


def check_shared(workdir: epath.Path) -> None:
    """Raises `UsageError` if a process does not see what the main one has written."""
    hosts.is_same(0)  # waits for all
    if not (workdir / "config.json").exists():
        raise _other_workdir(workdir)


def make_workdir(workdir: epath.Path) -> None:
    """Makes the folder of a run; raises `UsageError` if it cannot be written."""
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        probe = workdir / f".writable{jax.process_index()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--workdir: {workdir} cannot be written: {error}") from error


def introduce(config: Config, run: build.Run, workdir: epath.Path, latest: Any) -> None:
    """Says what is about to happen: model, data, devices, derived numbers."""
    devices, processes = jax.devices(), jax.process_count()
    shared = f" of {processes} processes" if processes > 1 else ""
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
        f"on {len(devices)} {devices[0].platform} device{'s'[: len(devices) > 1]}"
        f"{shared} ({config.parallel}); "
        f"peak learning rate {derived['peak_lr']:g}, {warmup}\n"
        "compiling ..."
    )


def _fit(
    config: Config,
    run: build.Run,
    workdir: epath.Path,
    state: TrainState,
    checkpoints: Any,
) -> int:
    """`loop.fit` with the hooks of a run around it; returns the exit code."""
    start_step, started = int(state.step), time.perf_counter()
    waits = loop.Waits()
    with contextlib.ExitStack() as stack:
        received = stack.enter_context(hooks.stop_signals())
        write = stack.enter_context(records.open_metrics(workdir, start_step))
        images, done = (n * config.batch_size for n in (run.num_steps, start_step))
        bar = stack.enter_context(hooks.progress_bar(images, done, "training"))
        log = hooks.TrainLog(
            write=write,
            every=config.log_every_steps,
            epochs_per_step=config.batch_size / run.num_examples,
            learning_rates=run.learning_rates,
            images_per_step=config.batch_size,
            waits=waits,
        )
        evaluate = _make_evaluation(config, run, workdir, log)
        save = _make_save(config, run, checkpoints)

        def should_stop(finished: Any) -> bool:
            if jax.process_count() == 1:
                return bool(received)
            return finished is not None and bool(finished["stop"])  # of any process

        try:
            state = loop.fit(
                run.train_step,
                state,
                run.train_batches(start_step, lambda: bool(received)),
                [
                    log,
                    hooks.make_progress_hook(bar, log),
                    hooks.make_hook(run.eval_steps.__contains__, evaluate, log),
                    hooks.make_hook(run.save_due, save, log),
                ],
                should_stop=should_stop,
                waits=waits,
            )
            step = int(state.step)
            if step != checkpoints.latest_step():  # stopped by a signal between two saves
                with log.paused():
                    save(step, state)
            checkpoints.wait_until_finished()
        except UsageError:  # of the data: the same one line as before the run
            raise
        except (FloatingPointError, OSError, ValueError) as error:
            raise _failure(error, checkpoints) from error
    if step < run.num_steps:
        signum = received[0] if received else signal.SIGTERM  # of another process
        records.say(f"stopped by signal {signum}; step {step} is saved")
        return 128 + signum
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    damaged = (
        f", {run.num_damaged()} damaged examples left out" if run.num_damaged() else ""
    )
    records.say(
        f"finished in {minutes} min {seconds:02d} s (waited {waits.data:.0f} s for data, "
        f"{waits.devices:.0f} s for the devices{damaged}); see {workdir}/curves.png"
    )
    return 0


def _make_evaluation(
    config: Config, run: build.Run, workdir: epath.Path, log: hooks.TrainLog
) -> Callable[[int, TrainState], None]:
    """The action that evaluates, records and reports."""

    def evaluate(step: int, state: TrainState) -> None:
        before = time.perf_counter()
        means = loop.evaluate(
            run.eval_step, state.variables, run.eval_batches(), waits=log.waits
        )
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the test loss is {means['loss']} at step {step}")
        speed = means["num_examples"] / (time.perf_counter() - before)
        test = log.record(step, "test", means, speed)
        log.write(test)
        records.plot_curves(workdir, f"{config.model} on {config.data.name}")
        report(run.num_steps, log.latest, test)
        report_wait(log.take_data_wait(), config.data.name)

    return evaluate


def _make_save(
    config: Config, run: build.Run, checkpoints: Any
) -> Callable[[int, TrainState], None]:
    """The action that writes a checkpoint."""
    record = {
        "config": dataclasses.asdict(config),
        "derived": run.derived,
        "class_names": run.class_names,
    }

    def save(step: int, state: TrainState) -> None:
        state = parallel.as_global(state)
        checkpoint.save(checkpoints, step, state.variables, state.optimizer, record)

    return save


def report(num_steps: int, train: records.Record, test: records.Record) -> None:
    """Says how a run stands after an evaluation."""
    line = f"step {test['step']:>6,}/{num_steps:,}  epoch {test['epoch']:6.2f}  "
    for row in (train, test):
        if row:  # no training record is written yet if log_every_steps is large
            line += f"{row['split']} loss {row['loss']:.4f} top-1 {row['top1']:6.2f} %  "
    speed = f"{train['images_per_second']:,.0f} images/s" if train else ""
    records.say((line + speed).rstrip())


def report_wait(percent: float, data_name: str) -> None:
    """Says that training waits for data, if it waits long."""
    if percent > _LONG_WAIT:
        records.say(
            f"waiting for data {percent:.0f} % of the time; more --config.data.num_workers "
            "may help, for large JPEG files also "
            f"`python -m resjax.data {data_name} --shrink=512`"
        )


def _failure(error: Exception, checkpoints: Any) -> RunError:
    """Why training stopped and what is kept, in one line."""
    if jax.process_count() == 1:  # others may be gone
        with contextlib.suppress(Exception):  # a save that fails is the error itself
            checkpoints.wait_until_finished()
    checkpoints.reload()
    latest = checkpoints.latest_step()
    kept = f"the checkpoint of step {latest} is kept" if latest else "nothing was saved yet"
    line = f"training stopped: {' '.join(str(error).split())[:300]}; {kept}"
    if isinstance(error, FloatingPointError):
        line += (
            "; a lower --config.lr_per_256, a longer --config.warmup_epochs or another "
            "--config.init may help (in a new --workdir)"
        )
    return RunError(line)
