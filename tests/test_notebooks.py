"""The notebooks run from top to bottom, and are committed as they ran."""

import json
import re
import shutil
import sys

import pytest
from conftest import ROOT

# One worker runs all that share `digits_run`.
pytestmark = pytest.mark.xdist_group("runs")

NAMES = ("quickstart", "restore_checkpoint", "init_ablation")

# In a process of its own: its event loop and sockets stay out of the tests.
EXECUTE = """
import sys, nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], as_version=4)
NotebookClient(notebook, timeout=300, coalesce_streams=True).execute()
nbformat.write(notebook, sys.argv[1])
"""


def cells_of(path):
    """{id: cell} of the code."""
    cells = json.loads(path.read_text())["cells"]
    return {cell["id"]: cell for cell in cells if cell["cell_type"] == "code"}


def printed(cell):
    texts = [out["text"] for out in cell["outputs"] if out["output_type"] == "stream"]
    return "".join("".join(text) for text in texts)


def check_ran(cells):
    """In order, without an error or a warning, and every figure is a picture."""
    assert [cell["execution_count"] for cell in cells.values()] == [
        *range(1, len(cells) + 1)
    ]
    for name, cell in cells.items():
        outputs = cell["outputs"]
        assert {out["output_type"] for out in outputs} <= {"stream", "display_data"}, name
        assert {out.get("name", "stdout") for out in outputs} <= {"stdout"}, name
        pictures = sum("image/png" in out.get("data", {}) for out in outputs)
        source = "".join(cell["source"])
        assert pictures == source.count("plt.show()") + source.count("display("), name


@pytest.fixture
def execute(command, digits_run, tmp_path, monkeypatch):
    """execute(name, changes) -> the cells of a copy that has run, beside a run of 22 steps.

    `changes` are pairs of words of its source, and what stands in their place.
    """
    assert digits_run.done.returncode == 0, digits_run.done.stderr
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    shutil.copytree(digits_run.workdir, tmp_path / "runs" / "digits")
    for name in ("resjax", "configs"):
        (tmp_path / name).symlink_to(ROOT / name)
    # The kernel of the tests' interpreter, whatever this machine's user has set up.
    kernel = tmp_path / "jupyter" / "kernels" / "python3"
    kernel.mkdir(parents=True)
    launch = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    spec = {"argv": launch, "display_name": "Python 3", "language": "python"}
    (kernel / "kernel.json").write_text(json.dumps(spec))
    for name in ("JUPYTER_PATH", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / "jupyter"))
    monkeypatch.delenv("MPLBACKEND", raising=False)
    script = tmp_path / "execute.py"
    script.write_text(EXECUTE)

    def run(name, changes=()):
        path = tmp_path / "notebooks" / f"{name}.ipynb"
        text = path.read_text()
        for words, others in changes:
            assert words in text
            text = text.replace(words, others)
        path.write_text(text)
        done = command(script, path, cwd=path.parent)
        assert done.returncode == 0, done.stderr
        return cells_of(path)

    return run


@pytest.mark.slow
@pytest.mark.long
def test_the_quickstart_runs_and_prints_what_is_committed(execute):
    cells = execute("quickstart")
    check_ran(cells)
    accuracy = re.search(r"after 66 steps: ([\d.]+) %", printed(cells["train-loop"]))
    assert float(accuracy[1]) > 90
    committed = cells_of(ROOT / "notebooks" / "quickstart.ipynb")
    for name in cells.keys() - {"train-loop", "response"}:  # those depend on rounding
        assert printed(cells[name]) == printed(committed[name])


@pytest.mark.slow
def test_a_run_opened_in_the_notebook_predicts_what_its_training_recorded(execute):
    cells = execute("restore_checkpoint")
    check_ran(cells)
    number = r"(\d+\.\d+)"
    found = re.search(rf"{number} % of 360\nloss +{number}", printed(cells["predict"]))
    recorded = re.search(rf"{number} %, loss {number}", printed(cells["records"]))
    for mine, theirs in zip(found.groups(), recorded.groups(), strict=True):
        assert float(mine) == pytest.approx(float(theirs), abs=2e-3)


@pytest.mark.slow
@pytest.mark.long
def test_the_init_ablation_finds_what_theory_says(execute):
    small = [("range(8)", "range(3)"), ("range(4)", "range(1)"), ("[0, 1, 2]", "[0]")]
    small += [
        ("num_epochs=12.0", "num_epochs=0.5"),
        ("eval_every_epochs=1.0", "eval_every_epochs=0.5"),
    ]
    small += [("num_epochs=8.0", "num_epochs=0.5"), ("width=48", "width=32")]
    cells = execute("init_ablation", small)
    check_ran(cells)
    scales = dict(
        re.findall(r"(\w+) +n Var\[w\] / 2 = +([\d.]+)", printed(cells["schemes"]))
    )
    assert abs(float(scales["msra_fan_in"]) - 1) < 0.1
    assert abs(float(scales["xavier"]) - 0.5) < 0.05
    reached = r"(\w+) +forward (\S+) after 29 convolutions, theory (\S+)"
    found = re.findall(reached, printed(cells["signal"]))
    assert [name for name, *_ in found] == ["xavier", "msra_fan_in", "padded_msra"]
    for name, measured, theory in found:
        assert 0.1 < float(measured) / float(theory) < 10, name
    assert "4 members, 22 updates each" in printed(cells["sweep"])


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_is_committed_as_it_ran(name):
    check_ran(cells_of(ROOT / "notebooks" / f"{name}.ipynb"))


@pytest.mark.parametrize("name", NAMES)
def test_a_committed_notebook_is_small_and_says_nothing_of_its_machine(name):
    path = ROOT / "notebooks" / f"{name}.ipynb"
    text, notebook = path.read_text(), json.loads(path.read_text())
    assert len(text) < 300_000
    assert not re.search(r"/(home|root|tmp|Users|work|mnt|opt|usr)\b", text)
    assert notebook["metadata"] == {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    assert not any(cell["metadata"] for cell in notebook["cells"])  # no times


def test_every_notebook_is_tested():
    there = {path.stem for path in (ROOT / "notebooks").glob("*.ipynb")}
    assert there == set(NAMES)
