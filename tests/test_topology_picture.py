"""The losses of the README's second picture say what is written beside it."""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

FILE = Path(__file__).resolve().parent.parent / "docs" / "topology.csv"
ONE, STEPS = "1 device", 88


@pytest.fixture(scope="module")
def parted():
    """{code: {variant: largest relative deviation from one device}}."""
    losses = defaultdict(lambda: defaultdict(list))
    with FILE.open(newline="") as file:
        for row in csv.DictReader(file):
            curve = losses[row["code"]][row["variant"]]
            curve.append(float(row["loss"]))
            assert len(curve) == int(row["step"])
    assert {len(curve) for curves in losses.values() for curve in curves.values()} == {
        STEPS
    }
    return {
        code: {
            name: np.abs(np.divide(curve, curves[ONE]) - 1).max()
            for name, curve in curves.items()
            if name != ONE
        }
        for code, curves in losses.items()
    }


def test_resjax_curves_lie_on_each_other(parted):
    assert len(parted["resjax"]) == 5
    assert max(parted["resjax"].values()) < 1e-4


def test_only_other_statistics_part_the_flax_curves(parted):
    """Rounding parts them too, by far less."""
    rounding = {"2 devices", "8 devices"}
    for name, deviation in parted["flax"].items():
        assert deviation < 5e-3 if name in rounding else deviation > 0.03, name
