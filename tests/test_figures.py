"""The figures' numbers are those of the trained nets, and their sentences say which."""

import csv
from functools import partial
from types import SimpleNamespace

import flax
import numpy as np
import pytest
from conftest import ROOT, random_variables
from scipy import stats

import figures
import resjax
from figures import lesion, paths, responses
from resjax import build_data
from resjax.analysis.paths import PathGradients, path_length_distribution
from resjax.config import Config, UsageError, load_config
from resjax.data import pipeline
from resjax.models.blocks import basic
from resjax.models.resnet import ResNet

IMAGES = np.random.RandomState(0).randn(5, 4, 4, 3).astype(np.float32)
NET = partial(ResNet, branch=basic, width=4, downsample=False, num_classes=10)
CONFIG = """
from functools import partial

from resjax.config import Config
from resjax.models.blocks import basic
from resjax.models.resnet import MODELS, ResNet

mini = partial(ResNet, (2, 1), basic, width=4, downsample=False, shortcut="A")
MODELS["mini_resnet"] = mini
MODELS["mini_plain"] = partial(mini, shortcut="none")
MODELS["mini_preact"] = partial(mini, preactivation=True)


def get_config():
    return Config(
        model="mini_resnet",
        batch_size=128,
        lr_per_256=0.2,
        warmup="none",
        num_epochs=3,
        eval_every_epochs=99,
    )
"""


def captured_stds(model, variables, images):
    """In float64, of what flax says that each norm puts out."""
    _, found = model.apply(
        variables,
        images,
        train=False,
        capture_intermediates=lambda module, _: "norm" in (module.name or ""),
    )
    flat = flax.traverse_util.flatten_dict(found["intermediates"])
    return {
        "/".join(path[:-1]): np.asarray(y, np.float64).std() for path, (y,) in flat.items()
    }


def test_responses_are_those_of_all_layers_but_projections_in_order():
    model = NET((1, 1), shortcut="B")
    variables = random_variables(model)
    expected = captured_stds(model, variables, IMAGES)
    assert expected.pop("stage2/block1/shortcut_norm")
    found = responses.response_stds(model.clone(remat="blocks"), variables, IMAGES)
    blocks = ["stage1/block1", "stage2/block1"]
    norms = [f"{block}/{norm}" for block in blocks for norm in ("norm1", "norm_out")]
    assert list(found) == ["stem/norm", *norms]
    assert found == pytest.approx(expected, rel=1e-5)


def test_responses_of_a_net_with_norms_before_convolutions_are_refused():
    model = NET((1,), preactivation=True)
    with pytest.raises(UsageError, match="pre-activation"):
        responses.response_stds(model, {}, IMAGES)


@pytest.mark.parametrize("is_plain", [True, False])
def test_lesions_are_every_block_alone_and_any_number_of_those_that_keep_the_shape(
    is_plain,
):
    model = NET((2, 2), shortcut="none" if is_plain else "A")
    variables = random_variables(model)
    rng = np.random.default_rng(0)
    rows = [row for row, _ in lesion.make_lesions(variables, is_plain, 3, rng)]
    deleted = [row["block"] for row in rows if row["lesion"] == "delete"]
    widening = [] if is_plain else ["stage2/block1"]
    same = {"stage1/block1", "stage1/block2", "stage2/block2"}
    assert sorted(deleted) == sorted([*same, *widening])
    counts = [row["count"] for row in rows if row["lesion"] == "delete random"]
    assert counts == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    # Stage 1's pair of blocks is the only one with equal shapes: of six pairs in the
    # order of four blocks it is the only one that an odd number of swaps turns round.
    taus = {row["count"]: row["kendall_tau"] for row in rows if row["count"] > 3}
    assert taus == {
        swaps: pytest.approx(1 - 2 / 6 * (swaps % 2)) for swaps in (5, 8, 12, 18, 27)
    }


def lesion_rows(model, intact, deleted):
    """Rows of two seeds, the second with two percent more of all errors."""
    return [
        {"model": model, "seed": seed, "lesion": kind, "count": 0, "block": b, "error": e}
        for seed in (0, 1)
        for kind, b, e in [("none", "", intact + 2 * seed)]
        + [("delete", f"block{i}", error + 2 * seed) for i, error in enumerate(deleted)]
    ]


@pytest.mark.parametrize(
    "residual, plain, said",
    [
        ([5, 6, 50], [80, 90, 85], "As"),
        ([50, 6, 5], [80, 90, 85], "In part as"),  # where the shape does not change
        ([70, 80, 60], [10, 20, 11], "Not as"),
    ],
)
def test_the_lesions_verdict_compares_medians_and_blocks_that_change_the_shape(
    residual, plain, said
):
    rows = lesion_rows("deep", 4, residual) + lesion_rows("flat", 10, plain)
    verdict = lesion.verdict(rows, {"deep": {"block2"}}, chance=90)
    assert verdict.startswith(f"{said} in the paper: ")
    medians, largest = sorted(residual)[1] + 1, max(residual) + 1
    assert (
        f"deep goes from 5.00 +- 1.41 % to a median of {medians:.2f} +- 1.41 and a maximum "
        f"of {largest:.2f} +- 1.41 over blocks, a mean of {residual[2] + 1:.2f} +- 1.41 "
        "over those that change the shape and "
        f"{(residual[0] + residual[1]) / 2 + 1:.2f} +- 1.41 over the others"
    ) in verdict


def test_the_lesions_verdict_leaves_out_plain_nets_that_did_not_train():
    rows = lesion_rows("deep", 4, [5, 6]) + lesion_rows("flat", 88, [90, 90])
    verdict = lesion.verdict(rows, {"deep": set()}, chance=90)
    assert verdict.startswith("Not comparable with the paper: ")
    assert "over blocks (it has hardly trained)" in verdict


@pytest.mark.parametrize(
    "deep, said", [(0.8, "As"), (1.2, "In part as"), (2.5, "In part as")]
)
def test_the_responses_verdict_wants_smaller_and_shrinking_responses(deep, said):
    measured = {
        "plain": np.full((2, 3), 2.0),
        "res3": np.array([[0.5, 1.0, 1.5], [0.6, 1.1, 1.6]]),
        "res5": np.full((2, 5), deep),
    }
    verdict = responses.verdict(measured, {"plain"}, set())
    assert verdict.startswith(f"{said} in the paper: ")
    assert "plain 2.000 +- 0.000, res3 1.050 +- 0.071" in verdict


def test_the_responses_verdict_leaves_out_nets_that_did_not_train():
    measured = {
        "plain": np.full((2, 3), 2.0),
        "plain5": np.full((2, 5), 0.1),
        "res3": np.ones((2, 3)),
    }
    verdict = responses.verdict(measured, {"plain", "plain5"}, {"plain5"})
    assert verdict.startswith("As in the paper: ")
    assert "plain5 0.100 +- 0.000 (it has hardly trained), res3" in verdict
    verdict = responses.verdict(measured, {"plain", "plain5"}, {"plain", "plain5"})
    assert verdict.startswith("Not comparable with the paper: ")


@pytest.mark.parametrize("length, said", [(10, "As"), (27, "Not as")])
def test_the_paths_verdict_has_the_papers_probabilities(length, said):
    """Veit et al. 2016, section 5: of 54 blocks."""
    share = np.eye(55)[length]
    probability = path_length_distribution(54)
    one = PathGradients(np.arange(55), probability, share, 0 * share, share)
    verdict = paths.verdict([one, one])
    assert verdict.startswith(f"{said} in the paper: of 54 blocks, 98.0 % of the paths")
    assert "0.4537 % through 5 to 17" in verdict
    assert f"{100 * (length == 10):.2f} +- 0.00 % of the gradient" in verdict
    assert f"through {length}.0 +- 0.0 to {length}.0 +- 0.0" in verdict


def test_one_seed_has_no_deviation():
    assert figures.text([1.0, 2.0, 4.5]) == "2.50 +- 1.80"
    assert figures.text([2.5]) == "2.50"


@pytest.mark.parametrize(
    "flag, told",
    [
        ("--vary=init=xavier,lecun", "'init' cannot vary here"),
        ("--images=0", "'0' is no whole number from 1"),
        ("--config.model_kwarg=1", "model_kwargs"),
    ],
)
@pytest.mark.parametrize("script", [responses, lesion, paths])
def test_a_wrong_flag_is_named(script, flag, told, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=told):
        script.main([flag])


@pytest.mark.parametrize(
    "script, models, told",
    [
        (responses, "cifar_preact_resnet110", "allowed: none with pre-activation"),
        (paths, "cifar_resnet20", "allowed: one of pre-activation"),
        (paths, "cifar_preact_resnet110,cifar_preact_resnet164", "more than one model"),
    ],
)
def test_a_net_that_a_figure_is_not_of_is_refused_before_training(
    script, models, told, monkeypatch, tmp_path
):
    monkeypatch.chdir(ROOT)
    with pytest.raises(UsageError, match=told):
        script.main([f"--vary=model={models}", f"--workdir={tmp_path / 'new'}"])
    assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def drawn(command, tmp_path_factory):
    """draw(script, models, *flags) -> .table .verdict .runs, of two seeds."""
    folder = tmp_path_factory.mktemp("figures")
    config = folder / "mini.py"
    config.write_text(CONFIG)

    def draw(script, models, *flags):
        done = command(
            "-m",
            f"figures.{script}",
            f"--config={config}",
            f"--workdir={folder}",
            f"--output={folder / script}",
            f"--vary=model={models}",
            "--vary=seed=0,1",
            *flags,
            cwd=ROOT,
            devices=2,
        )
        assert done.returncode == 0, done.stderr
        with (folder / script / f"{script}.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert (folder / script / f"{script}.png").read_bytes().startswith(b"\x89PNG")
        verdict = (folder / script / f"{script}.txt").read_text()
        assert verdict.strip() in done.stdout
        runs = {
            (model, seed): resjax.restore(folder / f"model={model},seed={seed}")
            for model in models.split(",")
            for seed in range(2)
        }
        return SimpleNamespace(table=table, verdict=verdict, runs=runs)

    load_config(config)  # to restore its models in this process
    return draw


@pytest.fixture(scope="module")
def held_out(data_dir):
    """The digits' test split, uint8, and its labels."""
    config = Config()
    source = build_data.build_source(config, "test")
    return pipeline.load_all(build_data.build_reader(config, source))


@pytest.mark.slow
@pytest.mark.long
def test_responses_of_trained_nets(drawn, held_out):
    found = drawn("responses", "mini_resnet,mini_plain", "--images=50")
    for model in ("mini_resnet", "mini_plain"):
        rows = [row for row in found.table if row["model"] == model]
        assert [int(row["layer"]) for row in rows] == list(range(1, 8))
        each = [
            captured_stds(run.model, run.variables, run.preprocess(held_out[0][:50]))
            for run in (found.runs[model, 0], found.runs[model, 1])
        ]
        for row in rows:
            values = [stds[row["path"]] for stds in each]
            assert float(row["mean"]) == pytest.approx(np.mean(values), rel=1e-4)
            assert float(row["std"]) == pytest.approx(np.std(values, ddof=1), abs=1e-4)


@pytest.mark.slow
@pytest.mark.long
def test_lesions_of_trained_nets(drawn, held_out):
    images, labels = held_out
    found = drawn("lesion", "mini_resnet,mini_plain", "--draws=2")
    run = found.runs["mini_resnet", 1]
    rows = [
        row for row in found.table if (row["model"], row["seed"]) == ("mini_resnet", "1")
    ]
    errors = {row["block"]: float(row["error"]) for row in rows if row["block"]}
    intact = next(float(row["error"]) for row in rows if row["lesion"] == "none")
    assert intact == pytest.approx(100 - run.evaluation["top1"], abs=1e-3)
    assert errors.keys() == {"stage1/block1", "stage1/block2", "stage2/block1"}
    for name, error in errors.items():
        flat = flax.traverse_util.flatten_dict(run.variables["params"], sep="/")
        for leaf in ("scale", "bias"):
            flat[f"{name}/norm_out/{leaf}"] = 0 * flat[f"{name}/norm_out/{leaf}"]
        params = flax.traverse_util.unflatten_dict(flat, sep="/")
        logits = run.model.apply(
            {**run.variables, "params": params}, run.preprocess(images), train=False
        )
        wrong = np.argmax(logits, axis=1) != labels
        assert error == pytest.approx(100 * wrong.mean(), abs=0.3)  # a tie, rounded


@pytest.mark.slow
@pytest.mark.long
def test_paths_of_trained_nets(drawn):
    found = drawn("paths", "mini_preact", "--samples=4")
    assert len(found.table) == 2 * 4  # lengths 0 to 3
    for seed in "01":
        rows = [row for row in found.table if row["seed"] == seed]
        columns = {k: np.array([float(row[k]) for row in rows]) for k in rows[0]}
        binomial = stats.binom(3, 0.5).pmf(columns["lengths"])
        np.testing.assert_allclose(columns["probability"], binomial)
        weighted = binomial * columns["mean"]
        np.testing.assert_allclose(columns["share"], weighted / weighted.sum())
        assert (columns["mean"] > 0).all()
