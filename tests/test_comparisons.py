"""The table of comparisons: configs that build, verdicts of made-up numbers, pictures."""

import dataclasses

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


# Whether the claim of the paper holds, for errors that say so and for their opposite.
ERRORS = {
    "shortcuts": lambda c: 20 if c.model_kwargs.shortcut == "none" else 10,
    "preact": lambda c: 10 if "preact" in c.model else 20,
    "resnext": lambda c: 10 if "32x4d" in c.model else 20,
    "gamma": lambda c: 10 if "zero_gamma" in c.init else 20,
    "bn": lambda c: 10 if c.norm.kind == "batch" or c.lr_per_256 < 0.05 else 60,
    "depth": lambda c: int(c.model[-2:]) * (1 if "plain" in c.model else -1) + 60,
    "minibatch": lambda c: 10 if c.batch_size <= 256 else 30,
    "warmup": lambda c: 10 if c.warmup == "gradual" else 20,
    "init": lambda c: 85 if c.init.startswith("xavier") else 10,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_verdict_says_whether_the_claim_holds_and_gives_mean_and_deviation(name):
    verdict = COMPARISONS[name].verdict
    good = verdict(comparisons.Table(made_up(name, ERRORS[name])))
    bad = verdict(comparisons.Table(made_up(name, lambda c: 100 - ERRORS[name](c))))
    assert good.startswith("As in the paper: ") and bad.startswith("Not as in the paper: ")
    assert " +- 0.5" in good and good.endswith(".") and "\n" not in good


def test_differences_within_two_standard_errors_are_noise():
    # Two of the seeds at +0.5 and two at -0.5: 0.577 apart, 0.289 the error of each mean.
    table = comparisons.Table(made_up("gamma", lambda c: 10 + 0.8 * ("zero" in c.init)))
    one, zero = ({"init": name, "batch_size": 128} for name in table.values("init"))
    assert table.order(one, zero) == 0  # 0.8 < 2 * 0.289 * sqrt(2) = 0.816
    assert "Within the noise: " in COMPARISONS["gamma"].verdict(table)
    table = comparisons.Table(made_up("gamma", lambda c: 10 + 0.83 * ("zero" in c.init)))
    assert (table.order(one, zero), table.order(zero, one)) == (-1, 1)
    assert COMPARISONS["gamma"].verdict(table).startswith("Not as in the paper: ")


def test_minibatches_are_flat_up_to_the_first_that_is_worse():
    errors = {64: 10, 128: 30, 256: 10, 512: 10, 1024: 40}
    table = comparisons.Table(made_up("minibatch", lambda c: errors[c.batch_size]))
    verdict = COMPARISONS["minibatch"].verdict(table)
    assert verdict.startswith("Not as in the paper: ") and "up to 64 it is" in verdict


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_other_fields_or_values_have_no_verdict(name):
    rows = made_up(name, ERRORS[name])
    assert COMPARISONS[name].is_complete(rows)
    assert not COMPARISONS[name].is_complete(rows[1:])
    rows[0].fields["weight_decay"] = 0.1
    assert not COMPARISONS[name].is_complete(rows)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_comparison_is_about_holds_on_any_config(name):
    folder = "imagenet_resnet50" if name in ("shortcuts", "gamma", "warmup") else None
    path = ROOT / "configs" / f"{folder or 'cifar10_resnet20'}.py"
    members, where = sweep.plan(name, {}, path)
    assert where == epath.Path(f"runs/sweep_{name}_{path.stem}")
    for field, text in COMPARISONS[name].fixed.items():
        values = {str(configs.flatten(m.config)[field]).lower() for m in members}
        assert values == {text}
    base = configs.load_config(path)
    assert {m.config.num_epochs for m in members} == {base.num_epochs}


def test_mean_and_deviation_of_a_verdict_are_those_of_the_runs():
    # Seeds 0 to 3 are at +0.5, -0.5, +0.5, -0.5: deviation 1/sqrt(3).
    table = comparisons.Table(made_up("shortcuts", lambda c: 10.0))
    assert table.text(model_kwargs__shortcut="A") == "10.00 +- 0.58 %"
    assert table.mean("train_loss", model_kwargs__shortcut="C") == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["depth", "minibatch", "bn"])
def test_pictures_are_drawn_with_or_without_an_axis(name):
    rows = made_up(name, ERRORS[name])
    assert comparisons.draw(rows, COMPARISONS[name]).startswith(b"\x89PNG")
    assert comparisons.draw(rows).startswith(b"\x89PNG")


def test_help_lists_every_comparison():
    text = comparisons.describe()
    assert all(f"  {name} " in text and COMPARISONS[name].title in text for name in NAMES)
