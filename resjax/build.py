"""Config -> the parts of a run, one `build_*` each.

Below it nobody reads a config field: everything takes plain arguments. Values that follow
from several fields (peak learning rate, steps) are computed here, after all overrides.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from resjax import (
    build_data,
    hooks,
    initializers,
    optim,
    parallel,
    precise_bn,
    schedules,
    steps,
)
from resjax.config import Config, UsageError, warmup_kind
from resjax.loss_scale import init_loss_scale
from resjax.models.blocks import Layer
from resjax.models.norm import BatchNorm, Bias
from resjax.models.ops import Conv
from resjax.models.resnet import create_model, frozen_layers
from resjax.steps import Batch, TrainState

_INT32 = 2**31  # steps and positions are int32
_EVAL_SHARE = 256  # examples of an evaluation that a device takes at a time
_PRECISE_GROUP = 256  # examples of a group, at most (of the last, less than twice as many)


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run, built and not yet started.

    Attributes:
      init_state: () -> the replicated state before the first update.
      train_step: (state, batch) -> (state, sums), on all devices; state is donated. If
        they hold the training set, it makes several updates and gives a tuple of sums.
      eval_step: (variables, batch) -> sums, on all devices; a compiled function of jax's,
        so that it can be lowered without being run.
      train_batches: (start_step, wants_stop) -> what train_step takes, from that update
        to the end; the batches of several hosts tell each other when wants_stop().
      eval_batches: (wants_stop) -> the sharded batches of the test split, each example
        once; they tell of wants_stop() as those of the training do.
      num_steps: updates of the whole run.
      eval_steps: updates after which the run is evaluated.
      save_due: whether a checkpoint is written after that update, whatever it is worth.
      num_examples: of the training split.
      learning_rates: of every update, [num_steps] float32.
      derived: what was computed from several fields, to be shown and stored.
      record: what a checkpoint says of all this.
      num_damaged: () -> training examples that were left out so far.
      precise_bn: variables -> the same with statistics recomputed; None if the run ends
        with its running ones.
    """

    init_state: Callable[[], TrainState]
    train_step: Callable[[TrainState, Any], tuple[TrainState, Any]]
    eval_step: Any  # a jax.stages.Wrapped
    train_batches: Callable[..., Iterator[Any]]
    eval_batches: Callable[..., Iterable[Batch]]
    num_steps: int
    eval_steps: frozenset[int]
    save_due: Callable[[int], bool]
    num_examples: int
    learning_rates: np.ndarray
    derived: dict[str, Any]
    record: dict[str, Any]
    num_damaged: Callable[[], int]
    precise_bn: Callable[[Any], Any] | None = None


def build_model(config: Config, axis_name: str | None = None) -> nn.Module:
    """The model; with `axis_name`, statistics join the devices of that axis if they must.

    Raises:
      UsageError: an unknown model.
    """
    return make_model(describe_model(config), axis_name)


def describe_model(config: Config) -> dict[str, Any]:
    """What `make_model` needs, in JSON, so that a checkpoint can hold it."""
    group = config.norm.virtual_batch_size
    if group == config.batch_size:
        group = 0  # the same examples, however many devices hold them
    return {
        "name": config.model,
        "num_classes": config.num_classes,
        "dtype": config.dtype,
        "norm": config.norm.kind,
        "virtual_batch_size": group,
        "options": model_options(config),
    }


def make_model(
    described: dict[str, Any], axis_name: str | None = None, conv: Layer = Conv
) -> nn.Module:
    """The model of `describe_model`, with the statistics of `build_model`."""
    options = {
        name: tuple(value) if isinstance(value, list) else value  # JSON has no tuples
        for name, value in described["options"].items()
    }
    norm: Any = Bias
    if described.get("norm", "batch") == "batch":  # checkpoints before it was a choice
        group = described["virtual_batch_size"]
        norm = partial(BatchNorm, virtual_batch_size=group, axis_name=axis_name)
    return create_model(
        described["name"],
        num_classes=described["num_classes"],
        dtype=jnp.dtype(described["dtype"]),
        norm=norm,
        conv=conv,
        **options,
    )


def model_options(config: Config) -> dict[str, Any]:
    """Those of `model_kwargs` that are set."""
    options = dataclasses.asdict(config.model_kwargs)
    return {name: value for name, value in options.items() if value is not None}


def check_devices(config: Config, num_devices: int) -> None:
    """Raises `UsageError` if the global minibatch does not fit so many devices."""
    batch = config.batch_size
    if batch % num_devices:
        below = batch - batch % num_devices
        near = f"{below} or {below + num_devices}" if below else str(num_devices)
        raise UsageError(
            f"config.batch_size: {batch} is not divisible by the {num_devices} devices; "
            f"the nearest that are: {near}"
        )
    held, microbatch = batch // num_devices, config.microbatch
    if not 0 < microbatch < held:
        return
    if held % microbatch:
        raise UsageError(
            f"config.microbatch: {microbatch} does not divide the {held} examples of a "
            f"device (config.batch_size={batch}, devices: {num_devices})"
        )
    group = config.norm.virtual_batch_size
    if config.norm.kind == "batch" and microbatch % (group or batch):
        raise UsageError(
            f"config.norm.virtual_batch_size: {group}, so {group or batch} examples share "
            f"statistics, and a backward pass of config.microbatch={microbatch} does not "
            f"hold them; allowed: config.microbatch=0 or a multiple of {group or batch}"
        )


def check_model(config: Config, own_scheme: bool = False) -> None:
    """Raises `UsageError` if init scheme, images or `freeze_at` do not fit the model.

    Args:
      config: of the run.
      own_scheme: the init scheme is a function of the user's, and not looked at.
    """
    model = build_model(config)
    try:
        frozen_layers(model, config.freeze_at)
    except UsageError as error:
        raise UsageError(f"config.{error} of {config.model}") from error
    size, group = config.data.image_size, config.norm.virtual_batch_size
    shape = (group or config.batch_size, size, size, 3)
    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    key = jax.random.key(0)
    keys = {"params": key, "dropout": key}
    try:
        variables = jax.eval_shape(partial(model.init, train=True), keys, images)
    except ValueError as error:
        raise UsageError(
            f"config.data.image_size: {size} is too small for {config.model} with "
            f"{shape[0]} examples sharing statistics: {error}"
        ) from error
    try:
        if not own_scheme:
            scheme = initializers.get_scheme(config.init)
            jax.eval_shape(lambda: scheme(key, variables["params"]))
    except UsageError as error:
        raise UsageError(f"config.init={config.init}, {config.model}: {error}") from error


def epochs_to_steps(config: Config, epochs: float, num_examples: int) -> int:
    """The nearest whole number of updates, at most what an int32 holds."""
    return min(round(epochs * num_examples / config.batch_size), _INT32 - 1)


def warmup_rates(config: Config) -> tuple[float, float]:
    """The learning rates that a warmup starts from and leads to, the peak."""
    peak = schedules.scale_learning_rate(config.lr_per_256, config.batch_size)
    start = config.lr_per_256 if config.warmup_start_lr is None else config.warmup_start_lr
    return start, peak


def build_schedule(
    config: Config, num_examples: int
) -> tuple[schedules.Schedule, dict[str, Any]]:
    """The learning rate of every update, and the numbers it was derived from.

    Raises:
      UsageError: a run of more examples than positions can count.
    """
    to_steps = partial(epochs_to_steps, config, num_examples=num_examples)
    num_steps = max(to_steps(config.num_epochs), 1)
    if num_steps * config.batch_size >= _INT32:
        raise UsageError(
            f"config.num_epochs: {config.num_epochs:g} epochs of {num_examples} examples, "
            f"in minibatches of {config.batch_size}, are more than a run can count (2**31)"
        )
    start, peak = warmup_rates(config)
    warmup = warmup_kind(config)
    warmup_steps = to_steps(config.warmup_epochs) if warmup != "none" else 0
    boundaries = [to_steps(epoch) for epoch in config.drop_epochs]
    after = {
        "step": lambda: schedules.step_decay(peak, boundaries),
        "cosine": lambda: schedules.cosine_decay(peak, warmup_steps, num_steps),
    }[config.schedule]()
    if warmup_steps:
        after = schedules.warm_up(after, warmup, start, peak, warmup_steps)
    derived = {
        "num_examples": num_examples,
        "num_steps": num_steps,
        "peak_lr": peak,
        "warmup": warmup,
        "warmup_steps": warmup_steps,
        "drop_steps": boundaries if config.schedule == "step" else [],
    }
    return after, derived


def build_eval_steps(config: Config, num_examples: int, num_steps: int) -> frozenset[int]:
    """The updates after which a run is evaluated; the last is one of them.

    Raises:
      UsageError: evaluations more often than updates.
    """
    every = config.eval_every_epochs
    num_evals = int(config.num_epochs / every)
    if num_evals > num_steps:
        raise UsageError(
            f"config.eval_every_epochs: {every:g} is less than one step, which is "
            f"{config.batch_size / num_examples:.3g} epochs"
        )
    multiples = range(1, num_evals + 1)
    steps = {epochs_to_steps(config, i * every, num_examples) for i in multiples}
    return frozenset(steps - {0} | {num_steps})


def build_save_due(
    config: Config, eval_steps: frozenset[int], num_steps: int
) -> Callable[[int], bool]:
    """Whether a checkpoint is written after an update; after the last in any case."""
    every = config.checkpoint.every_steps

    def save_due(step: int) -> bool:
        due = step % every == 0 if every else step in eval_steps
        return due or step == num_steps

    return save_due


def build_keep(
    config: Config, best_step: Callable[[Sequence[int]], int | None]
) -> Callable[[Sequence[int]], set[int]]:
    """Of the steps that have checkpoints, in order, those that keep them.

    Args:
      config: of the run.
      best_step: steps -> the best of them; None if that is not known.
    """
    every = config.checkpoint.keep_every_steps

    def choose(steps: Sequence[int]) -> set[int]:
        latest = set(steps[-config.checkpoint.keep :])
        multiples = {step for step in steps if every and step % every == 0}
        best = {step for step in steps if step == best_step(steps)}
        return latest | multiples | best

    return choose


def build_optimizer(
    config: Config, schedule: schedules.Schedule
) -> optax.GradientTransformation:
    """The optimizer, with the learning rate inside it."""
    makers = {"sgd": optim.sgd, "lars": optim.lars}
    tx = makers[config.optimizer](
        schedule, config.momentum, config.nesterov, config.weight_decay
    )
    if config.head_lr_multiplier == 1:
        return tx
    return optax.chain(tx, optim.scale_head(config.head_lr_multiplier))


def build_train_step(
    config: Config,
    model: nn.Module,
    tx: optax.GradientTransformation,
    augment: steps.Transform,
) -> steps.TrainStep:
    """The update of one device."""
    return steps.make_train_step(
        model,
        tx,
        augment,
        config.batch_size,
        config.seed,
        config.microbatch,
        config.label_smoothing,
        config.ema_decay,
        config.freeze_at,
    )


def build_state(
    config: Config,
    model: nn.Module,
    tx: optax.GradientTransformation,
    variables: dict[str, Any],
) -> TrainState:
    """The state before the first update, with all that the config's updates need."""
    return steps.create_state(
        variables,
        tx,
        init_loss_scale() if config.dtype == "float16" else None,
        with_ema=config.ema_decay > 0,
        frozen=frozen_layers(model, config.freeze_at),
    )


def eval_batch_size(config: Config, num_devices: int) -> int:
    """Examples of an evaluation at a time where nobody says how many.

    A run may be evaluated by fewer devices than have trained it: each takes no more than a
    backward pass, or than `_EVAL_SHARE`.
    """
    return min(config.batch_size, num_devices * (config.microbatch or _EVAL_SHARE))


def build_evaluation(
    config: Config,
    split: str,
    batch_size: int,
    keep: bool = False,
) -> tuple[Callable[[Any, Batch], Any], Callable[..., Iterable[Batch]]]:
    """The eval step on all devices, and a function that starts the batches of a split.

    Args:
      config: of the run.
      split: our name for it.
      batch_size: examples at a time.
      keep: the devices keep the batches of a small split.

    Raises:
      UsageError: the data is not there, or has other classes than the config says.
    """
    from resjax.data import pipeline

    source = build_data.build_source(config, split)
    _, prepare = build_data.build_transforms(config)
    step = steps.make_eval_step(build_model(config), prepare)
    batches = partial(
        pipeline.eval_batches,
        build_data.build_reader(config, source),
        batch_size=batch_size,
        num_shards=jax.device_count(),
        host=jax.process_index(),
        num_hosts=jax.process_count(),
    )
    run_step = parallel.run_on_devices(step, config.parallel)
    kept: list[Batch] = []

    def start(wants_stop: Callable[[], bool] = lambda: False) -> Iterable[Batch]:
        if not (keep and build_data.is_small(config, len(source))):
            return parallel.prefetch(build_data.with_stop(batches(), wants_stop))
        if not kept:
            kept.extend(parallel.prefetch(batches()))
        return kept

    return run_step, start


def build_precise_bn(
    config: Config, model: nn.Module, reader: Any, num_examples: int
) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """What takes the statistics of variables anew over training examples.

    The result depends on the parameters, the examples and the size of a group, which is
    that of training, or at most 256 where the whole minibatch shares statistics. On how
    many devices, and in what minibatches, it does not depend. Each device takes whole
    groups; what does not fill one joins the last.

    Args:
      config: of the run.
      model: with batch norm.
      reader: of the training split.
      num_examples: the first of the training stream, with its augmentation; as many as the
        split has are each of them once.

    Returns:
      {"params", "batch_stats"} -> the same with new statistics; both replicated.

    Raises:
      UsageError: fewer than two examples, frozen layers, or a model without batch norm.
    """
    if num_examples < 2:
        raise UsageError(f"precise batch norm: {num_examples} examples are not 2 or more")
    if config.freeze_at:
        raise UsageError(
            f"precise batch norm: the run has config.freeze_at={config.freeze_at}, and the "
            "statistics of frozen layers stay as they are"
        )
    augment, _ = build_data.build_transforms(config)
    step = precise_bn.make_group_step(model, augment)
    group = describe_model(config)["virtual_batch_size"]
    group = group or min(config.batch_size, _PRECISE_GROUP)
    on_each = parallel.run_on_devices(step, config.parallel)
    on_same = parallel.run_on_devices(step, config.parallel, sharded=False)

    def recompute(variables: dict[str, Any]) -> dict[str, Any]:
        count, last = precise_bn.split(num_examples, group)
        batches, last_batch = build_data.build_groups(config, reader, num_examples, group)

        def groups() -> Iterator[tuple[int, np.ndarray]]:
            outputs = (on_each(variables, batch) for batch in batches)
            done = 0
            for each in precise_bn.fetch_late(outputs):  # [devices, 2, K]
                yield from ((group, moments) for moments in each[: count - done])
                done += len(each)
            if last_batch is not None:
                yield last, jax.device_get(on_same(variables, last_batch))[0]

        def shown() -> Iterator[tuple[int, np.ndarray]]:
            with hooks.progress_bar(num_examples, 0, "batch norm") as bar:
                for size, moments in groups():
                    bar.update(size)
                    yield size, moments

        values = precise_bn.count_values(model, variables, config.data.image_size)
        pooled = precise_bn.pool(shown(), values)
        stats = precise_bn.to_batch_stats(pooled, variables["batch_stats"])
        stats = parallel.replicate(stats)
        return {"params": parallel.as_global(variables["params"]), "batch_stats": stats}

    return recompute


def build_record(
    config: Config, derived: dict[str, Any], class_names: list[str]
) -> dict[str, Any]:
    """What makes a checkpoint say what it is."""
    return {
        "config": dataclasses.asdict(config),
        "derived": derived,
        "class_names": class_names,
        "model": describe_model(config),
        "preprocess": build_data.describe_preprocess(config),
    }


def check_data(now: dict[str, Any], before: dict[str, Any]) -> None:
    """Raises `UsageError` if the data is not what a checkpoint was trained on.

    Args:
      now: the record of the run that goes on.
      before: that of the checkpoint.
    """
    count, known = now["derived"]["num_examples"], before["derived"].get("num_examples")
    if known is not None and count != known:
        raise UsageError(
            f"config.data.dir: there are {count:,} training examples, and the run was "
            f"trained on {known:,}"
        )
    check_class_names(now["class_names"], before["class_names"])


def other_class(now: list[str], before: list[str]) -> tuple[int, str, str] | None:
    """The first class that has another name than it had: its number, and both.

    None if there is none, or the names were numbers, as where they were not known.
    """
    if before == [str(i) for i in range(len(before))]:
        return None
    pairs = zip(now, before, strict=True)
    return next(((i, a, b) for i, (a, b) in enumerate(pairs) if a != b), None)


def check_class_names(now: list[str], before: list[str]) -> None:
    """Raises `UsageError` if the classes have other names than those trained on."""
    other = other_class(now, before)
    if other:
        index, name, trained = other
        raise UsageError(
            f"config.data.dir: class {index} is {name!r}, and was {trained!r} in training"
        )


def build_run(config: Config) -> Run:
    """The whole run, checked against the devices and the data that are there.

    Raises:
      UsageError: naming the field that does not fit.
    """
    model = build_model(config, axis_name=parallel.AXIS)
    scheme = initializers.get_scheme(config.init)
    check_devices(config, jax.device_count())
    check_model(config)
    source = build_data.build_source(config, "train")
    augment, _ = build_data.build_transforms(config)
    schedule, derived = build_schedule(config, len(source))
    num_steps = derived["num_steps"]
    tx = build_optimizer(config, schedule)
    train_step = build_train_step(config, model, tx, augment)
    eval_steps = build_eval_steps(config, len(source), num_steps)
    save_due = build_save_due(config, eval_steps, num_steps)
    on_device = build_data.build_on_device(config, len(source))
    steps_per_dispatch = build_data.build_steps_per_dispatch(config, on_device)
    eval_step, eval_batches = build_evaluation(
        config, "test", eval_batch_size(config, jax.device_count()), keep=on_device
    )

    def init_state() -> TrainState:
        key = jax.random.key(config.seed)
        variables = initializers.init(model, key, scheme, config.data.image_size)
        return parallel.replicate(build_state(config, model, tx, variables))

    def must_end(step: int) -> bool:  # a dispatch, so that the state is there
        return step in eval_steps or save_due(step)

    reader = build_data.build_reader(config, source)
    if on_device:
        run_step, train_batches = build_data.build_resident(
            config, reader, train_step, num_steps, steps_per_dispatch, must_end
        )
    else:
        run_step, train_batches = build_data.build_streamed(
            config, reader, train_step, num_steps
        )
    refine, examples = None, config.precise_bn_examples
    if examples:
        refine = build_precise_bn(config, model, reader, examples)
    rates = jax.vmap(schedule)(jnp.arange(num_steps))
    return Run(
        init_state=init_state,
        train_step=run_step,
        eval_step=eval_step,
        train_batches=train_batches,
        eval_batches=eval_batches,
        num_steps=num_steps,
        eval_steps=eval_steps,
        save_due=save_due,
        num_examples=len(source),
        learning_rates=np.asarray(rates),
        derived=derived,
        record=build_record(config, derived, source.class_names),
        num_damaged=lambda: len(reader.damaged),
        precise_bn=refine,
    )
