"""Programs on disk: when they are kept and taken, and what of the folder is cleaned up."""

import json
import os
import subprocess
import sys
import zlib
from pathlib import Path

import jax
import jaxlib.version
import matplotlib as mpl
import pytest
from conftest import ROOT

from resjax import compilation_cache, run_evaluation, sweep, training
from resjax.compilation_cache import use_compilation_cache

DIR = "jax_compilation_cache_dir"
MIN_TIME = "jax_persistent_cache_min_compile_time_secs"


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user's cache; jax knows of none yet, as in a process that has just begun."""
    before = {name: getattr(jax.config, name) for name in (DIR, MIN_TIME)}
    jax.config.update(DIR, None)
    jax.config.update(MIN_TIME, 1.0)
    monkeypatch.delenv(MIN_TIME.upper())
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    for name, value in before.items():
        jax.config.update(name, value)


def machines(home):
    return sorted((home / "resjax" / "compiled").glob("*"))


# --- whose folder it is ---------------------------------------------------------------


def test_the_folder_is_of_the_user_and_the_machine(home):
    use_compilation_cache()
    (folder,) = machines(home)
    assert str(folder) == jax.config.jax_compilation_cache_dir
    assert folder.name.startswith(os.uname().machine + "-")
    assert folder.stat().st_mode & 0o777 == 0o700
    assert getattr(jax.config, MIN_TIME) == 0


@pytest.mark.parametrize("given", ["", "not/absolute"])
def test_without_a_usable_xdg_cache_home_it_is_in_the_home(home, given, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", given)
    monkeypatch.setenv("HOME", str(home))
    use_compilation_cache()
    assert jax.config.jax_compilation_cache_dir.startswith(f"{home}/.cache/resjax/")


@pytest.mark.parametrize("folder", ["/elsewhere", ""])
def test_a_folder_that_is_set_is_left_alone(home, folder):
    jax.config.update(DIR, folder)
    use_compilation_cache()
    assert (getattr(jax.config, DIR), getattr(jax.config, MIN_TIME)) == (folder, 1)
    assert not home.exists()


def test_a_time_that_is_set_is_left_alone(home, monkeypatch):
    monkeypatch.setenv(MIN_TIME.upper(), "1.0")
    use_compilation_cache()
    assert machines(home) and getattr(jax.config, MIN_TIME) == 1


@pytest.mark.parametrize(
    "owner, name, value",
    [
        (jaxlib.version, "__version_info__", (0, 10, 1)),  # which cries out when it loads
        (jax, "process_count", lambda: 2),
    ],
)
def test_nothing_is_kept_where_it_would_harm(home, owner, name, value, monkeypatch):
    monkeypatch.setattr(owner, name, value)
    use_compilation_cache()
    assert getattr(jax.config, DIR) is None and not home.exists()


def test_a_folder_that_cannot_be_written_is_one_line(home, capsys):
    home.write_text("a file")
    use_compilation_cache()
    assert getattr(jax.config, DIR) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line.startswith("warning: compiled programs are not kept: ") and str(home) in line
    )


def test_a_user_without_a_home_is_one_line(home, capsys, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    use_compilation_cache()
    assert getattr(jax.config, DIR) is None
    assert len(capsys.readouterr().err.splitlines()) == 1


CPU = """processor\t: {i}
model name\t: {model}
cpu MHz\t\t: {mhz}
flags\t\t: fpu {flags}
"""


def test_machines_whose_programs_differ_have_folders_of_their_own(tmp_path, monkeypatch):
    def name(model="Zen", flags="avx2 avx512f", mhz=2400, cores=2):
        text = "\n".join(
            CPU.format(i=i, model=model, mhz=mhz + i, flags=flags) for i in range(cores)
        )
        (tmp_path / "cpuinfo").write_text(text)
        monkeypatch.setattr(compilation_cache, "num_cores", lambda: cores)
        return compilation_cache._machine()

    monkeypatch.setattr(compilation_cache, "_CPU_INFO", tmp_path / "cpuinfo")
    assert name() == name(mhz=3000)
    others = [name(model="Cascade Lake"), name(flags="avx2"), name(cores=1)]
    assert len({name(), *others}) == 4
    (tmp_path / "cpuinfo").unlink()
    assert compilation_cache._machine().startswith(os.uname().machine + "-")


# --- what is cleaned up ---------------------------------------------------------------


def write(path, size=10, used=None):
    """A whole entry, last used so many seconds ago."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(zlib.compress(os.urandom(size)))
    if used is not None:
        now = path.stat().st_mtime
        os.utime(path, (now - used, now - used))
    return path


def test_what_was_not_written_to_its_end_is_deleted(home):
    use_compilation_cache()
    (folder,) = machines(home)
    whole, half, empty = (write(folder / f"jit_{i}-cache", 1000) for i in range(3))
    half.write_bytes(half.read_bytes()[:500])
    empty.write_bytes(b"")
    (folder / "of_another_kind").write_bytes(b"")
    jax.config.update(DIR, None)
    use_compilation_cache()
    assert whole.exists() and not half.exists() and not empty.exists()
    assert (folder / "of_another_kind").exists()


def test_a_folder_to_which_nothing_came_is_not_read_again(home, monkeypatch):
    use_compilation_cache()
    write(machines(home)[0] / "jit_f-cache")
    read = []
    monkeypatch.setattr(compilation_cache, "_is_broken", read.append)
    for _ in range(3):
        jax.config.update(DIR, None)
        use_compilation_cache()
    assert len(read) == 1


def test_the_least_recently_used_go_first_of_all_machines(home, monkeypatch):
    monkeypatch.setattr(compilation_cache, "_MAX_BYTES", 10_000)
    use_compilation_cache()
    (folder,) = machines(home)
    first = write(folder / "jit_a-cache", 2000, used=50)
    other = write(folder.parent / "aarch64-1" / "jit_b-cache", 2000, used=40)
    nested = write(folder / "xla_gpu_per_fusion_autotune_cache_dir" / "c", 2000, used=30)
    last = write(folder / "jit_d-cache", 2000, used=20)
    jax.config.update(DIR, None)
    use_compilation_cache()  # the stamp takes 4,096
    assert not first.exists() and not other.exists()
    assert nested.exists() and last.exists()


# --- runs -----------------------------------------------------------------------------


def python(code, home, **variables):
    """What a process says that knows of no folder but that of its user."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    environment |= {"XDG_CACHE_HOME": str(home), "JAX_PLATFORMS": "cpu", **variables}
    code = f"import jax, resjax\n{code}\nprint(jax.config.{DIR})"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.strip()


USE = "from resjax.compilation_cache import *; use_compilation_cache()"


@pytest.mark.parametrize(
    "code, switch, is_on",
    [("pass", "true", False), (USE, "true", True), (USE, "false", False)],
)
def test_it_is_used_only_where_it_is_called_and_not_turned_off(
    code, switch, is_on, tmp_path
):
    folder = python(code, tmp_path, JAX_ENABLE_COMPILATION_CACHE=switch)
    assert folder == str(machines(tmp_path)[0] if is_on else None)
    assert bool(list(tmp_path.iterdir())) == is_on


def test_a_disk_that_fills_up_is_no_matter_of_the_run(tmp_path):
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (999, 999))"
    compute = (
        "print(float(jax.jit(lambda x: jax.numpy.sin(x @ x).sum())(jax.numpy.eye(9))))"
    )
    said = python(f"{USE}\n{limit}\n{compute}", tmp_path)
    assert said.split()[0] == python(compute, tmp_path).split()[0]
    (folder,) = machines(tmp_path)
    assert any(path.stat().st_size == 999 for path in folder.glob("jit*-cache"))  # cut off
    python(USE, tmp_path)
    assert not any(path.stat().st_size == 999 for path in folder.glob("jit*-cache"))


@pytest.mark.parametrize("name", ["train", "eval", "sweep"])
def test_every_command_that_runs_uses_it(name, monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT)
    calls = []

    def stop(*args, **kwargs):
        calls.append("run")
        return 0

    module = sweep if name == "sweep" else __import__(name)
    monkeypatch.setattr(module, "use_compilation_cache", lambda: calls.append("cache"))
    monkeypatch.setattr(training, "train", stop)
    monkeypatch.setattr(run_evaluation, "evaluate", stop)
    monkeypatch.setattr(sweep, "_train_all", stop)
    monkeypatch.setattr(sweep, "compare", lambda *args: None)
    monkeypatch.chdir(ROOT)
    flags = [f"--workdir={tmp_path}", *["--vary=seed=0,1"] * (name == "sweep")]
    assert module.main(flags) == 0
    assert calls == ["cache", "run"]


def rows_of(workdir):
    """The records of a run but for its speed."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    timed = ("images_per_second", "data_wait", "seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in rows]


@pytest.mark.parametrize(
    "runner",
    ["pmap", pytest.param("shard_map", marks=(pytest.mark.slow, pytest.mark.long))],
)
def test_a_run_of_kept_programs_is_bitwise_the_one_that_compiled(
    runner, command, tiny_config, tmp_path
):
    variables = {name: None for name in os.environ if name.startswith("JAX_")}
    variables |= {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    variables["MPLCONFIGDIR"] = mpl.get_cachedir()  # of fonts, made in seconds

    def train(workdir):
        flags = (f"--config={tiny_config}", f"--config.parallel={runner}")
        flags += (f"--workdir={workdir}", "--config.num_epochs=0.1")
        done = command("train.py", *flags, devices=2, variables=variables)
        assert (done.returncode, done.stderr) == (0, "")
        (folder,) = machines(tmp_path / "cache")
        entries = {path: path.stat().st_mtime_ns for path in folder.glob("*-cache")}
        (record,) = workdir.glob("checkpoints/9/*/record.json")
        return entries, rows_of(workdir), json.loads(record.read_text())["arrays"]

    first, again = train(tmp_path / "first"), train(tmp_path / "again")
    assert len(first[0]) > 20
    assert again == first  # nothing was compiled: it would have been written
    for path in first[0]:  # as another process may leave it for a moment
        path.write_bytes(path.read_bytes()[:-9])
        os.utime(path, (0, 0))
    assert train(tmp_path / "third")[1:] == first[1:]
