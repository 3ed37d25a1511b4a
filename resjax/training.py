"""Trains the run of a config in a workdir: checked, resumed, logged, saved."""

import contextlib
import dataclasses
import math
import signal
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import jax
from etils import epath

from resjax import (
    build,
    checkpoint,
    checkpoint_writer,
    hooks,
    hosts,
    loop,
    parallel,
    records,
    signals,
    workdirs,
)
from resjax import config as configs
from resjax.checkpoint import Checkpoint
from resjax.config import Config, RunError, UsageError
from resjax.models.resnet import frozen_layers
from resjax.steps import TrainState, copy_variables

_LONG_WAIT = 20  # percent of the time without data


def train(
    config: Config,
    workdir: str | epath.Path,
    stop: signals.StopSignals | None = None,
) -> int:
    """Trains the run of a config in a workdir, from where its last checkpoint stands.

    Args:
      config: of the run.
      workdir: folder of the run, made if need be.
      stop: what ends it early, from `signals.stop_signals` in a process of its own.

    Returns:
      0 when the run is finished, 128 + n after it was stopped by signal n and saved.

    Raises:
      RunError: it could not go on; the last checkpoint is kept.
      UsageError: something in the config, data or workdir does not fit; nothing was
        written.
    """
    config = configs.validate(config)
    workdir = checkpoint.to_path(workdir)
    stop = stop or signals.StopSignals()

    def tell(signum: int) -> None:
        steps = checkpoint.list_steps(workdir)
        saved = f"step {steps[-1]} is saved" if steps else "nothing was saved yet"
        records.say(f"stopped by signal {signum}; {saved}")

    stop.tell = tell
    if _train(config, workdir, stop):
        return 0
    signum = stop.received[0] if stop.received else signal.SIGTERM  # of another process
    tell(signum)
    return 128 + signum


def _train(config: Config, workdir: epath.Path, stop: signals.StopSignals) -> bool:
    """Whether the run is finished, and was not stopped before."""
    workdirs.check_agreement(config, workdir)
    latest, damaged = workdirs.check_workdir(workdir, config)
    evaluated = records.read_evaluations(workdir, latest.step) if latest else None
    found = repr((latest and latest.step, evaluated))
    if not hosts.is_same(zlib.crc32(found.encode())):
        raise workdirs.other_workdir(workdir)
    if latest and workdirs.is_finished(workdir, latest):
        records.say(
            f"{workdir} is finished: step {latest.step} of {latest.step}; "
            "for another run choose another --workdir"
        )
        return True
    run = build.build_run(config)
    if latest:
        build.check_data(run.record, latest.record)
    state, origin = _first_state(config, run, latest)
    window = stored_window(config, latest)
    seen = [*damaged, *([latest.step] if latest else [])]
    del latest  # and its arrays
    workdirs.make_workdir(workdir)
    with records.lock(workdir):
        is_new = checkpoint.list_steps(workdir)[-1:] != seen[:1]
        if not hosts.is_same(is_new) or is_new:
            raise UsageError(f"--workdir: another run has just written in {workdir}")
        workdirs.put_aside(workdir, damaged)
        workdirs.write_config(workdir, config)
        workdirs.check_shared(workdir)
        introduce(config, run, workdir, origin)
        try:
            return _fit(config, run, workdir, state, stop, window)
        except UsageError:  # of the data: the same one line as before the run
            raise
        except (FloatingPointError, OSError, ValueError) as error:
            raise _failure(error, workdir) from error
        except jax.errors.JaxRuntimeError as error:  # several processes: `hosts` tells it
            if jax.process_count() > 1 or "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise _failure(error, workdir) from error


def _first_state(
    config: Config, run: build.Run, latest: Checkpoint | None
) -> tuple[TrainState, str]:
    """Where a run starts, and the words for it."""
    if latest:
        like = jax.eval_shape(run.init_state)
        variables, optimizer = (
            checkpoint.to_tree(latest.arrays[item], getattr(like, item), latest.path)
            for item in checkpoint.ITEMS
        )
        state = TrainState(**variables, **optimizer)
        return parallel.replicate(state), f"resuming after step {latest.step}"
    if config.init_from is None:
        return run.init_state(), "from the start"
    return _init_from(config.init_from, run)


def _init_from(path: str, run: build.Run) -> tuple[TrainState, str]:
    """The state before the first update with the weights of another run.

    The classifier is new if the classes are others, by their number or their names. Says
    so if that run normalised its images in another way.

    Raises:
      UsageError: there is no such run, or it is of another model.
    """
    state = run.init_state()
    try:
        given, damaged = checkpoint.read(checkpoint.to_path(path), items=["variables"])
        arrays, own = given.arrays["variables"], checkpoint.to_arrays(state.variables)
        head = {name: own[name] for name in own if name.startswith("params/head/")}
        is_new = any(
            name in arrays and arrays[name].shape != head[name].shape for name in head
        ) or bool(build.other_class(run.record["class_names"], given.record["class_names"]))
        arrays = arrays | head if is_new else arrays
        variables = checkpoint.to_tree(arrays, state.variables, given.path)
    except UsageError as error:
        remedy = "; `python -m resjax.convert` makes a workdir of PyTorch's weights"
        told = remedy if str(error).startswith("there is no directory") else ""
        raise UsageError(f"config.init_from: {error}{told}") from error
    records.warn_of_damage(damaged, given.step)
    for name in ("mean", "std"):
        theirs = given.record.get("preprocess", {}).get(name)
        ours = run.record["preprocess"][name]
        if theirs not in (None, ours):
            records.warn(
                f"config.init_from: {path} was trained on images normalised with {name} "
                f"{theirs}, and these are with {ours}; its first layer sees others"
            )
    origin = f"from the weights of {path} after step {given.step}"
    origin += " and a new classifier" if is_new else ""
    state = dataclasses.replace(state, **parallel.replicate(variables))
    if state.ema is not None:
        state = dataclasses.replace(state, ema=copy_variables(state.variables))
    return state, origin


def introduce(config: Config, run: build.Run, workdir: epath.Path, origin: str) -> None:
    """Says what is about to happen: model, data, devices, derived numbers."""
    devices, processes = jax.devices(), jax.process_count()
    shared = f" of {processes} processes" if processes > 1 else ""
    frozen = frozen_layers(build.build_model(config), config.freeze_at)
    origin += f", {' '.join(frozen)} frozen" if frozen else ""
    records.say(
        f"{config.model} on {config.data.name} ({run.num_examples:,} examples, "
        f"{config.num_classes} classes), {origin}, in {workdir}\n"
        f"{run.num_steps:,} steps of {config.batch_size}, {config.num_epochs:g} epochs, "
        f"on {len(devices)} {devices[0].platform} device{'s'[: len(devices) > 1]}"
        f"{shared} ({config.parallel}); "
        f"{_describe_schedule(config, run.derived)}\n"
        "compiling ..."
    )


def _describe_schedule(config: Config, derived: dict[str, Any]) -> str:
    """The peak and the warmup in words, and what of the schedule the run ends before."""
    num_steps, warmup_steps = derived["num_steps"], derived["warmup_steps"]
    warmup = f"{derived['warmup']} warmup of {warmup_steps} steps"
    if derived["warmup"] == "none":
        warmup = "no warmup"
        if config.warmup == "goyal":
            warmup += " (goyal warms up only minibatches over 256)"
    text = f"peak learning rate {derived['peak_lr']:g}, {warmup}"
    if warmup_steps and warmup_steps >= num_steps:
        text += (
            f"; the run ends before that peak (config.warmup_epochs="
            f"{config.warmup_epochs:g})"
        )
    drops = zip(config.drop_epochs, derived["drop_steps"], strict=False)
    if late := [f"{epoch:g}" for epoch, step in drops if step >= num_steps]:
        text += f"; the run ends before the drops of epochs {', '.join(late)}"
        text += " (config.drop_epochs)"
    return text


def stored_window(config: Config, latest: Checkpoint | None) -> dict[str, float]:
    """What the log had summed when the checkpoint was written."""
    if not latest or latest.record["config"]["log_every_steps"] != config.log_every_steps:
        return {}
    return latest.record.get("window", {})


def make_log(
    config: Config,
    run: build.Run,
    write: Callable[[records.Record], None],
    waits: loop.Waits,
    window: dict[str, float],
) -> hooks.TrainLog:
    """The hook that logs a run, from the `stored_window` on."""
    return hooks.TrainLog(
        write=write,
        every=config.log_every_steps,
        epochs_per_step=config.batch_size / run.num_examples,
        learning_rates=run.learning_rates,
        images_per_step=config.batch_size,
        waits=waits,
        window=window,
    )


def _fit(
    config: Config,
    run: build.Run,
    workdir: epath.Path,
    state: TrainState,
    stop: signals.StopSignals,
    window: dict[str, float],
) -> bool:
    """`loop.fit` with the hooks of a run around it; whether the run is finished."""
    start_step, started = int(state.step), time.perf_counter()
    waits = loop.Waits()
    evaluations = read_evaluations(workdir, start_step)
    metric, tests = config.checkpoint.best_metric, evaluations["test"]
    best_step = partial(records.best_step, tests, metric)
    with contextlib.ExitStack() as stack:
        keep = build.build_keep(config, best_step)
        writer = stack.enter_context(checkpoint_writer.open_writer(workdir, keep))
        write = stack.enter_context(records.open_metrics(workdir, start_step))
        images, done = (n * config.batch_size for n in (run.num_steps, start_step))
        bar = stack.enter_context(hooks.progress_bar(images, done, "training"))
        log = make_log(config, run, write, waits, window)
        failures: list[Exception] = []
        wants_stop, should_stop = _make_stopping(stop, failures)
        test = _make_test(run, log, failures, wants_stop, should_stop)
        refine = _make_refine(config, run, start_step, test)
        evaluate = _make_evaluation(config, run, workdir, log, evaluations, test, refine)
        save = _make_save(run, writer, log, evaluations, refine)

        def heed(step: int, state: TrainState, sums: Any) -> None:
            stop.has_news = True
            if hosts.is_preempted(step):
                stop.received.append(signal.SIGTERM)

        def save_due(step: int) -> bool:
            return run.save_due(step) or step == best_step(run.eval_steps)

        if start_step in run.eval_steps and not _is_evaluated(tests, start_step):
            evaluate(start_step, state)  # in which the run was stopped
        if start_step < run.num_steps:
            _compile(run, state)
        state = loop.fit(
            run.train_step,
            state,
            _until_failure(run.train_batches(start_step, wants_stop), failures),
            [
                heed,
                log,
                hooks.make_progress_hook(bar, log),
                hooks.make_hook(run.eval_steps.__contains__, evaluate, log),
                hooks.make_hook(save_due, save, log),
            ],
            should_stop=should_stop,
            waits=waits,
        )
        step = int(state.step)
        if step > start_step and step != writer.latest_step:
            with log.paused():
                save(step, state)
        writer.wait_until_finished()
    if failures:
        raise failures[0]
    if step < run.num_steps or not _is_evaluated(tests, step):
        return False
    minutes, seconds = divmod(round(time.perf_counter() - started), 60)
    damaged = (
        f", {run.num_damaged()} damaged examples left out" if run.num_damaged() else ""
    )
    records.say(
        f"finished in {minutes} min {seconds:02d} s (waited {waits.data:.0f} s for data, "
        f"{waits.devices:.0f} s for the devices{damaged}); see {workdir}/curves.png"
    )
    return True


def read_evaluations(
    workdir: epath.Path, last_step: float = math.inf
) -> dict[str, list[records.Record]]:
    """The evaluations of a run up to a step: "test", and "test_ema" of its averages."""
    read = partial(records.read_evaluations, workdir, last_step)
    return {split: read(split) for split in ("test", "test_ema")}


def last_evaluations(evaluations: dict[str, list[records.Record]]) -> dict[str, Any]:
    """What a checkpoint says of `read_evaluations`: the last of each."""
    tests, averaged = evaluations["test"], evaluations["test_ema"]
    last = {"evaluation": tests[-1] if tests else None}
    return last | ({"evaluation_ema": averaged[-1]} if averaged else {})


def _is_evaluated(evaluations: list[records.Record], step: int) -> bool:
    return step in {row["step"] for row in evaluations}


def _compile(run: build.Run, state: TrainState) -> None:
    """Compiles the evaluation and the check before saving, while there is nothing to lose.

    It reads a batch, which also shows that the test split can be read.
    """
    checkpoint_writer.check_finite(state.variables, int(state.step))
    for batch in run.eval_batches():
        run.eval_step.lower(state.variables, batch).compile()  # what later calls run
        break


def _until_failure(batches: Iterable[Any], failures: list[Exception]) -> Iterator[Any]:
    """The batches until there is an error, which is kept so that the run is saved before.

    In one of several processes it is raised: the others do not know of it.
    """
    try:
        yield from batches
    except (UsageError, RunError, OSError) as error:
        if jax.process_count() > 1:
            raise
        failures.append(error)


def _make_stopping(
    stop: signals.StopSignals, failures: list[Exception]
) -> tuple[Callable[[], bool], Callable[[Any], bool]]:
    """Whether this process wants to stop; whether all do, by what the devices finished."""
    is_alone, agreed = jax.process_count() == 1, False

    def wants_stop() -> bool:
        return bool(stop.received or failures)

    def should_stop(finished: Any) -> bool:
        nonlocal agreed
        agreed = agreed or (
            wants_stop() if is_alone else bool(finished and finished["stop"])
        )
        return agreed

    return wants_stop, should_stop


def _make_test(
    run: build.Run,
    log: hooks.TrainLog,
    failures: list[Exception],
    wants_stop: Callable[[], bool],
    should_stop: Callable[[Any], bool],
) -> Callable[[dict[str, Any]], dict[str, float] | None]:
    """What averages over the test split; its result is None if the run was stopped."""

    def test(variables: dict[str, Any]) -> dict[str, float] | None:
        batches = _until_failure(run.eval_batches(wants_stop), failures)
        return loop.evaluate(run.eval_step, variables, batches, should_stop, log.waits)

    return test


def _make_refine(
    config: Config,
    run: build.Run,
    start_step: int,
    test: Callable[[dict[str, Any]], dict[str, float] | None],
) -> Callable[[int, TrainState], TrainState]:
    """What is evaluated and saved of a state: after the last update, precise statistics.

    Those of the averages are made as well. It is done once, and no signal interrupts it:
    every checkpoint of the last step has them, and a run that starts from one has no more
    to do than to evaluate.
    """
    made: list[TrainState] = []

    def refine(step: int, state: TrainState) -> TrainState:
        if not run.precise_bn or step < run.num_steps or step == start_step:
            return state
        if not made:
            means = test(state.variables)
            if means:
                records.say(
                    f"running statistics: test loss {means['loss']:.4f} "
                    f"top-1 {means['top1']:6.2f} %; recomputing them over "
                    f"{config.precise_bn_examples:,} training examples"
                )
            made.append(_with_precise_bn(run, state))
        return made[0]

    return refine


def _with_precise_bn(run: build.Run, state: TrainState) -> TrainState:
    """The state with precise statistics, or as it is where they cannot be had.

    So an image that cannot be read, or too little memory, does not cost the last updates.
    In one of several processes it is raised: the others do not know of it.
    """
    assert run.precise_bn
    try:
        ema = state.ema and run.precise_bn(state.ema)
        return dataclasses.replace(state, **run.precise_bn(state.variables), ema=ema)
    except (
        UsageError,
        RunError,
        OSError,
        MemoryError,
        jax.errors.JaxRuntimeError,
    ) as error:
        if jax.process_count() > 1:
            raise
        told = " ".join(str(error).split())[:300]
        records.warn(
            f"config.precise_bn_examples: {told}; the run ends with its running statistics "
            "(eval.py --precise_bn takes them anew)"
        )
        return state


def _make_evaluation(
    config: Config,
    run: build.Run,
    workdir: epath.Path,
    log: hooks.TrainLog,
    evaluations: dict[str, list[records.Record]],
    test: Callable[[dict[str, Any]], dict[str, float] | None],
    refine: Callable[[int, TrainState], TrainState],
) -> Callable[[int, TrainState], None]:
    """The action that evaluates, records and reports."""

    def measure(step: int, split: str, variables: Any) -> records.Record | None:
        before = time.perf_counter()
        means = test(variables)
        if means is None:
            return None
        if not math.isfinite(means["loss"]):
            raise FloatingPointError(f"the {split} loss is {means['loss']} at step {step}")
        speed = means["num_examples"] / (time.perf_counter() - before)
        return log.record(step, split, means, speed)

    def evaluate(step: int, state: TrainState) -> None:
        state = refine(step, state)
        weights = {"test": state.variables} | ({"test_ema": state.ema} if state.ema else {})
        found = [measure(step, split, variables) for split, variables in weights.items()]
        tested = [record for record in found if record is not None]
        if len(tested) < len(weights):  # to be done when the run goes on
            return
        for record in reversed(tested):  # with that of "test" the evaluation is whole
            log.write(record)
            evaluations[record["split"]].append(record)
        records.plot_curves(workdir, f"{config.model} on {config.data.name}")
        report(run.num_steps, log.latest, *tested)
        report_wait(log.take_data_wait(), config.data.name)

    return evaluate


def _make_save(
    run: build.Run,
    writer: Any,
    log: hooks.TrainLog,
    evaluations: dict[str, list[records.Record]],
    refine: Callable[[int, TrainState], TrainState],
) -> Callable[[int, TrainState], None]:
    """The action that writes a checkpoint."""

    def save(step: int, state: TrainState) -> None:
        state = refine(step, state)
        record = {**run.record, **last_evaluations(evaluations), "window": log.window}
        checkpoint_writer.save(writer, step, state.variables, state.optimizer, record)

    return save


def report(num_steps: int, train: records.Record, *tests: records.Record) -> None:
    """Says how a run stands after an evaluation, of which there may be several records."""
    line = f"step {tests[0]['step']:>6,}/{num_steps:,}  epoch {tests[0]['epoch']:6.2f}  "
    for row in (train, *tests):
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


def _failure(error: Exception, workdir: epath.Path) -> RunError:
    """Why training stopped and what is kept, in one line."""
    kept = checkpoint.list_steps(workdir)[-1:]
    what = f"the checkpoint of step {kept[0]} is kept" if kept else "nothing was saved yet"
    line = f"training stopped: {' '.join(str(error).split())[:300]}; {what}"
    if isinstance(error, FloatingPointError):
        line += (
            "; a lower --config.lr_per_256, a longer --config.warmup_epochs or another "
            "--config.init may help (in a new --workdir)"
        )
    elif isinstance(error, jax.errors.JaxRuntimeError):
        line += "; --config.microbatch and --config.model_kwargs.remat save memory"
    return RunError(line)
