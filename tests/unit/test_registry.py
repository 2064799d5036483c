from __future__ import annotations

import importlib.metadata
import inspect
from collections.abc import Iterator

import pytest

from fewbit import registry
from fewbit.errors import RecipeError
from fewbit.registry import ROWS, Kind, find, kinds, rows
from fewbit.spec import Frozen
from fewbit.step import Step

EVERY = [(kind, name) for kind in ROWS for name in ROWS[kind]]


@pytest.fixture(autouse=True)
def fresh_rows() -> Iterator[None]:
    registry.rows.cache_clear()
    yield
    registry.rows.cache_clear()


def enter(monkeypatch: pytest.MonkeyPatch, **points: str) -> None:
    """Let other packages enter rows: name with "__" for the dot -> value."""
    given = [
        importlib.metadata.EntryPoint(name.replace("__", "."), value, "fewbit.methods")
        for name, value in points.items()
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: given if "methods" in group else [])


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_each_row_is_a_class_with_a_docstring(kind: Kind, name: str) -> None:
    found = find(kind, name)
    assert inspect.isclass(found)
    assert found.__doc__
    assert issubclass(found, {"steps": Step, "engines": object}.get(kind, Frozen))


def test_every_kind_has_rows() -> None:
    assert set(kinds()) == set(ROWS) and all(ROWS.values())


def test_an_unknown_name_is_told_with_the_nearest_and_what_there_is() -> None:
    with pytest.raises(RecipeError) as caught:
        find("ranges", "minmaks")
    assert str(caught.value) == (
        f"ranges: no 'minmaks' (did you mean 'minmax'?); there are {', '.join(ROWS['ranges'])}"
    )


def test_another_package_adds_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, ranges__theirs="fewbit.ranges.minmax:MinMax", steps__other="fewbit.step:Step")
    assert rows("ranges")["theirs"] == "fewbit.ranges.minmax:MinMax"
    assert find("ranges", "theirs") is find("ranges", "minmax")
    assert "theirs" not in rows("steps") and "other" in rows("steps")


def test_another_package_does_not_take_the_place_of_our_row(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, ranges__minmax="fewbit.ranges.mse:MSE")
    assert find("ranges", "minmax").__name__ == "MinMax"


@pytest.mark.parametrize("value", ["no_such_package:Thing", "fewbit.ranges.minmax:Thing"])
def test_a_row_of_another_package_that_is_broken_is_told(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    enter(monkeypatch, ranges__theirs=value)
    with pytest.raises(RecipeError, match=r"ranges: 'theirs' comes from another package and cannot be imp"):
        find("ranges", "theirs")


def test_the_group_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    enter(monkeypatch, ranges__theirs="fewbit.ranges.minmax:MinMax")
    assert "theirs" in rows("ranges")
    enter(monkeypatch)
    assert "theirs" in rows("ranges")
