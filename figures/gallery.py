"""Every comparison and figure on the digits, and docs/gallery.md of what they came to.

  python -m figures.gallery

Runs `python -m resjax.sweep` for each comparison and the other scripts of this folder,
which reuse the nets of those. What is finished is not trained again, and what a script has
drawn of them is not drawn again. Over an hour on two cores.
"""

import math
import shutil
import subprocess
import sys
from pathlib import Path

from tqdm import tqdm

from resjax.comparisons import COMPARISONS
from resjax.config import ArgumentParser, RunError, run_command

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Scripts: title, and the sweep in whose folder they leave their files.
SCRIPTS = {
    "responses": ("Responses of layers (He et al. 2015, figure 7)", "depth"),
    "lesion": ("Lesions (Veit et al. 2016, figures 3 and 5)", "depth"),
    "paths": ("Lengths of gradient paths (Veit et al. 2016, figure 6)", "preact"),
}
HEAD = """# The papers' figures, on the digits

Each is real training on scikit-learn's 1,437 digits (8 x 8 pixels; 360 more to test on),
in minutes on two CPU cores. The first line under a title is what the paper says, the
second what was measured: mean ± standard deviation over seeds, whichever way it fell.
Means that differ by less than two standard errors are within the noise, which of so few
seeds one in ten exceeds by chance; one test image is 0.28 %. A claim holds in part if not
all of its comparisons do. Nets of 22 layers and more without norms are half trained in
such minutes. Each command takes `--config=configs/cifar10_resnet20.py` for whoever
has CIFAR-10, `warmup` with `--config.batch_size=1024`.
This page is written by `python -m figures.gallery`.
"""


def section(title: str, name: str, command: str, text: str) -> str:
    """One figure of the page."""
    claim, verdict = text.strip().replace("+-", "±").split("\n")
    return (
        f"\n## {title}\n\n{claim}\n\n**{verdict}**\n\n`{command}`\n\n"
        f"![{title}](figures/{name}.png)\n"
    )


def _is_older(text: Path) -> bool:
    """Whether a verdict is not there, or older than one of the nets that it is of."""
    nets = (path.stat().st_mtime for path in text.parent.glob("*/metrics.jsonl"))
    return not text.exists() or text.stat().st_mtime < max(nets, default=math.inf)


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = ArgumentParser(prog="python -m figures.gallery", description=__doc__)
    parser.add_argument(
        "--runs", metavar="DIR", type=Path, default=Path("runs"), help="(default: runs)"
    )
    flags = parser.parse_args(arguments)
    page, folder = HEAD, DOCS / "figures"
    folder.mkdir(exist_ok=True)
    for name in tqdm([*COMPARISONS, *SCRIPTS], unit="figure", disable=None):
        if name in COMPARISONS:
            title, sweep, stem = COMPARISONS[name].title, name, "compare"
            words = ["resjax.sweep", name]
        else:
            title, sweep = SCRIPTS[name]
            words, stem = [f"figures.{name}"], name
        runs = flags.runs / f"sweep_{sweep}"
        if name in COMPARISONS or _is_older(runs / f"{stem}.txt"):
            done = subprocess.run([sys.executable, "-m", *words, f"--workdir={runs}"])
            if done.returncode:
                raise RunError(f"{' '.join(words)} ended with exit code {done.returncode}")
        for suffix in ("png", "csv"):
            shutil.copyfile(runs / f"{stem}.{suffix}", folder / f"{name}.{suffix}")
        if not (runs / f"{stem}.txt").exists():
            raise RunError(f"{' '.join(words)} came to no verdict; see {runs}")
        text = (runs / f"{stem}.txt").read_text()
        page += section(title, name, f"python -m {' '.join(words)}", text)
    (DOCS / "gallery.md").write_text(page)
    print(f"see {DOCS / 'gallery.md'}")
    return 0


if __name__ == "__main__":
    run_command(main)
