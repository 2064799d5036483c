"""The tree of errors that fewbit raises.

Every message is one line that says which object (by name), what came, what is allowed and what to do next::

    FewbitError
    |-- InputError              the user's input cannot be used; the command exits with 2
    |   |-- CardError           a network card or an option in its place
    |   |-- DataError           images, labels, archives
    |   |-- NetworkError        a model, its weights, its capture
    |   |-- ModelFileError      an .onnx file
    |   |-- RecipeError         a recipe, a scheme, a step out of order
    |   |-- BudgetError         an error budget that does not parse
    |   |-- OutputError         a place that cannot be written
    |   `-- JournalError        a journal of another network, data or version
    `-- EngineError             an engine failed; it costs one trial, not the search
        |-- EngineCrashed       its process died
        `-- EngineHung          its process did not answer in time
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

_NEAR = 0.6


class FewbitError(Exception):
    """Any error that fewbit raises on purpose."""


class InputError(FewbitError):
    """The user's input cannot be used."""


class CardError(InputError):
    """A network card, or an option in its place, is wrong."""


class DataError(InputError):
    """Images, labels or an archive of them cannot be used."""


class NetworkError(InputError):
    """A model, its weights or its capture cannot be used."""


class ModelFileError(InputError):
    """An ONNX file cannot be used."""


class RecipeError(InputError):
    """A recipe or scheme cannot be used, or a step came out of order."""


class BudgetError(InputError):
    """A budget does not parse."""


class OutputError(InputError):
    """A place to write to cannot be written."""


class JournalError(InputError):
    """A journal belongs to another network, other data or another version."""


class EngineError(FewbitError):
    """An engine refused or failed; it costs one trial, not the search."""


class EngineCrashed(EngineError):
    """The process of an engine died."""


class EngineHung(EngineError):
    """The process of an engine did not answer in time."""


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " (did you mean 'x'?)" for the nearest known word (the first of equals), or an empty text.

    >>> suggest("weigths", ["weights", "source"])
    " (did you mean 'weights'?)"
    >>> suggest("zzz", ["weights"])
    ''
    """
    scored = [(difflib.SequenceMatcher(None, other, word).ratio(), other) for other in known]
    score, near = max(scored, key=lambda pair: pair[0], default=(0.0, ""))
    return f" (did you mean '{near}'?)" if score >= _NEAR else ""


def first_line(reason: BaseException) -> str:
    """Return the first line of another library's message without its full stop, or the name of its class.

    >>> first_line(ValueError("too long."))
    'too long'
    >>> first_line(EOFError())
    'EOFError'
    """
    lines = str(reason).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(reason).__name__
