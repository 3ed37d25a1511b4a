"""Checkpoints: what is read is what was saved, in any process, and by any other reader."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, saved
from etils import epath

import resjax
from resjax import checkpoint, checkpoint_writer, optim, parallel, run_evaluation, steps
from resjax.config import UsageError

TX = optim.sgd(lambda step: jnp.float32(0.1), 0.9, True, 1e-4)
FORMAT_1 = ROOT / "tests" / "golden" / "run_format1"


def make_state(seed=0):
    rng = np.random.RandomState(seed)
    params = {"stem": {"conv": {"kernel": rng.randn(3, 2).astype(np.float32)}}}
    stats = {"stem": {"norm": {"mean": rng.randn(2).astype(np.float32)}}}
    state = steps.create_state({"params": params, "batch_stats": stats}, TX)
    return parallel.replicate(state.replace(step=jnp.int32(seed)))


def save(workdir, seeds, keep=set):
    with checkpoint_writer.open_writer(workdir, keep) as writer:
        for seed in seeds:
            state = make_state(seed)
            record = {"seed": seed}
            checkpoint_writer.save(writer, seed, state.variables, state.optimizer, record)


@pytest.fixture
def workdir(tmp_path):
    return epath.Path(tmp_path)


def test_a_state_from_eight_devices_returns_bitwise(workdir):
    save(workdir, [3])
    state = make_state(3)
    found, damaged = checkpoint.read_latest(workdir)
    assert (found.step, found.record["seed"], damaged) == (3, 3, {})
    for item in checkpoint.ITEMS:
        wanted = getattr(state, item)
        tree = checkpoint.to_tree(found.arrays[item], wanted, workdir)
        jax.tree.map(np.testing.assert_array_equal, tree, wanted)
        assert jax.tree.structure(tree) == jax.tree.structure(wanted)


def test_any_reader_of_safetensors_finds_the_variables_by_their_paths(workdir):
    save(workdir, [3])
    variables = saved(workdir, 3)
    state = make_state(3)
    assert set(variables) == {"params/stem/conv/kernel", "batch_stats/stem/norm/mean"}
    expected = state.params["stem"]["conv"]["kernel"]
    np.testing.assert_array_equal(variables["params/stem/conv/kernel"], expected)


def test_the_record_says_what_wrote_it_and_what_each_array_is(workdir):
    save(workdir, [3])
    path = workdir / "checkpoints" / "3" / "state" / "record.json"
    record = json.loads(path.read_text())
    assert record["format"] == checkpoint.FORMAT == 2
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"]["resjax"] == resjax.__version__
    kernel = record["arrays"]["variables"]["params/stem/conv/kernel"]
    assert (kernel["shape"], kernel["dtype"]) == ([3, 2], "float32")


def test_one_item_is_read_without_the_other(workdir):
    save(workdir, [3])
    (workdir / "checkpoints" / "3" / "state" / "optimizer.safetensors").unlink()
    found, _ = checkpoint.read(workdir, items=["variables"])
    assert set(found.arrays) == {"variables"}


def test_a_step_is_picked_and_a_missing_one_answered_with_those_there_are(workdir):
    save(workdir, [3, 4], keep=lambda steps: set(steps))
    assert checkpoint.read(workdir)[0].step == 4
    assert checkpoint.read(workdir, 3)[0].step == 3
    assert checkpoint.read(workdir / "checkpoints" / "3")[0].step == 3
    with pytest.raises(UsageError, match=r"step 1 .*\[3, 4\]"):
        checkpoint.read(workdir, 1)
    with pytest.raises(UsageError, match=r"step: 4, but .* is one checkpoint"):
        checkpoint.read(workdir / "checkpoints" / "3", 4)


def test_reading_makes_no_folder(workdir):
    assert checkpoint.read_latest(workdir) == (None, {})
    with pytest.raises(UsageError, match="no checkpoint"):
        checkpoint.read(workdir)
    assert list(workdir.iterdir()) == []


def test_what_is_being_written_or_was_put_aside_is_no_checkpoint(workdir):
    save(workdir, [3])
    for name in ("5.orbax-checkpoint-tmp", "7.damaged", "notes"):
        (workdir / "checkpoints" / name).mkdir()
    assert checkpoint.list_steps(workdir) == [3]


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda a: a.pop("b"), "here: b is missing, the first of 1"),
        (lambda a: a.update(c=np.zeros(1)), "c is unknown"),
        (lambda a: a.update(b=np.zeros(3, np.float32)), r"b is float32 \[3\], not .*\[2\]"),
        (lambda a: a.update(b=np.zeros(2, np.int32)), r"b is int32 \[2\], not float32"),
    ],
)
def test_arrays_of_another_tree_are_refused_by_name(change, said):
    like = {"a": np.zeros((), np.float32), "b": np.zeros(2, np.float32)}
    arrays = dict(like)
    change(arrays)
    with pytest.raises(UsageError, match=said):
        checkpoint.to_tree(arrays, like, "here")


# --- other versions -----------------------------------------------------------------


def test_a_checkpoint_of_a_newer_format_says_so(workdir):
    save(workdir, [3])
    path = workdir / "checkpoints" / "3" / "state" / "record.json"
    record = json.loads(path.read_text())
    record = {k: v for k, v in record.items() if k != "digest"} | {"format": 3}
    path.write_text(json.dumps({**record, "digest": checkpoint._digest(record)}))
    with pytest.raises(UsageError, match=r"format 3, .* up to 2; a newer version"):
        checkpoint.read_latest(workdir)


def test_a_run_of_the_first_format_opens(tmp_path):
    # Trained for 12 epochs by the commit before format 2, its weights then rounded to five
    # bits of mantissa to be small; that commit evaluated it.
    shutil.copytree(FORMAT_1, tmp_path / "run")
    evaluated = json.loads((FORMAT_1 / "eval_test_135.json").read_text())
    found = run_evaluation.evaluate(tmp_path / "run")
    assert found["loss"] == pytest.approx(evaluated.pop("loss"), rel=1e-5)
    assert {name: found[name] for name in evaluated} == evaluated
    run = resjax.restore(FORMAT_1)
    assert (run.step, run.config.model) == (135, "cifar_resnet20")
    assert run.class_names == [str(digit) for digit in range(10)]
    assert run.versions == {} and run.evaluation is None


@pytest.mark.slow
def test_a_run_of_the_first_format_goes_on(command, tmp_path):
    shutil.copytree(FORMAT_1, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").unlink()  # so the last evaluation is to be done
    flags = "--config.num_epochs=12", f"--workdir={tmp_path / 'run'}"
    done = command("train.py", *flags)
    assert (done.returncode, done.stderr) == (0, "")
    assert "resuming after step 135," in done.stdout
    assert "test loss 0.0535 top-1  98.89 %" in done.stdout
