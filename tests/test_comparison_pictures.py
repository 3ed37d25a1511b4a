"""Pictures of made-up comparisons."""

import pytest
from conftest import ROOT
from test_comparisons import made_up

from resjax import comparison_pictures
from resjax.comparisons import COMPARISONS


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("name", ["minibatch", "bn"])
def test_a_picture_of_one_value_of_the_axis_is_by_epoch(name):
    rows = made_up(name, lambda config: 10)
    axis = COMPARISONS[name].axis
    first = rows[0].fields[axis]
    rows = [row for row in rows if row.fields.pop(axis) == first]
    assert comparison_pictures.draw(rows, COMPARISONS[name]).startswith(b"\x89PNG")


@pytest.mark.parametrize("name", ["depth", "minibatch", "bn"])
def test_pictures_are_drawn_with_or_without_an_axis(name):
    rows = made_up(name, lambda config: 10 + config.batch_size)
    assert comparison_pictures.draw(rows, COMPARISONS[name]).startswith(b"\x89PNG")
    assert comparison_pictures.draw(rows).startswith(b"\x89PNG")
