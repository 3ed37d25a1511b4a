"""What the papers compare: rows of a table that `resjax.sweep` runs, and their verdicts.

To add one, add a row to `COMPARISONS`.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Iterable
from typing import Any

from resjax import build, report
from resjax.config import Config, UsageError, flatten, unknown_name
from resjax.report import Row, format_spread


class Table:
    """The rows of a comparison, by the values of their fields; `a__b` is the field a.b."""

    def __init__(self, rows: list[Row]):
        self.rows = rows

    def row(self, **fields: Any) -> Row:
        """The only row whose configs have these values."""
        wanted = {name.replace("__", "."): value for name, value in fields.items()}
        (row,) = (
            row
            for row in self.rows
            if wanted.items() <= flatten(row.results[0].config).items()
        )
        return row

    def values(self, field: str) -> list[Any]:
        """The values of a field, sorted."""
        return sorted({flatten(row.results[0].config)[field] for row in self.rows})

    def mean(self, number: str = "error", **fields: Any) -> float:
        """The mean over seeds of a number of `report.Result`."""
        return self.row(**fields).spread(number)[0]

    def text(self, number: str = "error", **fields: Any) -> str:
        """Mean +- std over seeds of a number of `report.Result`, in percent or nats."""
        is_loss = number == "train_loss"
        spread = format_spread(self.row(**fields).spread(number), 3 if is_loss else 2)
        return spread + (" nats" if is_loss else " %")

    def below(
        self, one: dict[str, Any], other: dict[str, Any], number: str = "error"
    ) -> int:
        """1 if a number is less in one row than in another, -1 if it is more.

        0 if that is within the noise, as `report.order` has it.
        """
        a, b = (self.row(**fields).values(number) for fields in (one, other))
        return -report.order(a, b)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A figure or table of a paper.

    Attributes:
      title: of the picture.
      claim: what the paper says, and where.
      vary: values by field, as `--vary` takes them.
      fixed: fields that all runs must have, whatever the config, as `--config.` takes them.
      digits: fields in which its runs on the digits differ from configs/digits.py.
      axis: the field along the axis of the picture; None: test and training error by epoch.
      verdict: what was measured, in a sentence.
    """

    title: str
    claim: str
    vary: dict[str, str]
    verdict: Callable[[Table], str]
    fixed: dict[str, str] = dataclasses.field(default_factory=dict)
    digits: dict[str, str] = dataclasses.field(default_factory=dict)
    axis: str | None = None

    def why_no_verdict(self, rows: list[Row]) -> str | None:
        """Why rows are not those that the verdict is of; None: they are.

        They are all combinations of the values of `vary`, of three seeds or more.
        """
        vary = {name: split_values(text) for name, text in self.vary.items()}
        del vary["seed"]
        for name, values in vary.items():
            if {report.format_value(row.fields.get(name)) for row in rows} != set(values):
                return f"it is of {name}={self.vary[name]}"
        if any(row.fields.keys() != vary.keys() for row in rows):
            return f"it is of runs that differ in {', '.join(vary)} and seed alone"
        if len(rows) != math.prod(map(len, vary.values())):
            return "it is of all combinations"
        if any(len(row.results) < 3 for row in rows):
            return "it is of three seeds or more"
        return None


def split_values(text: str) -> list[str]:
    """The values of FIELD=VALUE,VALUE,...; a list as a value is in brackets, () or []."""
    text = re.sub(r"\s*,\s*", ",", text.strip())
    values = re.split(r",(?![^(\[]*[)\]])", text)
    return [re.sub(r"^[(\[]\s*(.*?)\s*[)\]]$", r"\1", value) for value in values]


def outcome(signs: Iterable[int]) -> str:
    """How a verdict begins; of the signs, 1 is for the claim, -1 against, 0 in noise."""
    found = set(signs)
    if not found:
        return "Not comparable with the paper: "
    if found == {1}:
        return "As in the paper: "
    if 1 in found:
        return "In part as in the paper: "
    return "Not as in the paper: " if -1 in found else "Within the noise: "


def sign(holds: bool) -> int:
    """Of a condition that a claim has, for `outcome`."""
    return 1 if holds else -1


def _shortcuts(table: Table) -> str:
    kinds = {kind: {"model_kwargs__shortcut": kind} for kind in ("A", "B", "C", "none")}
    said = ", ".join(
        f"{'no shortcut' if kind == 'none' else kind} {table.text(**fields)}"
        for kind, fields in kinds.items()
    )
    signs = [table.below(kinds[kind], kinds["none"]) for kind in "ABC"]
    if table.below(kinds["A"], kinds["C"]) == 1:  # the paper has them the other way round
        signs.append(-1)
    return f"{outcome(signs)}test error is {said}."


def _preact(table: Table) -> str:
    original = {"model": "cifar_resnet110"}
    preact = {"model": "cifar_preact_resnet110"}
    return (
        f"{outcome([table.below(preact, original)])}at 110 layers, test error is "
        f"{table.text(**original)} with the original units and {table.text(**preact)} with "
        f"pre-activation; training loss {table.text('train_loss', **original)} and "
        f"{table.text('train_loss', **preact)}."
    )


_CARDINALITIES = ("1x64d", "2x40d", "4x24d", "8x14d", "32x4d")


def _resnext(table: Table) -> str:
    names = {kind: f"cifar_resnext29_{kind}" for kind in _CARDINALITIES}
    said = ", ".join(f"{kind} {table.text(model=name)}" for kind, name in names.items())
    one, *others = ({"model": name} for name in names.values())
    signs = (table.below(other, one) for other in others)
    return f"{outcome(signs)}at equal complexity, test error is {said}."


def _gamma(table: Table) -> str:
    one, zero = {"init": "msra_fan_out"}, {"init": "msra_fan_out_zero_gamma"}
    sizes = [{"batch_size": size} for size in table.values("batch_size")]
    said = "; ".join(
        f"at minibatch {size['batch_size']}, test error is {table.text(**size, **one)} "
        f"with 1 and {table.text(**size, **zero)} with 0"
        for size in sizes
    )
    signs = (table.below(size | zero, size | one) for size in sizes)
    return f"{outcome(signs)}{said}."


_TRAINS = 20  # percent of training error that a net has at most which trains


def _bn(table: Table) -> str:
    rates = table.values("lr_per_256")
    largest, said = {}, {}
    for kind in ("batch", "none"):
        errors = {
            rate: table.mean("train_error", norm__kind=kind, lr_per_256=rate)
            for rate in rates
        }
        trained = [rate for rate in rates if errors[rate] < _TRAINS]
        largest[kind] = max(trained, default=0.0)
        best = min(rates, key=lambda rate: errors[rate])
        text = table.text("train_error", norm__kind=kind, lr_per_256=best)
        end = f"trains up to a rate of {largest[kind]:g}" if trained else "does not train"
        said[kind] = f"{end}, best at {best:g} ({text})"
    # A net that trains at no rate is no control.
    signs = sign(largest["batch"] > largest["none"]), sign(largest["none"] > 0)
    return (
        f"{outcome(signs)}with batch norm the net {said['batch']}, and without it "
        f"{said['none']}; to train is to come to less than {_TRAINS} % training error, "
        "rates are for a minibatch of 256."
    )


_DEPTHS = (20, 56)


def _depth(table: Table) -> str:
    signs, said = [], []
    for kind, name in (("plain", "plain"), ("resnet", "residual")):
        shallow, deep = ({"model": f"cifar_{kind}{depth}"} for depth in _DEPTHS)
        signs.append(table.below(shallow, deep, "train_error"))
        errors, losses = (
            " and ".join(table.text(number, **fields) for fields in (shallow, deep))
            for number in ("train_error", "train_loss")
        )
        said.append(
            f"{name} nets of {_DEPTHS[0]} and {_DEPTHS[1]} layers end at training error "
            f"{errors} (loss {losses})"
        )
    plain, residual = signs
    begin = outcome([plain, -1] if residual == 1 else [plain])
    return f"{begin}{'; '.join(said)}."


def _minibatch(table: Table) -> str:
    sizes = [{"batch_size": size} for size in table.values("batch_size")]
    said = ", ".join(f"{size['batch_size']}: {table.text(**size)}" for size in sizes)
    above = [table.below(sizes[0], size) == 1 for size in sizes]
    flat = [*above, True].index(True)  # so many, from the smallest, are not above it
    signs = [table.below(sizes[0], sizes[-1]), 1] if flat >= len(sizes) / 2 else [-1]
    return (
        f"{outcome(signs)}test error by minibatch is {said}; "
        f"up to {sizes[flat - 1]['batch_size']} it is not above that of "
        f"{sizes[0]['batch_size']}, or within the noise."
    )


def _warmup(table: Table) -> str:
    kinds = [{"warmup": kind} for kind in ("none", "constant", "gradual")]
    said, losses = (
        ", ".join(f"{kind['warmup']} {table.text(number, **kind)}" for kind in kinds)
        for number in ("error", "train_loss")
    )
    signs = [table.below(kinds[-1], kind) for kind in kinds[:-1]]
    return f"{outcome(signs)}test error is {said}; training loss {losses}."


_STALLS = 80  # percent of training error from which a net has not begun to train


def _init(table: Table) -> str:
    trains, signs, said = {}, [], []
    for layers, sizes in ((22, (10,)), (30, (14,))):
        shape = {"model_kwargs__stage_sizes": sizes}
        xavier, msra = ({**shape, "init": name} for name in ("xavier", "msra_fan_in"))
        for name, fields in (("xavier", xavier), ("msra", msra)):
            trains[layers, name] = table.mean("train_error", **fields) < _STALLS
        signs.append(table.below(msra, xavier, "train_error"))
        said.append(
            f"{layers} layers end at training error {table.text('train_error', **xavier)} "
            f"with Xavier and {table.text('train_error', **msra)} with MSRA"
        )
    for (layers, name), begun in trains.items():
        signs.append(sign(begun != ((layers, name) == (30, "xavier"))))
    return f"{outcome(signs)}without batch norm, {'; '.join(said)}."


COMPARISONS: dict[str, Comparison] = {
    "shortcuts": Comparison(
        title="Shortcuts (He et al. 2015, table 3)",
        claim="He et al. 2015, table 3 (34 layers, ImageNet): plain 28.54 % error, A "
        "25.03, B 24.52, C 24.19.",
        vary={"model_kwargs.shortcut": "A,B,C,none", "seed": "0,1,2,3"},
        digits={"model": "cifar_resnet32", "num_epochs": "12", "eval_every_epochs": "2"},
        verdict=_shortcuts,
    ),
    "preact": Comparison(
        title="Original and pre-activation units (He et al. 2016, table 3)",
        claim="He et al. 2016, table 3 (CIFAR-10): 6.61 % error originally and 6.37 % with "
        "pre-activation at 110 layers, 7.61 and 4.92 % at 1,001.",
        vary={"model": "cifar_resnet110,cifar_preact_resnet110", "seed": "0,1,2,3"},
        fixed={"model_kwargs.remat": "blocks"},  # they are deep
        digits={
            "batch_size": "32",  # for more updates in the time
            "lr_per_256": "0.16",
            "num_epochs": "12",
            "eval_every_epochs": "3",
        },
        verdict=_preact,
    ),
    "resnext": Comparison(
        title="Cardinality at equal complexity, 11 layers (Xie et al. 2016, table 3)",
        claim="Xie et al. 2016, table 3 (50 layers, ImageNet): 1x64d 23.9 % error, 2x40d "
        "23.0, 4x24d 22.6, 8x14d 22.3, 32x4d 22.2.",
        vary={
            "model": ",".join(f"cifar_resnext29_{kind}" for kind in _CARDINALITIES),
            "seed": "0,1,2,3",
        },
        fixed={"model_kwargs.width": "32", "model_kwargs.stage_sizes": "1,1,1"},
        digits={"num_epochs": "10", "eval_every_epochs": "2"},
        verdict=_resnext,
    ),
    "gamma": Comparison(
        title="The last scale of each branch at 1 and at 0 (Goyal et al. 2017, table 2b)",
        claim="Goyal et al. 2017, table 2b (ResNet-50, ImageNet): with 1 and with 0, 23.84 "
        "and 23.60 % error at minibatch 256, 24.11 and 23.74 % at 8,192.",
        vary={
            "init": "msra_fan_out,msra_fan_out_zero_gamma",
            "batch_size": "128,512",
            "seed": "0,1,2,3",
        },
        digits={"num_epochs": "20", "eval_every_epochs": "2"},
        verdict=_gamma,
    ),
    "bn": Comparison(
        title="Batch norm and the learning rate (Ioffe & Szegedy 2015, section 4.2)",
        claim="Ioffe & Szegedy 2015, section 4.2: batch norm allows rates 5 to 30 times as "
        "large, at which the net without it does not train.",
        vary={
            "norm.kind": "batch,none",
            "lr_per_256": "0.05,0.2,0.8,3.2,12.8",
            "seed": "0,1,2,3",
        },
        # Of eight layers, which train without, too.
        fixed={
            "model": "cifar_plain20",
            "model_kwargs.stage_sizes": "1,1,1",
            "init": "msra_fan_in",
        },
        digits={"num_epochs": "30", "eval_every_epochs": "3"},
        axis="lr_per_256",
        verdict=_bn,
    ),
    "depth": Comparison(
        title="Depth, plain and residual (He et al. 2015, figure 6)",
        claim="He et al. 2015, figures 1 and 6 (CIFAR-10): a deeper plain net has the "
        "higher training error, a deeper residual net has not.",
        vary={
            "model": ",".join(
                f"cifar_{kind}{depth}" for kind in ("plain", "resnet") for depth in _DEPTHS
            ),
            "seed": "0,1,2,3",
        },
        digits={"lr_per_256": "0.08", "num_epochs": "15", "eval_every_epochs": "1"},
        verdict=_depth,
    ),
    "minibatch": Comparison(
        title="Minibatch size under linear scaling (Goyal et al. 2017, figure 1)",
        claim="Goyal et al. 2017, figure 1 (ResNet-50, ImageNet): 23.48 to 23.74 % error "
        "from minibatch 128 to 8,192, then 24.79, 27.55 and 33.96 % up to 65,536.",
        vary={"batch_size": "64,128,256,512,1024", "seed": "0,1,2,3"},
        fixed={"warmup": "goyal", "init": "msra_fan_out_zero_gamma"},
        digits={"num_epochs": "30", "eval_every_epochs": "3"},
        axis="batch_size",
        verdict=_minibatch,
    ),
    "warmup": Comparison(
        title="Warmup at a large minibatch (Goyal et al. 2017, table 1)",
        claim="Goyal et al. 2017, table 1 (ResNet-50, ImageNet, minibatch 8,192): no "
        "warmup 24.84 % error, constant 25.88, gradual 23.74.",
        vary={"warmup": "none,constant,gradual", "seed": "0,1,2,3"},
        fixed={"init": "msra_fan_out_zero_gamma"},
        digits={
            "batch_size": "512",
            "num_epochs": "40",
            "eval_every_epochs": "2",
            "lr_per_256": "0.4",
            "warmup_start_lr": "0.05",  # as for a minibatch of 32
            "warmup_epochs": "8",  # of not even three updates each
        },
        verdict=_warmup,
    ),
    "init": Comparison(
        title="Initialisation of 22 and 30 layers without batch norm (He et al. 2015)",
        claim="He et al. 2015 (arXiv:1502.01852), figures 2 and 3: 22 layers train with "
        "either, MSRA sooner; 30 train with MSRA, and stall with Xavier.",
        vary={
            "model_kwargs.stage_sizes": "10,14",
            "init": "xavier,msra_fan_in",
            "seed": "0,1,2",
        },
        fixed={
            "model": "cifar_plain20",
            "model_kwargs.width": "32",
            "norm.kind": "none",
        },
        digits={
            "batch_size": "8",  # for many updates: they begin slowly
            "lr_per_256": "0.05",
            "warmup": "none",
            "num_epochs": "20",
            "eval_every_epochs": "2",
            "log_every_steps": "90",  # twice an epoch
        },
        verdict=_init,
    ),
}


def get_comparison(name: str) -> Comparison:
    """The comparison of that name; raises `UsageError` with the nearest ones."""
    if name not in COMPARISONS:
        raise unknown_name("COMPARISON", name, COMPARISONS)
    return COMPARISONS[name]


def check_config(name: str, config: Config) -> None:
    """Raises `UsageError` for a config on which a comparison would say nothing."""
    row = COMPARISONS[name]
    models = (row.vary | row.fixed).get("model", "")
    size = config.data.image_size
    if models.startswith("cifar_") and size > 64:
        raise UsageError(
            f"COMPARISON: {name} compares CIFAR nets, and config.data.image_size is "
            f"{size}; allowed: up to 64"
        )
    start, peak = build.warmup_rates(config)
    if name == "warmup" and peak <= start:
        raise UsageError(
            f"COMPARISON: warmup is from a learning rate of {start:g} up to the peak, "
            f"{peak:g} at config.batch_size={config.batch_size}; allowed: a larger one"
        )


def describe() -> str:
    """The table as lines of a help text."""
    lines = [f"  {name:<10} {row.title}" for name, row in COMPARISONS.items()]
    return "\n".join(["comparisons:", *lines])
