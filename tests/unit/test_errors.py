from __future__ import annotations

import inspect

import pytest

from fewbit import errors
from fewbit.errors import EngineError, FewbitError, InputError, suggest

CLASSES = [
    value for value in vars(errors).values() if inspect.isclass(value) and issubclass(value, FewbitError)
]


@pytest.mark.parametrize("error", CLASSES, ids=lambda error: error.__name__)
def test_each_error_is_on_the_tree_with_its_exit_code(error: type[FewbitError]) -> None:
    if error is FewbitError:
        return
    assert issubclass(error, InputError) != issubclass(error, EngineError)
    assert f"-- {error.__name__} " in (errors.__doc__ or "")


def test_an_engine_error_is_no_input_error() -> None:
    assert not issubclass(errors.EngineCrashed, InputError)
    assert issubclass(errors.EngineHung, EngineError)


@pytest.mark.parametrize(
    ("word", "known", "expected"),
    [
        ("weigths", ["weights", "source"], " (did you mean 'weights'?)"),
        ("minmax2", ["minmax", "mse"], " (did you mean 'minmax'?)"),
        ("zzz", ["weights"], ""),
        ("top-drop", ["top1-drop", "top5-drop"], " (did you mean 'top1-drop'?)"),
        ("top-drop", ["top5-drop", "top1-drop"], " (did you mean 'top5-drop'?)"),
        ("", ["weights"], ""),
        ("x", [], ""),
    ],
)
def test_suggest_names_the_nearest_word_or_nothing(word: str, known: list[str], expected: str) -> None:
    assert suggest(word, known) == expected


def test_suggest_takes_any_iterable_once() -> None:
    assert suggest("colour", iter(["color", "size"])) == " (did you mean 'color'?)"
