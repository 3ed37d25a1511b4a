"""Configs that differ in arrays alone -> runs that one program trains at once.

Each member is the run that `build.build_run` makes of its config, on a device of its own.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from resjax import build, build_data, initializers, parallel, steps
from resjax import config as configs
from resjax.config import Config
from resjax.initializers import Scheme
from resjax.models.ops import Conv
from resjax.steps import Batch, TrainState

# What members may differ in: where they start, their data order, the rate of every update.
ARRAY_FIELDS = (
    "seed",
    "init",
    "lr_per_256",
    "schedule",
    "warmup",
    "warmup_epochs",
    "warmup_start_lr",
    "drop_epochs",
    "momentum",
    "weight_decay",
)


@dataclasses.dataclass(frozen=True)
class Members:
    """Runs that are trained at once; arrays of all have an axis of them in front.

    It is as long as `parallel.shard_members` makes it: what lies behind the last of
    `configs` repeats that.

    Attributes:
      configs: of the members, M.
      init_states: () -> the states before the first update.
      shard: M states -> states on the devices.
      train_step: (states, step) -> (states, sums of each update made), from that update;
        states are donated.
      evaluate: variables, or averages of them -> the sums of each batch of the test split.
      num_steps: updates of each run.
      eval_steps: updates after which they are evaluated.
      save_due: whether they are saved after an update.
      segment_ends: updates after which they are evaluated or saved.
      num_examples: of the training split.
      learning_rates: of every update, [M, num_steps] float32.
      records: what a checkpoint says of each.
    """

    configs: list[Config]
    init_states: Callable[[], TrainState]
    shard: Callable[[Sequence[TrainState]], TrainState]
    train_step: Callable[[TrainState, int], tuple[TrainState, tuple[steps.Sums, ...]]]
    evaluate: Callable[[dict[str, Any]], list[steps.Sums]]
    num_steps: int
    eval_steps: frozenset[int]
    save_due: Callable[[int], bool]
    segment_ends: frozenset[int]
    num_examples: int
    learning_rates: np.ndarray
    records: list[dict[str, Any]]


def group(members: Sequence[Config]) -> list[list[int]]:
    """Which of the configs are trained at once: their places, in order.

    One for which `can_train_together` is false is alone.
    """
    groups: dict[Any, list[int]] = {}
    for i, config in enumerate(members):
        groups.setdefault(_shared(config), []).append(i)
    result = []
    for places in groups.values():
        together = can_train_together(members[places[0]])
        result += [places] if together else [[i] for i in places]
    return result


def _shared(config: Config) -> tuple[Any, ...]:
    """The values of all fields that members of one program must share."""
    flat = configs.flatten(config)
    apart = flat.keys() - {*ARRAY_FIELDS, "published_error"}
    return tuple(flat[name] for name in sorted(apart))


def check(members: Sequence[Config], schemes: Mapping[str, Scheme] | None = None) -> None:
    """Raises `UsageError` for the first config that cannot be trained, naming the field.

    Args:
      members: validated; what they share is looked at once.
      schemes: init schemes of the user's own by name.
    """
    for config in {_shared(config): config for config in members}.values():
        together = can_train_together(config)
        build.check_devices(config, 1 if together else jax.device_count())
        num_examples = len(build_data.build_source(config, "train"))
        _, derived = build.build_schedule(config, num_examples)
        build.build_eval_steps(config, num_examples, derived["num_steps"])
    kinds = {(_shared(config), config.init): config for config in members}
    for config in kinds.values():
        build.check_model(config, own_scheme=config.init in (schemes or {}))


def can_train_together(config: Config) -> bool:
    """Whether the devices hold the data, and need not be asked about any update."""
    if config.dtype == "float16" or config.init_from is not None:
        return False
    if config.precise_bn_examples:  # for which the host reads the data once more
        return False
    source = build_data.build_source(config, "train")
    return build_data.build_on_device(config, len(source))


def build_members(
    members: Sequence[Config],
    schemes: Mapping[str, Scheme] | None = None,
    batch_seed: int | None = None,
) -> Members:
    """The runs of configs that differ in `ARRAY_FIELDS` alone.

    Args:
      members: at least one, all of them fit to be trained, as `check` finds out.
      schemes: init schemes by the names that the configs call them, beside those of
        `initializers.SCHEMES`.
      batch_seed: of the order, augmentation and dropped branches of all; None: of each
        its own.
    """
    config, schemes = members[0], schemes or {}
    source = build_data.build_source(config, "train")
    each = [build.build_schedule(member, len(source)) for member in members]
    num_steps = each[0][1]["num_steps"]
    rates = np.stack([jax.vmap(schedule)(jnp.arange(num_steps)) for schedule, _ in each])
    eval_steps = build.build_eval_steps(config, len(source), num_steps)
    save_due = build.build_save_due(config, eval_steps, num_steps)
    ends = eval_steps | {step for step in range(1, num_steps + 1) if save_due(step)}
    # Products in place of convolutions, which are slow in the loop over members.
    conv = partial(Conv, as_products=parallel.members_take_turns())
    model = build.make_model(build.describe_model(config), conv=conv)
    mesh = parallel.member_mesh(len(members))
    shard = partial(parallel.shard_members, mesh=mesh)
    seeds = [member.seed if batch_seed is None else batch_seed for member in members]

    def init_state(member: Config) -> TrainState:
        scheme = schemes.get(member.init) or initializers.get_scheme(member.init)
        key = jax.random.key(member.seed)
        variables = initializers.init(model, key, scheme, config.data.image_size)
        tx = build.build_optimizer(member, jnp.float32)
        return build.build_state(member, model, tx, variables)

    return Members(
        configs=list(members),
        init_states=lambda: shard([init_state(member) for member in members]),
        shard=shard,
        train_step=_build_train_step(members, model, mesh, source, rates, seeds, ends),
        evaluate=_build_evaluate(config, model, mesh),
        num_steps=num_steps,
        eval_steps=eval_steps,
        save_due=save_due,
        segment_ends=ends,
        num_examples=len(source),
        learning_rates=rates,
        records=[
            build.build_record(member, derived, source.class_names)
            for member, (_, derived) in zip(members, each, strict=True)
        ],
    )


def _build_train_step(
    members: Sequence[Config],
    model: nn.Module,
    mesh: Mesh,
    source: Any,
    rates: np.ndarray,
    seeds: list[int],
    ends: frozenset[int],
) -> Callable[[TrainState, int], Any]:
    """`Members.train_step`; the devices hold the data and the order of all epochs."""
    from resjax.data import order, pipeline, resident

    config, num_examples, num_steps = members[0], len(source), rates.shape[1]
    num_epochs = -(-num_steps * config.batch_size // num_examples)
    orders = sorted(set(seeds))  # members of one seed share an order
    hyper = [
        {
            "seed": np.uint32(seed),
            "rates": rates[i],
            "momentum": np.float32(member.momentum),
            "weight_decay": np.float32(member.weight_decay),
            # The rows of its order lie behind those of the seeds before.
            "first_epoch": np.int32(-num_epochs * orders.index(seed)),
        }
        for i, (member, seed) in enumerate(zip(members, seeds, strict=True))
    ]
    table = [
        order.permutation(seed, epoch, num_examples)
        for seed in orders
        for epoch in range(num_epochs)
    ]
    images, labels = pipeline.load_all(build_data.build_reader(config, source))
    data = {"image": images, "label": labels, "order": np.stack(table).astype(np.int32)}
    data, own = (
        jax.device_put(data, NamedSharding(mesh, P())),
        parallel.shard_members(hyper, mesh),
    )
    take_batch = partial(resident.resident_batch, batch_size=config.batch_size)

    def make_program(num_updates: int) -> Callable:
        def update(state: TrainState, own: Any, data: Any) -> Any:
            numbers = {name: own[name] for name in ("seed", "momentum", "weight_decay")}
            member = dataclasses.replace(config, **numbers)  # traced
            augment, _ = build_data.build_transforms(member)
            tx = build.build_optimizer(member, lambda step: own["rates"][step])
            train_step = build.build_train_step(member, model, tx, augment)
            run = steps.make_train_steps(train_step, take_batch, num_updates, unroll=False)
            return run(state, {**data, "first_epoch": own["first_epoch"]})

        return parallel.run_members(update, mesh, donate_state=True)

    length = build_data.build_steps_per_dispatch(config, on_device=True)
    programs = {n: make_program(n) for n in {1, length}}

    def train_step(states: TrainState, step: int) -> Any:
        last = step + length
        cut = last > num_steps or any(n in ends for n in range(step + 1, last))
        return programs[1 if cut else length](states, own, data)

    return train_step


def _build_evaluate(
    config: Config, model: nn.Module, mesh: Mesh
) -> Callable[[dict[str, Any]], list[steps.Sums]]:
    """`Members.evaluate`; the devices keep the test split."""
    from resjax.data import pipeline

    source = build_data.build_source(config, "test")
    _, prepare = build_data.build_transforms(config)
    eval_step = steps.make_eval_step(model, prepare)
    run = parallel.run_members(lambda own, _, batch: eval_step(own, batch), mesh)
    reader = build_data.build_reader(config, source)
    batch_size = build.eval_batch_size(config, 1)
    read = pipeline.eval_batches(reader, batch_size=batch_size, num_shards=1)
    batches: list[Batch] = [jax.device_put(b, NamedSharding(mesh, P())) for b in read]
    return lambda variables: [run(variables, {}, batch) for batch in batches]
