"""The table of comparisons: configs that build, verdicts of made-up numbers."""

import dataclasses

import jax
import numpy as np
import pytest
from conftest import ROOT
from etils import epath

from resjax import build, comparisons, report, sweep
from resjax import config as configs
from resjax.comparisons import COMPARISONS

NAMES = sorted(COMPARISONS)


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def made_up(name, error_of):
    """Rows of a comparison whose runs came to error_of(config), without training."""
    members, _ = sweep.plan(name, {})
    groups = {}
    for member in members:
        shared = dataclasses.replace(member.config, seed=0)
        error = error_of(member.config) + (0.5 - member.config.seed % 2)  # a spread
        result = report.Result(
            workdir=member.workdir,
            config=member.config,
            error=error,
            num_evaluations=1,
            train_loss=error / 10,
            train_error=error,
            test_loss=error / 10,
            curve={1.0: 90.0, 2.0: error},
            train_curve={1.0: 90.0, 2.0: error},
        )
        groups.setdefault(shared, []).append(result)
    flat = [configs.flatten(shared) for shared in groups]
    names = [name for name in flat[0] if len({row[name] for row in flat}) > 1]
    return [
        report.Row({name: configs.flatten(shared)[name] for name in names}, results, "")
        for shared, results in groups.items()
    ]


@pytest.mark.parametrize(
    "name",
    [
        name if name == "gamma" else pytest.param(name, marks=pytest.mark.slow)
        for name in NAMES
    ],
)
def test_members_build_have_three_seeds_and_differ_in_their_workdirs(name):
    members, folder = sweep.plan(name, {})
    assert folder == epath.Path(f"runs/sweep_{name}")
    assert len({member.workdir for member in members}) == len(members)
    assert len({member.config.seed for member in members}) >= 3
    build.check_model(members[0].config)
    build.check_model(members[-1].config)


def init_errors(xavier22, msra22, xavier30, msra30):
    by_shape = {(10,): (xavier22, msra22), (14,): (xavier30, msra30)}

    def error_of(config):
        return by_shape[config.model_kwargs.stage_sizes][config.init == "msra_fan_in"]

    return error_of


# What the verdict begins with, for errors of the runs.
CASES = [
    ("shortcuts", "As", lambda c: 20 if c.model_kwargs.shortcut == "none" else 10),
    ("shortcuts", "In part as", lambda c: 4 if c.model_kwargs.shortcut == "A" else 5.5),
    (
        "shortcuts",
        "In part as",
        lambda c: {"A": 4, "none": 9}.get(c.model_kwargs.shortcut, 6),
    ),
    ("shortcuts", "Not as", lambda c: 10 if c.model_kwargs.shortcut == "none" else 20),
    ("preact", "As", lambda c: 10 if "preact" in c.model else 20),
    ("preact", "Not as", lambda c: 20 if "preact" in c.model else 10),
    ("resnext", "As", lambda c: 20 if "1x64d" in c.model else 10),
    ("resnext", "In part as", lambda c: {"1x": 5, "32": 3}.get(c.model[16:18], 40)),
    ("resnext", "Not as", lambda c: 10 if "1x64d" in c.model else 20),
    ("gamma", "As", lambda c: 10 if "zero_gamma" in c.init else 20),
    ("gamma", "In part as", lambda c: 10 + 9 * (c.init[-1] == "t" and c.batch_size > 200)),
    ("gamma", "Not as", lambda c: 20 if "zero_gamma" in c.init else 10),
    ("bn", "As", lambda c: 10 if c.norm.kind == "batch" or c.lr_per_256 < 0.5 else 60),
    ("bn", "In part as", lambda c: 10 if c.norm.kind == "batch" else 60),
    ("bn", "Not as", lambda c: 60),
    ("depth", "As", lambda c: 60 if c.model == "cifar_plain56" else 10),
    ("depth", "In part as", lambda c: 10 if "20" in c.model else 60),
    ("depth", "Within", lambda c: 1 if "plain" in c.model else 10 - int(c.model[-2:]) / 9),
    ("depth", "Not as", lambda c: 10 if c.model == "cifar_plain56" else 60),
    ("minibatch", "As", lambda c: 10 if c.batch_size <= 256 else 30),
    ("minibatch", "In part as", lambda c: 5),  # which never becomes worse
    ("minibatch", "Not as", lambda c: 10 if c.batch_size <= 64 else 30),
    ("warmup", "As", lambda c: 10 if c.warmup == "gradual" else 20),
    ("warmup", "In part as", lambda c: 10 if c.warmup == "constant" else 2),
    ("warmup", "Not as", lambda c: 20 if c.warmup == "gradual" else 10),
    ("init", "As", init_errors(20, 10, 90, 10)),
    ("init", "In part as", init_errors(90, 90, 90, 75)),
    ("init", "Not as", init_errors(90, 90, 10, 90)),
]


@pytest.mark.parametrize(
    "name, outcome, error_of",
    CASES,
    ids=[f"{name}-{outcome}" for name, outcome, _ in CASES],
)
def test_a_verdict_says_whether_the_claim_holds_and_gives_mean_and_deviation(
    name, outcome, error_of
):
    rows = made_up(name, error_of)
    assert COMPARISONS[name].why_no_verdict(rows) is None
    verdict = COMPARISONS[name].verdict(comparisons.Table(rows))
    rest = "the noise: " if outcome == "Within" else "in the paper: "
    assert verdict.startswith(f"{outcome} {rest}")
    assert " +- 0.5" in verdict and verdict.endswith(".") and "\n" not in verdict


@pytest.mark.parametrize("name", NAMES)
def test_every_comparison_can_be_as_and_not_as_in_the_paper(name):
    assert {"As", "Not as"} <= {outcome for own, outcome, _ in CASES if own == name}


def test_differences_within_two_standard_errors_are_noise():
    # Two of the seeds at +0.5 and two at -0.5: 0.577 apart, 0.289 the error of each mean.
    table = comparisons.Table(made_up("gamma", lambda c: 10 + 0.8 * ("zero" in c.init)))
    one, zero = ({"init": name, "batch_size": 128} for name in table.values("init"))
    assert table.below(one, zero) == 0  # 0.8 < 2 * 0.289 * sqrt(2) = 0.816
    assert "Within the noise: " in COMPARISONS["gamma"].verdict(table)
    table = comparisons.Table(made_up("gamma", lambda c: 10 + 0.83 * ("zero" in c.init)))
    assert (table.below(one, zero), table.below(zero, one)) == (1, -1)
    assert COMPARISONS["gamma"].verdict(table).startswith("Not as in the paper: ")


def test_minibatches_are_flat_up_to_the_first_that_is_worse():
    errors = {64: 10, 128: 30, 256: 10, 512: 10, 1024: 40}
    table = comparisons.Table(made_up("minibatch", lambda c: errors[c.batch_size]))
    verdict = COMPARISONS["minibatch"].verdict(table)
    assert verdict.startswith("Not as in the paper: ") and "up to 64 it is" in verdict


def test_minibatches_that_are_better_are_not_called_equal():
    table = comparisons.Table(made_up("minibatch", lambda c: 2 if c.batch_size > 64 else 9))
    verdict = COMPARISONS["minibatch"].verdict(table)
    assert "up to 1024 it is not above that of 64" in verdict


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_other_fields_values_or_seeds_have_no_verdict(name):
    def rows():
        return made_up(name, lambda config: 10)

    why = COMPARISONS[name].why_no_verdict
    assert why(rows()) is None
    assert why(rows()[1:]) is not None
    more = rows()
    more[0].fields["weight_decay"] = 0.1
    assert "alone" in why(more)
    other = rows()
    field = next(iter(other[0].fields))
    for row in other:
        row.fields[field] = "another"
    assert f"{field}=" in why(other)
    few = rows()
    del few[-1].results[2:]
    assert "three seeds" in why(few)


def test_one_seed_and_diverged_runs_tell_no_order():
    assert report.order([1.0], [2.0]) == report.order([1.0, 1.1], [2.0]) == 0
    assert report.order([1.0, 1.1], [2.0, 2.1]) == -1
    assert report.order([2.0, 2.1], [1.0, float("nan")]) == 0
    assert report.order([1.0, 1.0], [1.0, 1.0]) == 0
    assert report.order([1.0, 1.0], [0.9, 0.9]) == 1


@pytest.mark.parametrize("name", NAMES)
def test_what_a_comparison_is_about_holds_on_any_config(name):
    imagenet = {
        "shortcuts": "imagenet_resnet50",
        "gamma": "imagenet_resnet50",
        "warmup": "imagenet_resnet50_8k",
    }
    path = ROOT / "configs" / f"{imagenet.get(name, 'cifar10_resnet20')}.py"
    members, where = sweep.plan(name, {}, path)
    assert where == epath.Path(f"runs/sweep_{name}_{path.stem}")
    for field, text in COMPARISONS[name].fixed.items():
        values = {
            report.format_value(configs.flatten(m.config)[field]).lower() for m in members
        }
        assert values == {text}
    schedules = (build.build_schedule(m.config, 50_000) for m in members)
    for schedule, derived in schedules:
        rates = jax.vmap(schedule)(np.arange(derived["warmup_steps"] + 1))
        assert (np.diff(rates) >= 0).all()  # a warmup, if there is one, warms up
    base = configs.load_config(path)
    assert {m.config.num_epochs for m in members} == {base.num_epochs}


def test_mean_and_deviation_of_a_verdict_are_those_of_the_runs():
    # Seeds 0 to 3 are at +0.5, -0.5, +0.5, -0.5: deviation 1/sqrt(3).
    table = comparisons.Table(made_up("shortcuts", lambda c: 10.0))
    assert table.text(model_kwargs__shortcut="A") == "10.00 +- 0.58 %"
    assert table.mean("train_loss", model_kwargs__shortcut="C") == pytest.approx(1.0)


@pytest.mark.parametrize(
    "text, values",
    [
        ("0.1, 0.2", ["0.1", "0.2"]),
        (" 0.1 ,0.2 ", ["0.1", "0.2"]),
        ("[1, 1,1],[2,2,2]", ["1,1,1", "2,2,2"]),
        ("(1,1), ( 2,2 )", ["1,1", "2,2"]),
        ("(1,),[2]", ["1,", "2"]),
        ("runs/a (1),none", ["runs/a (1)", "none"]),
    ],
)
def test_values_are_split_at_commas_outside_of_brackets(text, values):
    assert comparisons.split_values(text) == values


def test_help_lists_every_comparison():
    text = comparisons.describe()
    assert all(f"  {name} " in text and COMPARISONS[name].title in text for name in NAMES)


def test_a_warmup_that_would_not_rise_is_refused():
    path = ROOT / "configs/cifar10_resnet20.py"
    with pytest.raises(configs.UsageError, match=r"0.2 up to the peak, 0.1 at .*size=128"):
        sweep.plan("warmup", {}, path)
    assert sweep.plan("warmup", {}, path, ["--config.batch_size=1024"])
