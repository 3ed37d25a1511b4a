"""What a run is: typed config fields, how a command line fills them, what is allowed.

Owns every error a user can make before anything is built: `UsageError` is one line,
and `run_command` turns it into exit code 2. Knows no jax, no model and no dataset.
"""

import argparse
import ast
import dataclasses
import difflib
import math
import runpy
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal, NoReturn

# --- errors -------------------------------------------------------------------------


class UsageError(ValueError):
    """Something the user typed or pointed at is wrong; the message is one line."""


class RunError(RuntimeError):
    """A run that was asked for rightly cannot go on; the message is one line."""


EXPECTED_ERRORS = (UsageError, RunError, KeyboardInterrupt)
_MANY = 10  # names that a line offers at most, when there are more


def unknown_name(kind: str, name: str, known: Iterable[str]) -> UsageError:
    """A `UsageError` that offers the nearest of the `known` names, or all of them.

    Nearest are those whose last part it is, as `a.name`, then those that begin with it.
    """
    known = sorted(known)
    near = [own for own in known if own.rpartition(".")[2] == name]
    near += [own for own in known if name and own.startswith(name)]
    near = near[:_MANY] or difflib.get_close_matches(name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"there are {known}"
    return UsageError(f"{kind}: there is no {name!r}; {hint}")


# --- fields -------------------------------------------------------------------------

RematPolicy = Literal["none", "blocks", "convs"]
RecipeName = Literal["none", "shift", "cifar", "goyal", "resnet", "fb_resnet_torch"]


def _field(default: Any, about: str, **more: Any) -> Any:
    """A dataclass field, with what it means in a line of a help text."""
    return dataclasses.field(default=default, metadata={"about": about, **more})


def _bounded(default: Any, about: str, allowed: str, check: Callable[[Any], bool]) -> Any:
    """A field whose number (or each of whose numbers) must pass `check`."""
    return _field(default, about, allowed=allowed, check=check)


def _positive(default: Any, about: str) -> Any:
    return _bounded(default, about, "greater than 0", lambda value: value > 0)


def _not_negative(default: Any, about: str) -> Any:
    return _bounded(default, about, "0 or more", lambda value: value >= 0)


def _fraction(default: Any, about: str) -> Any:
    return _bounded(default, about, "at least 0 and below 1", lambda value: 0 <= value < 1)


def remat_policy(value: Any) -> Any:
    """The name of a way to rematerialise; True, False and None stood for two of them."""
    if value is None or isinstance(value, bool):
        return "blocks" if value else "none"
    return value


@dataclasses.dataclass(frozen=True)
class ModelKwargs:
    """Options of the model; None keeps what its name stands for."""

    stage_sizes: tuple[int, ...] | None = _positive(None, "blocks of each stage")
    width: int | None = _positive(None, "channels of the first stage")
    shortcut: Literal["A", "B", "C", "none"] | None = _field(
        None, "identity with zeros (A), projections where shapes change (B), everywhere (C)"
    )
    stochastic_depth: float | None = _fraction(None, "chance to drop the last branch")
    remat: RematPolicy = _field(
        "none",
        "kept for the backward pass, the rest being computed twice: all (none), what "
        "blocks take, or what convolutions put out",
        earlier=remat_policy,
    )


@dataclasses.dataclass(frozen=True)
class NormConfig:
    """Batch normalisation."""

    virtual_batch_size: int = _not_negative(
        0, "consecutive examples that share statistics; 0 = the whole global minibatch"
    )
    kind: Literal["batch", "none"] = _field("batch", "none: a bias a channel in its place")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """The data set and how it is read."""

    name: str = _field("digits", "digits, cifar10, imagenet2012 or folder")
    dir: str | None = _field(
        None, "where it is; none = $TFDS_DATA_DIR, or ~/tensorflow_datasets"
    )
    image_size: int = _positive(8, "side of the images that the net sees, in pixels")
    recipe: RecipeName | None = _field(
        None, "the training augmentation; left out, the data set's own"
    )
    skip_errors: int = _not_negative(
        0, "damaged examples a host may leave out of a split; 0 = stop at the first"
    )
    on_device: bool | None = _field(
        None, "the whole data set in the memory of the devices; none = if it is small"
    )
    steps_per_dispatch: int = _not_negative(
        0, "updates that one dispatch makes of data on the device; 0 = 1 on a CPU, else 8"
    )
    num_workers: int | None = _not_negative(
        None, "processes that decode; 0 = threads of this one; none = by the cores"
    )
    num_threads: int = _not_negative(0, "decoding threads of each process; 0 = one a core")
    prefetch: int = _positive(2, "batches made ahead")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are written and how many are kept."""

    every_steps: int = _not_negative(0, "between checkpoints; 0 = at every evaluation")
    keep: int = _positive(2, "so many of the latest are kept")
    keep_every_steps: int = _not_negative(0, "and those of all multiples of this; 0 = none")
    best_metric: Literal["top1", "top5", "loss", "none"] = _field(
        "top1", "and the best, by this number of the test split"
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """One run. Holds references (rate per 256 examples, epochs), no derived value."""

    seed: int = _bounded(
        0,
        "of weights, data order and augmentation",
        "from 0 to 2**32 - 1",
        lambda value: 0 <= value < 2**32,
    )

    model: str = _field("cifar_resnet20", "such as resnet50; docs/models.md has them all")
    model_kwargs: ModelKwargs = ModelKwargs()
    num_classes: int = _positive(10, "of the data set")
    dtype: Literal["float32", "bfloat16", "float16"] = _field(
        "float32", "of the computation; parameters and statistics are float32"
    )
    init: str = _field(
        "msra_fan_out",
        "how weights are drawn: msra_fan_out, msra_fan_in, xavier, xavier_uniform, lecun, "
        "normal, orthogonal or delta_orthogonal, or one of these with _zero_gamma",
    )
    init_from: str | None = _field(
        None, "a workdir or checkpoint whose weights the run starts from"
    )
    freeze_at: int = _not_negative(
        0,
        "1 keeps the stem of those weights as it is, 2 also the first stage, ..., one more "
        "than there are stages all but the classifier; 0 = nothing",
    )
    norm: NormConfig = NormConfig()

    batch_size: int = _positive(128, "the global minibatch, over all devices")
    microbatch: int = _not_negative(
        0, "examples of a device in one backward pass, the rest following; 0 = all at once"
    )
    optimizer: Literal["sgd", "lars"] = _field("sgd", "both with momentum")
    lr_per_256: float = _positive(0.1, "learning rate, times batch_size / 256")
    schedule: Literal["step", "cosine"] = _field(
        "step", "a tenth of the rate at drop_epochs, or half a cosine"
    )
    warmup: Literal["goyal", "gradual", "constant", "none"] = _field(
        "goyal", "a rate that grows, or is small; goyal = gradual, of minibatches over 256"
    )
    warmup_epochs: float = _not_negative(5.0, "how long it takes")
    warmup_start_lr: float | None = _not_negative(
        None, "the rate it starts with; none = lr_per_256"
    )
    drop_epochs: tuple[float, ...] = _positive(
        (30.0, 60.0, 80.0), "when schedule=step divides the rate by ten"
    )
    num_epochs: float = _positive(90.0, "passes over the training split")
    momentum: float = _fraction(0.9, "of the optimizer")
    nesterov: bool = _field(True, "Nesterov's form of momentum")
    weight_decay: float = _not_negative(1e-4, "L2, of all but scales and biases of norms")
    head_lr_multiplier: float = _positive(1.0, "of the classifier's learning rate")
    label_smoothing: float = _fraction(0.0, "of the training loss; evaluation has none")
    ema_decay: float = _fraction(
        0.0,
        'of the average over updates of the weights, evaluated as "test_ema"; 0 = none',
    )
    precise_bn_examples: int = _bounded(
        0,
        "training examples over which batch norm's statistics are taken anew after the "
        "last update; 0 = the run ends with its running averages",
        "0 or from 2 to 2**30",
        lambda value: value == 0 or 2 <= value <= 2**30,
    )

    data: DataConfig = DataConfig()

    eval_every_epochs: float = _positive(1.0, "between evaluations; the last is always")
    checkpoint: CheckpointConfig = CheckpointConfig()
    parallel: Literal["pmap", "shard_map"] = _field("pmap", "what runs on all devices")
    log_every_steps: int = _positive(20, "updates that one line of metrics.jsonl is of")
    published_error: str | None = _field(
        None, "top-1 % of the source, which `python -m resjax.report` shows"
    )


# Fields that cannot change the numbers of a run, and so may differ when it resumes.
FREE_FIELDS = (
    "parallel",
    "microbatch",
    "log_every_steps",
    "published_error",
    "data.dir",
    "data.skip_errors",
    "data.on_device",
    "data.steps_per_dispatch",
    "data.num_workers",
    "data.num_threads",
    "data.prefetch",
    "checkpoint.every_steps",
    "checkpoint.keep",
    "checkpoint.keep_every_steps",
    "checkpoint.best_metric",
)

# --- values -> Config ---------------------------------------------------------------

_UNIONS = (types.UnionType, typing.Union)  # `A | None` is one or the other


def _describe(kind: Any) -> str:
    """What a field of this type takes, in words."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(map(str, args))
    if origin in _UNIONS:
        said = "none" in typing.get_args(args[0])  # as one of its values
        return _describe(args[0]) + ("" if said else " or none")
    if origin is tuple:
        return f"a list of {_describe(args[0])}s, separated by commas"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names[kind]


def _fit(value: Any, kind: Any) -> Any:
    """`value` as a field of type `kind` holds it; raises TypeError if it does not fit."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in args:
        return value
    if origin in _UNIONS:
        if value is None and type(None) in args:
            return None
        return _fit(value, args[0])
    if origin is tuple:
        items = value if isinstance(value, tuple | list) else (value,)
        return tuple(_fit(item, args[0]) for item in items)
    if kind is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if kind in (int, bool, str) and type(value) is kind:
        return value
    raise TypeError


def _from_text(text: str, kind: Any) -> Any:
    """The Python value that a command line means by `text` for a field of this type."""
    words = {"true": True, "false": False, "none": None}
    is_choice = typing.get_origin(kind) is Literal
    if typing.get_origin(kind) in _UNIONS:
        kind = typing.get_args(kind)[0]
        if text.lower() == "none" and "none" not in typing.get_args(kind):
            return None
        return _from_text(text, kind)
    if kind is str or (is_choice and text.lower() not in ("true", "false")):
        return text
    if text.lower() in words:
        return words[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text  # fits no field that is not text, and so is named in the error


def fields(cls: type = Config, prefix: str = "") -> dict[str, dataclasses.Field]:
    """Every field by its dotted name, `batch_size`, `data.name`, ..., in order."""
    found: dict[str, dataclasses.Field] = {}
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            found |= fields(typing.cast(type, field.type), f"{prefix}{field.name}.")
        else:
            found[prefix + field.name] = field
    return found


def flatten(config: Config) -> dict[str, Any]:
    """The config as {dotted name: value}."""
    flat = {}
    for name in fields():
        section, _, leaf = name.rpartition(".")
        owner = getattr(config, section) if section else config
        if not hasattr(owner, leaf):
            raise UsageError(f"config.{section}: {owner!r} has no field {leaf!r}")
        flat[name] = getattr(owner, leaf)
    return flat


def unflatten(values: dict[str, Any]) -> Config:
    """A validated config from {dotted name: value}; what is missing takes its default.

    Raises:
      UsageError: an unknown name, a value of a wrong type or outside its range.
    """
    own, nested = {}, {}
    known = fields()
    for name, value in values.items():
        if name not in known:
            raise unknown_name("config", name, known)
        field = known[name]
        value = field.metadata.get("earlier", lambda value: value)(value)
        try:
            value = _fit(value, field.type)
        except (TypeError, OverflowError):
            allowed = _describe(field.type)
            raise UsageError(f"config.{name}: {value!r} is not {allowed}") from None
        if value == "":
            raise UsageError(f"config.{name}: '' is empty; leave it out for the default")
        numbers = value if isinstance(value, tuple) else (value,)
        check = field.metadata.get("check")
        if check and not all(n is None or check(n) for n in numbers):
            allowed = field.metadata["allowed"]
            raise UsageError(f"config.{name}: {value!r} is not {allowed}")
        own[name] = value
    for field in dataclasses.fields(Config):
        if dataclasses.is_dataclass(field.type):
            start = f"{field.name}."
            inner = {n[len(start) :]: own.pop(n) for n in list(own) if n.startswith(start)}
            nested[field.name] = typing.cast(type, field.type)(**inner)
    return Config(**own, **nested)


def validate(config: Config) -> Config:
    """The config with every field checked: alone by its type and range, then together.

    Raises:
      UsageError: naming the field, its value and what is allowed.
    """
    config = unflatten(flatten(config))
    drops = config.drop_epochs
    if list(drops) != sorted(set(drops)):
        raise UsageError(f"config.drop_epochs: {drops} must be increasing")
    group, batch = config.norm.virtual_batch_size, config.batch_size
    if group and batch % group:
        raise UsageError(
            f"config.norm.virtual_batch_size: {group} does not divide "
            f"config.batch_size={batch}"
        )
    if config.freeze_at and config.init_from is None:
        raise UsageError(
            f"config.freeze_at: {config.freeze_at}, but there is no config.init_from, so "
            "that layers would stay as they were drawn"
        )
    if config.precise_bn_examples and config.norm.kind == "none":
        raise UsageError(
            f"config.precise_bn_examples: {config.precise_bn_examples}, but a net of "
            "config.norm.kind=none has no statistics; allowed: 0"
        )
    if config.precise_bn_examples and config.freeze_at:
        raise UsageError(
            f"config.precise_bn_examples: {config.precise_bn_examples}, but the statistics "
            f"of frozen layers stay as they are (config.freeze_at={config.freeze_at}); "
            "allowed: 0"
        )
    return config


def warmup_kind(config: Config) -> Literal["gradual", "constant", "none"]:
    """The warmup of a run: goyal warms up, gradually, only minibatches over 256."""
    if config.warmup == "goyal":
        return "gradual" if config.batch_size > 256 else "none"
    return config.warmup


def unread_fields(config: Config) -> dict[str, str]:
    """The fields of the schedule that change nothing in a run: {name: what they need}."""
    unread = {}
    if config.schedule != "step":
        unread["drop_epochs"] = "config.schedule=step"
    warmup = "config.warmup=gradual or constant, or goyal with config.batch_size over 256"
    if warmup_kind(config) == "none":
        unread |= {"warmup_epochs": warmup, "warmup_start_lr": warmup}
    elif not config.warmup_epochs:
        unread["warmup_start_lr"] = "config.warmup_epochs above 0"
    return unread


def check_varied(names: Iterable[str], members: Iterable[Config]) -> None:
    """Raises `UsageError` for a field that varies among runs none of which reads it."""
    unread = [unread_fields(config) for config in members]
    for name in names:
        if all(name in own for own in unread):
            raise UsageError(
                f"config.{name}: it varies, and no run reads it; it needs {unread[0][name]}"
            )


def from_dict(nested: dict[str, Any], ignore_unknown: bool = False) -> Config:
    """The config that `dataclasses.asdict` wrote, validated.

    Args:
      nested: sections in a dict of their own.
      ignore_unknown: leave out fields of another version.

    Raises:
      UsageError: an unknown name, a value of a wrong type or outside its range.
    """
    if not isinstance(nested, dict):
        raise UsageError(f"config: {nested!r} is no set of fields")
    flat: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
        else:
            flat[name] = value
    if ignore_unknown:
        flat = {name: value for name, value in flat.items() if name in fields()}
    return validate(unflatten(flat))


def differences(before: Config, now: Config) -> list[str]:
    """The fields in which two configs differ and that change the numbers of a run."""
    old, new = flatten(before), flatten(now)
    return [
        f"config.{name} was {old[name]!r} and is now {new[name]!r}"
        for name in new
        if new[name] != old[name] and name not in FREE_FIELDS
    ]


# --- the command line ---------------------------------------------------------------


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are `UsageError`s and which guesses no abbreviation."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **kwargs,
        )

    def error(self, message: str) -> NoReturn:
        """Called by argparse for a flag that does not fit."""
        raise UsageError(message)


CLUSTER_FLAGS = ("coordinator_address", "num_processes", "process_id")


def add_cluster_flags(parser: argparse.ArgumentParser) -> None:
    """The flags with which one of several processes finds the others."""
    flags = parser.add_argument_group(
        "several hosts", "found in the environment of SLURM, TPU pods, GKE; elsewhere:"
    )
    flags.add_argument(
        "--coordinator_address", metavar="HOST:PORT", help="where process 0 listens"
    )
    flags.add_argument("--num_processes", type=int, metavar="N", help="of the run")
    flags.add_argument("--process_id", type=int, metavar="I", help="of this one, from 0")


def fields_help() -> str:
    """The config fields, their defaults, types and meanings, as lines of a help text."""
    lines = ["config fields, set with --config.FIELD=VALUE, and their defaults:"]
    for name, field in fields().items():
        allowed = field.metadata.get("allowed")
        what = _describe(field.type) + (f", {allowed}" if allowed else "")
        lines.append(f"  {name} = {field.default}")
        text, indent = f"{field.metadata['about']} ({what})", " " * 6
        lines += textwrap.wrap(text, 88, initial_indent=indent, subsequent_indent=indent)
    return "\n".join(lines)


def load_config(path: Path) -> Config:
    """The config that the Python file at `path` returns from `get_config()`.

    Raises:
      UsageError: no such file, or one that does not run or returns something else.
    """
    if not path.is_file():
        raise _missing_config(path)
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except Exception as error:
        text = " ".join(str(error).split())
        raise UsageError(f"--config: {path}: {type(error).__name__}: {text}") from error
    if not isinstance(config, Config):
        raise UsageError(f"--config: {path}: get_config() returned no resjax Config")
    return validate(config)


def _missing_config(path: Path) -> UsageError:
    """Offers the file that is meant if but its folder or ending lacks; others if not."""
    folders = [path.parent]
    if path.parent == Path() and Path("configs").is_dir():
        folders.append(Path("configs"))
    for folder in folders:
        if (meant := folder / f"{path.stem}.py").is_file():
            return UsageError(f"--config: there is no file {path}; did you mean {meant}?")
    there = sorted(str(p) for p in folders[-1].glob("*.py"))
    more = f" and {len(there) - _MANY} more" if len(there) > _MANY else ""
    return UsageError(f"--config: there is no file {path}; there are {there[:_MANY]}{more}")


def override(config: Config, words: Iterable[str]) -> Config:
    """`config` with every `--config.FIELD=VALUE` of `words` applied, validated.

    Raises:
      UsageError: a word of another form, an unknown field, a value that does not fit.
    """
    flat, known = flatten(config), fields()
    for word in words:
        name, equals, text = word.removeprefix("--config.").partition("=")
        if not word.startswith("--config."):
            raise UsageError(f"{word!r} is no flag of this command; see --help")
        if name not in known:
            raise unknown_name("config", name, known)
        if not equals:
            raise UsageError(f"--config.{name}: write --config.{name}=VALUE")
        flat[name] = _from_text(text, known[name].type)
    changed = unflatten(flat)
    reseeded = dataclasses.replace(changed, seed=config.seed)
    told = changed.published_error != config.published_error
    if differences(config, reseeded) and not told:  # a source reports its own recipe
        changed = dataclasses.replace(changed, published_error=None)
    return validate(changed)


def report_error(error: BaseException) -> int:
    """Says on standard error what one of `EXPECTED_ERRORS` is; returns the exit code."""
    path, line = Path(sys.argv[0]), " ".join(str(error).split())
    name = path.name.replace("__main__.py", f"python -m resjax.{path.parent.name}")
    if isinstance(error, KeyboardInterrupt):
        code, line = 130, "interrupted"
    else:
        code, line = (1, line) if isinstance(error, RunError) else (2, f"error: {line}")
    print(f"{name}: {line}", file=sys.stderr)
    return code


def run_command(main: Callable[[list[str]], int]) -> NoReturn:
    """Runs `main(arguments)` and exits with its code; expected errors are one line."""
    try:
        sys.exit(main(sys.argv[1:]))
    except EXPECTED_ERRORS as error:
        sys.exit(report_error(error))
