"""A damaged newest checkpoint is noticed, named, and the one before it is used."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from test_resume import NUM_STEPS, assert_same_run

import resjax
from resjax import checkpoint, checkpoint_writer, run_evaluation, training, workdirs
from resjax import config as configs
from resjax.checkpoint import DamagedError
from resjax.config import UsageError

# One worker runs all that share the undamaged run, and what test_resume.py has compiled.
pytestmark = pytest.mark.xdist_group("resume")

OURS = "state/variables.safetensors", "state/optimizer.safetensors", "state/record.json"
ORBAX = "_CHECKPOINT_METADATA", "commit_success.txt", "state/commit_success.txt"


# --- what is read -------------------------------------------------------------------


def make_arrays(step):
    """Arrays of several types and ranks, by item and path, that only numpy has made."""
    rng = np.random.RandomState(step)
    variables = {
        "params/stem/kernel": rng.randn(3, 3, 2, 4).astype(np.float32),
        "params/head/bias": rng.randn(5).astype(np.float32),
        "batch_stats/stem/mean": rng.randn(4).astype(np.float32),
    }
    optimizer = {
        "step": np.int32(step),
        "opt_state/trace": rng.randn(3, 3, 2, 4).astype(np.float32),
        "loss_scale/scale": rng.randn(2).astype(np.float16),
    }
    return {"variables": variables, "optimizer": optimizer}


def save(workdir, steps, keep=9):
    with checkpoint_writer.open_writer(workdir, lambda steps: set(steps[-keep:])) as writer:
        for step in steps:
            record = {"class_names": ["null", "ein\u00e9"], "derived": {"lr": 1e-05}}
            checkpoint_writer.save(writer, step, *make_arrays(step).values(), record)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("saved"))
    save(workdir, [1, 2, 3])
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return epath.Path(shutil.copytree(saved, tmp_path / "run"))


def files_of(folder):
    found = (path for path in Path(folder).rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


CUTS = {  # what is left of a file; None = nothing
    "deleted": lambda content: None,
    "emptied": lambda content: b"",
    "halved": lambda content: content[: len(content) // 2],
    "cut": lambda content: content[:-1],
    "zeroed": lambda content: bytes(len(content)),
    "flipped": lambda content: flip(content, 8 * len(content) - 14),  # of the last but one
}


def damages(content):
    """What is left of a file after each damage."""
    yield from (cut(content) for cut in CUTS.values())
    places = [0, 3, 8, 9, 40, len(content) // 2, len(content) - 1]  # header, data, end
    places += list(np.random.RandomState(0).randint(len(content), size=5))
    yield from (flip(content, 8 * place + bit) for place in places for bit in (0, 6))


def write(path, content):
    if content is None:
        path.unlink(missing_ok=True)
    else:
        path.write_bytes(content)


def says_the_same(left, content):
    """Whether what is left of JSON has its values, as 1E-05 has those of 1e-05."""
    try:
        return json.loads(left or b"") == json.loads(content)
    except ValueError:
        return False


def assert_arrays(arrays, step):
    wanted = make_arrays(step)
    assert {item: set(arrays[item]) for item in arrays} == {
        item: set(wanted[item]) for item in wanted
    }
    for item in wanted:
        for name, array in wanted[item].items():
            assert arrays[item][name].dtype == array.dtype
            assert arrays[item][name].tobytes() == array.tobytes()
            assert arrays[item][name].shape == array.shape


def is_noticed(workdir):
    """Whether 3 is found damaged; if it is not, it is what was saved, else 2 is."""
    found, damaged = checkpoint.read_latest(workdir)
    assert_arrays(found.arrays, found.step)
    assert found.record["class_names"] == ["null", "ein\u00e9"]
    assert found.record["derived"] == {"lr": 1e-05}
    assert (found.step, list(damaged)) in [(3, []), (2, [3])]
    for error in damaged.values():
        path, _, what = str(error).partition(" is damaged: ")
        assert path == str(workdir / "checkpoints" / "3")
        assert 5 < len(what) < 300
        assert "\n" not in what
    return bool(damaged)


def test_the_files_of_a_checkpoint_are_those_damaged_here(saved):
    assert files_of(saved / "checkpoints" / "3") == sorted(OURS + ORBAX)


@pytest.mark.parametrize("name", OURS)
def test_any_damage_to_what_is_restored_is_noticed(workdir, name):
    path = workdir / "checkpoints" / "3" / name
    content = path.read_bytes()
    for left in damages(content):
        write(path, left)
        harmless = path.suffix == ".json" and says_the_same(left, content)
        assert is_noticed(workdir) != harmless, left
    write(path, content)
    assert not is_noticed(workdir)


@pytest.mark.parametrize("name", ORBAX)
def test_damage_to_what_orbax_notes_beside_it_loses_nothing(workdir, name):
    path = workdir / "checkpoints" / "3" / name
    content = path.read_bytes()
    for left in damages(content):
        write(path, left)
        assert not is_noticed(workdir)
    for damage, cut in CUTS.items():
        write(path, cut(content))
        save(workdir, [4], keep=2)
        assert checkpoint.list_steps(workdir) == [3, 4], damage
        assert not checkpoint.read_latest(workdir)[1]
        shutil.rmtree(workdir / "checkpoints" / "4")


def test_any_flipped_bit_is_noticed_if_it_changes_what_is_read(workdir):
    rng = np.random.RandomState(0)
    state = workdir / "checkpoints" / "3" / "state"
    for name in ("variables.safetensors", "record.json"):
        path = state / name
        content = path.read_bytes()
        for bit in rng.randint(8 * len(content), size=150):
            path.write_bytes(left := flip(content, bit))
            harmless = name == "record.json" and says_the_same(left, content)
            assert is_noticed(workdir) != harmless, bit
        path.write_bytes(content)


def test_a_flipped_bit_of_an_array_is_always_noticed(workdir):
    path = workdir / "checkpoints" / "3" / "state" / "variables.safetensors"
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")  # Source: the safetensors format
    assert len(content) - start == 4 * (3 * 3 * 2 * 4 + 5 + 4)
    for bit in np.random.RandomState(1).randint(8 * start, 8 * len(content), size=100):
        path.write_bytes(flip(content, bit))
        assert is_noticed(workdir)


def test_a_flipped_bit_of_the_digest_itself_is_noticed(workdir):
    path = workdir / "checkpoints" / "3" / "state" / "record.json"
    content = path.read_bytes()
    digits = str(json.loads(content)["digest"]).encode()
    start = content.index(digits)
    for bit in range(8 * start, 8 * (start + len(digits))):
        path.write_bytes(flip(content, bit))
        assert is_noticed(workdir)


@pytest.mark.parametrize("name", OURS[:2])
def test_a_file_of_another_checkpoint_is_noticed(workdir, name):
    shutil.copy(workdir / "checkpoints" / "2" / name, workdir / "checkpoints" / "3" / name)
    assert is_noticed(workdir)


def empty(path):
    shutil.rmtree(path)
    path.mkdir()


def become_a_file(path):
    shutil.rmtree(path)
    path.write_text("")


@pytest.mark.parametrize("damage", [shutil.rmtree, empty, become_a_file])
@pytest.mark.parametrize("name", ["3/state", "3"])
def test_a_checkpoint_without_its_folders_is_noticed(workdir, name, damage):
    damage(workdir / "checkpoints" / name)
    if damage is shutil.rmtree and name == "3":
        assert checkpoint.read_latest(workdir)[0].step == 2  # nothing is left to notice
    else:
        assert is_noticed(workdir)


@pytest.mark.parametrize("left", [(), ORBAX[:1], OURS[:1], OURS[2:]])
def test_an_older_one_that_was_being_deleted_disturbs_nothing(workdir, left):
    for name in set(OURS + ORBAX) - set(left):
        (workdir / "checkpoints" / "1" / name).unlink()
    assert not is_noticed(workdir)
    save(workdir, [4], keep=3)
    assert checkpoint.list_steps(workdir) == [2, 3, 4]


def test_what_is_no_checkpoint_is_left_alone(workdir):
    folder = workdir / "checkpoints"
    (folder / "notes.txt").write_text("mine")
    (folder / "abc").mkdir()
    shutil.copytree(folder / "2", folder / "7.damaged")
    shutil.copytree(folder / "2", folder / "5.orbax-checkpoint-tmp")
    assert checkpoint.list_steps(workdir) == [1, 2, 3]
    assert not is_noticed(workdir)
    save(workdir, [5, 7], keep=2)
    found = {path.name for path in folder.iterdir()} - {"5.orbax-checkpoint-tmp"}
    assert found == {"5", "7", "7.damaged", "abc", "notes.txt"}


def test_a_step_that_was_asked_for_is_not_replaced_by_another(workdir):
    (workdir / "checkpoints" / "2" / "state" / "optimizer.safetensors").unlink()
    with pytest.raises(DamagedError, match=r"checkpoints/2 is damaged: .*\[1, 3\]"):
        checkpoint.read(workdir, 2)
    with pytest.raises(DamagedError, match="checkpoints/2 is damaged: "):
        checkpoint.read(workdir / "checkpoints" / "2")
    assert checkpoint.read(workdir, 2, ["variables"])[0].step == 2  # those are whole


def test_damage_to_all_is_one_clear_error(workdir):
    for name in ("1", "2", "3"):
        (workdir / "checkpoints" / name / OURS[2]).write_text("{}")
    with pytest.raises(UsageError) as caught:
        checkpoint.read_latest(workdir)
    assert "checkpoints/3 is damaged" in str(caught.value)
    assert "so are those of [2, 1]" in str(caught.value)


# --- training, in this process ------------------------------------------------------


@pytest.fixture(scope="module")
def config(tiny_config, data_dir):
    words = (
        "--config.batch_size=320",
        f"--config.num_epochs={NUM_STEPS * 320 / 1437}",
        "--config.eval_every_epochs=0.6",  # after steps 3 and 5
        "--config.dtype=float16",  # the program of test_resume.py, compiled once
        "--config.checkpoint.every_steps=1",
        "--config.checkpoint.keep=9",
        f"--config.data.dir={data_dir}",  # this fixture is older than the environment
    )
    return configs.override(configs.load_config(tiny_config), words)


@pytest.fixture(scope="module")
def undamaged(config, tmp_path_factory):
    workdir = epath.Path(tmp_path_factory.mktemp("undamaged") / "run")
    assert training.train(config, workdir) == 0
    assert checkpoint.list_steps(workdir) == [1, 2, 3, 4, 5]
    return workdir


def stopped_after(step, undamaged, workdir):
    """The workdir of a run that was killed after a checkpoint."""
    workdir = epath.Path(shutil.copytree(undamaged, workdir))
    for later in range(step + 1, NUM_STEPS + 1):
        shutil.rmtree(workdir / "checkpoints" / str(later))
    return workdir


def damage_newest(workdir, name, damage):
    newest = checkpoint.list_steps(workdir)[-1]
    path = workdir / "checkpoints" / str(newest) / name
    write(path, CUTS[damage](path.read_bytes()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (OURS[0], "flipped"),
        (OURS[0], "halved"),
        (OURS[0], "deleted"),
        (OURS[1], "flipped"),
        (OURS[1], "zeroed"),
        (OURS[2], "emptied"),
        (OURS[2], "deleted"),
    ],
)
def test_training_goes_on_from_the_one_before(
    config, undamaged, tmp_path, capsys, name, damage
):
    workdir = stopped_after(3, undamaged, tmp_path / "run")
    damage_newest(workdir, name, damage)
    capsys.readouterr()
    assert training.train(config, workdir) == 0
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert line.startswith(f"warning: {workdir}/checkpoints/3 is damaged: ")
    assert "3.damaged" in line
    assert "resuming after step 2," in out
    assert (workdir / "checkpoints" / "3.damaged").is_dir()
    assert_same_run(workdir, undamaged, NUM_STEPS)
    assert training.train(config, workdir) == 0  # and is finished, without a word
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_a_finished_run_whose_last_is_damaged_is_finished_again(
    config, undamaged, tmp_path, capsys
):
    workdir = stopped_after(NUM_STEPS, undamaged, tmp_path / "run")
    damage_newest(workdir, OURS[0], "flipped")
    assert training.train(config, workdir) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert_same_run(workdir, undamaged, NUM_STEPS)
    damage_newest(workdir, OURS[0], "halved")  # the same step a second time
    assert training.train(config, workdir) == 0
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert_same_run(workdir, undamaged, NUM_STEPS)


def test_a_step_may_be_put_aside_twice(workdir, capsys):
    path = workdir / "checkpoints" / "3"
    for content in (b"first", b"second"):
        path.mkdir(exist_ok=True)
        (path / "mark").write_bytes(content)
        workdirs.put_aside(workdir, {3: DamagedError(f"{path} is damaged: so")})
        assert checkpoint.list_steps(workdir) == [1, 2]
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f"warning: {path} is damaged: so")


@pytest.mark.slow
def test_two_damaged_ones_are_two_warnings(config, undamaged, tmp_path, capsys):
    workdir = stopped_after(4, undamaged, tmp_path / "run")
    for step, name in ((3, OURS[0]), (4, OURS[2])):
        (workdir / "checkpoints" / str(step) / name).write_bytes(b"")
    assert training.train(config, workdir) == 0
    out, err = capsys.readouterr()
    newest, older = err.splitlines()
    assert "checkpoints/4 is damaged" in newest
    assert "checkpoints/3 is damaged" in older
    assert "resuming after step 2," in out
    assert_same_run(workdir, undamaged, NUM_STEPS)


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["deleted", "halved", "flipped"])
@pytest.mark.parametrize("name", ORBAX)
def test_training_loses_nothing_by_damage_to_what_orbax_notes(
    config, undamaged, tmp_path, capsys, caplog, name, damage
):
    workdir = stopped_after(3, undamaged, tmp_path / "run")
    damage_newest(workdir, name, damage)
    assert training.train(config, workdir) == 0
    out, err = capsys.readouterr()
    assert "resuming after step 3," in out
    assert err == ""
    assert caplog.text == ""  # which a command prints on stderr
    assert_same_run(workdir, undamaged, NUM_STEPS)


@pytest.mark.slow
def test_training_does_not_start_over_when_all_are_damaged(config, undamaged, tmp_path):
    workdir = stopped_after(2, undamaged, tmp_path / "run")
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / OURS[1]).write_bytes(b"")
    before = files_of(workdir)
    with pytest.raises(UsageError, match="checkpoints/2 is damaged: "):
        training.train(config, workdir)
    assert [name for name in files_of(workdir) if name != ".lock"] == [
        name for name in before if name != ".lock"
    ]


# --- restoring and evaluating -------------------------------------------------------


@pytest.mark.slow
def test_restore_and_evaluate_use_the_one_before(undamaged, tmp_path, capsys):
    workdir = stopped_after(3, undamaged, tmp_path / "run")
    whole = resjax.restore(workdir, 2)
    damage_newest(workdir, OURS[0], "flipped")
    capsys.readouterr()
    run = resjax.restore(workdir)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {workdir}/checkpoints/3 is damaged: ")
    assert line.endswith("the one of step 2 is used")
    assert run.step == 2
    wanted = checkpoint.to_arrays(whole.variables)
    for name, array in checkpoint.to_arrays(run.variables).items():
        np.testing.assert_array_equal(array, wanted[name])
    result = run_evaluation.evaluate(workdir)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith("the one of step 2 is used")
    assert result["step"] == 2
    assert result["top1"] == run_evaluation.evaluate(workdir, 2)["top1"]
    assert (workdir / "checkpoints" / "3").is_dir()  # reading changes nothing
    with pytest.raises(UsageError, match=r"checkpoints/3 is damaged: .*\[1, 2\]"):
        resjax.restore(workdir, 3)
    with pytest.raises(UsageError, match=r"checkpoints/3 is damaged: .*\[1, 2\]"):
        resjax.restore(workdir, "best")  # the only one that was evaluated


@pytest.mark.slow
def test_nothing_left_to_restore_is_one_clear_error(undamaged, tmp_path, capsys):
    workdir = stopped_after(2, undamaged, tmp_path / "run")
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / OURS[0]).unlink()
    for read in (resjax.restore, run_evaluation.evaluate):
        with pytest.raises(UsageError, match="checkpoints/2 is damaged: ") as caught:
            read(workdir)
        assert "\n" not in str(caught.value)
    assert capsys.readouterr().err == ""


# --- a full disk --------------------------------------------------------------------

_ON_A_SMALL_DISK = """
mount -t tmpfs -o size={size} none {disk} || exit 99
timeout -k 5 60 {train} >{out}/first.out 2>{out}/first.err
echo $? >{out}/first.code
ls {disk}/run/checkpoints >{out}/first.steps
mount -o remount,size=64m none {disk}
timeout -k 5 60 {train} >{out}/second.out 2>{out}/second.err
echo $? >{out}/second.code
cp -r {disk}/run {out}/run
"""
_FULL_FLAGS = "--config.checkpoint.every_steps=10", "--config.checkpoint.keep=2"


@pytest.fixture(scope="module")
def on_a_wide_disk(command, tiny_config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("wide") / "run"
    flags = f"--config={tiny_config}", f"--workdir={workdir}", *_FULL_FLAGS
    done = command("train.py", *flags)
    assert done.returncode == 0, done.stderr
    return workdir


@pytest.mark.slow  # 20 s each
@pytest.mark.parametrize("size", ["12k", "100k", "150k"])  # of 36k for a checkpoint
def test_a_run_that_fills_the_disk_goes_on_when_there_is_room(
    on_a_wide_disk, tiny_config, data_dir, tmp_path, size
):
    disk, out = tmp_path / "disk", tmp_path / "out"
    disk.mkdir()
    out.mkdir()
    script = Path(__file__).resolve().parent.parent / "train.py"
    flags = f"--config={tiny_config}", f"--workdir={disk}/run", *_FULL_FLAGS
    train = shlex.join([sys.executable, str(script), *flags])
    environment = {**os.environ, "XLA_FLAGS": ""}  # one device
    lines = _ON_A_SMALL_DISK.format(size=size, disk=disk, out=out, train=train)
    subprocess.run(["unshare", "-rm", "sh", "-c", lines], env=environment, check=True)

    assert (out / "first.code").read_text() == "1\n"  # 124, 137: it hung
    (line,) = (out / "first.err").read_text().splitlines()
    steps = [int(x) for x in (out / "first.steps").read_text().split() if x.isdecimal()]
    kept = f"the checkpoint of step {max(steps)} is kept" if steps else "nothing was saved"
    assert line.startswith("train.py: training stopped: ")
    assert "No space left on device" in line
    assert kept in line
    assert steps or size == "12k"

    assert (out / "second.code").read_text() == "0\n"
    assert (out / "second.err").read_text() == ""
    start = f"resuming after step {max(steps)}," if steps else "from the start,"
    assert start in (out / "second.out").read_text()
    assert_same_run(out / "run", on_a_wide_disk, 50)
