"""eval.py: each example once, whatever the minibatch and the devices."""

import json
import runpy
import shutil
import sys

import pytest
from conftest import ROOT
from flax import linen as nn

from resjax.models.fold import FoldedNorm

# One worker runs all that share `digits_run`.
pytestmark = pytest.mark.xdist_group("runs")


@pytest.fixture(scope="module")
def workdir(digits_run, tmp_path_factory):
    assert digits_run.done.returncode == 0, digits_run.done.stderr
    copy = tmp_path_factory.mktemp("eval") / "run"
    shutil.copytree(digits_run.workdir, copy)
    return copy


@pytest.fixture
def evaluate_here(workdir, monkeypatch, capfd):
    """The command in this process, on its eight devices, which is faster."""

    def run(*flags):
        argv = ["eval.py", f"--workdir={workdir}", *flags]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / "eval.py"), run_name="__main__")
        out, err = capfd.readouterr()
        assert (stop.value.code, err) == (0, "")
        return json.loads(out)

    return run


def evaluate_on_one(command, workdir, *flags):
    done = command("eval.py", f"--workdir={workdir}", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    (line,) = done.stdout.splitlines()
    return json.loads(line)


def assert_same(result, expected):
    """The same examples: equal counts, and a loss that differs by rounding."""
    result, expected = dict(result), dict(expected)
    for name, digits in (("loss", 1e-5), ("ece", 1e-4)):
        assert result.pop(name) == pytest.approx(expected.pop(name), rel=digits)
    for numbers in (result, expected):
        assert numbers.pop("images_per_second") > 0
    assert result == expected


def last_test_record(workdir):
    return json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])


@pytest.fixture(scope="module")
def by_ones(command, workdir):
    return evaluate_on_one(command, workdir, "--batch_size=1")


def test_one_json_line_tells_the_result_and_is_kept_in_the_workdir(by_ones, workdir):
    assert list(by_ones)[:5] == ["top1", "top5", "loss", "num_examples", "step"]
    assert (by_ones["num_examples"], by_ones["step"]) == (360, 22)
    (path,) = workdir.glob("eval_*.json")
    assert json.loads(path.read_text()) == by_ones


def test_it_reports_what_training_reported(by_ones, workdir):
    training = last_test_record(workdir)
    assert (training["split"], training["step"]) == ("test", 22)
    assert by_ones["top1"] == pytest.approx(training["top1"])
    assert by_ones["top5"] == pytest.approx(training["top5"])
    assert by_ones["loss"] == pytest.approx(training["loss"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [7, 64])
@pytest.mark.slow
def test_any_minibatch_counts_the_same_on_one_device(command, workdir, by_ones, batch_size):
    result = evaluate_on_one(command, workdir, f"--batch_size={batch_size}")
    assert_same(result, by_ones)


@pytest.mark.parametrize("batch_size", [64, 7, pytest.param(1, marks=pytest.mark.slow)])
def test_any_minibatch_counts_the_same_on_eight_devices(evaluate_here, by_ones, batch_size):
    assert_same(evaluate_here(f"--batch_size={batch_size}"), by_ones)


def test_a_step_picks_its_checkpoint(evaluate_here, by_ones, workdir):
    result = evaluate_here("--step=10")
    assert result["step"] == 10 and result["loss"] != by_ones["loss"]
    files = list(workdir.glob("eval_*10*.json"))
    assert [json.loads(path.read_text()) for path in files] == [result]


def test_the_training_split_has_the_other_examples(evaluate_here, by_ones):
    result = evaluate_here("--split=train")
    assert result["num_examples"] == 1797 - 360
    assert result["top1"] * 14.37 == pytest.approx(round(result["top1"] * 14.37))
    assert result["loss"] != by_ones["loss"]


def test_folding_batch_norm_changes_nothing_but_rounding_and_says_so(
    evaluate_here, by_ones, workdir
):
    called = set()

    def note(call, args, kwargs, context):
        called.add(type(context.module))
        return call(*args, **kwargs)

    with nn.intercept_methods(note):
        result = evaluate_here("--fold_batch_norm")
    assert FoldedNorm in called
    assert json.loads((workdir / "eval_test_22_folded.json").read_text()) == result
    assert_same(json.loads((workdir / "eval_test_22.json").read_text()), by_ones)
    assert result.pop("fold_batch_norm") is True
    assert_same(result, by_ones)
    assert "fold_batch_norm" not in evaluate_here()


def test_the_data_may_have_moved(evaluate_here, by_ones, data_dir, tmp_path, monkeypatch):
    shutil.copytree(data_dir / "digits", tmp_path / "moved" / "digits")
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "nowhere"))
    result = evaluate_here(f"--data_dir={tmp_path / 'moved'}")
    assert result.pop("data_dir") == str(tmp_path / "moved")
    assert_same(result, by_ones)


@pytest.mark.parametrize(
    ("flags", "name", "said"),
    [
        (["--scales=8,12"], "eval_test_22_scales8-12", {"scales": [8, 12]}),
        (["--crops=1", "--details"], "eval_test_22", {}),
    ],
)
def test_flags_choose_how_images_are_shown_and_what_is_written(
    evaluate_here, by_ones, workdir, flags, name, said
):
    result = evaluate_here(*flags)
    assert {field: result[field] for field in set(result) - set(by_ones)} == said
    assert result["num_examples"] == 360
    assert json.loads((workdir / f"{name}.json").read_text()) == result
    assert (workdir / name).exists() is ("--details" in flags)
    if not said:
        assert_same(result, by_ones)


def test_a_dense_image_of_the_size_of_the_training_is_the_plain_one(evaluate_here, by_ones):
    result = evaluate_here("--scales=8")
    assert result.pop("scales") == [8]
    assert_same(result, by_ones)


def test_workdirs_given_several_times_are_an_ensemble(evaluate_here, workdir, by_ones):
    result = evaluate_here(f"--workdir={workdir / 'checkpoints' / '10'}")
    first, second = result["members"]
    assert (first["step"], second["step"]) == (22, 10)
    assert first["top1"] == by_ones["top1"]
    path = workdir / f"eval_test_22_with_{workdir.name}-10.json"
    assert json.loads(path.read_text()) == result
